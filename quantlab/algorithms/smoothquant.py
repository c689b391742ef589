"""SmoothQuant: move the difficulty of rounding activations into the weights, channel by channel.

Where activations are rounded per token, one channel with large values makes the steps of all channels coarse. Dividing
channel j by ``s_j = max|X_j|^α / max|W_j|^(1-α)`` and multiplying the columns that read it by the same changes nothing but
that: with α = 1 all channels of X have the same range, with α = 0 all columns of W.

Source: SmoothQuant (arXiv 2211.10438), section 4, equation 4.
"""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from quantlab.algorithms.awq import balanced
from quantlab.errors import CalibrationError

_LEAST: Final = 1e-5


def smoothing_scales(max_abs: Tensor, weights: Sequence[Tensor], *, alpha: float) -> Tensor:
    """The factors of one fold.

    Args:
        max_abs: [K] largest magnitude of each channel.
        weights: [N, K] each, all that read the channels and are rounded.
        alpha: share of the difficulty that moves into the weights, 0 to 1.

    Returns:
        s [K] float32, the geometric middle of its largest and smallest 1; 1 on channels that are always zero.

    Raises:
        CalibrationError: no weights, magnitudes that are not finite or negative, or alpha outside [0, 1].
    """
    if not weights or not max_abs.isfinite().all() or (max_abs < 0).any() or not 0 <= alpha <= 1:
        raise CalibrationError(
            "A fold has no usable statistics",
            found=f"{len(weights)} matrices, alpha {alpha}, largest magnitudes between "
            f"{max_abs.min().item():.3g} and {max_abs.max().item():.3g}",
            fix="fold only where a quantized matrix reads, with alpha from 0 to 1, and collect the largest |x|",
        )
    largest = torch.stack([W.abs().amax(dim=0).to(torch.float32) for W in weights]).amax(dim=0)
    x = max_abs.to(torch.float32)
    s = x.clamp(min=_LEAST) ** alpha / largest.clamp(min=_LEAST) ** (1 - alpha)
    return balanced(s, (x > 0) & (largest > 0))
