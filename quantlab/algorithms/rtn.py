"""Round to nearest (RTN): every weight is rounded to the closest point of the grid of its row or group.

The scale and zero point of each group are chosen in `scales`. With the mean squares of the inputs as importance, the
search minimises the output error under the assumption of uncorrelated inputs.

Source: as the baseline of GPTQ (arXiv 2210.17323, section 2) and of LLM.int8() (arXiv 2208.07339, section 2).
"""

import torch
from torch import Tensor

from quantlab.algorithms.scales import Grid as Grid
from quantlab.algorithms.scales import GridOptions, searched_points
from quantlab.numerics.bands import bands
from quantlab.numerics.integer import QuantizedMatrix, quantize_to_grid


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
    """Quantize a matrix by rounding to nearest; as `round_batch` for B = 1: W [N, K], importance [K]."""
    return round_batch(W[None], options, importance=None if importance is None else importance[None])


def round_batch(W: Tensor, options: GridOptions, *, importance: Tensor | None = None) -> QuantizedMatrix:
    """Quantize matrices of one shape by rounding to nearest.

    Args:
        W: [B, N, K] of any floating dtype, finite.
        options: the grid and the search for its scales.
        importance: [B, K] float32 on W's device, not negative, for example the diagonal of H: weight of each column's
            squared error in the search; None for 1 everywhere.

    Returns:
        The matrices on their grids, concatenated by rows: [B * N, K]; a search does not increase the error of any group.
    """
    batch, rows, columns = W.shape
    flat, groups = W.reshape(batch * rows, columns), columns // (options.group_size or columns)
    q = torch.empty(flat.shape, dtype=torch.int8, device=W.device)
    scale = torch.empty(len(flat), groups, dtype=options.scale_dtype, device=W.device)
    zero = torch.empty(len(flat), groups, dtype=torch.int8, device=W.device) if options.grid == "minmax" else None
    m = None if importance is None else importance.to(torch.float32).view(batch, groups, -1)
    for band in bands(flat):
        grouped = flat[band].to(torch.float32).view(-1, groups, columns // groups)
        points = searched_points(grouped, options, _of_rows(m, band, rows=rows))
        scale[band] = points.scale
        steps = quantize_to_grid(grouped, points.scale, bits=options.bits, zero=points.zero)
        if zero is not None and points.zero is not None:
            zero[band] = points.zero
            steps += points.zero[:, :, None]
        q[band] = steps.view(-1, columns).to(torch.int8)
    return QuantizedMatrix(q, scale, options.bits, zero)


def _of_rows(importance: Tensor | None, band: slice, *, rows: int) -> Tensor | None:
    """The importance [B, G, g] of the rows of a band, counted over all matrices: [1, G, g] within one matrix, else [n, G, g]."""
    if importance is None:
        return None
    first, last = band.start // rows, (band.stop - 1) // rows
    if first == last:
        return importance[first : first + 1]
    index = torch.arange(band.start, band.stop, device=importance.device) // rows
    return importance.index_select(0, index)
