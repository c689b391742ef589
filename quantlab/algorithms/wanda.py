"""Wanda: in every row, remove the weights with the smallest product of magnitude and input norm.

The contribution of weight W_ij to its output is bounded by |W_ij| · ‖X_j‖₂, which is the score. Scores are compared
within each row, so that every output keeps the same number of inputs. The remaining weights are not updated.

Source: Wanda (arXiv 2306.11695), section 3, equation 1 and algorithm 1.
"""

import torch
from torch import Tensor

from quantlab.algorithms.masks import check_sparsity, smallest, smallest_of_each
from quantlab.errors import CalibrationError


def wanda_mask(W: Tensor, mean_square: Tensor, *, ratio: float, pattern: tuple[int, int] | None = None) -> Tensor:
    """The weights to remove.

    Args:
        W: [N, K] of any floating dtype.
        mean_square: [K] mean of x² per input channel (the diagonal of H), or any positive multiple of it.
        ratio: fraction of every row to remove, 0 <= ratio < 1; ignored with a pattern.
        pattern: (n, m) to remove n of every m consecutive weights of a row, or None for ``round(ratio * K)`` of every
            row.

    Returns:
        [N, K] bool, True where a weight is removed. Among equal scores the first in the row are removed.

    Raises:
        CalibrationError: the ratio is not in [0, 1), m does not divide K, or the mean squares are not finite or negative.
    """
    check_sparsity(W.shape[1], ratio=ratio, pattern=pattern)
    if not mean_square.isfinite().all() or (mean_square < 0).any():
        raise CalibrationError(
            "Mean squares of inputs are negative or not finite",
            found=f"between {mean_square.min().item():.3g} and {mean_square.max().item():.3g}",
            fix="collect the mean of x² of finite activations",
        )
    scores = W.abs().to(torch.float32) * mean_square.to(torch.float32).sqrt()
    if pattern is not None:
        return smallest_of_each(scores, removed=pattern[0], of=pattern[1])
    return smallest(scores, round(ratio * W.shape[1]))
