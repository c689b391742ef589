"""Magnitude pruning: remove the weights of smallest magnitude.

Source: Han et al., "Learning both Weights and Connections for Efficient Neural Networks", arXiv 1506.02626, section 3.
"""

import torch
from torch import Tensor

from quantlab.algorithms.masks import check_sparsity, smallest, smallest_of_each


def magnitude_mask(W: Tensor, *, ratio: float, pattern: tuple[int, int] | None = None) -> Tensor:
    """The weights to remove.

    Args:
        W: [N, K] of any floating dtype.
        ratio: fraction of weights to remove, 0 <= ratio < 1; ignored with a pattern.
        pattern: (n, m) to remove n of every m consecutive weights of a row, or None for exactly
            ``round(ratio * N * K)`` of the smallest ``|W|`` of the whole matrix.

    Returns:
        [N, K] bool, True where a weight is removed. Among equal magnitudes the first in row-major order are removed.

    Raises:
        CalibrationError: the ratio is not in [0, 1), or m does not divide K.
    """
    check_sparsity(W.shape[1], ratio=ratio, pattern=pattern)
    magnitude = W.abs() if W.dtype in (torch.bfloat16, torch.float16) else W.abs().to(torch.float32)
    if pattern is not None:
        return smallest_of_each(magnitude, removed=pattern[0], of=pattern[1])
    return smallest(magnitude.flatten(), round(ratio * W.numel())).view(W.shape)
