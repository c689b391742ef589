"""All formats that an artifact can be written in, without torch. `quantlab.exports.writers.table` lists the other part."""

from collections.abc import Mapping
from typing import Final, get_args

from quantlab.exports import bitsandbytes, dense, gptq
from quantlab.exports.target import Target
from quantlab.recipe.schemes import FormatName

TARGETS: Final[Mapping[FormatName, Target]] = {
    target.name: target
    for target in (dense.TARGET, gptq.TARGET, bitsandbytes.INT8, bitsandbytes.NF4, bitsandbytes.NF4_DOUBLE)
}
assert set(TARGETS) == set(get_args(FormatName)), "every word has its format"
