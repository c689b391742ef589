"""All formats that an artifact can be written in, without torch. `quantlab.exports.writers.table` lists the other part."""

from collections.abc import Mapping
from typing import Final, get_args

from quantlab.exports import bitsandbytes, compressed_tensors, dense, gptq, onnx
from quantlab.exports.gguf import target as gguf
from quantlab.exports.target import Target
from quantlab.recipe.schemes import FormatName

_TARGETS: Final[tuple[Target, ...]] = (
    compressed_tensors.TARGET, dense.TARGET, gptq.TARGET, gguf.TARGET, onnx.TARGET,
    bitsandbytes.INT8, bitsandbytes.NF4, bitsandbytes.NF4_DOUBLE,
)  # fmt: skip
TARGETS: Final[Mapping[FormatName, Target]] = {target.name: target for target in _TARGETS}
assert set(TARGETS) == set(get_args(FormatName)), "every word has its format"
