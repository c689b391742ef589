"""Banks of dense and of expanded matrices, and the choice of a bank for a number format, shape and device."""

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor, nn

from quantlab.numerics.integer import QuantizedMatrix
from quantlab.numerics.number_format import INT4, INT8, Element, NumberFormat
from quantlab.runtime.cuda.banks import COUNTERS, CudaMatrices
from quantlab.runtime.int4 import TorchInt4Matrices
from quantlab.runtime.int8 import Int8Matrices, Int8WeightMatrices
from quantlab.runtime.native import kernels
from quantlab.runtime.native_int4 import NativeInt4Matrices
from quantlab.runtime.products import (
    RowGroups,
    compute_dtype,
    dense_product,
    dispatch_by_rows,
    in_bands,
    join_groups,
    native_dense_limit,
    signed_nibbles,
    split_groups,
)


class DenseMatrices(nn.Module):
    """Floating-point matrices: weight [E, N, K] of `dtype`; on CUDA also the counters of the kernels."""

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

    def products(self, x: Tensor, groups: RowGroups) -> Tensor:
        """[T, K] -> [T, N], each row times the matrix of its group."""
        limit = native_dense_limit(x, self.weight)
        if limit < 0:
            parts = zip(split_groups(x, groups), groups.matrices, strict=True)
            return join_groups([dense_product(part, self._each[index]) for part, index in parts], x.dtype)
        return dispatch_by_rows(
            x,
            self.shape[1],
            groups,
            limit=limit,
            few=lambda slices, out: kernels.dense_product(x, self.weight, slices, out),
            many=lambda part, index: dense_product(part, self._each[index]),
        )


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

    def dense(self, index: int, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows start to stop of matrix `index`, expanded: [stop - start, K] of `dtype`."""
        q = self.q[index, start:stop]
        if self.number.bits == 4:
            q = signed_nibbles(torch.stack((q & 15, q >> 4), dim=-1).flatten(1))
        zero = None if self.zero is None else self.zero[index, start:stop]
        return QuantizedMatrix(q, self.scale[index, start:stop], self.number.bits, zero).dequantize(dtype)

    def products(self, x: Tensor, groups: RowGroups) -> Tensor:
        """[T, K] -> [T, N], each row times the matrix of its group."""
        compute = compute_dtype(x)
        rows = split_groups(x.to(compute), groups)
        return join_groups(
            [self._product(part, index) for part, index in zip(rows, groups.matrices, strict=True)], x.dtype
        )

    def _product(self, x: Tensor, index: int) -> Tensor:
        return in_bands(x, self.shape[1], lambda start, stop: self.dense(index, start, stop, x.dtype), dtype=x.dtype)


KernelMatrices = NativeInt4Matrices | TorchInt4Matrices | Int8WeightMatrices | Int8Matrices | CudaMatrices
QuantizedMatrices = KernelMatrices | ExpandedMatrices
Matrices = DenseMatrices | QuantizedMatrices

_BANKS: Final[Mapping[tuple[str, Element], tuple[type[KernelMatrices], ...]]] = {
    ("cpu", INT4): (NativeInt4Matrices, TorchInt4Matrices),
    ("cpu", INT8): (Int8Matrices, Int8WeightMatrices),
    ("cuda", INT4): (CudaMatrices,),
    ("cuda", INT8): (CudaMatrices,),
}
"""Banks with kernels for an element type on a device, fastest first."""


def choose_bank(
    number: NumberFormat, shape: tuple[int, int], scale_dtype: torch.dtype, device_type: str
) -> tuple[type[KernelMatrices] | None, tuple[str, ...]]:
    """The first bank that can hold matrices [N, K] of a format on a device, and the reasons of the banks before it.

    The bank is None if every bank declines.
    """
    banks = _BANKS.get((device_type, number.element), ())
    reasons = [] if banks else [f"no kernel for {number.element} on {device_type}"]
    for bank in banks:
        reason = bank.can_hold(number, shape, scale_dtype)
        if reason is None:
            return bank, tuple(reasons)
        reasons.append(reason)
    return None, tuple(reasons)


def quantized_matrices(
    number: NumberFormat,
    count: int,
    rows: int,
    columns: int,
    *,
    scale_dtype: torch.dtype,
    device: torch.device | None = None,
) -> QuantizedMatrices:
    """An uninitialized bank on `device` (the CPU if None): the first of `choose_bank`, else `ExpandedMatrices`."""
    device = torch.device("cpu") if device is None else device
    bank, reasons = choose_bank(number, (rows, columns), scale_dtype, device.type)
    with device:
        if bank is not None:
            return bank(number, count, rows, columns, scale_dtype=scale_dtype)
        return ExpandedMatrices(number, count, rows, columns, scale_dtype=scale_dtype, reasons=reasons)
