"""Bank of int4 matrices in the layout of the native kernel."""

from functools import partial
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from quantlab.numerics.integer import QuantizedMatrix
from quantlab.numerics.number_format import INT4, NumberFormat
from quantlab.runtime.banks.dense_product import band_dtype, in_bands
from quantlab.runtime.banks.groups import RowGroups, dispatch_by_rows
from quantlab.runtime.native import kernels
from quantlab.runtime.native.library import product_library, status
from quantlab.runtime.processor import MATRIX_UNIT_ROWS, has_matrix_units

_ROWS: Final = 128
"""Number of rows up to which the native kernel is faster than expanding the matrix (Zen 4, 2816x2048, and with AVX2
Zen 3, 4096x4096); with matrix units it is fewer."""
_LANES: Final = 16
_BLOCK: Final = 64


class NativeInt4Matrices(nn.Module):
    """int4 matrices with a scale per group of columns and any number of rows; scales keep their stored dtype.

    `native/int4.c` describes the layout. It interleaves 16 rows, so that a product needs no sum across SIMD lanes, and
    forms blocks of 64 rows, so that a block is read as one stream.

    Buffers: q [E, N', K/2] uint8; scale [E, N'/16, G, 16] in its stored dtype; N' is N rounded up to a multiple of 16.
    """

    q: Tensor
    scale: Tensor

    def __init__(self, number: NumberFormat, count: int, rows: int, columns: int, *, scale_dtype: torch.dtype) -> None:
        super().__init__()
        group_size = number.group_size
        assert group_size is not None, "can_hold was asked"
        self.number = number
        self.shape = (count, rows, columns)
        self.group_size = group_size
        lanes = -(-rows // _LANES)
        self.register_buffer("q", torch.zeros(count, lanes * _LANES, columns // 2, dtype=torch.uint8))
        self.register_buffer("scale", torch.zeros(count, lanes, columns // group_size, _LANES, dtype=scale_dtype))

    @staticmethod
    def can_hold(number: NumberFormat, shape: tuple[int, int], scale_dtype: torch.dtype) -> str | None:
        """The reason why the kernel cannot multiply by matrices [N, K] of a format; None if it can."""
        if number.element != INT4 or number.activations is not None:
            return "the native int4 kernel: int4 weights with floating-point activations only"
        if not number.symmetric:
            return "the native int4 kernel: no zero points"
        if not number.by_row or number.group_size not in {32, 64, 128} or not number.fits(shape) or not shape[0]:
            return "the native int4 kernel: groups of 32, 64 or 128 columns only"
        if scale_dtype not in {torch.bfloat16, torch.float16}:
            return "the native int4 kernel: 16-bit scales only"
        return None if product_library() is not None else f"the native int4 kernel: {status()}"

    def fill(self, index: int, matrix: QuantizedMatrix) -> None:
        """Set matrix `index`."""
        _, rows, columns = self.shape
        above = self.q.shape[1] - rows
        column = functional.pad((matrix.q + 8).view(torch.uint8), (0, 0, 0, above)).view(-1, columns // 8, 8)
        lanes = column[..., [0, 4, 1, 5]] | (column[..., [2, 6, 3, 7]] << 4)  # [N', K/8, 4]: 8 columns in 4 bytes
        whole = self.q.shape[1] // _BLOCK * _BLOCK
        blocks = lanes[:whole].view(-1, _BLOCK, columns // 8, 4).transpose(1, 2)
        self.q[index, :whole] = blocks.reshape(whole, columns // 2)
        self.q[index, whole:] = lanes[whole:].transpose(0, 1).reshape(-1, columns // 2)
        scale = functional.pad(matrix.scale, (0, 0, 0, above)).view(-1, _LANES, matrix.scale.shape[1])
        self.scale[index] = scale.transpose(1, 2)

    def integers(self, index: int) -> Tensor:
        """The stored integers of matrix `index`; every bit pattern is valid."""
        return self.q[index]

    def set_scales(self, index: int, scale: float) -> None:
        """Set the scale of every group of matrix `index`."""
        self.scale[index] = scale

    def products(self, x: Tensor, groups: RowGroups) -> Tensor:
        """[T, K] -> [T, N], each row times the matrix of its group."""
        _, rows, columns = self.shape
        shape = (rows, columns, self.group_size)
        return dispatch_by_rows(
            x,
            rows,
            groups,
            limit=0 if x.dtype == torch.float32 else MATRIX_UNIT_ROWS if has_matrix_units() else _ROWS,
            few=lambda slices, out: kernels.int4_product(x, self.q, self.scale, shape, slices, out),
            many=self._expanded_product,
        )

    def expand(self, index: int, start: int, out: Tensor) -> None:
        """Write rows of matrix `index`, dequantized and transposed, to out [K, n] of float32 or bfloat16.

        The first row, `start`, is a multiple of 16.
        """
        shape = (*self.shape[1:], self.group_size)
        kernels.int4_expand(self.q[index], self.scale[index], shape, start, out)

    def _expanded_product(self, x: Tensor, index: int) -> Tensor:
        expand = partial(self.expand, index)
        return in_bands(x.to(band_dtype(x)), self.shape[1], expand, x.dtype, transposed=True)
