"""Masks of the smallest scores: an exact number of them, with a rule for ties.

They serve two kinds of sparsity: a fraction of the scores of a row or matrix, and n of every m consecutive scores of a
row. Among equal scores the first are marked, so that equal scores give the same mask on every device.

Sources: unstructured as in Han et al. (arXiv 1506.02626), section 3; n:m as in Mishra et al. (arXiv 2104.08378), section 3.
"""

from typing import Final

import torch
from torch import Tensor

from quantlab.errors import CalibrationError

_MAGNITUDES: Final = 1 << 15


def check_sparsity(columns: int, *, ratio: float, pattern: tuple[int, int] | None) -> None:
    """Check a ratio or a pattern.

    Args:
        columns: K of the weight.
        ratio: fraction of weights to remove.
        pattern: (n, m) for n of every m consecutive weights of a row, or None.

    Raises:
        CalibrationError: the ratio is outside [0, 1), m does not divide K, or n is not between 1 and m - 1.
    """
    if not 0 <= ratio < 1:
        raise CalibrationError(
            "The fraction of weights to remove is not in [0, 1)",
            found=f"{ratio}",
            fix="0 removes nothing, 0.5 removes half of the weights",
        )
    if pattern is None:
        return
    removed, of = pattern
    if not 0 < removed < of or columns % of:
        raise CalibrationError(
            "A sparsity pattern does not fit its weight",
            found=f"{removed} of every {of} weights in rows of {columns}",
            fix="choose n:m with 0 < n < m and m dividing the row",
        )


def smallest(scores: Tensor, count: int) -> Tensor:
    """Mark the `count` smallest scores along the last dimension.

    Args:
        scores: [..., M] of any floating dtype, finite, not negative.
        count: between 0 and M.

    Returns:
        [..., M] bool.
    """
    if count == 0:
        return torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    if scores.dim() == 1 and scores.dtype in (torch.bfloat16, torch.float16):
        patterns = scores.abs().view(torch.int16)
        return _first_up_to(patterns, _threshold_of_patterns(patterns, count), count)
    threshold = scores.kthvalue(count, dim=-1, keepdim=True).values
    return _first_up_to(scores, threshold, count)


def smallest_of_each(scores: Tensor, *, removed: int, of: int) -> Tensor:
    """Mark the `removed` smallest of every `of` consecutive scores along the last dimension (a multiple of `of`).

    Returns:
        [..., K] bool.
    """
    grouped = scores.reshape(*scores.shape[:-1], -1, of)
    order = grouped.argsort(dim=-1, stable=True)
    mask = torch.zeros(grouped.shape, dtype=torch.bool, device=scores.device)
    return mask.scatter_(-1, order[..., :removed], value=True).flatten(-2)


def _threshold_of_patterns(patterns: Tensor, count: int) -> Tensor:
    """The `count`-th smallest of 15-bit patterns [M] int16, by counting; patterns are ordered like magnitudes."""
    counts = torch.bincount(patterns.to(torch.int32), minlength=_MAGNITUDES)
    return torch.searchsorted(counts.cumsum(0), count).to(torch.int16)


def _first_up_to(scores: Tensor, threshold: Tensor, count: int) -> Tensor:
    """Mark all scores below the threshold, and the first scores equal to it until `count` are marked."""
    mask, ties = scores < threshold, scores == threshold
    if scores.dim() == 1:
        mask[ties.nonzero().flatten()[: count - int(mask.sum())]] = True
        return mask
    room = count - mask.sum(dim=-1, keepdim=True)
    return mask | (ties & (ties.cumsum(dim=-1) <= room))
