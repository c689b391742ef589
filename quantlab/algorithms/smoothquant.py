"""SmoothQuant: move the difficulty of rounding activations into the weights, channel by channel.

Where activations are rounded per token, one channel with large values makes the steps of all channels coarse. Dividing
channel j by ``s_j = max|X_j|^α / max|W_j|^(1-α)`` and multiplying the columns that read it by the same changes nothing but
that: with α = 1 all channels of X have the same range, with α = 0 all columns of W.

Which α is best can be searched with an estimate of the squared error of the outputs at 8 bits:
``tr(Δ H Δᵀ)`` of the rounded weights, plus what rounding a token to steps of ``a / 127`` adds, ``a² / (12 · 127²) · |W s|²``
with a the largest scaled magnitude, ``max_j max|X_j| / s_j``. That is what the worst token suffers, so activations count
rather too much than too little.

Source: SmoothQuant (arXiv 2211.10438), section 4, equation 4.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from quantlab.algorithms.awq import balanced
from quantlab.algorithms.hessian import check_statistics
from quantlab.algorithms.rtn import rtn
from quantlab.errors import CalibrationError

_LEAST: Final = 1e-5
_LEVELS: Final = 127


@dataclass(frozen=True)
class SmoothingSearch:
    """What a search of α found.

    Attributes:
        s: [K] float32.
        alpha: of the candidates the best; None where no smoothing is better than every α.
        losses: estimated squared error of no smoothing, then of every candidate.
    """

    s: Tensor
    alpha: float | None
    losses: tuple[float, ...]


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


def searched_smoothing(
    max_abs: Tensor,
    readers: Sequence[tuple[Tensor, Tensor]],
    *,
    alphas: Sequence[float] = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8),
) -> SmoothingSearch:
    """The factors of least estimated error, no smoothing among the candidates.

    Args:
        max_abs: [K] largest magnitude of each channel.
        readers: (W [N, K], H [K, K] mean of x xᵀ) of every matrix that reads the channels and is rounded.
        alphas: candidates.

    Returns:
        The best factors.

    Raises:
        CalibrationError: as `smoothing_scales`, or H does not fit.
    """
    for W, H in readers:
        check_statistics(W, H)
    curves = [torch.ones_like(max_abs, dtype=torch.float32)]
    curves += [smoothing_scales(max_abs, [W for W, _ in readers], alpha=alpha) for alpha in alphas]
    losses = [sum(_loss(max_abs, W.to(torch.float32), H, s) for W, H in readers) for s in curves]
    best = min(range(len(curves)), key=losses.__getitem__)
    return SmoothingSearch(curves[best], alphas[best - 1] if best else None, tuple(losses))


def _loss(max_abs: Tensor, W: Tensor, H: Tensor, s: Tensor) -> float:
    """Estimated squared error of the outputs of one matrix, 8 bits per row and per token."""
    scaled = W * s
    rounded = rtn(scaled, bits=8, group_size=None, scale_dtype=torch.float32, grid="absmax").dequantize(torch.float32)
    delta = rounded / s - W
    step = (max_abs / s).max() / _LEVELS
    weights = (delta @ H.to(torch.float32)).mul_(delta).sum(dtype=torch.float64)
    return float(weights + step.square() / 12 * scaled.square().sum(dtype=torch.float64))
