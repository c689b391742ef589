"""Magnitude pruning: the weights nearest to zero become zero.

Source: Han et al., "Learning both Weights and Connections for Efficient Neural Networks", arXiv 1506.02626, section 3.
"""

import torch
from torch import Tensor


def magnitude_mask(W: Tensor, *, ratio: float) -> Tensor:
    """The weights to remove: exactly ``round(ratio * N * K)`` of the smallest ``|W|`` of the whole matrix.

    Args:
        W: [N, K] of any floating dtype.
        ratio: share of weights to remove, 0 <= ratio < 1.

    Returns:
        [N, K] bool, True where a weight is removed. Of equal magnitudes the first in row order go first.
    """
    count = round(ratio * W.numel())
    if count == 0:
        return torch.zeros(W.shape, dtype=torch.bool)
    magnitude = W.abs().flatten().to(torch.float32)
    threshold = magnitude.kthvalue(count).values
    mask = magnitude < threshold
    ties = (magnitude == threshold).nonzero().flatten()
    mask[ties[: count - int(mask.sum())]] = True
    return mask.view(W.shape)
