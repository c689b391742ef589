"""Folds of one block: factors found where the statistics are, and applied to everything that takes part.

Where a weight that stays in 16 bits takes part (a router, kv_b), factors are powers of two: multiplying by them rounds
nothing, so that the fold is exact in the artifact too.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantlab.algorithms.awq import AwqOptions, awq_scales
from quantlab.algorithms.smoothquant import smoothing_scales
from quantlab.calibration.moe import MoeInputs
from quantlab.calibration.statistics import Need, SiteStatistics
from quantlab.checkpoint.reader import TORCH_DTYPES
from quantlab.passes.apply import grid_of
from quantlab.plan.folds import Fold
from quantlab.plan.model import Step
from quantlab.recipe.algorithms import Awq, SmoothQuant

FOLD_NEEDS: frozenset[Need] = frozenset({"hessian", "magnitudes"})
_ROWS = 2048
"""Rows looked at in the search of one fold, spread over all its matrices."""


@dataclass(frozen=True)
class Knowledge:
    """What is known of the inputs of half a layer before anything in it was changed.

    Attributes:
        sites: statistics of every site outside the routed experts.
        moe: who got which token, None without routed experts.
        weights: the layer's weights as they are now.
        tokens: how many in all.
    """

    sites: Mapping[str, SiteStatistics]
    moe: MoeInputs | None
    weights: Mapping[str, Tensor]
    tokens: int

    def of(self, step: Step) -> SiteStatistics:
        """Statistics of what a linear reads."""
        rule, expert = step.claim.rule, step.claim.expert
        assert rule is not None
        if expert is None:
            return self.sites[rule.site or ""]
        assert self.moe is not None, "an expert's inputs are known by the routing"
        if rule.site == "mlp":
            return self.moe.statistics(expert, FOLD_NEEDS)
        down = step.claim.name
        gate, up = (self.weights[down.replace(".down_proj.", f".{kind}_proj.")] for kind in ("gate", "up"))
        return self.moe.down_statistics(expert, gate, up, FOLD_NEEDS)


def factors_of(fold: Fold, known: Knowledge, rows: Sequence[int]) -> Tensor:
    """The factor of each channel [K] float32: consumers are multiplied by it, producers divided.

    Args:
        fold: where.
        known: about the inputs.
        rows: for every channel the row of the producer it comes from; channels of one row share a factor.
    """
    quantized = [step for step in fold.consumers if step.quantize and step.quantize.algorithm == fold.algorithm]
    readers = []
    for step in quantized:
        found = known.of(step)
        readers.append((known.weights[step.claim.name].to(torch.float32), found))
    tied = len(set(rows)) < len(rows)
    match fold.algorithm:
        case Awq() as algorithm:
            factors = _awq(algorithm, quantized[0], readers, known.tokens, rows, tied=tied)
        case SmoothQuant(alpha=alpha):
            largest = torch.stack([found.max_abs for _, found in readers if found.max_abs is not None]).amax(dim=0)
            factors = smoothing_scales(largest, [weight for weight, _ in readers], alpha=alpha)
    if tied:
        factors = _shared(factors.log(), rows).exp()
    linears = [step for step in (*fold.producers, *fold.consumers) if len(step.source.shape) == 2]
    if any(step.quantize is None for step in linears):
        factors = torch.exp2(factors.log2().round())
    return factors


def _awq(
    algorithm: Awq,
    step: Step,
    readers: Sequence[tuple[Tensor, SiteStatistics]],
    tokens: int,
    rows: Sequence[int],
    *,
    tied: bool,
) -> Tensor:
    assert step.quantize is not None
    seen = sum(found.count for _, found in readers)
    means = [found.mean_abs * (found.count / max(seen, 1)) for _, found in readers if found.mean_abs is not None]
    mean_abs = torch.stack(means).sum(dim=0)
    if tied:
        mean_abs = _shared(mean_abs, rows)
    pairs = [(weight, found.hessian * (found.count / tokens)) for weight, found in readers if found.hessian is not None]
    # the search of a group's scale comes after the fold; here it would cost twenty times as much and change little
    grid = replace(grid_of(step.quantize, TORCH_DTYPES[step.dtype]), clip_steps=0)
    options = AwqOptions(
        steps=algorithm.steps, both_curves=not tied, weighted=False, rows=max(_ROWS // len(readers), 16)
    )
    return awq_scales(mean_abs, pairs, grid, options).s


def _shared(values: Tensor, rows: Sequence[int]) -> Tensor:
    """The mean [K] over all channels that come from the same row."""
    index = torch.tensor(rows, device=values.device)
    total = torch.zeros(int(index.max()) + 1, device=values.device).index_add_(0, index, values)
    return (total / torch.bincount(index))[index]


def folded(weight: Tensor, factors: Tensor) -> Tensor:
    """A consumer [N, K] with its columns multiplied."""
    return weight.to(torch.float32) * factors


def unfolded(weight: Tensor, factors: Tensor, rows: Sequence[int]) -> Tensor:
    """A producer, [N, …] or [N], with the rows that feed the channels divided."""
    divisor = torch.ones(len(weight), device=weight.device)
    divisor[torch.tensor(rows, device=weight.device)] = factors
    return weight.to(torch.float32) / divisor.view(-1, *[1] * (weight.dim() - 1))


Change = Callable[[Tensor], Tensor]
"""What a fold does to one weight."""
