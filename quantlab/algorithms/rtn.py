"""Round to nearest (RTN): every weight goes to the closest point of a grid that is chosen per row or group.

What is left to choose is the grid's scale. Three conventions are in use for b bits and a group of weights w:

- `absmax`  ``s = max|w| / (2^(b-1) - 1)``: nothing is clipped, the point -2^(b-1) is never used.
- `half`    ``s = 2 max|w| / (2^b - 1)``: the extreme lies half a step outside one end of the grid.
- `signed`  ``s = -e / 2^(b-1)`` with e the weight of largest magnitude, sign kept: e itself lands on -2^(b-1) exactly and
  all 2^b points are used; half of the scales are negative. Of two extremes of equal magnitude the negative one counts.

A search then shrinks the scale where that lowers the squared error: a few clipped outliers for finer steps elsewhere.

Sources: scale conventions as in AWQ (arXiv 2306.00978), compressed-tensors and AutoRound (arXiv 2309.05516);
clipping by mean squared error as in OMSE (arXiv 1902.06822), section 3.
"""

from typing import Literal

import torch
from torch import Tensor

from quantlab.numerics.integer import QuantizedMatrix, quantize_to_grid, usable_scale

_BAND_WEIGHTS = 1 << 20
"""Weights worked on at a time: the float32 copies of a band stay in the processor's cache, whatever the matrix's size."""

Grid = Literal["absmax", "half", "signed"]


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


def rtn(
    W: Tensor,
    *,
    bits: int,
    group_size: int | None,
    scale_dtype: torch.dtype,
    grid: Grid,
    clip_steps: int = 0,
    clip_floor: float = 0.6,
) -> QuantizedMatrix:
    """Quantize a matrix by rounding to nearest.

    Args:
        W: [N, K] of any floating dtype, finite.
        bits: 4 or 8.
        group_size: columns per scale, dividing K; None for one scale per row.
        scale_dtype: dtype the scales are stored in.
        grid: scale convention, see above.
        clip_steps: how many shrink factors to try below 1; 0 for no search.
        clip_floor: the smallest shrink factor.

    Returns:
        The matrix on its grid; with a search, per group the scale of least squared error among
        ``p * s`` for p = 1 ... clip_floor, never worse than without.
    """
    rows, columns = W.shape
    groups = columns // (group_size or columns)
    q = torch.empty(rows, columns, dtype=torch.int8)
    scale = torch.empty(rows, groups, dtype=scale_dtype)
    height = max(1, _BAND_WEIGHTS // columns)
    for start in range(0, rows, height):
        band = slice(start, start + height)
        grouped = W[band].to(torch.float32).view(-1, groups, columns // groups)
        first = grid_scale(grouped, bits=bits, grid=grid)
        scale[band] = _clipped_scale(grouped, first, bits=bits, dtype=scale_dtype, steps=clip_steps, floor=clip_floor)
        q[band] = quantize_to_grid(grouped, scale[band], bits=bits).view(-1, columns).to(torch.int8)
    return QuantizedMatrix(q, scale, bits)


def _clipped_scale(
    grouped: Tensor, first: Tensor, *, bits: int, dtype: torch.dtype, steps: int, floor: float
) -> Tensor:
    """Per group the stored scale of least squared error among ``p * first``, p = 1 ... floor; `first` itself if steps is 0."""
    best = usable_scale(first, dtype)
    if steps == 0:
        return best
    best_error = _squared_error(grouped, best, bits=bits)
    for step in range(1, steps + 1):
        candidate = usable_scale(first * (1 - (1 - floor) * step / steps), dtype)
        error = _squared_error(grouped, candidate, bits=bits)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = torch.where(better, candidate, best)
    return best


def _squared_error(grouped: Tensor, scale: Tensor, *, bits: int) -> Tensor:
    """Sum of squared rounding errors per group [N, G] on the grid of `scale`."""
    rounded = quantize_to_grid(grouped, scale, bits=bits)
    return rounded.mul_(scale.to(torch.float32)[:, :, None]).sub_(grouped).square_().sum(dim=2)
