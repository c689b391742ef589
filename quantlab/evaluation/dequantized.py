"""A quantized checkpoint written as a plain one, which every program reads."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from quantlab.checkpoint.index import INDEX_NAME
from quantlab.checkpoint.reader import DTYPE_NAMES
from quantlab.checkpoint.writer import ShardWriter
from quantlab.files import write_atomically
from quantlab.formats.codecs.table import CODECS
from quantlab.formats.stored import StoredWeights
from quantlab.numerics.integer import QuantizedMatrix


def write_dequantized(stored: StoredWeights, directory: Path, *, exact: bool = False) -> None:
    """Write the weights of a checkpoint as a plain checkpoint: config.json, an index and one shard per tensor.

    Args:
        stored: the checkpoint.
        directory: an empty directory.
        exact: multiply integers and scales in float32, and write float32; otherwise in the dtype of the scales, 16 bits.
    """
    config = dict(stored.reader.checkpoint.config)
    config.pop("quantization_config", None)
    weight_map = {}
    for number, name in enumerate(stored.names()):
        tensor = dequantized(stored, name, exact=exact)
        file = f"model-{number:06d}.safetensors"
        with ShardWriter(directory / file, [(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))]) as writer:
            writer.write(name, tensor)
        weight_map[name] = file
    write_atomically(directory / "config.json", json.dumps(config).encode())
    write_atomically(directory / INDEX_NAME, json.dumps({"metadata": {}, "weight_map": weight_map}).encode())


def dequantized(stored: StoredWeights, name: str, *, exact: bool) -> Tensor:
    """One weight in floating point; see `write_dequantized`. Weights that are not quantized keep their dtype."""
    held = stored.stored(name)
    if exact and held is not None and not held.number.is_integer:  # `read` rounds it to bfloat16
        parts = {part.name: stored.reader.read(part.name) for part in held.parts}
        return CODECS[held.layout].decode(name, parts, held.number).dequantize(torch.float32)
    weight = stored.read(name)
    if not isinstance(weight, QuantizedMatrix):
        return weight
    if exact:
        return replace(weight, scale=weight.scale.float()).dequantize(torch.float32)
    return weight.dequantize(weight.scale.dtype)
