"""int4 weights in the layout of the native kernel."""

from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from quantlab.numerics.integer import QuantizedMatrix
from quantlab.runtime.native import kernels
from quantlab.runtime.native.library import library
from quantlab.runtime.products import Groups, band_rows, by_count, compute_dtype, joined, split

_ROWS: Final = 128
"""Up to this many rows the native kernel beats expanding a matrix (Zen 4, 2816x2048)."""
_LANES: Final = 16
_BLOCK: Final = 64


class NativeInt4Matrices(nn.Module):
    """int4 matrices with a scale per group of columns, of any number of rows, scales stored as they are.

    The layout is described in `native/int4.c`: 16 rows side by side, so that a product needs no sum across lanes, and blocks
    of 64 rows, so that a block is one stream from memory.

    Buffers: q [E, N', K/2] uint8 and scale [E, N'/16, G, 16] in its stored dtype; N' is N rounded up to a multiple of 16.
    """

    q: Tensor
    scale: Tensor

    def __init__(self, count: int, rows: int, columns: int, *, group_size: int, scale_dtype: torch.dtype) -> None:
        super().__init__()
        self.shape = (count, rows, columns)
        self.group_size = group_size
        lanes = -(-rows // _LANES)
        self.register_buffer("q", torch.zeros(count, lanes * _LANES, columns // 2, dtype=torch.uint8))
        self.register_buffer("scale", torch.zeros(count, lanes, columns // group_size, _LANES, dtype=scale_dtype))

    @staticmethod
    def fits(rows: int, columns: int, *, group_size: int | None, scale_dtype: torch.dtype) -> bool:
        """Whether the kernel is to be had and takes the shape and the scales."""
        return (
            rows > 0
            and group_size in {32, 64, 128}
            and columns % group_size == 0
            and scale_dtype in {torch.bfloat16, torch.float16}
            and library() is not None
        )

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

    def products(self, x: Tensor, groups: Groups) -> Tensor:
        """[T, K] -> [T, N], row by row with the matrix of its group."""
        _, rows, columns = self.shape
        if compute_dtype(x) == torch.float32:
            parts = zip(split(x, groups), groups.which, strict=True)
            return joined([self._expanded_product(part, index) for part, index in parts], x.dtype)
        shape = (rows, columns, self.group_size)
        return by_count(
            x,
            rows,
            groups,
            limit=_ROWS,
            few=lambda slices, out: kernels.int4_product(x, self.q, self.scale, shape, slices, out),
            many=lambda part, index: self._expanded_product(part.to(torch.bfloat16), index),
        )

    def dense(self, index: int, start: int, stop: int) -> Tensor:
        """Rows start to stop of matrix `index`, expanded and transposed: [K, stop - start] in the dtype of the scales."""
        shape = (*self.shape[1:], self.group_size)
        return kernels.int4_expand(self.q[index], self.scale[index], shape, start, stop)

    def _expanded_product(self, x: Tensor, index: int) -> Tensor:
        _, rows, columns = self.shape
        step = band_rows(columns)
        if rows <= step:
            return x @ self.dense(index, 0, rows).to(x.dtype)
        result = torch.empty(x.shape[0], rows, dtype=x.dtype)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            result[:, start:stop] = x @ self.dense(index, start, stop).to(x.dtype)
        return result
