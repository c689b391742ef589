"""Banks of matrices: groups of rows, dispatch by the number of rows, and products of floating-point matrices.

A *bank* holds E matrices [N, K] of one shape and one number format: the routed experts of a layer (E of them) or a
single linear (E = 1). Every bank implements `products(x, groups)`: rows of activations, sorted by matrix, times these
matrices. Linears, MLPs and experts use nothing else of a bank, so each is written once for dense and quantized weights.

On the CPU the fastest way to multiply depends on the number of rows and the dtype of the activations:

- With one row, a product is bound by reading its matrix, so torch's packed operators multiply the integers as stored.
  They are fast for bfloat16 activations only (float16 and float32 take scalar loops, 10 to 40 times slower), so
  activations are rounded to bfloat16.
- With many rows, a product is bound by arithmetic. The packed operators are then slower than expanding a band of rows
  to floating point, multiplying by it and discarding it. A band fits into the cache; a whole expanded matrix is never
  kept.
- With float32 activations, results must be exact, because quality is measured with them. Weights are always expanded:
  ``x @ (q * scale)^T``, with ``q * scale`` formed as the format defines it (`QuantizedMatrix.dequantize`).
- x86 has no float16 arithmetic before AVX512-FP16: beyond a few rows a float16 matrix is expanded to float32 in bands.

If the native kernels (`quantlab.runtime.native`) are available, they compute products of few rows, at memory bandwidth
and for all groups in one call. Otherwise torch's operators do, as described above.

Legend: E matrices, N rows (outputs), K columns (inputs), g columns per scale, G = K / g, T rows of activations.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from quantlab.runtime.native import kernels
from quantlab.runtime.native.kernels import Slices
from quantlab.runtime.native.library import library

Product = Callable[[Tensor, int], Tensor]

_FLOAT16_ROWS: Final = 4
"""Up to this many rows a float16 product beats expanding its matrix to float32 (Zen 4, 2816x2048)."""
_NATIVE_ROWS: Final = {torch.float16: 128, torch.bfloat16: 48}
"""Up to this many rows the native kernel beats torch (Zen 4, 2816x2048)."""
_BAND_ELEMENTS: Final = 1 << 19
"""Weights expanded at once: 2 MB in float32."""
BAND_ROWS: Final = 64
"""Bands start and end at multiples of this number of rows: torch's int4 layout interleaves up to 64 rows."""


@dataclass(frozen=True)
class RowGroups:
    """The matrix of a bank that each row of activations is multiplied by; rows are sorted by matrix.

    Attributes:
        matrices: index of the matrix of each group, without duplicates.
        counts: number of consecutive rows in each group; they sum to T.
        matrix_of_row: [T] int64, the index of the matrix of each row; None for a bank of one matrix.
    """

    matrices: Sequence[int]
    counts: Sequence[int]
    matrix_of_row: Tensor | None

    @cached_property
    def slices(self) -> Slices:
        """The groups in the form that the native kernels read."""
        return Slices(self.matrices, [0, *accumulate(self.counts)][:-1], self.counts)

    def chunked(self, max_rows: int) -> Slices:
        """The groups for the native kernels, larger ones split into several of at most `max_rows` rows."""
        if max(self.counts, default=0) <= max_rows:
            return self.slices
        starts = [0, *accumulate(self.counts)]
        cut = [
            (index, start + first, min(max_rows, count - first))
            for index, start, count in zip(self.matrices, starts, self.counts, strict=False)
            for first in range(0, count, max_rows)
        ]
        return Slices(*zip(*cut, strict=True))


@cache
def single_group(rows: int) -> RowGroups:
    """One group of `rows` rows, for a bank of one matrix."""
    return RowGroups((0,), (rows,), None)


def dispatch_by_rows(
    x: Tensor, rows: int, groups: RowGroups, *, limit: int, few: Callable[[Slices, Tensor], None], many: Product
) -> Tensor:
    """Products [T, rows] of x [T, K], computed by one of two functions depending on the number of rows of a group.

    Args:
        x: [T, K].
        rows: N, rows of a matrix.
        groups: of the rows of x.
        limit: largest number of rows of a group that `few` computes.
        few: writes the products of all small groups to the result in one call.
        many: the product of the rows of one group with the matrix of an index.
    """
    if max(groups.counts, default=0) <= limit:
        out = torch.empty(x.shape[0], rows, dtype=x.dtype)
        few(groups.slices, out)
        return out
    if len(groups.matrices) == 1:
        return many(x, groups.matrices[0]).to(x.dtype)
    out = torch.empty(x.shape[0], rows, dtype=x.dtype)
    starts = [0, *accumulate(groups.counts)]
    small = [i for i, count in enumerate(groups.counts) if count <= limit]
    few(Slices(*([values[i] for i in small] for values in (groups.matrices, starts, groups.counts))), out)
    for index, start, count in zip(groups.matrices, starts, groups.counts, strict=False):
        if count > limit:
            out[start : start + count] = many(x[start : start + count], index)
    return out


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


def split_groups(x: Tensor, groups: RowGroups) -> tuple[Tensor, ...]:
    """The rows [T, K] of each group, as views."""
    return torch.split_with_sizes(x, groups.counts)


def join_groups(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Concatenate the results of groups, the inverse of `split_groups`, and cast to `dtype`."""
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).to(dtype)


def signed_nibbles(nibbles: Tensor) -> Tensor:
    """Stored nibbles 0 … 15 (uint8, overwritten) -> the integers -8 … 7 (int8) that they encode."""
    return nibbles.view(torch.int8).sub_(8)
