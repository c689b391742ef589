"""The banks there are, and which of them holds a weight."""

from typing import cast

import torch
from torch import Tensor, nn

from quantlab.numerics.integer import QuantizedMatrix
from quantlab.recipe.schemes import Scheme
from quantlab.runtime.cuda.banks import COUNTERS, CudaMatrices
from quantlab.runtime.int4 import Int4Matrices
from quantlab.runtime.int8 import Int8Matrices, Int8WeightMatrices
from quantlab.runtime.native import kernels
from quantlab.runtime.native_int4 import NativeInt4Matrices
from quantlab.runtime.products import (
    Groups,
    by_count,
    centred,
    compute_dtype,
    dense_product,
    in_bands,
    joined,
    native_dense_limit,
    split,
)


class DenseMatrices(nn.Module):
    """Floating-point matrices: weight [E, N, K] of `dtype`; on CUDA also counters of the kernels."""

    weight: nn.Parameter
    arrived: Tensor

    def __init__(self, count: int, rows: int, columns: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape = (count, rows, columns)
        self.weight = nn.Parameter(torch.empty(count, rows, columns, dtype=dtype), requires_grad=False)
        self._each = self.weight.unbind(0)
        if self.weight.is_cuda:
            counters = torch.zeros(COUNTERS, dtype=torch.int32, device=self.weight.device)
            self.register_buffer("arrived", counters, persistent=False)

    def fill(self, index: int, matrix: Tensor) -> None:
        """Set matrix `index` from [N, K] of any floating dtype."""
        self.weight[index].copy_(matrix)

    def products(self, x: Tensor, groups: Groups) -> Tensor:
        """[T, K] -> [T, N], row by row with the matrix of its group."""
        limit = native_dense_limit(x, self.weight)
        if limit < 0:
            parts = zip(split(x, groups), groups.which, strict=True)
            return joined([dense_product(part, self._each[index]) for part, index in parts], x.dtype)
        return by_count(
            x,
            self.shape[1],
            groups,
            limit=limit,
            few=lambda slices, out: kernels.dense_product(x, self.weight, slices, out),
            many=lambda part, index: dense_product(part, self._each[index]),
        )


class ExpandedMatrices(nn.Module):
    """Integers of a shape or with scales no packed operator takes: stored small, expanded band by band for every product.

    Slow at few rows, and exact. int4 is stored two to a byte, so K is even.

    Buffers: q [E, N, K] int8 or [E, N, K/2] uint8; scale [E, N, G] in its stored dtype.
    """

    q: Tensor
    scale: Tensor

    def __init__(
        self, count: int, rows: int, columns: int, *, bits: int, groups: int, scale_dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.shape = (count, rows, columns)
        self.bits = bits
        integers = (columns // 2, torch.uint8) if bits == 4 else (columns, torch.int8)
        self.register_buffer("q", torch.empty(count, rows, integers[0], dtype=integers[1]))
        self.register_buffer("scale", torch.empty(count, rows, groups, dtype=scale_dtype))

    def fill(self, index: int, matrix: QuantizedMatrix) -> None:
        """Set matrix `index`."""
        q = matrix.q
        if self.bits == 4:
            nibbles = (q + 8).view(torch.uint8)
            q = nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)
        self.q[index].copy_(q)
        self.scale[index].copy_(matrix.scale)

    def dense(self, index: int, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows start to stop of matrix `index`, expanded: [stop - start, K] of `dtype`."""
        q = self.q[index, start:stop]
        if self.bits == 4:
            q = centred(torch.stack((q & 15, q >> 4), dim=-1).flatten(1))
        return QuantizedMatrix(q, self.scale[index, start:stop], self.bits).dequantize(dtype)

    def products(self, x: Tensor, groups: Groups) -> Tensor:
        """[T, K] -> [T, N], row by row with the matrix of its group."""
        compute = compute_dtype(x)
        rows = split(x.to(compute), groups)
        return joined([self._product(part, index) for part, index in zip(rows, groups.which, strict=True)], x.dtype)

    def _product(self, x: Tensor, index: int) -> Tensor:
        return in_bands(x, self.shape[1], lambda start, stop: self.dense(index, start, stop, x.dtype), dtype=x.dtype)


QuantizedMatrices = (
    NativeInt4Matrices | Int4Matrices | Int8WeightMatrices | Int8Matrices | CudaMatrices | ExpandedMatrices
)
Matrices = DenseMatrices | QuantizedMatrices


def quantized_matrices(
    scheme: Scheme, count: int, rows: int, columns: int, *, scale_dtype: torch.dtype, device: torch.device | None = None
) -> QuantizedMatrices:
    """An unfilled bank on `device` (the CPU if None) of the kind that computes `scheme` best at this shape.

    Every device has its own layouts; this is the one place that chooses among them.
    """
    if device is not None and device.type != "cpu":
        with device:
            if CudaMatrices.fits(scheme, columns, scale_dtype=scale_dtype):
                return CudaMatrices(scheme, count, rows, columns, scale_dtype=scale_dtype)
            return ExpandedMatrices(
                count, rows, columns, bits=scheme.bits, groups=scheme.groups(columns), scale_dtype=scale_dtype
            )
    if scheme.quantized_activations:
        return Int8Matrices(count, rows, columns, scale_dtype=scale_dtype)
    for bank in (NativeInt4Matrices, Int4Matrices) if scheme.bits == 4 else ():
        if bank.fits(rows, columns, group_size=scheme.group_size, scale_dtype=scale_dtype):
            return bank(count, rows, columns, group_size=cast("int", scheme.group_size), scale_dtype=scale_dtype)
    if scheme.bits == 8 and scheme.group_size is None and Int8WeightMatrices.fits(columns):
        return Int8WeightMatrices(count, rows, columns, scale_dtype=scale_dtype)
    return ExpandedMatrices(
        count, rows, columns, bits=scheme.bits, groups=scheme.groups(columns), scale_dtype=scale_dtype
    )
