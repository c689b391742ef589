"""Groups of rows of activations by matrix, and dispatch of products by the number of rows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate

import torch
from torch import Tensor

from quantlab.runtime.native.kernels import Slices

Product = Callable[[Tensor, int], Tensor]


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
    if small:
        few(Slices(*([values[i] for i in small] for values in (groups.matrices, starts, groups.counts))), out)
    for index, start, count in zip(groups.matrices, starts, groups.counts, strict=False):
        if count > limit:
            out[start : start + count] = many(x[start : start + count], index)
    return out


def split_groups(x: Tensor, groups: RowGroups) -> tuple[Tensor, ...]:
    """The rows [T, K] of each group, as views."""
    return torch.split_with_sizes(x, groups.counts)


def join_groups(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Concatenate the results of groups, the inverse of `split_groups`, and cast to `dtype`."""
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).to(dtype)
