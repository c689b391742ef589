"""Scales and zero points of integer grids: conventions, and a search that shrinks the range of a group.

Three conventions are in use for symmetric integers of b bits and a group of weights w:

- `absmax`  ``s = max|w| / (2^(b-1) - 1)``: nothing is clipped; the point -2^(b-1) is not used.
- `half`    ``s = 2 max|w| / (2^b - 1)``: the extreme is half a step outside one end of the grid.
- `signed`  ``s = -e / 2^(b-1)`` with e the weight of largest magnitude, including its sign: e maps to -2^(b-1) exactly
  and all 2^b points are used; half of the scales are negative. If two extremes have equal magnitude, e is the negative
  one.

One has zero points:

- `minmax`  ``s = (max - min) / (2^b - 1)``, where max and min include 0, so that zero is a grid point, and
  ``z = clamp(round(-2^(b-1) - min / s))``: both extremes are within half a step of the ends of the grid.

A search then shrinks the scale if that lowers the squared error ``Σ m ((q - z) s - w)²``: it clips a few outliers and
makes the steps finer for the other weights. The importance m of a column is 1, or the mean square of its input; for
uncorrelated inputs the sum is then the output error. The scale can be improved further by the closed form
``s = Σ m w p / Σ m p²`` for fixed steps ``p = q - z``, after which the weights are rounded again.

Sources: scale conventions as in AWQ (arXiv 2306.00978), compressed-tensors and AutoRound (arXiv 2309.05516); clipping by
mean squared error as in OMSE (arXiv 1902.06822), section 3.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from quantlab.numerics.integer import integer_range, quantize_to_grid, usable_scale

Grid = Literal["absmax", "half", "signed", "minmax"]


class Points(NamedTuple):
    """The grid of every group.

    Attributes:
        scale: [N, G] in its stored dtype.
        zero: [N, G] int8 zero points, None for symmetric integers.
    """

    scale: Tensor
    zero: Tensor | None


@dataclass(frozen=True)
class GridOptions:
    """An integer grid and how its scales are chosen.

    Attributes:
        bits: 4 or 8; with zero points 4, so that steps from them fit into int8.
        group_size: columns per scale, dividing K; None for one scale per row.
        scale_dtype: dtype the scales are stored in.
        grid: convention of the scales, see above; `minmax` has zero points.
        clip_steps: number of shrink factors below 1 to try; 0 for no search.
        clip_floor: smallest shrink factor.
        refits: iterations of closed form and rounding after the search; 0 for none.
    """

    bits: int
    group_size: int | None
    scale_dtype: torch.dtype
    grid: Grid
    clip_steps: int = 0
    clip_floor: float = 0.6
    refits: int = 0


def grid_scale(grouped: Tensor, *, bits: int, grid: Grid) -> Tensor:
    """The scale of each group before the search: [N, G, g] float32 -> [N, G] float32."""
    match grid:
        case "absmax":
            return grouped.abs().amax(dim=2) / ((1 << (bits - 1)) - 1)
        case "half":
            return grouped.abs().amax(dim=2) * (2 / ((1 << bits) - 1))
        case "signed":
            largest, smallest = grouped.amax(dim=2), grouped.amin(dim=2)
            return torch.where(largest > -smallest, largest, smallest) / -(1 << (bits - 1))
        case "minmax":
            return (grouped.amax(dim=2).clamp_min(0) - grouped.amin(dim=2).clamp_max(0)) / ((1 << bits) - 1)


def zero_points(smallest: Tensor, scale: Tensor, *, bits: int) -> Tensor:
    """The zero points that map the smallest weights to the lower end of the grid.

    Args:
        smallest: [N, G] float32, the smallest weight of each group, not positive.
        scale: [N, G] in its stored dtype.
        bits: width of the integers.

    Returns:
        [N, G] int8.
    """
    low, high = integer_range(bits)
    return (low - smallest / scale.to(torch.float32)).round_().clamp_(low, high).to(torch.int8)


def searched_points(grouped: Tensor, options: GridOptions, importance: Tensor | None) -> Points:
    """The grid of every group.

    Args:
        grouped: [N, G, g] float32.
        options: the grid.
        importance: m [1 or N, G, g] float32, not negative; None for 1 everywhere.

    Returns:
        The grid with the least ``Σ m ((q - z) s - w)²`` among the scales ``f * s`` for f = 1 ... clip_floor, then
        refitted; its error does not exceed that of f = 1.
    """
    bits, dtype = options.bits, options.scale_dtype
    first = grid_scale(grouped, bits=bits, grid=options.grid)
    smallest = grouped.amin(dim=2).clamp_max(0) if options.grid == "minmax" else None

    def shrunk(factor: float) -> Points:
        scale = usable_scale(first * factor, dtype)
        return Points(scale, None if smallest is None else zero_points(smallest * factor, scale, bits=bits))

    best = shrunk(1.0)
    if options.clip_steps == 0 and options.refits == 0:
        return best
    steps = torch.empty_like(grouped)  # one for all candidates: new memory costs more than the arithmetic in it

    def error_of(points: Points) -> Tensor:
        return _squared_error(grouped, points, importance, bits=bits, out=steps)

    least = error_of(best)
    for step in range(1, options.clip_steps + 1):
        candidate = shrunk(1 - (1 - options.clip_floor) * step / options.clip_steps)
        best, least = _better((candidate, error_of(candidate)), (best, least))
    for _ in range(options.refits):
        candidate = Points(usable_scale(_least_squares(grouped, best, importance, bits=bits), dtype), best.zero)
        best, least = _better((candidate, error_of(candidate)), (best, least))
    return best


def _better(candidate: tuple[Points, Tensor], best: tuple[Points, Tensor]) -> tuple[Points, Tensor]:
    """Grid and error of each group: the candidate's if its error is smaller, else those of `best`."""
    (points, error), (kept, least) = candidate, best
    better = error < least
    zero = kept.zero
    if zero is not None and points.zero is not None:
        zero = torch.where(better, points.zero, zero)
    return Points(torch.where(better, points.scale, kept.scale), zero), torch.where(better, error, least)


def _squared_error(grouped: Tensor, points: Points, importance: Tensor | None, *, bits: int, out: Tensor) -> Tensor:
    """``Σ m ((q - z) s - w)²`` per group [N, G] on a grid; `out` [N, G, g] is overwritten."""
    steps = quantize_to_grid(grouped, points.scale, bits=bits, zero=points.zero, out=out)
    squares = steps.mul_(points.scale.to(torch.float32)[:, :, None]).sub_(grouped).square_()
    return (squares if importance is None else squares.mul_(importance)).sum(dim=2)


def _least_squares(grouped: Tensor, points: Points, importance: Tensor | None, *, bits: int) -> Tensor:
    """``Σ m w p / Σ m p²`` per group [N, G] float32, p the steps on a grid; the grid's scale if all steps are zero."""
    steps = quantize_to_grid(grouped, points.scale, bits=bits, zero=points.zero)
    weighted = steps if importance is None else steps * importance
    norm = (weighted * steps).sum(dim=2)
    refitted = (weighted * grouped).sum(dim=2) / norm
    return torch.where(norm > 0, refitted, points.scale.to(torch.float32))
