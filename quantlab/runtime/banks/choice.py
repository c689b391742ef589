"""The choice of a bank for a number format, shape and device."""

from collections.abc import Mapping
from typing import Final

import torch

from quantlab.numerics.number_format import INT4, INT8, Element, NumberFormat
from quantlab.runtime.banks.dense import DenseMatrices
from quantlab.runtime.banks.expanded import ExpandedMatrices
from quantlab.runtime.banks.int4_native import NativeInt4Matrices
from quantlab.runtime.banks.int4_torch import TorchInt4Matrices
from quantlab.runtime.banks.int8 import Int8Matrices, Int8WeightMatrices
from quantlab.runtime.cuda.banks import CudaMatrices

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
