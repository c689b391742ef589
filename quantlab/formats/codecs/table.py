"""The codec of every layout: matrices to stored tensors and back. `quantlab.formats.layouts` lists the other part."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final

from torch import Tensor

from quantlab.formats.codecs import bitsandbytes, compressed_tensors, fp8_blocks, gptq
from quantlab.numerics.integer import QuantizedMatrix
from quantlab.numerics.number_format import NumberFormat
from quantlab.recipe.schemes import LayoutName


@dataclass(frozen=True)
class Codec:
    """Encoder and decoder of a layout.

    Attributes:
        encode: weight name and matrix -> its tensors by name, in the order of the layout; None for layouts that are only read.
        decode: weight name, its tensors by name and its format -> the matrix.
    """

    encode: Callable[[str, QuantizedMatrix], dict[str, Tensor]] | None
    decode: Callable[[str, Mapping[str, Tensor], NumberFormat], QuantizedMatrix]


CODECS: Final[Mapping[LayoutName, Codec]] = {
    "pack-quantized": Codec(compressed_tensors.encode_packed, compressed_tensors.decode),
    "int-quantized": Codec(compressed_tensors.encode_plain, compressed_tensors.decode),
    "float-quantized": Codec(compressed_tensors.encode_plain, compressed_tensors.decode_floats),
    "gptq": Codec(partial(gptq.encode, zero_offset=1), partial(gptq.decode, zero_offset=1)),
    "gptq_v2": Codec(partial(gptq.encode, zero_offset=0), partial(gptq.decode, zero_offset=0)),
    "bnb-int8": Codec(None, bitsandbytes.decode_integers),
    "bnb-nf4": Codec(None, bitsandbytes.decode_levels),
    "fp8-blocks": Codec(fp8_blocks.encode, fp8_blocks.decode),
}


def encode(layout: LayoutName, name: str, weight: Tensor | QuantizedMatrix) -> dict[str, Tensor]:
    """The stored tensors of the weight `name` in a layout, by name and in the order of the plan."""
    if isinstance(weight, Tensor):
        assert layout == "dense", "a layout of quantized weights stores matrices with scales"
        return {name: weight}
    codec = CODECS[layout]
    assert codec.encode is not None, f"{layout} is only read"
    return codec.encode(name, weight)
