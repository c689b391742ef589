"""What reading a long context takes beyond the weights, by implementation of attention.

Every implementation reads a context of 2k, 8k and 32k tokens, one sequence, into a cache, and then decodes one token. What
counts is the peak of memory above the weights, the cache included: on the CPU the growth of the resident size of a process
of its own, on CUDA what torch's allocator held at most. `quantlab_latent_sdpa` is the runtime's own: of MLA its cache holds
latents under every implementation, but it alone decodes without expanding them. What cannot fit is not tried: the scores of
`eager` are heads x context x context.

On the CPU the layers are small, on CUDA as wide as the models'.

    python tests/benchmarks/attention_memory.py --out eval/results/attention-memory-cpu
    python tests/benchmarks/attention_memory.py --device cuda --out eval/results/attention-memory-cuda
"""

import argparse
import gc
import json
import os
import platform
import resource
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import DynamicCache

from quantlab.errors import QuantlabError
from quantlab.runtime.account import weight_bytes
from quantlab.runtime.attention import IMPLEMENTATIONS
from quantlab.runtime.device import find_device, free_bytes
from quantlab.runtime.twin import random_twin

CONTEXTS = (2048, 8192, 32768)
BYTES_PER_SCORE = 12
"""What eager holds per score at once: 16-bit scores, masked scores and weights, float32 softmax."""
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
    """All layers dense, so that experts add nothing."""
    return {**shape, "num_hidden_layers": layers, "first_k_dense_replace": layers}


def resident() -> int:
    """Bytes in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measured(config: Mapping[str, Any], implementation: str, context: int, device: torch.device) -> dict[str, Any]:
    """Peaks above the weights of reading `context` tokens and of decoding one more, bytes of the cache, seconds."""
    model = random_twin(config, None, dtype=torch.bfloat16, seed=0, device=device, attention=implementation)
    ids = torch.randint(config["vocab_size"], (1, context), device=device)
    found: dict[str, Any] = {"weights_bytes": weight_bytes(model).total}
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(input_ids=ids[:, :8], use_cache=False)  # kernels are made and thread pools started before anything counts
        gc.collect()
        before = torch.cuda.memory_allocated(device) if device.type == "cuda" else resident()
        for task, part in (("prefill", ids), ("decode", ids[:, :1])):
            if device.type == "cuda":
                torch.cuda.synchronize(device)
                torch.cuda.reset_peak_memory_stats(device)
            start = time.perf_counter()
            model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
                peak = torch.cuda.max_memory_allocated(device)
            else:
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            if task == "prefill" or device.type == "cuda":  # the resident size has one peak only, that of the prefill
                found[f"{task}_peak_bytes"] = max(peak - before, 0)
            found[f"{task}_seconds"] = time.perf_counter() - start
    found["cache_bytes"] = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    return found


def attempt(config: Mapping[str, Any], implementation: str, context: int, device: torch.device) -> dict[str, Any]:
    """`measured`, or why not."""
    scores = BYTES_PER_SCORE * config["num_attention_heads"] * context**2
    free = free_bytes(device)
    # torch's fused kernel for the CPU asks for heads of one width, which MLA's are not
    unfused = implementation == "eager" or (
        implementation == "sdpa" and "v_head_dim" in config and device.type == "cpu"
    )
    if unfused and free is not None and scores > 0.5 * free:
        return {"reason": f"not tried: scores of about {scores / 1e9:.0f} GB, {free / 1e9:.0f} GB free"}
    try:
        return measured(config, implementation, context, device)
    except QuantlabError as error:
        return {"reason": f"{error.found}"}
    except torch.OutOfMemoryError:
        return {"reason": "out of memory"}


def in_a_child(config: Mapping[str, Any], implementation: str, context: int, device: torch.device) -> dict[str, Any]:
    """`attempt` in a forked process, whose peak is its own."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        with os.fdopen(writing, "w") as answers:
            json.dump(attempt(config, implementation, context, device), answers)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answers:
        text = answers.read()
    _, status = os.waitpid(child, 0)
    return json.loads(text) if text else {"reason": f"ended with {os.waitstatus_to_exitcode(status)}"}


def as_markdown(result: Mapping[str, Any]) -> str:
    """A table per kind of attention; a cell is the peak of the prefill in MB, of a decode step, and what the cache holds."""
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
    """One measurement for people."""
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
                run = attempt if cuda else in_a_child
                found = run(config_of(shape, layers), implementation, context, device)
                gc.collect()
                if cuda:
                    torch.cuda.empty_cache()
                rows.append({"kind": kind, "attention": implementation, "context": context} | found)
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
