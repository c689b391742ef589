"""Checkpoints as dense weights: the BF16 export the peers start from, and what their artifacts say, dequantized.

Two encodings are read: compressed-tensors `pack-quantized`, by quantlab's reader, and GPTQ's qweight, qzeros, scales and
g_idx, by the decoder here. Every number is dequantized in float32 from the integers and scales as stored, so that no
runtime of anyone rounds in between.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from quantlab.checkpoint.index import open_checkpoint
from quantlab.checkpoint.reader import Reader
from quantlab.formats.stored import StoredWeights
from quantlab.numerics.integer import QuantizedMatrix

GPTQ_PARTS = ("qweight", "qzeros", "scales", "g_idx")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def export_bf16(source: Path, out: Path) -> None:
    """The source as BF16 without its multi-token-prediction layer, which no peer reads."""
    checkpoint = open_checkpoint(source)
    stored = StoredWeights(Reader(checkpoint))
    extra = f"model.layers.{checkpoint.config['num_hidden_layers']}."
    tensors = {}
    for name in stored.names():
        if not name.startswith(extra):
            weight = stored.read(name)
            assert isinstance(weight, Tensor)
            tensors[name] = weight if name.endswith("e_score_correction_bias") else weight.to(torch.bfloat16)
    write_checkpoint(tensors, source, out)


def write_checkpoint(tensors: dict[str, Tensor], source: Path, out: Path) -> None:
    """One shard with the source's configuration and tokenizer, not quantized and without prediction layers."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    config = json.loads((source / "config.json").read_text())
    config.pop("quantization_config", None)
    config["num_nextn_predict_layers"] = 0
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in TOKENIZER:
        shutil.copy(source / name, out / name)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / "model.safetensors")


def dequantize(artifact: Path) -> tuple[dict[str, Tensor], set[str]]:
    """Every weight of an artifact as float32 by its name in DeepSeek's layout, and the names that were quantized."""
    checkpoint = open_checkpoint(artifact)
    reader = Reader(checkpoint)
    if any(name.endswith(".qweight") for name in checkpoint.tensors):
        return _from_gptq(reader, bits=checkpoint.config["quantization_config"]["bits"])
    return _from_compressed_tensors(StoredWeights(reader))


def _from_compressed_tensors(stored: StoredWeights) -> tuple[dict[str, Tensor], set[str]]:
    dense, quantized = {}, set()
    for name in stored.names():
        weight = stored.read(name)
        if isinstance(weight, QuantizedMatrix):  # integer times scale in float32, not in the scale's dtype
            quantized.add(name)
            weight = QuantizedMatrix(weight.q, weight.scale.float(), weight.bits).dequantize(torch.float32)
        dense[name] = weight.float()
    return dense, quantized


def _from_gptq(reader: Reader, *, bits: int) -> tuple[dict[str, Tensor], set[str]]:
    dense, quantized = {}, set()
    for name in reader.checkpoint.tensors:
        prefix, _, part = name.rpartition(".")
        if part == "qweight":
            dense[f"{prefix}.weight"] = decode_gptq(
                *(reader.read(f"{prefix}.{part}") for part in GPTQ_PARTS), bits=bits
            )
            quantized.add(f"{prefix}.weight")
        elif part not in GPTQ_PARTS:
            dense[name] = reader.read(name).float()
    return dense, quantized


def decode_gptq(qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor, *, bits: int) -> Tensor:
    """A weight [N, K] of GPTQ's first format, in which the stored zero point is one less than the real one.

    Args:
        qweight: [K * bits / 32, N] int32, consecutive inputs in one word, lowest bits first.
        qzeros: [G, N * bits / 32] int32, consecutive outputs in one word.
        scales: [G, N] float16 or bfloat16.
        g_idx: [K] the group of every input.
        bits: of an integer.
    """
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    mask = 2**bits - 1
    q = (qweight[:, None, :] >> shifts[None, :, None]) & mask
    zeros = ((qzeros[:, :, None] >> shifts[None, None, :]) & mask) + 1
    q, zeros = q.reshape(-1, qweight.shape[1]), zeros.reshape(qzeros.shape[0], -1)
    group = g_idx.long()
    return ((q - zeros[group]).float() * scales.float()[group]).T.contiguous()


def compare(dense: dict[str, Tensor], quantized: set[str], reference: dict[str, Tensor]) -> dict[str, object]:
    """What was quantized and what was not, by role, and whether anything else was changed.

    A peer may fold scales into norms; `changed` then names the weights that are neither quantized nor the source's.
    """
    missing, unknown = sorted(reference.keys() - dense.keys()), sorted(dense.keys() - reference.keys())
    roles: dict[str, list[int]] = {}
    for name, weight in reference.items():
        if weight.dim() == 2 and name in dense:
            count = roles.setdefault(role_of(name), [0, 0])
            count[name in quantized] += 1
    return {
        "modules": {role: {"quantized": yes, "not": no} for role, (no, yes) in sorted(roles.items())},
        "missing": missing,
        "unknown": unknown,
        "changed": sorted(
            name
            for name in dense.keys() & reference.keys() - quantized
            if not torch.equal(dense[name], reference[name].float())
        ),
    }


def role_of(name: str) -> str:
    """The role of a weight matrix of a DeepSeek-V3."""
    if ".mlp.experts." in name:
        return "routed experts"
    if ".shared_experts." in name:
        return "shared experts"
    if name.endswith("mlp.gate.weight"):
        return "router"
    if ".mlp." in name:
        return "dense MLP"
    if "kv_b_proj" in name:
        return "kv_b_proj"
    return "attention" if ".self_attn." in name else "embeddings and head"
