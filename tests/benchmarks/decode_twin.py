"""Decode and prefill speed of every layout on a twin at DeepSeek-V2-Lite's width, all layouts interleaved in one run.

The twin has one dense and one MoE layer and a vocabulary of 7680, about the share of the head that two of 27 layers
carry. The dense intermediate size is 11008 instead of 10944 so that groups of 128 divide it. Layouts take turns, step by
step, so that what else the machine does meets all of them alike; a ratio is the median of ratios within a turn.

    python tests/benchmarks/decode_twin.py --rounds 30
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache, PreTrainedModel

from quantlab.formats.compressed_tensors import QuantizationConfig
from quantlab.recipe.schemes import SCHEMES, SchemeName
from quantlab.runtime.account import weight_bytes
from quantlab.runtime.native.library import status
from quantlab.runtime.twin import random_twin

V2_LITE: Mapping[str, Any] = {
    "model_type": "deepseek_v2",
    "architectures": ["DeepseekV2ForCausalLM"],
    "hidden_size": 2048,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "intermediate_size": 11008,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "vocab_size": 7680,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
IGNORE = ("lm_head", r"re:.*mlp\.gate$", r"re:.*self_attn\.kv_b_proj$")
LAYOUTS: Mapping[str, tuple[torch.dtype, SchemeName | None]] = {
    "fp16": (torch.float16, None),
    "bf16": (torch.bfloat16, None),
    "int8 (W8A8)": (torch.float16, "int8"),
    "int8, bf16 activations": (torch.bfloat16, "int8"),
    "int8_weight (W8A16)": (torch.float16, "int8_weight"),
    "int4_g128 (W4A16)": (torch.float16, "int4_g128"),
    "int4_g128, bf16 activations": (torch.bfloat16, "int4_g128"),
}


def quantization(scheme: SchemeName | None) -> QuantizationConfig | None:
    """Every linear except the head, the router and kv_b under one scheme."""
    return None if scheme is None else QuantizationConfig(((("Linear",), SCHEMES[scheme]),), IGNORE)


def decoder(model: PreTrainedModel, *, batch: int, prompt: int) -> Callable[[], float]:
    """A call that decodes one token per sequence at the length `prompt` and returns its seconds."""
    tokens = torch.randint(0, V2_LITE["vocab_size"], (batch, prompt), generator=torch.Generator().manual_seed(batch))
    cache = DynamicCache(config=model.config)
    model(input_ids=tokens, past_key_values=cache, use_cache=True)
    step = tokens[:, :1]

    def run() -> float:
        start = time.perf_counter()
        model(input_ids=step, past_key_values=cache, use_cache=True)
        seconds = time.perf_counter() - start
        cache.crop(-1)
        return seconds

    return run


def prefiller(model: PreTrainedModel, *, length: int) -> Callable[[], float]:
    """A call that reads a prompt of `length` tokens and returns its seconds."""
    tokens = torch.randint(0, V2_LITE["vocab_size"], (1, length), generator=torch.Generator().manual_seed(0))

    def run() -> float:
        start = time.perf_counter()
        model(input_ids=tokens, use_cache=False, logits_to_keep=1)
        return time.perf_counter() - start

    return run


def interleaved(runs: Mapping[str, Callable[[], float]], *, rounds: int) -> dict[str, list[float]]:
    """Seconds of each run, taken in turns; the first two rounds warm up and do not count."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(rounds + 2):
        for name, run in runs.items():
            seconds = run()
            if index >= 2:
                times[name].append(seconds)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30, help="timed steps of each layout (prefill: a third of it)")
    parser.add_argument("--prompt", type=int, default=32, help="tokens in the cache when decoding starts")
    parser.add_argument("--threads", type=int, default=None, help="torch threads (default: torch's own choice)")
    parser.add_argument(
        "--layouts",
        nargs="+",
        choices=[name.split()[0].rstrip(",") for name in LAYOUTS],
        default=None,
        help="only these",
    )
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    chosen = {
        name: layout
        for name, layout in LAYOUTS.items()
        if arguments.layouts is None or name.split()[0].rstrip(",") in arguments.layouts
    }
    models = {
        name: random_twin(V2_LITE, quantization(scheme), dtype=dtype, seed=0)
        for name, (dtype, scheme) in chosen.items()
    }
    baseline = next(iter(models))
    columns: dict[str, dict[str, list[float]]] = {}
    with torch.inference_mode():
        for batch in (1, 8):
            runs = {name: decoder(model, batch=batch, prompt=arguments.prompt) for name, model in models.items()}
            columns[f"decode, batch {batch}"] = interleaved(runs, rounds=arguments.rounds)
        runs = {name: prefiller(model, length=128) for name, model in models.items()}
        columns["prefill 128"] = interleaved(runs, rounds=max(arguments.rounds // 3, 1))
    table = Table(
        title=f"V2-Lite width, 1 dense + 1 MoE layer, {arguments.prompt} tokens in the cache, {torch.get_num_threads()} threads, "
        f"{status()}, ms (ratio to {baseline}; best step)"
    )
    for heading in ("layout", "weights MB", "quantized % of fp16", *columns):
        table.add_column(heading, justify="left" if heading == "layout" else "right")
    for name, model in models.items():
        held = weight_bytes(model)
        cells = [
            name,
            f"{held.total / 1e6:.0f}",
            f"{100 * held.quantized / held.quantized_fp16:.2f}" if held.quantized else "–",
        ]
        for times in columns.values():
            median = statistics.median(times[name])
            ratio = statistics.median(first / mine for first, mine in zip(times[baseline], times[name], strict=True))
            cells.append(f"{1e3 * median:.1f} ({ratio:.2f}x; {1e3 * min(times[name]):.1f})")
        table.add_row(*cells)
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
