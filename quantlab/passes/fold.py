"""Binds folds to their algorithms: statistics and weights of one fold in, one factor per channel out.

A fold divides the channels of an input site in their producer and multiplies the columns of every reader; the model's
function is unchanged. If a weight that stays in 16 bits is scaled (a router, kv_b), factors are powers of two, which
are exact in 16 bits.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, assert_never

import torch
from torch import Tensor

from quantlab.algorithms.awq import AwqOptions, Reader, awq_scales, means_of_shared
from quantlab.algorithms.smoothquant import smoothing_scales
from quantlab.numerics.statistics import Need, SiteStatistics
from quantlab.passes.apply import grid_of
from quantlab.recipe.algorithms import Awq, SmoothQuant
from quantlab.recipe.schema import Quantize

_MAGNITUDES: Final[frozenset[Need]] = frozenset({"magnitudes"})
_ROWS: Final = 2048
"""Rows of weights used in the search of one fold, spread over all its matrices."""

Statistics = Callable[[int | None, Collection[Need]], SiteStatistics]
"""Statistics of the fold's site as one routed expert reads it, or as every other linear reads it (None)."""


@dataclass(frozen=True)
class FoldedLinear:
    """A linear that reads the channels and is quantized with the algorithm of the fold.

    Attributes:
        weight: [N, K].
        expert: the routed expert it belongs to; None for a linear that reads every token.
        quantize: the pass that quantizes it.
        dtype: dtype of its scales.
    """

    weight: Tensor
    expert: int | None
    quantize: Quantize
    dtype: torch.dtype


def fold_needs(algorithm: Awq | SmoothQuant) -> frozenset[Need]:
    """The statistics that the search for factors reads."""
    match algorithm:
        case Awq():
            return _MAGNITUDES | {"hessian"}
        case SmoothQuant():
            return _MAGNITUDES
        case _:
            assert_never(algorithm)


def fold_factors(
    algorithm: Awq | SmoothQuant,
    linears: Sequence[FoldedLinear],
    statistics: Statistics,
    *,
    rows: Sequence[int],
    exact: bool,
    tokens: int,
) -> Tensor:
    """The factor of each channel [K] float32: consumers are multiplied by it, producers divided.

    Args:
        algorithm: chooses the factors.
        linears: all readers that the algorithm quantizes, at least one.
        statistics: returns statistics of the site; AWQ calls it twice per expert, because the Hessians of all experts
            do not fit into memory.
        rows: for each channel the producer's row that computes it; channels of one row share a factor.
        exact: whether factors must be powers of two.
        tokens: number of calibration tokens.
    """
    by_expert: dict[int | None, list[Tensor]] = defaultdict(list)
    for linear in linears:
        by_expert[linear.expert].append(linear.weight)
    magnitudes = [statistics(expert, _MAGNITUDES) for expert in by_expert]
    shared = torch.tensor(rows, device=magnitudes[0].mean_square.device) if len(set(rows)) < len(rows) else None
    weights = [linear.weight for linear in linears]
    match algorithm:
        case Awq(steps=count):
            seen = sum(found.count for found in magnitudes)
            means = [one.mean_abs * (one.count / max(seen, 1)) for one in magnitudes if one.mean_abs is not None]
            # no search for scales here: it would take twenty times as long and change the factors little
            grid = replace(grid_of(linears[0].quantize, linears[0].dtype), clip_steps=0)
            options = AwqOptions(steps=count, weighted=False, rows=max(_ROWS // len(linears), 16), powers_of_two=exact)
            readers = _readers(by_expert, statistics, fold_needs(algorithm), tokens)
            return awq_scales(torch.stack(means).sum(dim=0), weights, readers, grid, options, shared=shared).s
        case SmoothQuant(alpha=alpha):
            largest = torch.stack([found.max_abs for found in magnitudes if found.max_abs is not None]).amax(dim=0)
            factors = smoothing_scales(largest, [weight.to(torch.float32) for weight in weights], alpha=alpha)
            exponents = factors.log2() if shared is None else means_of_shared(factors.log2(), shared)
            return torch.exp2(exponents.round() if exact else exponents)
        case _:
            assert_never(algorithm)


def _readers(
    by_expert: Mapping[int | None, Sequence[Tensor]], statistics: Statistics, needs: Collection[Need], tokens: int
) -> Iterator[Reader]:
    """Every matrix with its Hessian; matrices of one expert share it."""
    for expert, weights in by_expert.items():
        found = statistics(expert, needs)
        assert found.hessian is not None, "asked for by fold_needs"
        for weight in weights:
            yield Reader(weight, found.hessian, found.count / tokens)


def scaled_columns(weight: Tensor, factors: Tensor) -> Tensor:
    """A consumer [N, K] with its columns multiplied, in float32."""
    return weight.to(torch.float32) * factors


def divided_rows(weight: Tensor, factors: Tensor, rows: Sequence[int]) -> Tensor:
    """A producer, [N, …] or [N], with the rows that feed the channels divided, in float32."""
    divisor = torch.ones(len(weight), device=weight.device)
    divisor[torch.tensor(rows, device=weight.device)] = factors
    return weight.to(torch.float32) / divisor.view(-1, *[1] * (weight.dim() - 1))
