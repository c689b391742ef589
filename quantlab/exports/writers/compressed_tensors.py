"""Writes the format `compressed-tensors`: the artifact's FP8 blocks unchanged, under other names."""

from pathlib import Path

from torch import Tensor

from quantlab.exports.compressed_tensors import description
from quantlab.exports.target import Progress
from quantlab.exports.writers.checkpoint import Planned, carry_companions, write_json, write_shards
from quantlab.exports.writers.writer import Written
from quantlab.formats.codecs.table import encode
from quantlab.formats.compressed_layouts import FLOAT
from quantlab.formats.contents import Contents, Weight
from quantlab.formats.stored import StoredWeights


def write(artifact: StoredWeights, contents: Contents, directory: Path, progress: Progress) -> Written:
    """See `Write`."""

    def produce(weight: Weight) -> dict[str, Tensor]:
        if weight.number is None:
            return {weight.name: artifact.reader.read(weight.name)}
        return encode(FLOAT.name, weight.name, artifact.read_quantized(weight.name))

    hashes = write_shards(directory, [_planned(weight) for weight in contents.weights], produce, progress)
    write_json(directory / "config.json", {**contents.config, "quantization_config": description(contents).to_json()})
    carry_companions(contents.directory, directory)
    return Written(hashes=hashes)


def _planned(weight: Weight) -> Planned:
    if weight.number is None:
        return weight, ((weight.name, weight.dtype, weight.shape),)
    return weight, FLOAT.stored_tensors(weight.name, weight.shape, weight.number, weight.dtype)
