"""Writes the format `dense`: every weight expanded to the 16-bit dtype of its scales."""

from pathlib import Path

import torch
from torch import Tensor

from quantlab.checkpoint.reader import DTYPE_NAMES
from quantlab.exports.target import Contents, Progress, Weight
from quantlab.exports.writers.checkpoint import Planned, carry_companions, write_json, write_shards
from quantlab.exports.writers.writer import Written
from quantlab.formats.stored import StoredWeights
from quantlab.numerics.integer import QuantizedMatrix


def write(artifact: StoredWeights, contents: Contents, directory: Path, progress: Progress) -> Written:
    """See `Write`. The values are those that engines form: ``(q - zero) * scale`` in the dtype of the scale."""

    def produce(weight: Weight) -> dict[str, Tensor]:
        value = artifact.read(weight.name)
        tensor = value.dequantize(value.scale.dtype) if isinstance(value, QuantizedMatrix) else value
        return {weight.name: tensor}

    hashes = write_shards(directory, [_planned(weight) for weight in contents.weights], produce, progress)
    write_json(directory / "config.json", contents.config)
    carry_companions(contents.directory, directory)
    return Written(_notes(contents), hashes)


def _planned(weight: Weight) -> Planned:
    expanded = weight.number is not None and not weight.number.is_integer
    dtype = DTYPE_NAMES[torch.bfloat16] if expanded else weight.dtype  # FP8 is read as bfloat16
    return weight, ((weight.name, dtype, weight.shape),)


def _notes(contents: Contents) -> tuple[str, ...]:
    rounded = sum(weight.number is not None and weight.number.activations is not None for weight in contents.weights)
    if not rounded:
        return ()
    return (f"the inputs of {rounded} linears are quantized in the artifact and stay floating point here",)
