"""AWQ: scale the columns of channels with large inputs up before rounding, and their producer down.

Dividing channel j of the input by s_j where it is produced, and multiplying column j of every reader by s_j, leaves the
model's function unchanged; the rounding error becomes ``Δ = Q(W s) / s - W``. A scaled-up channel has a relatively
smaller rounding error, at the cost of the channels that share its grid. The best s is searched along two curves:

- ``s = x̄^α`` with x̄ the mean magnitude of each channel, and
- ``s = x̄^α / w̄^(1-α)`` with w̄ the mean of |w| / max |w| of its group, over all rows that read the channel,

for α in (0, 1]. No scaling is always a candidate. Every s is normalised to ``sqrt(max s · min s) = 1``. The loss is the
output error of all quantized readers, ``Σ tr(Δ H Δᵀ)`` with each matrix's own H. A reader that is not quantized (a
router) adds nothing to the loss, but its columns are multiplied too.

The loss is evaluated for the factors as they will be applied. Channels produced by one row share a factor. If a weight
that stays in 16 bits is scaled, factors are powers of two, which are exact. Every curve is then rounded with several
offsets of the exponent, because a single offset would round neighbouring factors up or down arbitrarily.

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

_EPSILON: Final = 1e-4
_LARGEST_FACTOR: Final = 100.0
"""Factors stay between 1 / 100 and 100: outside, one side of the fold loses precision."""
_OFFSETS: Final = (0.0, 0.25, 0.5, 0.75)
"""Offsets added to log2 of a curve before it is rounded to integers."""


@dataclass(frozen=True)
class AwqOptions:
    """Options of the search.

    Attributes:
        steps: number of exponents tried, α = 1/steps ... 1.
        both_curves: try the curve with w̄ too, which doubles the work.
        weighted: weigh the search for grid scales with the mean squares of the scaled inputs.
        rows: number of evenly spaced rows of a matrix that are evaluated; None for all.
        powers_of_two: restrict factors to powers of two.
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
        s: [K] float32, all 1 if no scaling has the lowest loss.
        losses: loss of every candidate; the first is no scaling.
        best: index of s among the candidates.
    """

    s: Tensor
    losses: tuple[float, ...]
    best: int


class Reader(NamedTuple):
    """A matrix that reads the channels and will be quantized.

    Attributes:
        W: [N, K].
        H: [K, K], mean of x xᵀ over the tokens it reads.
        share: fraction of all tokens that it reads; weights an expert's error by how often the expert is used.
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
        readers: iterated once, so that only one H is in memory at a time.
        grid: the integer grid and the search for its scales.
        options: options of the search.
        shared: [K] int64, equal for channels that must share a factor; None if there are none.

    Returns:
        The factors, and the losses of all candidates.

    Raises:
        CalibrationError: there are no weights, or magnitudes or H are not finite or have the wrong shape.
    """
    if not weights or not mean_abs.isfinite().all() or (mean_abs < 0).any():
        raise CalibrationError(
            "A fold has no usable statistics",
            found=f"{len(weights)} matrices to quantize, mean magnitudes between "
            f"{mean_abs.min().item():.3g} and {mean_abs.max().item():.3g}",
            fix="fold only sites that a quantized matrix reads, and collect the mean of |x|",
        )
    curves = list(_candidates(mean_abs, _mean_magnitude(weights, grid.group_size), options, shared))
    losses = [0.0] * len(curves)
    for W, H, share in readers:
        check_statistics(W, H)
        some = _sampled_rows(W, options.rows).to(torch.float32)
        for index, s in enumerate(curves):
            losses[index] += share * _loss(some, H, s, grid, weighted=options.weighted)
    best = min(range(len(curves)), key=losses.__getitem__)
    return AwqResult(curves[best], tuple(losses), best)


def balanced(s: Tensor, live: Tensor) -> Tensor:
    """Normalise factors to ``sqrt(max · min) = 1`` over the live channels and clamp them; 1 on channels that are always
    zero.

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
    s = (s / (known.max().sqrt() * known.min().sqrt())).clamp(1 / _LARGEST_FACTOR, _LARGEST_FACTOR)
    return torch.where(usable, s, torch.ones_like(s))


def _candidates(mean_abs: Tensor, mean_weight: Tensor, options: AwqOptions, shared: Tensor | None) -> Iterator[Tensor]:
    """No scaling, then the factors of both curves as they can be applied, without duplicates."""
    one = torch.ones_like(mean_abs, dtype=torch.float32)
    seen = {tuple(one.tolist())}
    yield one
    for curve in _curves(mean_abs, mean_weight, options):
        exponents = curve.log2() if shared is None else means_of_shared(curve.log2(), shared)
        for offset in _OFFSETS if options.powers_of_two else (None,):
            s = torch.exp2(exponents if offset is None else (exponents + offset).round())
            if (key := tuple(s.tolist())) not in seen:
                seen.add(key)
                yield s


def _curves(mean_abs: Tensor, mean_weight: Tensor, options: AwqOptions) -> Iterator[Tensor]:
    live, x = mean_abs > 0, mean_abs.to(torch.float32)
    for step in range(1, options.steps + 1):
        alpha = step / options.steps
        yield balanced(x**alpha, live)
        if options.both_curves and alpha < 1:
            yield balanced(x**alpha / (mean_weight ** (1 - alpha) + _EPSILON), live)


def means_of_shared(values: Tensor, shared: Tensor) -> Tensor:
    """The mean [K] over all channels with the same number in `shared` [K] int64."""
    total = torch.zeros(int(shared.max()) + 1, device=values.device).index_add_(0, shared, values)
    return (total / torch.bincount(shared).clamp(min=1))[shared]


def _mean_magnitude(weights: Sequence[Tensor], group_size: int | None) -> Tensor:
    """w̄ [K] float32: mean of |w| / max |w| of its group, over all rows of all weights."""
    total = torch.zeros(weights[0].shape[1], dtype=torch.float32, device=weights[0].device)
    for W in weights:
        grouped = W.abs().to(torch.float32).reshape(len(W), -1, group_size or W.shape[1])
        total += (
            (grouped / grouped.amax(dim=2, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)).flatten(1).sum(0)
        )
    return total / sum(len(W) for W in weights)


def _sampled_rows(W: Tensor, rows: int | None) -> Tensor:
    """At most `rows` rows of W, evenly spaced."""
    if rows is None or len(W) <= rows:
        return W
    return W[torch.arange(rows, device=W.device) * len(W) // rows]


def _loss(W: Tensor, H: Tensor, s: Tensor, grid: GridOptions, *, weighted: bool) -> float:
    """``tr(Δ H Δᵀ)`` for W rounded with its columns scaled by s."""
    importance = H.diagonal().to(torch.float32) / s.square() if weighted else None
    delta = round_to_nearest(W * s, grid, importance=importance).dequantize(torch.float32) / s - W
    return float((delta @ H.to(torch.float32)).mul_(delta).sum(dtype=torch.float64))
