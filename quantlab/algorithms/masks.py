"""Which of many scores are smallest, exactly so many of them, with a rule for ties.

Two shapes of sparsity are made of that: a share of the scores of a row or matrix, and n of every m neighbours in a row.
Of equal scores the first go first, so that the same scores give the same mask on every device.

Sources: unstructured as in Han et al. (arXiv 1506.02626), section 3; n:m as in Mishra et al. (arXiv 2104.08378), section 3.
"""

from typing import Final

import torch
from torch import Tensor

from quantlab.errors import CalibrationError

_MAGNITUDES: Final = 1 << 15


def check_sparsity(columns: int, *, ratio: float, pattern: tuple[int, int] | None) -> None:
    """Refuse what cannot be removed.

    Args:
        columns: K of the weight.
        ratio: share of weights to remove.
        pattern: (n, m) for n of every m neighbours in a row, or None.

    Raises:
        CalibrationError: ratio outside [0, 1), or a pattern that does not divide the row or leaves nothing.
    """
    if not 0 <= ratio < 1:
        raise CalibrationError(
            "A share of weights to remove is not below 1",
            found=f"{ratio}",
            fix="0 removes nothing, 0.5 every other weight",
        )
    if pattern is None:
        return
    removed, of = pattern
    if not 0 < removed < of or columns % of:
        raise CalibrationError(
            "A pattern of sparsity does not fit its weight",
            found=f"{removed} of every {of} weights in rows of {columns}",
            fix="remove fewer than there are, of a number that divides the row",
        )


def smallest(scores: Tensor, count: int) -> Tensor:
    """Mark the `count` smallest scores along the last dimension.

    Args:
        scores: [..., M] of any floating dtype, finite, none of them negative.
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
    """Mark the `removed` smallest of every `of` neighbours along the last dimension, which `of` divides: [..., K] bool."""
    grouped = scores.reshape(*scores.shape[:-1], -1, of)
    order = grouped.argsort(dim=-1, stable=True)
    mask = torch.zeros(grouped.shape, dtype=torch.bool, device=scores.device)
    return mask.scatter_(-1, order[..., :removed], value=True).flatten(-2)


def _threshold_of_patterns(patterns: Tensor, count: int) -> Tensor:
    """The `count`-th smallest of 15-bit patterns [M] int16, by counting: the order of patterns is that of magnitudes."""
    counts = torch.bincount(patterns.to(torch.int32), minlength=_MAGNITUDES)
    return torch.searchsorted(counts.cumsum(0), count).to(torch.int16)


def _first_up_to(scores: Tensor, threshold: Tensor, count: int) -> Tensor:
    """All below the threshold and, of those equal to it, the first that make up `count`."""
    mask, ties = scores < threshold, scores == threshold
    if scores.dim() == 1:
        mask[ties.nonzero().flatten()[: count - int(mask.sum())]] = True
        return mask
    room = count - mask.sum(dim=-1, keepdim=True)
    return mask | (ties & (ties.cumsum(dim=-1) <= room))
