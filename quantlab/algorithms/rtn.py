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
    clip_floor: float = 0.5,
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
    grouped = W.to(torch.float32).view(rows, columns // (group_size or columns), -1)
    first = grid_scale(grouped, bits=bits, grid=grid)
    scale = usable_scale(first, scale_dtype)
    q = quantize_to_grid(grouped, scale, bits=bits)
    if clip_steps:
        best = _squared_error(grouped, q, scale)
        for step in range(1, clip_steps + 1):
            candidate = usable_scale(first * (1 - (1 - clip_floor) * step / clip_steps), scale_dtype)
            candidate_q = quantize_to_grid(grouped, candidate, bits=bits)
            error = _squared_error(grouped, candidate_q, candidate)
            better = error < best
            best = torch.where(better, error, best)
            scale = torch.where(better, candidate, scale)
            q = torch.where(better[:, :, None], candidate_q, q)
    return QuantizedMatrix(q.view(rows, columns).to(torch.int8), scale, bits)


def _squared_error(grouped: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    """Sum of squared rounding errors per group [N, G]."""
    return (q * scale.to(torch.float32)[:, :, None] - grouped).square_().sum(dim=2)
