"""AWQ: scale the channels with large inputs up before rounding, and what produces them down.

A channel j of the input may be divided by s_j where it is produced and every column j that reads it multiplied by s_j: the
model computes the same, and rounding then costs ``Δ = Q(W s) / s - W``. Scaling up a channel makes its rounding error
relatively smaller at the cost of those that share its grid. Which s is best is searched along curves from "no scaling":

- ``s = x̄^α`` with x̄ the mean magnitude of each channel, and
- ``s = x̄^α / w̄^(1-α)`` with w̄ the mean over all rows that read it of |w| over the largest |w| of its group,

for some α in (0, 1]. No scaling at all is always a candidate. Every s is brought to ``sqrt(max s · min s) = 1``. The loss is
the error of the outputs of all matrices that read the channel, ``Σ tr(Δ H Δᵀ)`` with each matrix's own H. A matrix that reads
the channel and is not quantized (a router) adds nothing to the loss, but its columns take the factor like all others.

What is judged is what will be applied. Channels that one row produces share a factor. Where a weight that stays in 16 bits
takes part, factors are powers of two, which multiply it exactly: every curve is then rounded from several heights, since
whether a factor falls to one power or the next is otherwise chance.

Source: AWQ (arXiv 2306.00978), section 3.2, equations 4 and 5.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import Tensor

from quantlab.algorithms.hessian import check_statistics
from quantlab.algorithms.rtn import round_to_nearest
from quantlab.algorithms.scales import GridOptions
from quantlab.errors import CalibrationError

_LEAST: Final = 1e-4
_WIDEST: Final = 100.0
"""Factors stay between its inverse and it: beyond, neither side of a fold keeps its precision."""
_HEIGHTS: Final = (0.0, 0.25, 0.5, 0.75)
"""What is added to the binary logarithm of a curve before it is rounded to whole numbers."""


@dataclass(frozen=True)
class AwqOptions:
    """What can be chosen of the search.

    Attributes:
        steps: exponents tried, α = 1/steps ... 1.
        both_curves: try the curve with w̄ too, which doubles the work.
        weighted: search the scales of grids with the mean squares of the scaled inputs as importance.
        rows: of a matrix that are looked at, evenly spaced; None for all.
        powers_of_two: only such factors.
    """

    steps: int = 20
    both_curves: bool = True
    weighted: bool = True
    rows: int | None = 1024
    powers_of_two: bool = False


DEFAULT: Final = AwqOptions()


@dataclass(frozen=True)
class AwqResult:
    """The factors of one fold.

    Attributes:
        s: [K] float32, all 1 where no scaling is better than none.
        losses: loss of every candidate, the first that of no scaling.
        best: which of them s is.
    """

    s: Tensor
    losses: tuple[float, ...]
    best: int


class Reader(NamedTuple):
    """A matrix that reads the channels and will be quantized.

    Attributes:
        W: [N, K].
        H: [K, K], mean of x xᵀ over the tokens it reads.
        share: how many of all tokens those are: an expert's error counts as often as it is asked.
    """

    W: Tensor
    H: Tensor
    share: float = 1.0


def awq_scales(
    mean_abs: Tensor,
    weights: Sequence[Tensor],
    readers: Iterable[Reader],
    grid: GridOptions,
    options: AwqOptions = DEFAULT,
    *,
    shared: Tensor | None = None,
) -> AwqResult:
    """Search the factors of one fold.

    Args:
        mean_abs: x̄ [K] float32, mean magnitude of each channel.
        weights: [N, K] each, of all readers, for w̄.
        readers: taken one after the other and not kept, so that one H at a time has to be in memory.
        grid: the integers and the search of their scales.
        options: of the search.
        shared: [K] int64, equal for channels that have to share a factor; None where none has to.

    Returns:
        The factors, and the losses they were chosen by.

    Raises:
        CalibrationError: there is nothing to quantize, or magnitudes or H are not finite or do not fit.
    """
    if not weights or not mean_abs.isfinite().all() or (mean_abs < 0).any():
        raise CalibrationError(
            "A fold has no usable statistics",
            found=f"{len(weights)} matrices to quantize, mean magnitudes between "
            f"{mean_abs.min().item():.3g} and {mean_abs.max().item():.3g}",
            fix="fold only where a quantized matrix reads, and collect the mean of |x|",
        )
    curves = list(_candidates(mean_abs, _mean_magnitude(weights, grid.group_size), options, shared))
    losses = [0.0] * len(curves)
    for W, H, share in readers:
        check_statistics(W, H)
        some = _evenly(W, options.rows).to(torch.float32)
        for index, s in enumerate(curves):
            losses[index] += share * _loss(some, H, s, grid, weighted=options.weighted)
    best = min(range(len(curves)), key=losses.__getitem__)
    return AwqResult(curves[best], tuple(losses), best)


def balanced(s: Tensor, live: Tensor) -> Tensor:
    """Factors with ``sqrt(max · min) = 1`` over the live channels, within bounds; 1 on channels that are always zero.

    Args:
        s: [K], positive.
        live: [K] bool.

    Returns:
        [K] float32, finite and positive.
    """
    s = s.to(torch.float32)
    usable = live & s.isfinite() & (s > 0)
    if not usable.any():
        return torch.ones_like(s)
    known = s[usable]
    s = (s / (known.max().sqrt() * known.min().sqrt())).clamp(1 / _WIDEST, _WIDEST)
    return torch.where(usable, s, torch.ones_like(s))


def _candidates(mean_abs: Tensor, mean_weight: Tensor, options: AwqOptions, shared: Tensor | None) -> Iterator[Tensor]:
    """No scaling, then both curves as they can be applied, none twice."""
    one = torch.ones_like(mean_abs, dtype=torch.float32)
    seen = {tuple(one.tolist())}
    yield one
    for curve in _curves(mean_abs, mean_weight, options):
        exponents = curve.log2() if shared is None else means_of_shared(curve.log2(), shared)
        for height in _HEIGHTS if options.powers_of_two else (None,):
            s = torch.exp2(exponents if height is None else (exponents + height).round())
            if (key := tuple(s.tolist())) not in seen:
                seen.add(key)
                yield s


def _curves(mean_abs: Tensor, mean_weight: Tensor, options: AwqOptions) -> Iterator[Tensor]:
    live, x = mean_abs > 0, mean_abs.to(torch.float32)
    for step in range(1, options.steps + 1):
        alpha = step / options.steps
        yield balanced(x**alpha, live)
        if options.both_curves and alpha < 1:
            yield balanced(x**alpha / (mean_weight ** (1 - alpha) + _LEAST), live)


def means_of_shared(values: Tensor, shared: Tensor) -> Tensor:
    """The mean [K] over all channels with the same number in `shared` [K] int64."""
    total = torch.zeros(int(shared.max()) + 1, device=values.device).index_add_(0, shared, values)
    return (total / torch.bincount(shared).clamp(min=1))[shared]


def _mean_magnitude(weights: Sequence[Tensor], group_size: int | None) -> Tensor:
    """w̄ [K] float32: mean over all rows of all weights of |w| over the largest of its group."""
    total = torch.zeros(weights[0].shape[1], dtype=torch.float32, device=weights[0].device)
    for W in weights:
        grouped = W.abs().to(torch.float32).reshape(len(W), -1, group_size or W.shape[1])
        total += (
            (grouped / grouped.amax(dim=2, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)).flatten(1).sum(0)
        )
    return total / sum(len(W) for W in weights)


def _evenly(W: Tensor, rows: int | None) -> Tensor:
    """At most that many rows, evenly spaced."""
    if rows is None or len(W) <= rows:
        return W
    return W[torch.arange(rows, device=W.device) * len(W) // rows]


def _loss(W: Tensor, H: Tensor, s: Tensor, grid: GridOptions, *, weighted: bool) -> float:
    """``tr(Δ H Δᵀ)`` of rounding W with its columns scaled by s."""
    importance = H.diagonal().to(torch.float32) / s.square() if weighted else None
    delta = round_to_nearest(W * s, grid, importance=importance).dequantize(torch.float32) / s - W
    return float((delta @ H.to(torch.float32)).mul_(delta).sum(dtype=torch.float64))
