"""Bank of int4 matrices in the layout of torch's CPU operator."""

from collections.abc import Callable
from functools import cache
from typing import Final

import torch
from torch import Tensor, nn

from quantlab.numerics.integer import QuantizedMatrix
from quantlab.numerics.number_format import INT4, NumberFormat
from quantlab.runtime.banks.dense_product import BAND_ROWS, band_dtype, band_rows, signed_nibbles
from quantlab.runtime.banks.groups import RowGroups, join_groups, split_groups
from quantlab.runtime.processor import multiplies_bfloat16

_PACKED_ROWS: Final = 48
"""Number of rows up to which torch's operator is faster than expanding the matrix (Zen 4, 2816x2048)."""
_PACKED_ROWS_AVX2: Final = 16
"""The same without bfloat16 products (Zen 3, 4096x4096)."""

_product: Final[Callable[[Tensor, Tensor, int, Tensor], Tensor]] = torch.ops.aten._weight_int4pack_mm_for_cpu.default
_pack: Final[Callable[[Tensor, int], Tensor]] = torch.ops.aten._convert_weight_to_int4pack_for_cpu.default


class TorchInt4Matrices(nn.Module):
    """int4 matrices with a scale, and optionally a zero point, per group of columns.

    The operator computes ``(nibble - 8) * scale + offset`` with bfloat16 pairs (scale, offset), where ``offset = -zero
    * scale``. float16 scales and offsets have more mantissa bits than bfloat16. To stay exact, they are stored as a sum
    of two bfloat16 numbers, and a product makes two passes over the integers.

    Buffers: packed [E, N, K/2] uint8; scale [E, G, N, 2] bfloat16 pairs (scale, offset); remainder like scale, None for
    bfloat16 scales without zero points; zero [E, G, N] int8, None without zero points.
    """

    packed: Tensor
    scale: Tensor
    remainder: Tensor | None
    zero: Tensor | None

    def __init__(self, number: NumberFormat, count: int, rows: int, columns: int, *, scale_dtype: torch.dtype) -> None:
        super().__init__()
        group_size = number.group_size
        assert group_size is not None, "can_hold was asked"
        self.number = number
        self.shape = (count, rows, columns)
        self.group_size, self.scale_dtype = group_size, scale_dtype
        pairs = (count, columns // group_size, rows, 2)
        self.register_buffer("packed", torch.empty(count, rows, columns // 2, dtype=torch.uint8))
        self.register_buffer("scale", torch.zeros(pairs, dtype=torch.bfloat16))
        exact = scale_dtype == torch.bfloat16 and number.symmetric
        self.register_buffer("remainder", None if exact else torch.zeros(pairs, dtype=torch.bfloat16))
        self.register_buffer("zero", None if number.symmetric else torch.zeros(pairs[:-1], dtype=torch.int8))
        self._each = self.packed.unbind(0)
        self._scales = self.scale.unbind(0)
        self._remainders = None if self.remainder is None else self.remainder.unbind(0)

    @staticmethod
    def can_hold(number: NumberFormat, shape: tuple[int, int], scale_dtype: torch.dtype) -> str | None:
        """The reason why torch's operator cannot multiply exactly by matrices [N, K] of a format; None if it can."""
        if number.element != INT4 or number.activations is not None:
            return "torch's int4 operator: int4 weights with floating-point activations only"
        if int4_block() is None:
            return "torch's int4 operator: its layout on this CPU is unknown"
        if shape[0] % BAND_ROWS:
            return f"torch's int4 operator: the number of rows is not a multiple of {BAND_ROWS}"
        if not number.by_row or number.group_size not in {32, 64, 128} or not number.fits(shape):
            return "torch's int4 operator: groups of 32, 64 or 128 columns only"
        if scale_dtype not in {torch.bfloat16, torch.float16}:
            return "torch's int4 operator: float32 scales would be rounded"
        return None

    def fill(self, index: int, matrix: QuantizedMatrix) -> None:
        """Set matrix `index`."""
        self._each[index].copy_(_pack(matrix.q.to(torch.int32) + 8, 1))
        scale = matrix.scale.t().to(torch.float32)
        pairs = torch.stack((scale, torch.zeros_like(scale)), dim=-1)
        if self.zero is not None and matrix.zero is not None:
            self.zero[index] = matrix.zero.t()
            pairs[:, :, 1] = self.zero[index] * -scale
        self.scale[index] = pairs
        if self.remainder is not None:
            self.remainder[index] = pairs - self.scale[index].to(torch.float32)

    def integers(self, index: int) -> Tensor:
        """The stored integers of matrix `index`; every bit pattern is valid."""
        return self.packed[index]

    def set_scales(self, index: int, scale: float) -> None:
        """Set the scale of every group of matrix `index`."""
        self.scale[index, :, :, 0] = scale

    def products(self, x: Tensor, groups: RowGroups) -> Tensor:
        """[T, K] -> [T, N], each row times the matrix of its group."""
        limit = 0 if x.dtype == torch.float32 else _PACKED_ROWS if multiplies_bfloat16() else _PACKED_ROWS_AVX2
        parts = [
            self._packed_product(part.to(torch.bfloat16), index)
            if 0 < count <= limit
            else self._expanded_product(part.to(band_dtype(x)), index)
            for part, index, count in zip(split_groups(x, groups), groups.matrices, groups.counts, strict=True)
        ]
        return join_groups([part.to(x.dtype) for part in parts], x.dtype)

    def _packed_product(self, x: Tensor, index: int) -> Tensor:
        result = _product(x, self._each[index], self.group_size, self._scales[index])
        if self._remainders is None:
            return result
        rest = _product(x, self._each[index], self.group_size, self._remainders[index])
        return result.to(torch.float32) + rest

    def _expanded_product(self, x: Tensor, index: int) -> Tensor:
        block = int4_block()
        assert block is not None, "can_hold requires a known layout"
        _, rows, columns = self.shape
        result = torch.empty(x.shape[0], rows // block, 2, block // 2, dtype=x.dtype)
        step = band_rows(columns) // block
        for start in range(0, rows // block, step):
            band = slice(start, min(start + step, rows // block))
            product = x @ self._expanded_halves(index, band, block).to(x.dtype)
            result[:, band] = product.view(x.shape[0], 2, band.stop - band.start, block // 2).transpose(1, 2)
        return result.view(x.shape[0], rows)

    def _expanded_halves(self, index: int, band: slice, block: int) -> Tensor:
        """Some blocks of matrix `index`, transposed: [K, n] in the dtype of the scales, low nibbles before high ones.

        Reordering the few rows of the product afterwards is cheaper than reordering the rows of the matrix here.
        """
        _, rows, columns = self.shape
        some = slice(band.start * block, band.stop * block)
        scale = self._scales[index][:, some, 0].to(self.scale_dtype)
        if self._remainders is not None:
            scale = scale + self._remainders[index][:, some, 0].to(self.scale_dtype)
        halves = _halves(scale, block)
        zeros = None if self.zero is None else _halves(self.zero[index][:, some], block)
        # put blocks side by side instead of below each other, copying eight bytes at a time
        words = self._each[index].view(torch.int64).view(rows // block, columns, block // 16)[band]
        pairs = words.transpose(0, 1).contiguous().view(torch.uint8).view(scale.shape[0], self.group_size, -1)
        expanded = torch.empty(scale.shape[0], self.group_size, 2, pairs.shape[2], dtype=self.scale_dtype)
        for half, nibbles in enumerate((pairs & 15, pairs >> 4)):
            steps = signed_nibbles(nibbles) if zeros is None else signed_nibbles(nibbles) - zeros[:, :, half]
            torch.mul(steps.to(self.scale_dtype), halves[:, :, half], out=expanded[:, :, half])
        return expanded.view(columns, -1)


def _halves(values: Tensor, block: int) -> Tensor:
    """Reorder one value per row [G, n] like the nibbles of the row blocks: [G, 1, 2, n / 2]."""
    return values.reshape(values.shape[0], 1, -1, 2, block // 2).transpose(2, 3).flatten(3)


@cache
def int4_block() -> int | None:
    """Number of rows that torch's int4 layout interleaves on this CPU; None if this file cannot expand the layout.

    The layout is undocumented and depends on the vector width torch chose at start, so this function packs a known
    matrix and compares.
    """
    known = torch.arange(BAND_ROWS * 2).view(BAND_ROWS, 2).mul(7).remainder(16).to(torch.int32)
    packed = _pack(known, 1)
    for block in (64, 32):
        pairs = packed.view(BAND_ROWS // block, 2, block // 2)
        expanded = torch.cat((pairs & 15, pairs >> 4), dim=-1)  # low nibbles: the first half of the block's rows
        if torch.equal(expanded.transpose(1, 2).reshape(BAND_ROWS, 2).to(torch.int32), known):
            return block
    return None
