"""Scales of symmetric integer grids: where a group's grid begins, and how far it is shrunk.

Three conventions are in use for b bits and a group of weights w:

- `absmax`  ``s = max|w| / (2^(b-1) - 1)``: nothing is clipped, the point -2^(b-1) is never used.
- `half`    ``s = 2 max|w| / (2^b - 1)``: the extreme lies half a step outside one end of the grid.
- `signed`  ``s = -e / 2^(b-1)`` with e the weight of largest magnitude, sign kept: e itself lands on -2^(b-1) exactly and
  all 2^b points are used; half of the scales are negative. Of two extremes of equal magnitude the negative one counts.

A search then changes the scale where that lowers the squared error ``Σ m (q s - w)²``: a few clipped outliers for finer
steps elsewhere. The importance m of a column is 1, or the mean square of its input: with independent inputs the sum is
then the error of the output. What the search found can be improved further by the closed form ``s = Σ m w q / Σ m q²`` for
fixed integers, with the integers chosen again after it.

Sources: scale conventions as in AWQ (arXiv 2306.00978), compressed-tensors and AutoRound (arXiv 2309.05516); clipping by
mean squared error as in OMSE (arXiv 1902.06822), section 3.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from quantlab.numerics.integer import quantize_to_grid, usable_scale

Grid = Literal["absmax", "half", "signed"]


@dataclass(frozen=True)
class GridOptions:
    """An integer grid and how its scales are chosen.

    Attributes:
        bits: 4 or 8.
        group_size: columns per scale, dividing K; None for one scale per row.
        scale_dtype: dtype the scales are stored in.
        grid: scale convention, see above.
        clip_steps: how many shrink factors to try below 1; 0 for no search.
        clip_floor: the smallest shrink factor.
        refits: alternations of the closed form with rounding, after the search; 0 for none.
    """

    bits: int
    group_size: int | None
    scale_dtype: torch.dtype
    grid: Grid
    clip_steps: int = 0
    clip_floor: float = 0.6
    refits: int = 0


def grid_scale(grouped: Tensor, *, bits: int, grid: Grid) -> Tensor:
    """The scale of each group before any clipping: [N, G, g] float32 -> [N, G] float32."""
    match grid:
        case "absmax":
            return grouped.abs().amax(dim=2) / ((1 << (bits - 1)) - 1)
        case "half":
            return grouped.abs().amax(dim=2) * (2 / ((1 << bits) - 1))
        case "signed":
            largest, smallest = grouped.amax(dim=2), grouped.amin(dim=2)
            return torch.where(largest > -smallest, largest, smallest) / -(1 << (bits - 1))


def searched_scale(grouped: Tensor, options: GridOptions, importance: Tensor | None) -> Tensor:
    """The stored scale of every group.

    Args:
        grouped: [N, G, g] float32.
        options: the grid.
        importance: m [G, g] float32, not negative; None for 1 everywhere.

    Returns:
        [N, G] in the scale's dtype: of least ``Σ m (q s - w)²`` among ``p * s`` for p = 1 ... clip_floor, then refitted;
        never worse than the convention's own scale.
    """
    bits, dtype = options.bits, options.scale_dtype
    first = grid_scale(grouped, bits=bits, grid=options.grid)
    best = usable_scale(first, dtype)
    if options.clip_steps == 0 and options.refits == 0:
        return best
    best_error = _squared_error(grouped, best, importance, bits=bits)
    for step in range(1, options.clip_steps + 1):
        factor = 1 - (1 - options.clip_floor) * step / options.clip_steps
        candidate = usable_scale(first * factor, dtype)
        best, best_error = _better(grouped, candidate, importance, (best, best_error), bits=bits)
    for _ in range(options.refits):
        candidate = usable_scale(_least_squares(grouped, best, importance, bits=bits), dtype)
        best, best_error = _better(grouped, candidate, importance, (best, best_error), bits=bits)
    return best


def _better(
    grouped: Tensor, candidate: Tensor, importance: Tensor | None, best: tuple[Tensor, Tensor], *, bits: int
) -> tuple[Tensor, Tensor]:
    """Scale and error of each group: the candidate's where it is better."""
    error = _squared_error(grouped, candidate, importance, bits=bits)
    better = error < best[1]
    return torch.where(better, candidate, best[0]), torch.where(better, error, best[1])


def _squared_error(grouped: Tensor, scale: Tensor, importance: Tensor | None, *, bits: int) -> Tensor:
    """``Σ m (q s - w)²`` per group [N, G] on the grid of `scale`."""
    rounded = quantize_to_grid(grouped, scale, bits=bits)
    squares = rounded.mul_(scale.to(torch.float32)[:, :, None]).sub_(grouped).square_()
    return (squares if importance is None else squares.mul_(importance)).sum(dim=2)


def _least_squares(grouped: Tensor, scale: Tensor, importance: Tensor | None, *, bits: int) -> Tensor:
    """``Σ m w q / Σ m q²`` per group [N, G] float32 for the integers on the grid of `scale`; `scale` where q is zero."""
    rounded = quantize_to_grid(grouped, scale, bits=bits)
    weighted = rounded if importance is None else rounded * importance
    norm = (weighted * rounded).sum(dim=2)
    refitted = (weighted * grouped).sum(dim=2) / norm
    return torch.where(norm > 0, refitted, scale.to(torch.float32))
