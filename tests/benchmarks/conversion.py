"""Data-free conversion of a synthetic BF16 checkpoint: MB/s and peak memory, next to a plain copy of the same files.

    python tests/benchmarks/conversion.py --gigabytes 2 --rounds 3

Copy and conversions take turns in every round; the page cache is warm for all of them, so what is compared is work, not
the disk. MB/s counts the bytes of the source. Each conversion is a whole process of `quantlab run`, start included.

`int4_g128` searches its scales, `int4_g128, no search` does not. CPU seconds
of a 0.93 GB checkpoint on one thread of an AMD EPYC (Zen 4) shared with other work, medians of three interleaved rounds: 9.7
without the search, 12.4 with it; before weights were worked on in bands of rows, 11.5 without it and 14.4 (one round) with it.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

VARIANTS = {
    "float16": "[{cast: float16}]",
    "int8": "[{quantize: int8}]",
    "int4_g128": "[{quantize: int4_g128}]",
    "int4_g128, no search": "[{quantize: int4_g128, algorithm: {name: rtn, clip: none}}]",
    "prune 0.08": "[{prune: 0.08}]",
}
HIDDEN, INTERMEDIATE, HEADS, VOCABULARY = 4096, 11008, 32, 32000


def make_checkpoint(directory: Path, gigabytes: float) -> int:
    """Random Llama layers at the width of DeepSeek-LLM-7B, one shard a layer; returns the bytes of the weights."""
    layer_bytes = 2 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INTERMEDIATE)
    layers = max(1, round((gigabytes * 1e9 - 4 * VOCABULARY * HIDDEN) / layer_bytes))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "vocab_size": VOCABULARY,
        "torch_dtype": "bfloat16",
    }
    (directory / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)

    files: dict[str, dict[str, torch.Size]] = {}

    def write(file: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, directory / file)
        files[file] = {name: tensor.shape for name, tensor in tensors.items()}

    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        write(
            f"layer-{layer}.safetensors",
            {prefix + f"self_attn.{name}_proj.weight": random(HIDDEN, HIDDEN) for name in "qkvo"}
            | {prefix + f"mlp.{name}_proj.weight": random(INTERMEDIATE, HIDDEN) for name in ("gate", "up")}
            | {prefix + "mlp.down_proj.weight": random(HIDDEN, INTERMEDIATE)}
            | {
                prefix + f"{name}_layernorm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16)
                for name in ("input", "post_attention")
            },
        )
    write(
        "ends.safetensors",
        {
            "model.embed_tokens.weight": random(VOCABULARY, HIDDEN),
            "lm_head.weight": random(VOCABULARY, HIDDEN),
            "model.norm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
        },
    )
    weight_map = {name: file for file, names in files.items() for name in names}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def timed(command: list[str]) -> tuple[float, int]:
    """Seconds and largest resident bytes of a process."""
    begin = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"{command} failed")
    return time.perf_counter() - begin, usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the checkpoint")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="where to work; a temporary directory by default")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        root = Path(name)
        source = root / "source"
        source.mkdir()
        nbytes = make_checkpoint(source, options.gigabytes)
        seconds: dict[str, list[float]] = {}
        peaks: dict[str, int] = {}
        for _ in range(options.rounds):
            begin = time.perf_counter()
            shutil.copytree(source, root / "copy")
            os.sync()
            seconds.setdefault("plain copy", []).append(time.perf_counter() - begin)
            shutil.rmtree(root / "copy")
            for label, passes in VARIANTS.items():
                recipe = root / "recipe.yaml"
                recipe.write_text(f"model: source\nvariants:\n  v: {passes}\n")
                took, peak = timed(
                    [sys.executable, "-m", "quantlab", "run", str(recipe), "--out", str(root / "out"), "--quiet"]
                )
                seconds.setdefault(label, []).append(took)
                peaks[label] = max(peaks.get(label, 0), peak)
                shutil.rmtree(root / "out")
    copy = statistics.median(seconds["plain copy"])
    print(f"{nbytes / 1e9:.2f} GB of BF16, {torch.get_num_threads()} threads, median of {options.rounds} rounds")
    print(f"{'':22} {'MB/s':>8} {'x copy':>8} {'peak MB':>9}")
    for label, values in seconds.items():
        median = statistics.median(values)
        peak_text = f"{peaks[label] / 1e6:9.0f}" if label in peaks else f"{'':9}"
        print(f"{label:22} {nbytes / 1e6 / median:8.0f} {copy / median:8.2f} {peak_text}")


if __name__ == "__main__":
    main()
