"""The writer of every format; `quantlab.exports.targets` lists the other part."""

from collections.abc import Mapping
from typing import Final

from quantlab.exports.writers import bitsandbytes, compressed_tensors, dense, gguf, gptq, onnx
from quantlab.exports.writers.writer import Write
from quantlab.recipe.schemes import FormatName

WRITERS: Final[Mapping[FormatName, Write]] = {
    "compressed-tensors": compressed_tensors.write,
    "dense": dense.write,
    "gptq": gptq.write,
    "gguf": gguf.write,
    "onnx": onnx.write,
    "bnb-int8": bitsandbytes.write_int8,
    "bnb-nf4": bitsandbytes.write_nf4,
    "bnb-nf4-double": bitsandbytes.write_nf4_double,
}
OPTIONAL_PACKAGES: Final[Mapping[FormatName, str]] = {"gguf": "gguf"}
"""Packages that writing a format needs beyond quantlab's requirements; the extra of quantlab that installs one has its name."""
