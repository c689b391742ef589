"""Fallback bank for integer formats without a kernel."""

from functools import partial

import torch
from torch import Tensor, nn

from quantlab.numerics.integer import QuantizedMatrix
from quantlab.numerics.number_format import NumberFormat
from quantlab.runtime.banks.dense_product import band_dtype, in_bands, signed_nibbles
from quantlab.runtime.banks.groups import RowGroups, join_groups, split_groups


class ExpandedMatrices(nn.Module):
    """Fallback for integer formats without a kernel: stored packed, expanded band by band for every product.

    Products are exact, and slow for few rows. int4 is stored two to a byte, so K is even.

    Buffers: q [E, N, K] int8 or [E, N, K/2] uint8; scale [E, N, G] in its stored dtype; zero [E, N, G] int8, None
    without zero points.

    Attributes:
        reasons: the reason of each bank of the device for declining.
    """

    q: Tensor
    scale: Tensor
    zero: Tensor | None

    def __init__(
        self,
        number: NumberFormat,
        count: int,
        rows: int,
        columns: int,
        *,
        scale_dtype: torch.dtype,
        reasons: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        self.number, self.reasons = number, reasons
        self.shape = (count, rows, columns)
        integers = (columns // 2, torch.uint8) if number.bits == 4 else (columns, torch.int8)
        scales = (count, *number.scale_shape((rows, columns)))
        self.register_buffer("q", torch.empty(count, rows, integers[0], dtype=integers[1]))
        self.register_buffer("scale", torch.empty(scales, dtype=scale_dtype))
        self.register_buffer("zero", None if number.symmetric else torch.zeros(scales, dtype=torch.int8))

    def fill(self, index: int, matrix: QuantizedMatrix) -> None:
        """Set matrix `index`."""
        q = matrix.q
        if self.number.bits == 4:
            nibbles = (q + 8).view(torch.uint8)
            q = nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)
        self.q[index].copy_(q)
        self.scale[index].copy_(matrix.scale)
        if self.zero is not None and matrix.zero is not None:
            self.zero[index].copy_(matrix.zero)

    def integers(self, index: int) -> Tensor:
        """The stored integers of matrix `index`; every bit pattern is valid."""
        return self.q[index]

    def set_scales(self, index: int, scale: float) -> None:
        """Set the scale of every group of matrix `index`."""
        self.scale[index] = scale

    def expand(self, index: int, start: int, out: Tensor) -> None:
        """Write the rows of matrix `index` from row `start` on, dequantized, to out [n, K] of any floating dtype."""
        some = slice(start, start + out.shape[0])
        q = self.q[index, some]
        if self.number.bits == 4:
            q = signed_nibbles(torch.stack((q & 15, q >> 4), dim=-1).flatten(1))
        zero = None if self.zero is None else self.zero[index, some]
        out.copy_(QuantizedMatrix(q, self.scale[index, some], self.number.bits, zero).dequantize(out.dtype))

    def products(self, x: Tensor, groups: RowGroups) -> Tensor:
        """[T, K] -> [T, N], each row times the matrix of its group."""
        parts = zip(split_groups(x.to(band_dtype(x)), groups), groups.matrices, strict=True)
        return join_groups([self._product(part, index, x.dtype) for part, index in parts], x.dtype)

    def _product(self, x: Tensor, index: int, dtype: torch.dtype) -> Tensor:
        return in_bands(x, self.shape[1], partial(self.expand, index), dtype)
