"""The schemes: what the numbers of a quantized linear look like, in memory and on disk.

A scheme says how wide the integers are, how many weights share a scale and whether activations are quantized too. What
tensors that makes on disk (compressed-tensors' formats, read by vLLM, SGLang and transformers) follows from it, so the
size of an artifact is known before a weight has been read.
"""

from dataclasses import dataclass
from typing import Literal

FloatDtype = Literal["float16", "bfloat16"]
SchemeName = Literal["int8", "int8_weight", "int4_g128", "int4_g64", "int4_g32"]
ForeignName = Literal["int4", "int8_weight_g128", "int8_weight_g64", "int8_weight_g32"]
"""Schemes that are read but not written: no recipe names them."""

DTYPE_WORDS: dict[FloatDtype, str] = {"float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True)
class Scheme:
    """How the weights of a linear [N, K] are stored.

    Attributes:
        name: the word of the recipe; of a scheme no recipe names, one like it.
        bits: width of the integers.
        group_size: columns that share a scale; None for one scale per row.
        quantized_activations: whether activations become int8 too, with one scale per token found at run time.
        description: one line for people.
    """

    name: SchemeName | ForeignName
    bits: int
    group_size: int | None
    quantized_activations: bool
    description: str

    @property
    def packed(self) -> bool:
        """Whether the integers are packed into int32 words (`pack-quantized`) or stored as int8 (`int-quantized`)."""
        return not self.quantized_activations

    @property
    def format(self) -> Literal["pack-quantized", "int-quantized"]:
        """The name of the layout in compressed-tensors."""
        return "pack-quantized" if self.packed else "int-quantized"

    @property
    def divisor(self) -> int:
        """What K must be a multiple of."""
        return self.group_size or 32 // self.bits

    def groups(self, columns: int) -> int:
        """Scales per row of a matrix with `columns` columns."""
        return columns // (self.group_size or columns)

    def stored_tensors(
        self, name: str, shape: tuple[int, int], dtype: str
    ) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
        """What the weight `name` [N, K] becomes on disk: name, dtype word and shape of each tensor.

        Args:
            name: the weight's name, ending in ".weight".
            shape: its rows and columns.
            dtype: dtype word of the scales.
        """
        rows, columns = shape
        prefix = name.removesuffix("weight")
        scale = (prefix + "weight_scale", dtype, (rows, self.groups(columns)))
        if not self.packed:
            return (name, "I8", shape), scale
        return (
            (prefix + "weight_packed", "I32", (rows, columns * self.bits // 32)),
            scale,
            (prefix + "weight_shape", "I64", (2,)),
        )


SCHEMES: dict[SchemeName, Scheme] = {
    "int8": Scheme("int8", 8, None, True, "W8A8: int8 weights per row, int8 activations per token"),
    "int8_weight": Scheme("int8_weight", 8, None, False, "W8A16: int8 weights per row"),
    "int4_g128": Scheme("int4_g128", 4, 128, False, "W4A16: int4 weights, one scale per 128"),
    "int4_g64": Scheme("int4_g64", 4, 64, False, "W4A16: int4 weights, one scale per 64"),
    "int4_g32": Scheme("int4_g32", 4, 32, False, "W4A16: int4 weights, one scale per 32"),
}
READABLE: tuple[Scheme, ...] = (
    *SCHEMES.values(),
    Scheme("int4", 4, None, False, "W4A16: int4 weights per row"),
    Scheme("int8_weight_g128", 8, 128, False, "W8A16: int8 weights, one scale per 128"),
    Scheme("int8_weight_g64", 8, 64, False, "W8A16: int8 weights, one scale per 64"),
    Scheme("int8_weight_g32", 8, 32, False, "W8A16: int8 weights, one scale per 32"),
)
"""Every scheme artifacts made elsewhere may have."""


def find_scheme(bits: int, group_size: int | None, *, quantized_activations: bool = False) -> Scheme | None:
    """The readable scheme of these numbers, None if there is none."""
    wanted = (bits, group_size, quantized_activations)
    found = (s for s in READABLE if (s.bits, s.group_size, s.quantized_activations) == wanted)
    return next(found, None)
