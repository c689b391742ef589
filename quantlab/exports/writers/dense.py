"""Writes the format `dense`: every weight expanded to the 16-bit dtype of its scales."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from quantlab.checkpoint.reader import DTYPE_NAMES
from quantlab.exports.target import Progress
from quantlab.exports.writers.checkpoint import Planned, carry_companions, write_json, write_shards
from quantlab.exports.writers.writer import Written
from quantlab.formats.contents import Contents, Weight
from quantlab.formats.read_contents import contents_of
from quantlab.formats.stored import StoredWeights
from quantlab.numerics.integer import QuantizedMatrix


def write(artifact: StoredWeights, contents: Contents, directory: Path, progress: Progress) -> Written:
    """See `Write`. The values are those that engines form: ``(q - zero) * scale`` in the dtype of the scale."""
    hashes = _write_weights(artifact, contents, directory, progress, exact=False)
    carry_companions(contents.directory, directory)
    return Written(_notes(contents), hashes)


def write_expanded(stored: StoredWeights, directory: Path, *, exact: bool = False) -> None:
    """Write the weights of any checkpoint as a plain one, without tokenizer: config.json, shards and their index.

    Args:
        stored: the checkpoint.
        directory: an empty directory.
        exact: multiply integers and scales in float32, and write float32; otherwise in the dtype of the scales, 16 bits.

    Raises:
        ArtifactError: a file cannot be written.
    """
    _write_weights(stored, contents_of(stored.reader.checkpoint), directory, lambda _: None, exact=exact)


def expanded(stored: StoredWeights, name: str, *, exact: bool) -> Tensor:
    """One weight in floating point; see `write_expanded`. Weights that are not quantized keep their dtype."""
    held = stored.stored(name)
    if exact and held is not None and not held.number.is_integer:  # `read` rounds it to bfloat16
        return stored.read_quantized(name).dequantize(torch.float32)
    weight = stored.read(name)
    if not isinstance(weight, QuantizedMatrix):
        return weight
    if exact:
        return replace(weight, scale=weight.scale.float()).dequantize(torch.float32)
    return weight.dequantize(weight.scale.dtype)


def _write_weights(
    stored: StoredWeights, contents: Contents, directory: Path, progress: Progress, *, exact: bool
) -> dict[str, str]:
    def produce(weight: Weight) -> dict[str, Tensor]:
        return {weight.name: expanded(stored, weight.name, exact=exact)}

    hashes = write_shards(directory, list(map(partial(_planned, exact=exact), contents.weights)), produce, progress)
    write_json(directory / "config.json", contents.config)
    return hashes


def _planned(weight: Weight, *, exact: bool) -> Planned:
    dtype = weight.dtype
    if weight.number is not None:
        if exact:
            dtype = DTYPE_NAMES[torch.float32]
        elif not weight.number.is_integer:
            dtype = DTYPE_NAMES[torch.bfloat16]  # FP8 is read as bfloat16
    return weight, ((weight.name, dtype, weight.shape),)


def _notes(contents: Contents) -> tuple[str, ...]:
    rounded = sum(weight.number is not None and weight.number.activations is not None for weight in contents.weights)
    if not rounded:
        return ()
    return (f"the inputs of {rounded} linears are quantized in the artifact and stay floating point here",)
