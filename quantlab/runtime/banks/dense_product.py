"""Products with floating-point matrices on the CPU, and with matrices expanded band by band on any device."""

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from quantlab.runtime.banks.groups import single_group
from quantlab.runtime.native import kernels
from quantlab.runtime.native.library import library
from quantlab.runtime.processor import MATRIX_UNIT_ROWS, has_matrix_units, multiplies_bfloat16, multiplies_float16

_SIXTEEN_BIT_ROWS: Final = 4
"""Up to this many rows a 16-bit product beats expanding its matrix to float32 (Zen 3 and Zen 4)."""


_NATIVE_ROWS: Final = {torch.float16: 128, torch.bfloat16: 48}
"""Up to this many rows the native kernel beats torch (Zen 4, 2816x2048); with matrix units, fewer bfloat16 rows."""


_BAND_ELEMENTS: Final = 1 << 19
"""Weights expanded at once: 2 MB in float32, 1 MB in bfloat16 (Zen 3 and Zen 4)."""


_BAND_ELEMENTS_MATRIX_UNITS: Final = 1 << 21
"""The same with matrix units: fewer and longer products, 4 MB in bfloat16 (Intel Xeon with AMX and 2 MB of cache a core)."""


BAND_ROWS: Final = 64
"""Bands start and end at multiples of this number of rows: torch's int4 layout interleaves up to 64 rows."""


def native_dense_limit(x: Tensor, weight: Tensor) -> int:
    """Number of rows of x up to which the native kernel is fastest for weight [..., N, K]; -1 if it is unavailable."""
    if x.dtype != weight.dtype or x.device.type != "cpu" or library() is None:
        return -1
    limit = _NATIVE_ROWS.get(weight.dtype, -1)
    return min(limit, MATRIX_UNIT_ROWS) if weight.dtype == torch.bfloat16 and has_matrix_units() else limit


def dense_product(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight^T``: [..., K] and [N, K] of one dtype -> [..., N].

    A 16-bit weight is expanded to float32 in bands if the processor has no products of its dtype.
    """
    if x.numel() <= native_dense_limit(x, weight) * weight.shape[1]:
        flat = x.reshape(-1, x.shape[-1])
        out = torch.empty(*x.shape[:-1], weight.shape[0], dtype=x.dtype)
        kernels.dense_product(flat, weight.unsqueeze(0), single_group(flat.shape[0]).slices, out)
        return out
    return _torch_dense_product(x, weight)


def _torch_dense_product(x: Tensor, weight: Tensor) -> Tensor:
    if x.device.type != "cpu" or x.numel() <= _SIXTEEN_BIT_ROWS * weight.shape[1] or _multiplies(weight.dtype):
        return functional.linear(x, weight)
    flat = x.reshape(-1, x.shape[-1]).to(torch.float32)
    result = in_bands(flat, weight.shape[0], lambda start, out: out.copy_(weight[start : start + len(out)]), x.dtype)
    return result.view(*x.shape[:-1], -1)


def _multiplies(dtype: torch.dtype) -> bool:
    """Whether products of many rows are at least as fast in this dtype as in float32."""
    if dtype == torch.bfloat16:
        return multiplies_bfloat16()
    return dtype != torch.float16 or multiplies_float16()


def band_rows(columns: int) -> int:
    """Number of rows in a band of a matrix with `columns` columns: the rows that are expanded at once."""
    elements = _BAND_ELEMENTS_MATRIX_UNITS if has_matrix_units() else _BAND_ELEMENTS
    return max(elements // columns // BAND_ROWS, 1) * BAND_ROWS


def in_bands(
    x: Tensor, rows: int, expand: Callable[[int, Tensor], object], dtype: torch.dtype, *, transposed: bool = False
) -> Tensor:
    """``x @ W^T`` [T, N] of `dtype`, with W expanded band by band into the same few megabytes.

    The memory belongs to the call, so several threads may multiply by the same matrix.

    Args:
        x: [T, K].
        rows: N.
        expand: writes the rows of W that start at a row to a contiguous tensor [n, K] in the dtype of x.
        dtype: of the result.
        transposed: whether `expand` writes to [K, n] instead.
    """
    columns, step = x.shape[1], min(band_rows(x.shape[1]), max(rows, 1))
    memory = x.new_empty(step * columns)
    result = x.new_empty(x.shape[0], rows, dtype=dtype)
    for start in range(0, rows, step):
        count = min(step, rows - start)
        band = memory[: count * columns].view((columns, count) if transposed else (count, columns))
        expand(start, band)
        result[:, start : start + count] = functional.linear(x, band.t() if transposed else band)
    return result


def band_dtype(x: Tensor) -> torch.dtype:
    """The dtype of products with bands: bfloat16 for 16-bit activations if the processor multiplies it, else float32.

    A GPU multiplies every dtype.
    """
    if x.device.type != "cpu":
        return x.dtype
    return torch.bfloat16 if x.dtype != torch.float32 and multiplies_bfloat16() else torch.float32


def signed_nibbles(nibbles: Tensor) -> Tensor:
    """Stored nibbles 0 … 15 (uint8, overwritten) -> the integers -8 … 7 (int8) that they encode."""
    return nibbles.view(torch.int8).sub_(8)
