"""Writes the formats of bitsandbytes."""

from pathlib import Path

import torch
from torch import Tensor

from quantlab.algorithms.llm_int8 import RowwiseInt8, to_rowwise_int8
from quantlab.algorithms.nf4 import LEVELS, nest, nested_levels, to_normal_floats
from quantlab.errors import ArtifactError
from quantlab.exports.bitsandbytes import BLOCK, INT8, NF4, NF4_DOUBLE, Bitsandbytes, quant_state
from quantlab.exports.target import Progress
from quantlab.exports.writers.checkpoint import Planned, carry_companions, write_json, write_shards
from quantlab.exports.writers.writer import Written
from quantlab.formats.contents import Contents, Weight
from quantlab.formats.stored import StoredWeights
from quantlab.numerics.integer import QuantizedMatrix

_STEPS = 127.0


def write_int8(artifact: StoredWeights, contents: Contents, directory: Path, progress: Progress) -> Written:
    """See `Write`; integers of the artifact are copied."""
    return _write(INT8, artifact, contents, directory, progress)


def write_nf4(artifact: StoredWeights, contents: Contents, directory: Path, progress: Progress) -> Written:
    """See `Write`."""
    return _write(NF4, artifact, contents, directory, progress)


def write_nf4_double(artifact: StoredWeights, contents: Contents, directory: Path, progress: Progress) -> Written:
    """See `Write`."""
    return _write(NF4_DOUBLE, artifact, contents, directory, progress)


def _write(
    target: Bitsandbytes, artifact: StoredWeights, contents: Contents, directory: Path, progress: Progress
) -> Written:
    converted = {weight.name for weight in target.converted(contents)}

    def produce(weight: Weight) -> dict[str, Tensor]:
        value = artifact.read(weight.name)
        if weight.name not in converted:
            assert isinstance(value, Tensor), "formats of bitsandbytes express all quantized weights"
            return {weight.name: value}
        if target.bits == 4:
            assert isinstance(value, Tensor), "NF4 refuses quantized weights"
            return nf4_tensors(weight, value, double=target.double)
        return int8_tensors(weight, value)

    planned: list[Planned] = [
        (
            weight,
            target.stored_tensors(weight) if weight.name in converted else ((weight.name, weight.dtype, weight.shape),),
        )
        for weight in contents.weights
    ]
    hashes = write_shards(directory, planned, produce, progress)
    config = {**contents.config, "quantization_config": target.description_in_config(contents)}
    write_json(directory / "config.json", config)
    carry_companions(contents.directory, directory)
    return Written(_notes(target, contents), hashes)


def int8_tensors(weight: Weight, value: Tensor | QuantizedMatrix) -> dict[str, Tensor]:
    """The tensors of a weight in LLM.int8(), in the order of `Bitsandbytes.stored_tensors`.

    Args:
        weight: the weight.
        value: [N, K]: int8 with one scale per row, which are kept, or floating point.

    Raises:
        ArtifactError: a weight exceeds the range of float16.
    """
    rowwise = _kept(value) if isinstance(value, QuantizedMatrix) else to_rowwise_int8(value)
    if not bool(rowwise.absmax.isfinite().all()):
        raise ArtifactError(
            "a weight is too large for bitsandbytes' int8",
            where=weight.name,
            found=f"magnitude {value.abs().max().item():.3g}" if isinstance(value, Tensor) else "an infinite scale",
            fix="bitsandbytes rounds from float16, which ends at 65504: use another format",
        )
    return {
        weight.name: rowwise.q,
        f"{weight.module}.SCB": rowwise.absmax,
        f"{weight.module}.weight_format": torch.tensor(0, dtype=torch.uint8),  # row by row
    }


def _kept(matrix: QuantizedMatrix) -> RowwiseInt8:
    """The same integers; 127 scales of 16 bits are exact in float32."""
    return RowwiseInt8(matrix.q, matrix.scale[:, 0].to(torch.float32) * _STEPS)


def nf4_tensors(weight: Weight, value: Tensor, *, double: bool) -> dict[str, Tensor]:
    """The tensors of a weight in NF4, in the order of `Bitsandbytes.stored_tensors`.

    Args:
        weight: the weight.
        value: [N, K] floating point.
        double: whether the magnitudes of blocks are quantized, too.
    """
    floats = to_normal_floats(value, block=BLOCK)
    magnitudes, mean = {"absmax": floats.absmax}, None
    if double:
        nested = nest(floats.absmax)
        magnitudes = {"absmax": nested.indices, "nested_absmax": nested.absmax, "nested_quant_map": nested_levels()}
        mean = nested.mean
    state = torch.frombuffer(bytearray(quant_state(weight, mean=mean)), dtype=torch.uint8)
    parts = {**magnitudes, "quant_map": torch.tensor(LEVELS), "quant_state.bitsandbytes__nf4": state}
    return {weight.name: floats.packed, **{f"{weight.name}.{part}": tensor for part, tensor in parts.items()}}


def _notes(target: Bitsandbytes, contents: Contents) -> tuple[str, ...]:
    converted, notes = target.converted(contents), []
    if target.bits == 8:
        if target.rounds_all_activations(contents):
            notes.append("activations are rounded to int8 per token, as in the artifact (llm_int8_threshold 0)")
        else:
            notes.append("LLM.int8() rounds activations to int8 per token, but channels beyond 6 stay float16")
    uneven = sum(bool(weight.shape[0] % 32) for weight in converted) if target.bits == 4 else 0
    if uneven:
        notes.append(
            f"{uneven} matrices have rows that are no multiple of 32: CPUs with AVX512-BF16 cannot multiply them"
        )
    return tuple(notes)
