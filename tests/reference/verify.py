"""Read the checkpoint with a slow oracle and measure it with transformers' DeepSeek-V3 in float32.

    python tests/reference/verify.py --checkpoint eval/reference/deepseek-v3-mini --heldout eval/corpora/heldout.jsonl \\
        --work DIRECTORY --results FILE

Dequantizes every FP8 tensor into a BF16 directory under `--work`, loads it with `AutoModelForCausalLM` in float32,
scores the held-out documents, compares with `xz -9` on the same text, checks that the tokenizer is exact and writes
three samples.
"""

import argparse
import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from scoring import score, summarise
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantlab.numerics.fp8 import dequantize_blocks, quantize_blocks

PROMPTS = (
    "The Secretary of the Treasury reports that",
    "CHAPTER X\n\nIt was a fine morning, and Elizabeth",
    "The following example creates a table and",
)


def read_checkpoint(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, found through its index."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    tensors = {}
    for file in sorted(set(index["weight_map"].values())):
        with safe_open(folder / file, framework="pt") as shard:
            tensors.update({name: shard.get_tensor(name) for name in shard.keys()})  # noqa: SIM118
    if set(tensors) != set(index["weight_map"]):
        raise SystemExit("the index and the shards name different tensors")
    if sum(tensor.nbytes for tensor in tensors.values()) != index["metadata"]["total_size"]:
        raise SystemExit("total_size is not the bytes of the tensors")
    return tensors


def structure(folder: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Counts that the model card quotes."""
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    scales = [name for name in tensors if name.endswith("_scale_inv")]
    return {
        "bytes": sum(path.stat().st_size for path in folder.iterdir()),
        "tensors": len(tensors),
        "fp8_tensors": len(scales),
        "scales_in_another_shard": [
            name for name in scales if weight_map[name] != weight_map[name.removesuffix("_scale_inv")]
        ],
    }


def dequantize(folder: Path, target: Path) -> float:
    """Write a BF16 copy of a checkpoint; return the largest change of a scale when its matrices are rounded again."""
    tensors = read_checkpoint(folder)
    config = json.loads((folder / "config.json").read_text())
    rows, columns = config.pop("quantization_config")["weight_block_size"]
    plain, drift = {}, 0.0
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float8_e4m3fn:
            scale = tensors[f"{name}_scale_inv"]
            exact = dequantize_blocks(tensor, scale, block=(rows, columns), dtype=torch.float32)
            again, scale_again = quantize_blocks(exact, block=(rows, columns))
            if not torch.equal(again.float() * 1.0, tensor.float()):
                raise SystemExit(f"{name}: rounding the dequantized matrix again gives other FP8 values")
            drift = max(drift, float(((scale_again - scale) / scale).abs().max()))
            plain[name] = dequantize_blocks(tensor, scale, block=(rows, columns), dtype=torch.bfloat16)
        elif not name.endswith("_scale_inv"):
            plain[name] = tensor
    target.mkdir(parents=True, exist_ok=True)
    save_file(plain, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text(json.dumps(config, indent=2))
    for file in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / file, target / file)
    return drift


def xz_bits_per_byte(texts: list[str]) -> float:
    """Size under `xz -9e` of all texts in one file, in bits per byte."""
    data = "\n".join(texts).encode()
    packed = subprocess.run(["xz", "-9e", "--stdout"], input=data, capture_output=True, check=True).stdout
    return 8 * len(packed) / len(data)


def load(folder: Path) -> Any:
    """Load the BF16 copy in float32; exit if a weight of the model is missing from the files."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager", output_loading_info=True
    )
    if info["missing_keys"]:
        raise SystemExit(f"weights missing from the checkpoint: {sorted(info['missing_keys'])[:5]}")
    return model.eval()


def samples(model: Any, tokenizer: Any) -> list[str]:
    """One sampled continuation per prompt."""
    texts = []
    for seed, prompt in enumerate(PROMPTS):
        torch.manual_seed(seed)
        ids = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
        out = model.generate(ids, max_new_tokens=110, do_sample=True, temperature=0.7, top_p=0.9, pad_token_id=2)
        texts.append(tokenizer.decode(out[0], skip_special_tokens=True))
    return texts


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--heldout", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder for the BF16 twin")
    parser.add_argument("--results", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--every", type=int, default=1, help="score only every n-th document (default 1: all)")
    parser.add_argument("--device", default="cpu", help="device of the model (default cpu)")
    arguments = parser.parse_args()
    drift = dequantize(arguments.checkpoint, arguments.work)
    tokenizer = AutoTokenizer.from_pretrained(arguments.checkpoint)
    lines = arguments.heldout.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines[:: arguments.every]]
    for row in rows:
        row["ids"], row["bytes"] = tokenizer(row["text"]).input_ids, len(row["text"].encode())
        if tokenizer.decode(row["ids"][1:]) != row["text"]:
            raise SystemExit(f"{row['id']}: the tokenizer does not give the text back")
    model = load(arguments.work).to(arguments.device)

    @torch.no_grad()
    def losses(tokens: Tensor) -> Tensor:
        logits = model(tokens[:, :-1]).logits.flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="none").view(
            len(tokens), -1
        )

    start = time.monotonic()
    totals = score(rows, losses, device=arguments.device, batch=8)
    result = {
        "structure": structure(arguments.checkpoint, read_checkpoint(arguments.checkpoint)),
        "largest_relative_scale_change_on_second_rounding": drift,
        "device": arguments.device,
        "heldout": summarise(rows, totals),
        "nats": {row["id"]: round(nats, 3) for row, nats in zip(rows, totals, strict=True)},
        "xz_bits_per_byte": {
            domain: round(xz_bits_per_byte([row["text"] for row in rows if domain in ("all", row["domain"])]), 4)
            for domain in ["all", *sorted({row["domain"] for row in rows})]
        },
        "seconds": round(time.monotonic() - start),
        "samples": samples(model, tokenizer),
    }
    arguments.results.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in result.items() if key != "nats"}, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
