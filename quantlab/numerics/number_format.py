"""Number formats as values: the element type of a quantized matrix, and the elements that share a scale and a zero
point.

The parts are orthogonal: any element type can be combined with any granularity. Layouts decide which formats they
store, and banks of the runtime which they compute with. Nothing here needs torch: the plan computes sizes with it.

Legend: a matrix [N, K] has N rows (outputs) and K columns (inputs).
"""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Element:
    """The type of one stored number.

    Attributes:
        kind: integers, or floating point.
        bits: width.
        layout: name of the bits of a floating-point type, for example "e4m3"; empty for integers.
    """

    kind: Literal["int", "float"]
    bits: int
    layout: str = ""

    def __str__(self) -> str:
        if self == NF4:
            return "NF4"
        return f"int{self.bits}" if self.kind == "int" else f"FP{self.bits} {self.layout}"


INT4 = Element("int", 4)
INT8 = Element("int", 8)
E4M3 = Element("float", 8, "e4m3")
"""float8_e4m3fn: four bits of exponent, three of mantissa, no infinities; the largest number is 448."""

NF4 = Element("float", 4, "nf4")
"""Normal float: 16 levels, the quantiles of a normal distribution (QLoRA, arXiv:2305.14314)."""


@dataclass(frozen=True)
class Granularity:
    """The block of a matrix that shares one scale, counted from the first row and column.

    Attributes:
        rows: rows of a block; None for all.
        columns: columns of a block; None for all.
    """

    rows: int | None
    columns: int | None


TENSOR = Granularity(None, None)
ROW = Granularity(1, None)


def group(size: int) -> Granularity:
    """`size` consecutive columns of one row."""
    return Granularity(1, size)


def block(rows: int, columns: int) -> Granularity:
    """`rows` x `columns` elements; the last blocks of a matrix may be smaller (ragged)."""
    return Granularity(rows, columns)


@dataclass(frozen=True)
class Activations:
    """Dynamic quantization of activations: rounded at run time to a symmetric grid whose scale is computed there.

    Attributes:
        element: type of the rounded values.
        group_size: consecutive channels of a token that share a scale; None for one scale per token.
    """

    element: Element
    group_size: int | None = None


@dataclass(frozen=True)
class NumberFormat:
    """The number format of a quantized linear [N, K].

    Attributes:
        element: type of the stored weights.
        granularity: weights that share a scale.
        symmetric: whether zero is the middle of the grid; if not, there is a zero point for each scale.
        scale: dtype word of the scales, for example "F32"; empty for the 16-bit dtype of the artifact.
        activations: quantization of the activations; None if they stay floating point.
    """

    element: Element
    granularity: Granularity
    symmetric: bool = True
    scale: str = ""
    activations: Activations | None = None

    @property
    def bits(self) -> int:
        """Width of a stored weight."""
        return self.element.bits

    @property
    def is_integer(self) -> bool:
        """Whether the weights are integers."""
        return self.element.kind == "int"

    @property
    def by_row(self) -> bool:
        """Whether every scale belongs to one row: one per row, or one per group of its columns."""
        return self.granularity.rows == 1

    @property
    def group_size(self) -> int | None:
        """Columns that share a scale; None for whole rows."""
        return self.granularity.columns

    @property
    def divisor(self) -> int:
        """Required divisor of K: groups and the 32-bit words of packed integers must be whole; blocks may be ragged."""
        return self.group_size or 32 // self.bits if self.by_row else 1

    @property
    def shard(self) -> tuple[int, int]:
        """Required divisors of the rows and columns of a tensor-parallel shard.

        Zero points of consecutive rows share a word of 32 bits.
        """
        return self.granularity.rows or 1 if self.symmetric else 32 // self.bits, self.group_size or self.divisor

    def groups(self, columns: int) -> int:
        """Scales per row, or per row of blocks, of a matrix with `columns` columns."""
        return math.ceil(columns / (self.group_size or columns))

    def scale_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Shape of the scales of a matrix [N, K]."""
        return math.ceil(shape[0] / (self.granularity.rows or shape[0])), self.groups(shape[1])

    def fits(self, shape: tuple[int, int]) -> bool:
        """Whether K is a multiple of the group size; blocks may be ragged."""
        return not (self.by_row and self.group_size and shape[1] % self.group_size)

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight including scales and zero points; scales per row or per matrix are neglected."""
        rows, columns = self.granularity.rows, self.granularity.columns
        if rows is None or columns is None:
            return float(self.bits)
        beside = (32 if self.scale == "F32" else 16) + (0 if self.symmetric else self.bits)
        return self.bits + beside / (rows * columns)

    @property
    def name(self) -> str:
        """Short name, for tables; schemes of the recipe use the same names."""
        if not self.is_integer:
            rows, columns = self.granularity.rows, self.granularity.columns
            if self.element == NF4:
                return f"nf4_g{columns}"
            if rows is None or columns is None:
                return f"fp{self.bits}" + ("_tensor" if rows is None else "")
            return f"fp{self.bits}_block" if (rows, columns) == (128, 128) else f"fp{self.bits}_block_{rows}x{columns}"
        word = f"int{self.bits}" + ("_weight" if self.bits == 8 and self.activations is None else "")
        return word + (f"_g{self.group_size}" if self.group_size else "") + ("" if self.symmetric else "_asym")

    @property
    def description(self) -> str:
        """One readable line: "W4A16: int4 weights, one scale per 128"."""
        activations = self.activations
        words = (
            f"W{self.bits}A{activations.element.bits if activations else 16}: {self.element} weights{self._shared()}"
        )
        if not self.symmetric:
            words += " and zero point"
        if activations is not None:
            per = f"{activations.group_size} channels" if activations.group_size else "token"
            words += f", {activations.element} activations per {per}"
        return words

    def _shared(self) -> str:
        rows, columns = self.granularity.rows, self.granularity.columns
        if rows != 1:
            return " per matrix" if rows is None else f", one scale per {rows} x {columns}"
        if not columns:
            return " per row" if self.symmetric else ", one scale per row"
        return f", one scale per {columns}"
