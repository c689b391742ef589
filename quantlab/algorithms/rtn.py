"""Round to nearest (RTN): every weight is rounded to the closest point of the grid of its row or group.

The scale and zero point of each group are chosen in `scales`. With the mean squares of the inputs as importance, the
search minimises the output error under the assumption of uncorrelated inputs.

Source: as the baseline of GPTQ (arXiv 2210.17323, section 2) and of LLM.int8() (arXiv 2208.07339, section 2).
"""

from typing import Final

import torch
from torch import Tensor

from quantlab.algorithms.scales import Grid as Grid
from quantlab.algorithms.scales import GridOptions, searched_points
from quantlab.numerics.integer import QuantizedMatrix, quantize_to_grid

_BAND_WEIGHTS: Final = {"cpu": 1 << 20, "cuda": 1 << 26}
"""Weights per band of rows: on a CPU the float32 copies of a band fit into its cache."""


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
    """Quantize a matrix by rounding to nearest, with the same importance for every weight.

    Args:
        W: [N, K] of any floating dtype, finite.
        bits, group_size, scale_dtype, grid, clip_steps, clip_floor: as in `GridOptions`.

    Returns:
        The matrix on its grid.
    """
    return round_to_nearest(W, GridOptions(bits, group_size, scale_dtype, grid, clip_steps, clip_floor))


def round_to_nearest(W: Tensor, options: GridOptions, *, importance: Tensor | None = None) -> QuantizedMatrix:
    """Quantize a matrix by rounding to nearest.

    Args:
        W: [N, K] of any floating dtype, finite.
        options: the grid and the search for its scales.
        importance: [K] float32 on W's device, not negative, for example the diagonal of H: weight of each column's
            squared error in the search; None for 1 everywhere.

    Returns:
        The matrix on its grid; a search does not increase the error of any group.
    """
    rows, columns = W.shape
    groups = columns // (options.group_size or columns)
    q = torch.empty(rows, columns, dtype=torch.int8, device=W.device)
    scale = torch.empty(rows, groups, dtype=options.scale_dtype, device=W.device)
    zero = torch.empty(rows, groups, dtype=torch.int8, device=W.device) if options.grid == "minmax" else None
    m = None if importance is None else importance.to(torch.float32).view(groups, -1)
    height = max(1, _BAND_WEIGHTS.get(W.device.type, 1 << 20) // columns)
    for start in range(0, rows, height):
        band = slice(start, start + height)
        grouped = W[band].to(torch.float32).view(-1, groups, columns // groups)
        points = searched_points(grouped, options, m)
        scale[band] = points.scale
        steps = quantize_to_grid(grouped, points.scale, bits=options.bits, zero=points.zero)
        if zero is not None and points.zero is not None:
            zero[band] = points.zero
            steps += points.zero[:, :, None]
        q[band] = steps.view(-1, columns).to(torch.int8)
    return QuantizedMatrix(q, scale, options.bits, zero)
