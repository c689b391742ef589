"""Decode and prefill speed of every layout, on twins with the width of a DeepSeek model, interleaved in one run.

A twin has two layers and a reduced vocabulary, so that the head's share of the time is about that of the whole model.
The twin of V2-Lite has one dense and one MoE layer; its dense intermediate size is 11008 instead of 10944, a multiple
of 128. The twin of DeepSeek-LLM-7B has two dense layers. Steps are those of `quantlab.runtime.decode`. Layouts are
timed in turn, step by step, so that other load on the machine affects them equally. A ratio is the median of the ratios
within a turn, to the faster of float16 and bfloat16.

    python tests/benchmarks/decode_twin.py --width v2-lite --rounds 30 --out eval/results/cpu-decode
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from quantlab.formats.compressed_tensors import QuantizationConfig
from quantlab.recipe.schemes import SCHEMES, SchemeName
from quantlab.runtime.decode import Decoder
from quantlab.runtime.inventory import weight_bytes
from quantlab.runtime.native.library import status
from quantlab.runtime.twin import random_twin
from tests.checkpoints import all_linears

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
LLM_7B: Mapping[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "intermediate_size": 11008,
    "vocab_size": 6848,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
WIDTHS = {"v2-lite": V2_LITE, "llm-7b": LLM_7B}
TARGETS = {"decode, batch 1": {"int4": 2.2, "int8": 1.5}, "prefill 128": {"int4": 0.8, "int8": 0.8}}
IGNORE = ("lm_head", r"re:.*mlp\.gate$", r"re:.*self_attn\.kv_b_proj$")
LAYOUTS: Mapping[str, tuple[torch.dtype, SchemeName | None]] = {
    "fp16": (torch.float16, None),
    "bf16": (torch.bfloat16, None),
    "int8 (W8A8)": (torch.float16, "int8"),
    "int8-bf16 (W8A8, bfloat16 activations between)": (torch.bfloat16, "int8"),
    "int8_weight (W8A16)": (torch.float16, "int8_weight"),
    "int4_g128 (W4A16)": (torch.float16, "int4_g128"),
    "int4_g128-bf16 (W4A16)": (torch.bfloat16, "int4_g128"),
}
KEYS = tuple(name.split()[0].rstrip(",") for name in LAYOUTS)


def quantization(scheme: SchemeName | None) -> QuantizationConfig | None:
    """Every linear except the head, the router and kv_b under one scheme."""
    return None if scheme is None else all_linears(SCHEMES[scheme], IGNORE)


def decoder(model: PreTrainedModel, *, batch: int, prompt: int) -> Callable[[], float]:
    """A function that decodes one token per sequence after `prompt` tokens and returns the seconds."""
    tokens = torch.randint(0, model.config.vocab_size, (batch, prompt), generator=torch.Generator().manual_seed(batch))
    steps = Decoder(model, batch=batch, length=prompt + 1)
    steps.prefill(tokens)

    def run() -> float:
        start = time.perf_counter()
        steps.step(tokens[:, :1])
        seconds = time.perf_counter() - start
        steps.rewind(prompt)
        return seconds

    return run


def prefiller(model: PreTrainedModel, *, length: int) -> Callable[[], float]:
    """A function that reads a prompt of `length` tokens and returns the seconds."""
    tokens = torch.randint(0, model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))

    def run() -> float:
        start = time.perf_counter()
        model(input_ids=tokens, use_cache=False, logits_to_keep=1)
        return time.perf_counter() - start

    return run


def interleaved(runs: Mapping[str, Callable[[], float]], *, rounds: int) -> dict[str, list[float]]:
    """Seconds of every run in every round, timed in turn; the first two rounds are warm-up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(rounds + 2):
        for name, run in runs.items():
            seconds = run()
            if index >= 2:
                times[name].append(seconds)
    return times


def measured(models: Mapping[str, PreTrainedModel], *, rounds: int, prompt: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of every layout in every round, by task."""
    found: dict[str, dict[str, list[float]]] = {}
    with torch.inference_mode():
        for batch in (1, 8):
            runs = {name: decoder(model, batch=batch, prompt=prompt) for name, model in models.items()}
            found[f"decode, batch {batch}"] = interleaved(runs, rounds=rounds)
        runs = {name: prefiller(model, length=128) for name, model in models.items()}
        found["prefill 128"] = interleaved(runs, rounds=max(rounds // 3, 5))
    return found


def summary(
    models: Mapping[str, PreTrainedModel], found: Mapping[str, Mapping[str, list[float]]]
) -> list[dict[str, Any]]:
    """One row per layout: bytes, and per task milliseconds and the ratio to the faster 16-bit layout."""
    rows = []
    for name, model in models.items():
        held = weight_bytes(model)
        share = 100 * held.quantized / held.quantized_fp16 if held.quantized else None
        row: dict[str, Any] = {"layout": name, "weights_bytes": held.total, "quantized_percent_of_fp16": share}
        for task, times in found.items():
            baseline = min(
                (layout for layout in times if layout in ("fp16", "bf16")), key=lambda b: statistics.median(times[b])
            )
            ratios = [first / mine for first, mine in zip(times[baseline], times[name], strict=True)]
            row[task] = {
                "milliseconds": 1e3 * statistics.median(times[name]),
                "best_milliseconds": 1e3 * min(times[name]),
                "baseline": baseline,
                "ratio": statistics.median(ratios),
                "ratio_quartiles": statistics.quantiles(ratios, n=4)[::2],
            }
        rows.append(row)
    return rows


def conditions(width: str, *, rounds: int, prompt: int, load: tuple[float, ...]) -> dict[str, Any]:
    """The conditions of the measurement."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    return {
        "width": width,
        "rounds": rounds,
        "tokens_in_cache": prompt,
        "threads": torch.get_num_threads(),
        "kernels": status(),
        "cpu": cpu or platform.processor(),
        "torch": torch.__version__,
        "load_average_before": load,
        "load_average_after": os.getloadavg(),
    }


def best_of(rows: list[dict[str, Any]], task: str) -> float:
    """Milliseconds of the fastest 16-bit layout."""
    return min(float(row[task]["best_milliseconds"]) for row in rows if row["layout"] in ("fp16", "bf16"))


def as_markdown(results: Mapping[str, Any]) -> str:
    """A table per width."""
    lines = [
        "# Decode and prefill on the CPU",
        "",
        "Written by `tests/benchmarks/decode_twin.py`; ms per step, the ratio to",
    ]
    lines += [
        "the faster of float16 and bfloat16 with its quartiles over turns; behind it the fastest step of all turns, and its ratio to"
    ]
    lines += ["the fastest of the 16-bit layouts: what is left where other work disturbs most turns.", ""]
    for width, result in results.items():
        under, rows = result["conditions"], result["rows"]
        tasks = [key for key, value in rows[0].items() if isinstance(value, dict)]
        before, after = ("/".join(f"{x:.1f}" for x in under[f"load_average_{when}"]) for when in ("before", "after"))
        lines += [f"## {width}", ""]
        lines += [
            f"{under['cpu']}, {under['threads']} threads, {under['kernels']}, torch {under['torch']}; {under['rounds']} turns,"
        ]
        lines += [f"{under['tokens_in_cache']} tokens in the cache; load average before {before}, after {after}.", ""]
        lines += [
            "| layout | weights MB | quantized % of FP16 | " + " | ".join(tasks) + " |",
            "|---" * (3 + len(tasks)) + "|",
        ]
        for row in rows:
            share = row["quantized_percent_of_fp16"]
            cells = [row["layout"], f"{row['weights_bytes'] / 1e6:.0f}", f"{share:.2f}" if share else "–"]
            for task in tasks:
                one = row[task]
                low, high = one["ratio_quartiles"]
                undisturbed = f"{one['best_milliseconds']:.1f}, {best_of(rows, task) / one['best_milliseconds']:.2f}x"
                cells.append(f"{one['milliseconds']:.1f} ({one['ratio']:.2f}x; {low:.2f} … {high:.2f}); {undisturbed}")
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
        for task, wanted in TARGETS.items():
            for kind, least in wanted.items():
                each = [
                    f"{row['layout']} {row[task]['ratio']:.2f}x" + ("" if row[task]["ratio"] >= least else " (missed)")
                    for row in rows
                    if row["layout"].startswith(kind)
                ]
                if each:
                    lines.append(f"- {task}, {kind}, target {least}x: " + ", ".join(each))
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", choices=WIDTHS, default="v2-lite", help="the model whose width the twin has")
    parser.add_argument("--rounds", type=int, default=30, help="timed steps of each layout (prefill: a third of it)")
    parser.add_argument("--prompt", type=int, default=32, help="tokens in the cache when decoding starts")
    parser.add_argument("--threads", type=int, default=None, help="torch threads (default: torch's own choice)")
    parser.add_argument("--layouts", nargs="+", choices=KEYS, default=None, help="only these; fp16 and bf16 always")
    parser.add_argument("--out", type=Path, default=None, help="add the results to OUT.json and OUT.md")
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    wanted = set(arguments.layouts or KEYS) | {"fp16", "bf16"}
    load = os.getloadavg()
    models = {
        name: random_twin(WIDTHS[arguments.width], quantization(scheme), dtype=dtype, seed=0)
        for key, (name, (dtype, scheme)) in zip(KEYS, LAYOUTS.items(), strict=True)
        if key in wanted
    }
    rows = summary(models, measured(models, rounds=arguments.rounds, prompt=arguments.prompt))
    under = conditions(arguments.width, rounds=arguments.rounds, prompt=arguments.prompt, load=load)
    results = {arguments.width: {"conditions": under, "rows": rows}}
    if arguments.out is not None:
        file = arguments.out.with_suffix(".json")
        results = (json.loads(file.read_text()) if file.is_file() else {}) | results
        file.write_text(json.dumps(results, indent=1) + "\n")
        arguments.out.with_suffix(".md").write_text(as_markdown(results))
    print(as_markdown({arguments.width: results[arguments.width]}))


if __name__ == "__main__":
    main()
