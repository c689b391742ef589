"""SmoothQuant: move the range of activations into the weights, channel by channel.

If activations are quantized per token, one channel of large magnitude makes the grid coarse for all channels. Channel j
is divided by ``s_j = max|X_j|^α / max|W_j|^(1-α)`` and the columns that read it are multiplied by s_j, which leaves the
products unchanged. With α = 1 all channels of X have the same range; with α = 0 all columns of W do.

Source: SmoothQuant (arXiv 2211.10438), section 4, equation 4.
"""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from quantlab.algorithms.awq import balanced
from quantlab.errors import CalibrationError

_EPSILON: Final = 1e-5


def smoothing_scales(max_abs: Tensor, weights: Sequence[Tensor], *, alpha: float) -> Tensor:
    """The factors of one fold.

    Args:
        max_abs: [K] largest magnitude of each channel.
        weights: [N, K] each, all quantized readers of the channels.
        alpha: fraction of the range that moves into the weights, 0 to 1.

    Returns:
        s [K] float32, normalised to ``sqrt(max s · min s) = 1``; 1 on channels that are always zero.

    Raises:
        CalibrationError: no weights, magnitudes that are not finite or negative, or alpha outside [0, 1].
    """
    if not weights or not max_abs.isfinite().all() or (max_abs < 0).any() or not 0 <= alpha <= 1:
        raise CalibrationError(
            "A fold has no usable statistics",
            found=f"{len(weights)} matrices, alpha {alpha}, largest magnitudes between "
            f"{max_abs.min().item():.3g} and {max_abs.max().item():.3g}",
            fix="fold only sites that a quantized matrix reads, with alpha from 0 to 1, and collect the largest |x|",
        )
    largest = torch.stack([W.abs().amax(dim=0).to(torch.float32) for W in weights]).amax(dim=0)
    x = max_abs.to(torch.float32)
    s = x.clamp(min=_EPSILON) ** alpha / largest.clamp(min=_EPSILON) ** (1 - alpha)
    return balanced(s, (x > 0) & (largest > 0))
