"""The writer of every format; `quantlab.exports.targets` lists the other part."""

from collections.abc import Mapping
from typing import Final

from quantlab.exports.writers import dense, gguf, gptq
from quantlab.exports.writers.writer import Write
from quantlab.recipe.schemes import FormatName

WRITERS: Final[Mapping[FormatName, Write]] = {"dense": dense.write, "gptq": gptq.write, "gguf": gguf.write}
