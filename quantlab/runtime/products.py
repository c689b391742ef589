"""Matrices as the runtime holds them, and what a row of activations costs against each.

A *bank* is E matrices [N, K] of one shape and one number format: the routed experts of a layer (E of them) or a single
linear (E = 1). Every bank answers the same call, `products(x, groups)`: rows of activations, sorted by the matrix they
are meant for, times those matrices. That is all the modules above need to know, so a linear, an MLP and the experts of
a layer are each written once, for dense and quantized weights alike.

What decides the shape of the code is the CPU:

- At one row a product costs the bytes of its matrix, so integers are multiplied as they lie, by torch's packed
  operators. Those are fast for bfloat16 activations only (with float16 or float32 they fall to scalar loops, 10 to 40
  times slower), so activations are rounded to bfloat16 around them.
- At many rows it costs arithmetic, and there the packed operators are slower than expanding a band of rows, multiplying
  it and dropping it again. A band is small enough to stay in the cache; never is a whole expanded matrix kept.
- float32 activations ask for exact numbers (that is what quality is measured with): always expanded, ``x @ (q * scale)^T``
  with the product formed as the format defines it (`QuantizedMatrix.dequantize`).
- float16 has no arithmetic on x86 before AVX512-FP16: beyond a few rows a float16 matrix is expanded to float32 in bands.

Where the native kernels are to be had (`quantlab.runtime.native`), they take the few rows, at the rate the weights come from
memory and for all groups in one call. What is said of torch's operators above holds everywhere else.

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
"""Bands start and end at multiples of this: torch's int4 layout interleaves rows in blocks of up to 64."""


@dataclass(frozen=True)
class Groups:
    """Which matrix of a bank each row of activations meets; the rows are sorted by matrix.

    Attributes:
        which: index of each matrix that is met, no index twice.
        counts: how many consecutive rows meet it; they add up to T.
        of_row: [T] int64, the index of the matrix of each row; None for a bank of one.
    """

    which: Sequence[int]
    counts: Sequence[int]
    of_row: Tensor | None

    @cached_property
    def slices(self) -> Slices:
        """The same, for the native kernels."""
        return Slices(self.which, [0, *accumulate(self.counts)][:-1], self.counts)

    def portions(self, most: int) -> Slices:
        """The same, with no more than `most` rows in a group: larger ones meet their matrix several times."""
        if max(self.counts, default=0) <= most:
            return self.slices
        starts = [0, *accumulate(self.counts)]
        cut = [
            (index, start + first, min(most, count - first))
            for index, start, count in zip(self.which, starts, self.counts, strict=False)
            for first in range(0, count, most)
        ]
        return Slices(*zip(*cut, strict=True))


@cache
def single(rows: int) -> Groups:
    """All rows meet the only matrix of a bank of one."""
    return Groups((0,), (rows,), None)


def by_count(
    x: Tensor, rows: int, groups: Groups, *, limit: int, few: Callable[[Slices, Tensor], None], many: Product
) -> Tensor:
    """Products [T, rows] of x [T, K] with the matrices of its groups.

    Args:
        limit: of rows in a group that is left to `few`.
        few: writes the rows of some groups into the result.
        many: the product of the rows of one group with the matrix of an index.
    """
    if max(groups.counts, default=0) <= limit:
        out = torch.empty(x.shape[0], rows, dtype=x.dtype)
        few(groups.slices, out)
        return out
    if len(groups.which) == 1:
        return many(x, groups.which[0]).to(x.dtype)
    out = torch.empty(x.shape[0], rows, dtype=x.dtype)
    starts = [0, *accumulate(groups.counts)]
    small = [i for i, count in enumerate(groups.counts) if count <= limit]
    few(Slices(*([values[i] for i in small] for values in (groups.which, starts, groups.counts))), out)
    for index, start, count in zip(groups.which, starts, groups.counts, strict=False):
        if count > limit:
            out[start : start + count] = many(x[start : start + count], index)
    return out


def native_dense_limit(x: Tensor, weight: Tensor) -> int:
    """Up to how many rows the native kernel multiplies weight [..., N, K] with x fastest; -1 if it cannot."""
    if x.dtype != weight.dtype or x.device.type != "cpu" or library() is None:
        return -1
    return _NATIVE_ROWS.get(weight.dtype, -1)


def dense_product(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight^T``: [..., K] and [N, K] of one dtype -> [..., N]; float16 is expanded to float32 where that is faster."""
    if x.numel() <= native_dense_limit(x, weight) * weight.shape[1]:
        flat = x.reshape(-1, x.shape[-1])
        out = torch.empty(*x.shape[:-1], weight.shape[0], dtype=x.dtype)
        kernels.dense_product(flat, weight.unsqueeze(0), single(flat.shape[0]).slices, out)
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
    """How many rows of a matrix with `columns` columns are expanded at once."""
    return max(_BAND_ELEMENTS // columns // BAND_ROWS, 1) * BAND_ROWS


def in_bands(x: Tensor, rows: int, band: Callable[[int, int], Tensor], *, dtype: torch.dtype) -> Tensor:
    """``x @ W^T`` [T, N] of `dtype`, where `band(start, stop)` gives rows of W [stop - start, K] in the dtype of x [T, K]."""
    step = band_rows(x.shape[1])
    if rows <= step:
        return functional.linear(x, band(0, rows)).to(dtype)
    result = torch.empty(x.shape[0], rows, dtype=dtype, device=x.device)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        result[:, start:stop] = functional.linear(x, band(start, stop))
    return result


def compute_dtype(x: Tensor) -> torch.dtype:
    """What expanded integers are multiplied in: float32 for exactness, else bfloat16 as the packed operators do."""
    return torch.float32 if x.dtype == torch.float32 else torch.bfloat16


def split(x: Tensor, groups: Groups) -> tuple[Tensor, ...]:
    """The rows [T, K] of each group, as views."""
    return torch.split_with_sizes(x, groups.counts)


def joined(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
    """The inverse of `split`, cast to `dtype`."""
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).to(dtype)


def centred(nibbles: Tensor) -> Tensor:
    """Stored 0 … 15 (uint8, changed in place) to the integers -8 … 7 (int8) they stand for."""
    return nibbles.view(torch.int8).sub_(8)
