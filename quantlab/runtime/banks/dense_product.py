"""Products with floating-point matrices on the CPU, and with matrices expanded band by band."""

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from quantlab.runtime.banks.groups import single_group
from quantlab.runtime.native import kernels
from quantlab.runtime.native.library import library

_FLOAT16_ROWS: Final = 4
"""Up to this many rows a float16 product beats expanding its matrix to float32 (Zen 4, 2816x2048)."""


_NATIVE_ROWS: Final = {torch.float16: 128, torch.bfloat16: 48}
"""Up to this many rows the native kernel beats torch (Zen 4, 2816x2048)."""


_BAND_ELEMENTS: Final = 1 << 19
"""Weights expanded at once: 2 MB in float32."""


BAND_ROWS: Final = 64
"""Bands start and end at multiples of this number of rows: torch's int4 layout interleaves up to 64 rows."""


def native_dense_limit(x: Tensor, weight: Tensor) -> int:
    """Number of rows of x up to which the native kernel is fastest for weight [..., N, K]; -1 if it is unavailable."""
    if x.dtype != weight.dtype or x.device.type != "cpu" or library() is None:
        return -1
    return _NATIVE_ROWS.get(weight.dtype, -1)


def dense_product(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight^T``: [..., K] and [N, K] of one dtype -> [..., N].

    A float16 weight is expanded to float32 in bands if that is faster.
    """
    if x.numel() <= native_dense_limit(x, weight) * weight.shape[1]:
        flat = x.reshape(-1, x.shape[-1])
        out = torch.empty(*x.shape[:-1], weight.shape[0], dtype=x.dtype)
        kernels.dense_product(flat, weight.unsqueeze(0), single_group(flat.shape[0]).slices, out)
        return out
    return _torch_dense_product(x, weight)


def _torch_dense_product(x: Tensor, weight: Tensor) -> Tensor:
    if weight.dtype != torch.float16 or x.device.type != "cpu" or x.numel() <= _FLOAT16_ROWS * weight.shape[1]:
        return functional.linear(x, weight)
    flat = x.reshape(-1, x.shape[-1])
    buffer = torch.empty(band_rows(weight.shape[1]), weight.shape[1], dtype=torch.float32)

    def band(start: int, stop: int) -> Tensor:
        return buffer[: stop - start].copy_(weight[start:stop])

    return in_bands(flat.to(torch.float32), weight.shape[0], band, dtype=x.dtype).view(*x.shape[:-1], -1)


def band_rows(columns: int) -> int:
    """Number of rows in a band of a matrix with `columns` columns: the rows that are expanded at once."""
    return max(_BAND_ELEMENTS // columns // BAND_ROWS, 1) * BAND_ROWS


def in_bands(x: Tensor, rows: int, band: Callable[[int, int], Tensor], *, dtype: torch.dtype) -> Tensor:
    """``x @ W^T`` [T, N] of `dtype`, with W expanded band by band.

    Args:
        x: [T, K].
        rows: N.
        band: returns rows start to stop of W, [stop - start, K] in the dtype of x.
        dtype: of the result.
    """
    step = band_rows(x.shape[1])
    if rows <= step:
        return functional.linear(x, band(0, rows)).to(dtype)
    result = torch.empty(x.shape[0], rows, dtype=dtype, device=x.device)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        result[:, start:stop] = functional.linear(x, band(start, stop))
    return result


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of products with expanded integers: float32 for float32 activations, else bfloat16."""
    return torch.float32 if x.dtype == torch.float32 else torch.bfloat16


def signed_nibbles(nibbles: Tensor) -> Tensor:
    """Stored nibbles 0 … 15 (uint8, overwritten) -> the integers -8 … 7 (int8) that they encode."""
    return nibbles.view(torch.int8).sub_(8)
