"""Writes the format `gptq`: the artifact's integers packed along the inputs, scales as float16."""

from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from quantlab.errors import ArtifactError
from quantlab.exports.gptq import description
from quantlab.exports.target import Progress
from quantlab.exports.writers.checkpoint import Planned, carry_companions, write_json, write_shards
from quantlab.exports.writers.writer import Written
from quantlab.formats.codecs.table import encode
from quantlab.formats.contents import Contents, Weight
from quantlab.formats.gptq import layout_for
from quantlab.formats.stored import StoredWeights
from quantlab.numerics.integer import QuantizedMatrix
from quantlab.version import VERSION


@dataclass
class _Scales:
    """Counts of the scales written so far: all, and those that float16 rounds."""

    counts: Counter[str] = field(default_factory=Counter)

    def to_float16(self, weight: Weight, scale: Tensor) -> Tensor:
        """The scales as float16.

        Raises:
            ArtifactError: float16 cannot hold one.
        """
        narrow = scale.to(torch.float16)
        lost = ~narrow.isfinite() | ((narrow == 0) & (scale != 0))
        if bool(lost.any()):
            first = scale[lost][0].item()
            raise ArtifactError(
                "a scale is outside the range of float16, in which this format stores scales",
                where=weight.name,
                found=f"{first:g}; {int(lost.sum())} of {scale.numel()} scales",
                fix="leave the linear alone with `ignore`, or use another format",
            )
        self.counts["all"] += scale.numel()
        self.counts["rounded"] += int((narrow.to(scale.dtype) != scale).sum())
        return narrow


def write(artifact: StoredWeights, contents: Contents, directory: Path, progress: Progress) -> Written:
    """See `Write`."""
    scales = _Scales()

    def produce(weight: Weight) -> dict[str, Tensor]:
        value = artifact.read(weight.name)
        if isinstance(value, Tensor):
            return {weight.name: value}
        return _encoded(weight, replace(value, scale=scales.to_float16(weight, value.scale)))

    hashes = write_shards(directory, [_planned(weight) for weight in contents.weights], produce, progress)
    described = description(contents).to_json() | {"meta": {"quantizer": [f"quantlab:{VERSION}"]}}
    write_json(directory / "config.json", {**contents.config, "quantization_config": described})
    write_json(directory / "quantize_config.json", described)
    carry_companions(contents.directory, directory)
    return Written(_notes(scales, contents), hashes)


def _planned(weight: Weight) -> Planned:
    if weight.number is None:
        return weight, ((weight.name, weight.dtype, weight.shape),)
    return weight, layout_for(weight.number).stored_tensors(weight.name, weight.shape, weight.number, "F16")


def _encoded(weight: Weight, matrix: QuantizedMatrix) -> dict[str, Tensor]:
    assert weight.number is not None, "it is quantized"
    return encode(layout_for(weight.number).name, weight.name, matrix)


def _notes(scales: _Scales, contents: Contents) -> tuple[str, ...]:
    notes = []
    if rounded := scales.counts["rounded"]:
        notes.append(f"{rounded:,} of {scales.counts['all']:,} scales are rounded: float16 cannot hold them exactly")
    if any(weight.number is not None and not weight.number.symmetric for weight in contents.weights):
        notes.append("it has zero points: checkpoint_format is gptq_v2, which not every reader of gptq knows")
    return tuple(notes)
