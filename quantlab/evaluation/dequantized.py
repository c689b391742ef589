"""A quantized checkpoint written as a plain one of 16 bits, which every program reads."""

import json
from pathlib import Path

from quantlab.checkpoint.index import INDEX_NAME
from quantlab.checkpoint.reader import DTYPE_NAMES
from quantlab.checkpoint.writer import ShardWriter
from quantlab.files import write_atomically
from quantlab.formats.stored import StoredWeights
from quantlab.numerics.integer import QuantizedMatrix


def write_dequantized(stored: StoredWeights, directory: Path) -> None:
    """Write the weights of a checkpoint as a plain 16-bit checkpoint: config.json, an index and one shard per tensor.

    Args:
        stored: the checkpoint.
        directory: an empty directory.
    """
    config = dict(stored.reader.checkpoint.config)
    config.pop("quantization_config", None)
    weight_map = {}
    for number, name in enumerate(stored.names()):
        weight = stored.read(name)
        tensor = weight.dequantize(weight.scale.dtype) if isinstance(weight, QuantizedMatrix) else weight
        file = f"model-{number:06d}.safetensors"
        with ShardWriter(directory / file, [(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))]) as writer:
            writer.write(name, tensor)
        weight_map[name] = file
    write_atomically(directory / "config.json", json.dumps(config).encode())
    write_atomically(directory / INDEX_NAME, json.dumps({"metadata": {}, "weight_map": weight_map}).encode())
