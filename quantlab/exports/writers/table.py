"""The writer of every format; `quantlab.exports.targets` lists the other part."""

from collections.abc import Mapping
from typing import Final

from quantlab.exports.writers import bitsandbytes, dense, gptq
from quantlab.exports.writers.writer import Write
from quantlab.recipe.schemes import FormatName

WRITERS: Final[Mapping[FormatName, Write]] = {
    "dense": dense.write,
    "gptq": gptq.write,
    "bnb-int8": bitsandbytes.write_int8,
    "bnb-nf4": bitsandbytes.write_nf4,
    "bnb-nf4-double": bitsandbytes.write_nf4_double,
}
