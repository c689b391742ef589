"""Checkpoints in the layouts that other tools write, packed independently with numpy."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.runtime.tiny import LINEAR, Artifact, edit_config, rewrite

Parts = Callable[[Tensor, Tensor], Mapping[str, Tensor]]
"""(integers [N, K], scales [N, G]) -> the stored tensors, by their names after the name of the module and a dot."""


def packed_along(q: np.ndarray, bits: int, axis: int) -> Tensor:
    """Unsigned integers packed into int32 words along an axis, least significant bits first."""
    moved = np.moveaxis(q.astype(np.uint32), axis, -1)
    words = np.zeros((*moved.shape[:-1], moved.shape[-1] * bits // 32), dtype=np.uint32)
    for position in range(32 // bits):
        words |= moved[..., position :: 32 // bits] << np.uint32(position * bits)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(words, -1, axis)).view(np.int32))


def rounded(weight: Tensor, bits: int, group: int | None, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Integers [N, K] int64 and scales [N, G]: the weight rounded to nearest on a symmetric grid."""
    rows, columns = weight.shape
    grouped = weight.float().view(rows, -1, group or columns)
    scale = (grouped.abs().amax(-1) / (2 ** (bits - 1) - 1)).to(scale_dtype)
    q = (grouped / scale.float()[..., None]).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return q.to(torch.int64).view(rows, columns), scale


def gptq_parts(bits: int, *, second: bool = False, indices: bool = True) -> Parts:
    """The tensors GPTQModel stores for a linear, in its first or second format, with or without group indices."""

    def parts(q: Tensor, scale: Tensor) -> dict[str, Tensor]:
        rows, columns = q.shape
        middle = 2 ** (bits - 1)
        zeros = np.full((scale.shape[1], rows), middle - (0 if second else 1))
        found = {
            "qweight": packed_along(q.numpy().T + middle, bits, 0),
            "qzeros": packed_along(zeros, bits, 1),
            "scales": scale.T,
        }
        group_of = torch.tensor([column * scale.shape[1] // columns for column in range(columns)], dtype=torch.int32)
        return found | ({"g_idx": group_of} if indices else {})

    return parts


def compressed_parts(bits: int, *, packed: bool, shape: bool = True) -> Parts:
    """The tensors llm-compressor stores for a linear: packed words, or plain int8."""

    def parts(q: Tensor, scale: Tensor) -> dict[str, Tensor]:
        if not packed:
            return {"weight": q.to(torch.int8), "weight_scale": scale}
        words = packed_along(q.numpy() + 2 ** (bits - 1), bits, 1)
        return {"weight_packed": words, "weight_scale": scale} | (
            {"weight_shape": torch.tensor(q.shape)} if shape else {}
        )

    return parts


def quantized(
    source: Path,
    target: Path,
    parts: Parts,
    description: Mapping[str, Any],
    *,
    numbers: Callable[[str], tuple[int, int | None] | None],
    scale_dtype: torch.dtype = torch.float16,
) -> Artifact:
    """A checkpoint with quantized linears, and the float32 checkpoint of the dequantized weights.

    Args:
        numbers: bits and group size of the linear of a name, None to leave it.
    """
    shutil.copytree(source, target)
    dense = target.with_name(target.name + "-dense")
    shutil.copytree(source, dense)
    stored: dict[str, Tensor] = {}
    meant: dict[str, Tensor] = {}
    for name, weight in load_file(source / "model.safetensors").items():
        chosen = numbers(name) if name.endswith(LINEAR) else None
        if chosen is None:
            stored[name], meant[name] = weight, weight.float()
            continue
        q, scale = rounded(weight, *chosen, scale_dtype)
        stored |= {name.removesuffix("weight") + part: tensor for part, tensor in parts(q, scale).items()}
        each = scale.repeat_interleave(q.shape[1] // scale.shape[1], dim=1)
        meant[name] = (q.to(scale_dtype) * each).float()
    rewrite(target, stored)
    rewrite(dense, meant)
    edit_config(target, lambda fields: fields.update(quantization_config=dict(description)))
    edit_config(dense, lambda fields: fields.update(dtype="float32"))
    return Artifact(target, dense)


def gptq_description(bits: int, group: int | None, **changes: object) -> dict[str, Any]:
    """The quantization_config that GPTQModel writes."""
    fields = {
        "bits": bits,
        "group_size": group or -1,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        "meta": {"quantizer": ["gptqmodel:7.6.0"], "damp_percent": 0.05, "true_sequential": True},
    }
    return fields | changes


def compressed_description(
    bits: int, group: int | None, layout: str, *, ignore: list[str], tokens: bool
) -> dict[str, Any]:
    """The quantization_config that llm-compressor writes for one config group that targets all Linear modules."""
    weights = {
        "actorder": None,
        "block_structure": None,
        "dynamic": False,
        "group_size": group,
        "num_bits": bits,
        "observer": "minmax",
        "observer_kwargs": {},
        "scale_dtype": None,
        "strategy": "group" if group else "channel",
        "symmetric": True,
        "type": "int",
        "zp_dtype": None,
    }
    activations = weights | {"dynamic": True, "group_size": None, "strategy": "token", "observer": None}
    group_0 = {
        "format": layout,
        "input_activations": activations if tokens else None,
        "output_activations": None,
        "targets": ["Linear"],
        "weights": weights,
    }
    return {
        "config_groups": {"group_0": group_0},
        "format": layout,
        "global_compression_ratio": None,
        "ignore": ignore,
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.19.0",
    }


def fuse(directory: Path) -> None:
    """Convert the experts of a checkpoint to the names and shapes of transformers' fused experts."""
    weights = load_file(directory / "model.safetensors")
    fields = json.loads((directory / "config.json").read_text())
    for layer in range(fields["first_k_dense_replace"], fields["num_hidden_layers"]):
        experts = f"model.layers.{layer}.mlp.experts"
        for part in {name.rpartition(".")[2] for name in weights if name.startswith(f"{experts}.0.")} - {
            "weight_shape"
        }:
            of = {
                kind: [weights.pop(f"{experts}.{e}.{kind}_proj.{part}") for e in range(fields["n_routed_experts"])]
                for kind in ("gate", "up", "down")
            }
            ending = "" if part == "weight" else part.removeprefix("weight")
            both = [torch.cat(pair) for pair in zip(of["gate"], of["up"], strict=True)]
            weights[f"{experts}.gate_up_proj{ending}"] = torch.stack(both)
            weights[f"{experts}.down_proj{ending}"] = torch.stack(of["down"])
        for name in [name for name in weights if name.startswith(experts) and name.endswith("weight_shape")]:
            del weights[name]
    rewrite(directory, weights)
