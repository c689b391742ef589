"""Whole models on a GPU, decoding in captured steps: python tests/benchmarks/cuda_models.py [--models …] [--out PREFIX]

Random weights at the true width of a model, from a cache of `PROMPT` tokens. Each scheme is timed interleaved with two
baselines in
BF16: transformers' own steps, captured, and the fused steps that the packed schemes use too. The report adds the bytes
that a step has to read (all weights except the embeddings; of routed experts those that the tokens hit, which are
nearly the same for every scheme) and the times of the kernels of one step, longest first.
"""

import argparse
import gc
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parent))
from cuda_timing import copy_rate, hardware

from quantlab.formats.compressed_tensors import QuantizationConfig
from quantlab.recipe.schemes import SCHEMES, SchemeName
from quantlab.runtime.decode import Decoder
from quantlab.runtime.inventory import weight_bytes
from quantlab.runtime.modules.experts import Experts
from quantlab.runtime.twin import random_twin
from tests.checkpoints import all_linears

COMMON: Mapping[str, Any] = {
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
MLA: Mapping[str, Any] = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
MODELS: Mapping[str, Mapping[str, Any]] = {
    "DeepSeek-LLM-7B": {
        **COMMON,
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 30,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 102400,
    },
    "DeepSeek-V2-Lite": {
        **COMMON,
        **MLA,
        "model_type": "deepseek_v2",
        "architectures": ["DeepseekV2ForCausalLM"],
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 27,
        "first_k_dense_replace": 1,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "q_lora_rank": None,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "vocab_size": 102400,
    },
    "DeepSeek-V3, 4 layers": {
        **COMMON,
        **MLA,
        "model_type": "deepseek_v3",
        "architectures": ["DeepseekV3ForCausalLM"],
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 4,
        "first_k_dense_replace": 3,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "vocab_size": 129280,
    },
}
INT4: Mapping[str, SchemeName] = {"DeepSeek-V2-Lite": "int4_g64"}  # 128 does not divide its 10944
IGNORE = ("lm_head", r"re:.*mlp\.gate$", r"re:.*self_attn\.kv_b_proj$")
BATCHES = (1, 16)
PROMPT = 128
STEPS = 16
ROUNDS = 9


def quantization(scheme: SchemeName) -> QuantizationConfig:
    """Every linear except the head, the router and kv_b under one scheme."""
    return all_linears(SCHEMES[scheme], IGNORE)


def twin(name: str, scheme: SchemeName | None) -> torch.nn.Module:
    """A model with random weights."""
    chosen = None if scheme is None else quantization(scheme)
    return random_twin(MODELS[name], chosen, dtype=torch.bfloat16, seed=0, device="cuda")


def filled(model: torch.nn.Module, *, fuse: bool) -> dict[int, Decoder]:
    """A decoder for every batch size, with a filled cache and a captured step."""
    decoders = {}
    for batch in BATCHES:
        ids = torch.randint(1000, (batch, PROMPT), generator=torch.Generator().manual_seed(batch))
        decoders[batch] = Decoder(model, batch=batch, length=PROMPT + STEPS, fuse=fuse)
        decoders[batch].prefill(ids)
        timed(decoders[batch])
    return decoders


def some_tokens(batch: int) -> torch.Tensor:
    """[B, 1], a different token for each sequence, so that experts are hit as by different texts."""
    return torch.randint(1000, (batch, 1), generator=torch.Generator().manual_seed(0)).cuda()


def timed(decoder: Decoder) -> float:
    """Microseconds per step, averaged over `STEPS` - 1 steps."""
    tokens = some_tokens(decoder.batch)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    decoder.step(tokens)
    start.record()
    for _ in range(STEPS - 1):
        decoder.step(tokens)
    stop.record()
    stop.synchronize()
    decoder.rewind(PROMPT)
    return start.elapsed_time(stop) * 1e3 / (STEPS - 1)


def kernels(decoder: Decoder) -> list[dict[str, Any]]:
    """The kernels of one step, longest first: name, launches, microseconds."""
    tokens = some_tokens(decoder.batch)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(4):
            decoder.step(tokens)
        torch.cuda.synchronize()
    decoder.rewind(PROMPT)
    total: dict[str, list[float]] = defaultdict(list)
    for event in recorded.events():
        total[event.name[:90]].append(event.device_time)
    found = [
        {"kernel": name, "launches": len(times) / 4, "microseconds": round(sum(times) / 4, 1)}
        for name, times in total.items()
    ]
    return sorted(found, key=lambda line: -float(line["microseconds"]))


@torch.inference_mode()
def bytes_of_a_step(model: torch.nn.Module, batch: int) -> float:
    """Bytes of weights that one step reads; of routed experts those that `some_tokens` hit without a context."""
    total = float(weight_bytes(model).total) - model.model.embed_tokens.weight.nbytes
    shares: list[float] = []
    hooks = [
        module.register_forward_pre_hook(lambda its, args: shares.append(args[1].unique().numel() / its.num_experts))
        for module in model.modules()
        if isinstance(module, Experts)
    ]
    model(input_ids=some_tokens(batch))
    for hook in hooks:
        hook.remove()
    experts = [weight_bytes(module).total for module in model.modules() if isinstance(module, Experts)]
    return total - sum(held * (1 - share) for held, share in zip(experts, shares, strict=True))


def measured(name: str) -> list[dict[str, Any]]:
    """Measurements of all schemes of one model."""
    baseline = twin(name, None)
    plain, fused = (filled(baseline, fuse=fuse) for fuse in (False, True))
    lines = []
    for side in ("transformers", None, INT4.get(name, "int4_g128"), "int8", "int8_weight"):
        model = baseline if side in {"transformers", None} else twin(name, side)
        others = plain if side == "transformers" else fused if side is None else filled(model, fuse=True)
        held = weight_bytes(model)
        for batch in BATCHES:
            times: dict[str, list[float]] = defaultdict(list)
            for _ in range(ROUNDS):
                for of, decoders in (("plain", plain), ("fused", fused), ("ours", others)):
                    times[of].append(timed(decoders[batch]))
            microseconds = statistics.median(times["ours"])
            ratios = {of: [b / a for a, b in zip(times["ours"], times[of], strict=True)] for of in ("plain", "fused")}
            read = bytes_of_a_step(model, batch)
            lines.append(
                {
                    "model": name,
                    "weights": {"transformers": "bfloat16, transformers' step", None: "bfloat16"}.get(side, side),
                    "batch": batch,
                    "microseconds": round(microseconds, 1),
                    **{f"over_{of}": round(statistics.median(each), 3) for of, each in ratios.items()},
                    **{
                        f"quartiles_{of}": [round(q, 3) for q in statistics.quantiles(each, n=4)[::2]]
                        for of, each in ratios.items()
                    },
                    "weights_bytes": held.total,
                    "quantized_percent_of_fp16": held.quantized and 100 * held.quantized / held.quantized_fp16,
                    "bytes_of_a_step": round(read),
                    "terabytes_per_second": round(read / microseconds / 1e6, 3),
                    "kernels": kernels(others[batch])[:14],
                }
            )
            print(name, row(lines[-1]), flush=True)
        del model, others
        gc.collect()
        torch.cuda.empty_cache()
    return lines


def row(line: Mapping[str, Any]) -> str:
    """A row of the table."""
    share = line["quantized_percent_of_fp16"]
    ratios = (
        f"{line[f'over_{of}']:.2f} ({line[f'quartiles_{of}'][0]:.2f} … {line[f'quartiles_{of}'][1]:.2f})"
        for of in ("plain", "fused")
    )
    return (
        f"| {line['weights']} | {line['batch']} | {line['microseconds'] / 1e3:.2f} | {' | '.join(ratios)} "
        f"| {line['weights_bytes'] / 1e9:.2f} | {f'{share:.1f}' if share else '–'} | {line['bytes_of_a_step'] / 1e9:.2f} "
        f"| {line['terabytes_per_second']:.2f} |"
    )


def as_markdown(lines: list[dict[str, Any]], head: str) -> str:
    """A table per model, and the times of the kernels of its steps."""
    text = ["# Whole models decoding on one GPU", "", "Written by `tests/benchmarks/cuda_models.py`. " + head, ""]
    for name in dict.fromkeys(line["model"] for line in lines):
        of_model = [line for line in lines if line["model"] == name]
        text += [f"## {name}", ""]
        text += [
            "| weights | batch | ms per step | × BF16, transformers' step (quartiles) | × BF16, fused | GB | quantized % of FP16 | GB per step | TB/s |"
        ]
        text += ["|---|--:|--:|--:|--:|--:|--:|--:|--:|", *(row(line) for line in of_model), ""]
        text += [
            "Kernels of a step at batch 1, in µs (launches); launches overlap, and the time of one includes its wait for the one before:",
            "",
        ]
        for line in of_model:
            if line["batch"] == 1:
                each = (
                    f"{k['kernel'][:44]} {k['microseconds']:.0f} ({k['launches']:.0f})" for k in line["kernels"][:7]
                )
                text += [f"- {line['weights']}: " + "; ".join(f"`{one}`" for one in each)]
        text += [""]
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=tuple(MODELS), help="which models")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    options = parser.parse_args()
    rate = copy_rate()
    torch.cuda.empty_cache()
    head = (
        f"{hardware()}; device copy {rate:.2f} TB/s. Random weights, bfloat16 activations, {PROMPT} tokens in the cache, "
        f"captured steps, medians of {ROUNDS} turns of {STEPS - 1} steps; embeddings, head, router and kv_b are not quantized."
    )
    lines: list[dict[str, Any]] = []
    for name in options.models:
        lines += measured(name)
        if options.out is not None:
            data = {"hardware": hardware(), "copy_terabytes_per_second": rate, "lines": lines}
            options.out.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n")
            options.out.with_suffix(".md").write_text(as_markdown(lines, head))
    print(as_markdown(lines, head))


if __name__ == "__main__":
    main()
