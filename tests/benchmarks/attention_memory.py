"""Memory that a long context takes beyond the weights, by attention implementation.

`quantlab.evaluation.memory.attention` measures one sequence with contexts of 2k, 8k and 32k tokens: peak memory above
the weights while the context is read and while one more token is decoded. This script runs it for an MLA model and a
dense model without a recipe: on the CPU with small layers and one process per combination, on CUDA with layers of the
models' true widths.

    python tests/benchmarks/attention_memory.py --out eval/results/attention-memory-cpu
    python tests/benchmarks/attention_memory.py --device cuda --out eval/results/attention-memory-cuda
"""

import argparse
import gc
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from quantlab.evaluation.memory.attention import Case, measure_case
from quantlab.evaluation.record import AttentionCell
from quantlab.evaluation.speed.models import Layout
from quantlab.runtime.device import find_device
from quantlab.runtime.modules.attention import IMPLEMENTATIONS

CONTEXTS = (2048, 8192, 32768)
LAYOUT = Layout("bfloat16", None)
COMMON: Mapping[str, Any] = {"max_position_embeddings": max(CONTEXTS) + 8, "vocab_size": 1024, "rms_norm_eps": 1e-6}
LATENT: Mapping[str, Any] = {
    "model_type": "deepseek_v3",
    "n_routed_experts": 8,
    "moe_intermediate_size": 128,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
}
SMALL: Mapping[str, Mapping[str, Any]] = {
    "MLA": {
        **COMMON,
        **LATENT,
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 256,
        "kv_lora_rank": 128,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
    },
    "dense": {
        **COMMON,
        "model_type": "llama",
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    },
}
TRUE: Mapping[str, Mapping[str, Any]] = {
    "MLA": {
        **COMMON,
        **LATENT,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
    },
    "dense": {
        **COMMON,
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
}


def config_of(shape: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """The config with all layers dense, so that experts take no memory."""
    return {**shape, "num_hidden_layers": layers, "first_k_dense_replace": layers}


def in_a_child(config: Mapping[str, Any], case: Case, device: torch.device) -> AttentionCell:
    """Run `attempt` in a forked process, to measure its own peak memory."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        with os.fdopen(writing, "w") as answers:
            answers.write(measure_case(config, LAYOUT, case, device).cell.model_dump_json())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answers:
        text = answers.read()
    _, status = os.waitpid(child, 0)
    if text:
        return AttentionCell.model_validate_json(text)
    reason = f"ended with {os.waitstatus_to_exitcode(status)}"
    return AttentionCell(implementation=case.implementation, context=case.context, reason=reason)


def as_markdown(result: Mapping[str, Any]) -> str:
    """A table per kind of attention; a cell gives the peaks of prefill and of a decode step, and the cache, in MB."""
    lines = [
        f"# Memory of a long context on {result['hardware']}",
        "",
        "Written by `tests/benchmarks/attention_memory.py`.",
    ]
    lines += [
        f"{result['layers']} layers, bfloat16, torch {result['torch']}; MB above the weights: peak of reading the context"
    ]
    lines += ["(of decoding one token after it), in brackets what the cache holds.", ""]
    for kind in dict.fromkeys(row["kind"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["kind"] == kind]
        contexts = list(dict.fromkeys(row["context"] for row in rows))
        lines += [f"## {kind}", "", "| attention | " + " | ".join(f"{c:,} tokens" for c in contexts) + " |"]
        lines += ["|---" * (1 + len(contexts)) + "|"]
        for name in dict.fromkeys(row["attention"] for row in rows):
            cells = [cell(row) for row in rows if row["attention"] == name]
            lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def cell(row: Mapping[str, Any]) -> str:
    """Text of one measurement."""
    if "reason" in row:
        return str(row["reason"])
    decode = f" ({row['decode_peak_bytes'] / 1e6:,.0f})" if "decode_peak_bytes" in row else ""
    return f"{row['prefill_peak_bytes'] / 1e6:,.0f}{decode} [{row['cache_bytes'] / 1e6:,.1f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1")
    parser.add_argument("--layers", type=int, default=None, help="default: 1 on the CPU, 2 on CUDA")
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS, help="tokens")
    parser.add_argument("--implementations", nargs="+", choices=IMPLEMENTATIONS, default=IMPLEMENTATIONS)
    parser.add_argument("--out", type=Path, default=None, help="write OUT.json and OUT.md")
    arguments = parser.parse_args()
    device = find_device(arguments.device)
    cuda = device.type == "cuda"
    layers = arguments.layers or (2 if cuda else 1)
    for name in ("DeepseekV3ForCausalLM", "LlamaForCausalLM"):
        getattr(transformers, name)  # imported once, for all children
    rows = []
    for kind, shape in (TRUE if cuda else SMALL).items():
        for implementation in arguments.implementations:
            for context in arguments.contexts:
                config, case = config_of(shape, layers), Case(implementation, context)
                found = measure_case(config, LAYOUT, case, device).cell if cuda else in_a_child(config, case, device)
                gc.collect()
                if cuda:
                    torch.cuda.empty_cache()
                told = found.model_dump(exclude_defaults=True, exclude={"implementation", "noise"})
                rows.append({"kind": kind, "attention": implementation} | told)
                print(kind, implementation, context, cell(rows[-1]), flush=True)
    hardware = torch.cuda.get_device_name(device) if cuda else f"the CPU ({platform.machine()}, small widths)"
    result = {"hardware": hardware, "torch": torch.__version__, "layers": layers, "rows": rows}
    text = as_markdown(result)
    if arguments.out is not None:
        arguments.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        arguments.out.with_suffix(".md").write_text(text)
    print("\n" + text)


if __name__ == "__main__":
    main()
