"""The table of schemes: number format, layout, and default convention of the scales.

Formats that are only read need no entry: reading builds the `NumberFormat` from the checkpoint's description.
"""

from dataclasses import dataclass
from typing import Final, Literal, get_args

from quantlab.numerics.number_format import E4M3, INT4, INT8, ROW, Activations, NumberFormat, block, group

FloatDtype = Literal["float16", "bfloat16"]
SchemeName = Literal[
    "int8", "int8_weight", "int4_g128", "int4_g64", "int4_g32", "int4_g128_asym", "int4_g64_asym", "int4_g32_asym", "fp8_block"
]  # fmt: skip
LayoutName = Literal[
    "dense",
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "gptq",
    "gptq_v2",
    "fp8-blocks",
    "bnb-int8",
    "bnb-nf4",
]
"""Layouts of a weight on disk; `quantlab.formats.layouts` has an object for each."""
FormatName = Literal["compressed-tensors", "dense", "gptq", "gguf", "onnx", "bnb-int8", "bnb-nf4", "bnb-nf4-double"]
"""Formats of other programs that an artifact can be written in; `quantlab.exports.targets` has an object for each."""
DefaultGrid = Literal["absmax", "signed", "minmax"]
DefaultClip = Literal["none", "mse"]

DTYPE_WORDS: dict[FloatDtype, str] = {"float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True)
class Scheme:
    """A scheme.

    Attributes:
        format: number format of a quantized linear.
        layout: its layout on disk.
        grid: default convention of the scales (see `quantlab.algorithms.scales`); None for floating-point formats.
        clip: default search for the scales by `rtn`: `mse` for integers of few steps, whose outliers cost the others most.
    """

    format: NumberFormat
    layout: LayoutName
    grid: DefaultGrid | None
    clip: DefaultClip = "none"

    @property
    def name(self) -> str:
        """The name in the recipe."""
        return self.format.name

    @property
    def description(self) -> str:
        """The number format in one readable line."""
        return self.format.description


SCHEMES: Final[dict[SchemeName, Scheme]] = {
    "int8": Scheme(NumberFormat(INT8, ROW, activations=Activations(INT8)), "int-quantized", "absmax"),
    "int8_weight": Scheme(NumberFormat(INT8, ROW), "pack-quantized", "absmax"),
    "int4_g128": Scheme(NumberFormat(INT4, group(128)), "pack-quantized", "signed", clip="mse"),
    "int4_g64": Scheme(NumberFormat(INT4, group(64)), "pack-quantized", "signed", clip="mse"),
    "int4_g32": Scheme(NumberFormat(INT4, group(32)), "pack-quantized", "signed", clip="mse"),
    "int4_g128_asym": Scheme(NumberFormat(INT4, group(128), symmetric=False), "pack-quantized", "minmax", clip="mse"),
    "int4_g64_asym": Scheme(NumberFormat(INT4, group(64), symmetric=False), "pack-quantized", "minmax", clip="mse"),
    "int4_g32_asym": Scheme(NumberFormat(INT4, group(32), symmetric=False), "pack-quantized", "minmax", clip="mse"),
    "fp8_block": Scheme(
        NumberFormat(E4M3, block(128, 128), scale="F32", activations=Activations(E4M3, 128)), "fp8-blocks", None
    ),
}
assert set(SCHEMES) == set(get_args(SchemeName)), "every word has its scheme"
assert all(word == scheme.format.name for word, scheme in SCHEMES.items()), "a word is the name of its number format"
