"""Banks of int8 matrices with a scale per row, for floating-point activations (W8A16) and int8 activations (W8A8)."""

from collections.abc import Callable
from functools import partial
from typing import Final

import torch
from torch import Tensor, nn

from quantlab.numerics.integer import QuantizedMatrix
from quantlab.numerics.number_format import INT8, ROW, Activations, NumberFormat
from quantlab.runtime.banks.dense_product import band_dtype, in_bands
from quantlab.runtime.banks.exact_int8 import integer_product
from quantlab.runtime.banks.groups import RowGroups, dispatch_by_rows, join_groups, split_groups
from quantlab.runtime.native import kernels
from quantlab.runtime.native.library import library, product_library
from quantlab.runtime.processor import MATRIX_UNIT_ROWS, has_matrix_units

_PACKED_ROWS: Final = 24
"""Number of rows up to which torch's weight-only operator is faster than expanding the matrix (Zen 4, 2816x2048)."""

_ROWS_AVX2: Final = 128
"""Number of rows up to which the native W8A16 kernel for AVX2 is faster than expanding the matrix (Zen 3, 4096x4096)."""
_NATIVE_ROWS: Final = 128
"""Number of rows up to which the native W8A8 kernel is faster than torch's operator (Zen 4, 2816x2048)."""
_CHUNK_ROWS: Final = 256
"""Rows per call of the native W8A16 kernel: they stay in the last-level cache while the weights are streamed."""
_NATIVE_COLUMNS: Final = 1 << 16
"""Number of columns up to which the 32-bit sums of the native kernel cannot overflow."""

_weight_only_product: Final[Callable[[Tensor, Tensor, Tensor], Tensor]] = torch.ops.aten._weight_int8pack_mm.default


class Int8WeightMatrices(nn.Module):
    """W8A16: int8 weights with a scale per row, floating-point activations.

    Buffers: q [E, N, K] int8, scale [E, N] in its stored dtype.
    """

    q: Tensor
    scale: Tensor

    def __init__(self, number: NumberFormat, count: int, rows: int, columns: int, *, scale_dtype: torch.dtype) -> None:
        super().__init__()
        self.number = number
        self.shape = (count, rows, columns)
        self.register_buffer("q", torch.empty(count, rows, columns, dtype=torch.int8))
        self.register_buffer("scale", torch.empty(count, rows, dtype=scale_dtype))
        self._each, self._scales = self.q.unbind(0), self.scale.unbind(0)

    @staticmethod
    def can_hold(number: NumberFormat, shape: tuple[int, int], scale_dtype: torch.dtype) -> str | None:
        """The reason why the kernels cannot multiply by matrices [N, K] of a format; None if they can."""
        if number != NumberFormat(INT8, ROW):
            return "the int8 kernels for 16-bit activations: symmetric int8 with one scale per row only"
        # torch's operator reads past the end of a row if the number of columns is not a multiple of 16
        if shape[1] % 32:
            return "the int8 kernels for 16-bit activations: the number of columns is not a multiple of 32"
        return None

    def fill(self, index: int, matrix: QuantizedMatrix) -> None:
        """Set matrix `index`."""
        self._each[index].copy_(matrix.q)
        self._scales[index].copy_(matrix.scale[:, 0])

    def expand(self, index: int, start: int, out: Tensor) -> None:
        """Write the rows of matrix `index` from row `start` on, dequantized, to out [n, K] of float32 or bfloat16."""
        q, scale = self._each[index], self._scales[index]
        if product_library() is not None:
            kernels.int8_expand(q, scale, start, out)
            return
        some = slice(start, start + out.shape[0])
        out.copy_(QuantizedMatrix(q[some], scale[some, None], 8).dequantize(out.dtype))

    def integers(self, index: int) -> Tensor:
        """The stored integers of matrix `index`; every bit pattern is valid."""
        return self.q[index]

    def set_scales(self, index: int, scale: float) -> None:
        """Set the scale of every row of matrix `index`."""
        self.scale[index] = scale

    def products(self, x: Tensor, groups: RowGroups) -> Tensor:
        """[T, K] -> [T, N], each row times the matrix of its group."""
        if product_library() is None:
            return self._torch_products(x, groups)
        if x.dtype != torch.float32 and library() is not None and not has_matrix_units():
            out = torch.empty(x.shape[0], self.shape[1], dtype=x.dtype)
            kernels.int8_weight_product(x, self.q, self.scale, groups.chunked(_CHUNK_ROWS), out)
            return out
        few = _ROWS_AVX2 if library() is None else MATRIX_UNIT_ROWS
        return dispatch_by_rows(
            x,
            self.shape[1],
            groups,
            limit=0 if x.dtype == torch.float32 else few,
            few=lambda slices, out: kernels.int8_weight_product(x, self.q, self.scale, slices, out),
            many=self._expanded_product,
        )

    def _torch_products(self, x: Tensor, groups: RowGroups) -> Tensor:
        limit = 0 if x.dtype == torch.float32 else _PACKED_ROWS
        parts = [
            self._packed_product(part, index) if 0 < count <= limit else self._expanded_product(part, index)
            for part, index, count in zip(split_groups(x, groups), groups.matrices, groups.counts, strict=True)
        ]
        return join_groups(parts, x.dtype)

    def _packed_product(self, x: Tensor, index: int) -> Tensor:
        scale, rounded = self._scales[index], x.to(torch.bfloat16)
        if scale.dtype == torch.bfloat16:
            return _weight_only_product(rounded, self._each[index], scale).to(x.dtype)
        # the operator rounds scales to bfloat16: apply them afterwards
        ones = torch.ones(scale.shape, dtype=torch.bfloat16)
        return (_weight_only_product(rounded, self._each[index], ones) * scale.to(torch.float32)).to(x.dtype)

    def _expanded_product(self, x: Tensor, index: int) -> Tensor:
        return in_bands(x.to(band_dtype(x)), self.shape[1], partial(self.expand, index), x.dtype)


class Int8Matrices(nn.Module):
    """W8A8: int8 weights with a scale per row, int8 activations with a scale per token.

    The number format includes the rounding of activations: it is computed in float32 for activations of any dtype, in
    the same way for any number of rows. Integer products are exact.

    Buffers: q [E, N, K] int8, scale [E, N] in its stored dtype.
    """

    q: Tensor
    scale: Tensor

    def __init__(self, number: NumberFormat, count: int, rows: int, columns: int, *, scale_dtype: torch.dtype) -> None:
        super().__init__()
        self.number = number
        self.shape = (count, rows, columns)
        self.register_buffer("q", torch.empty(count, rows, columns, dtype=torch.int8))
        self.register_buffer("scale", torch.empty(count, rows, dtype=scale_dtype))
        self._each = self.q.unbind(0)

    @staticmethod
    def can_hold(number: NumberFormat, shape: tuple[int, int], scale_dtype: torch.dtype) -> str | None:
        """The reason why the kernels cannot multiply by matrices [N, K] of a format; None if they can."""
        if number != NumberFormat(INT8, ROW, activations=Activations(INT8)):
            return "the int8 kernels: symmetric int8 with one scale per row, and int8 activations per token, only"
        return None

    def fill(self, index: int, matrix: QuantizedMatrix) -> None:
        """Set matrix `index`."""
        self.q[index].copy_(matrix.q)
        self.scale[index].copy_(matrix.scale[:, 0])

    def integers(self, index: int) -> Tensor:
        """The stored integers of matrix `index`; every bit pattern is valid."""
        return self.q[index]

    def set_scales(self, index: int, scale: float) -> None:
        """Set the scale of every row of matrix `index`."""
        self.scale[index] = scale

    def products(self, x: Tensor, groups: RowGroups) -> Tensor:
        """[T, K] -> [T, N], each row times the matrix of its group."""
        if library() is not None and self.shape[2] <= _NATIVE_COLUMNS:
            return dispatch_by_rows(
                x,
                self.shape[1],
                groups,
                limit=MATRIX_UNIT_ROWS if has_matrix_units() else _NATIVE_ROWS,
                few=lambda slices, out: kernels.int8_product(x, self.q, self.scale, slices, out),
                many=lambda part, index: self._torch_product(part, index),
            )
        return self._torch_products(x, groups)

    def _torch_products(self, x: Tensor, groups: RowGroups) -> Tensor:
        quantized, token_scale = quantize_tokens(x)
        if len(groups.matrices) == 1:
            sums = integer_product(quantized, self._each[groups.matrices[0]])
        else:
            parts = zip(split_groups(quantized, groups), groups.matrices, strict=True)
            sums = torch.cat([integer_product(part, self._each[index]) for part, index in parts])
        row_scale = self.scale if groups.matrix_of_row is None else self.scale.index_select(0, groups.matrix_of_row)
        return (sums * token_scale).mul_(row_scale).to(x.dtype)

    def _torch_product(self, x: Tensor, index: int) -> Tensor:
        quantized, token_scale = quantize_tokens(x)
        sums = integer_product(quantized, self._each[index])
        return (sums * token_scale).mul_(self.scale[index]).to(x.dtype)


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round each token to a symmetric int8 grid with ``scale = max|x| / 127``.

    Args:
        x: [T, K] of any floating dtype.

    Returns:
        Integers [T, K] int8 and scales [T, 1] float32. A token of zeros becomes zeros. A token with NaN or infinity
        gets a scale that is not finite, so its products are not finite either.
    """
    largest = torch.linalg.vector_norm(x, ord=torch.inf, dim=1, keepdim=True, dtype=torch.float32)
    scale = (largest / 127).clamp_min_(2.0**-120)
    return torch.div(x, scale).round_().to(torch.int8), scale
