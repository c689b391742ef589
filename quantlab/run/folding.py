"""Folds of one block: factors found where the statistics are, and applied to everything that takes part.

Where a weight that stays in 16 bits takes part (a router, kv_b), factors are powers of two: multiplying by them rounds
nothing, so that the fold is exact in the artifact too.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from quantlab.algorithms.awq import AwqOptions, Reader, awq_scales, means_of_shared
from quantlab.algorithms.smoothquant import smoothing_scales
from quantlab.calibration.moe import MoeInputs
from quantlab.calibration.statistics import Need, SiteStatistics
from quantlab.checkpoint.reader import TORCH_DTYPES
from quantlab.passes.apply import grid_of
from quantlab.plan.folds import Fold
from quantlab.plan.model import Step
from quantlab.recipe.algorithms import Awq, SmoothQuant

FOLD_NEEDS: Final[frozenset[Need]] = frozenset({"hessian", "magnitudes"})
_MAGNITUDES: Final[frozenset[Need]] = frozenset({"magnitudes"})
_ROWS: Final = 2048
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

    def of(self, step: Step, needs: frozenset[Need]) -> SiteStatistics:
        """Statistics of what a linear reads; an expert's are computed anew, since all of them together are too many to keep."""
        rule, expert = step.claim.rule, step.claim.expert
        assert rule is not None
        if expert is None:
            return self.sites[rule.site or ""]
        assert self.moe is not None, "an expert's inputs are known by the routing"
        if rule.site == "mlp":
            return self.moe.statistics(expert, needs)
        down = step.claim.name
        gate, up = (self.weights[down.replace(".down_proj.", f".{kind}_proj.")] for kind in ("gate", "up"))
        return self.moe.down_statistics(expert, gate, up, needs)


def factors_of(fold: Fold, known: Knowledge, rows: Sequence[int]) -> Tensor:
    """The factor of each channel [K] float32: consumers are multiplied by it, producers divided.

    Args:
        fold: where.
        known: about the inputs.
        rows: for every channel the row of the producer it comes from; channels of one row share a factor.
    """
    quantized = [step for step in fold.consumers if step.quantize and step.quantize.algorithm == fold.algorithm]
    readers: dict[int | None, list[Step]] = defaultdict(list)
    for step in quantized:
        readers[step.claim.expert].append(step)  # what reads a site besides experts reads the same
    magnitudes = [known.of(steps[0], _MAGNITUDES) for steps in readers.values()]
    shared = torch.tensor(rows, device=magnitudes[0].mean_square.device) if len(set(rows)) < len(rows) else None
    linears = [step for step in (*fold.producers, *fold.consumers) if len(step.source.shape) == 2]
    exact = any(step.quantize is None for step in linears)
    weights = [known.weights[step.claim.name] for step in quantized]
    match fold.algorithm:
        case Awq(steps=count):
            assert quantized[0].quantize is not None
            seen = sum(found.count for found in magnitudes)
            means = [one.mean_abs * (one.count / max(seen, 1)) for one in magnitudes if one.mean_abs is not None]
            # the search of a group's scale comes after the fold; here it would cost twenty times as much and change little
            grid = replace(grid_of(quantized[0].quantize, TORCH_DTYPES[quantized[0].dtype]), clip_steps=0)
            options = AwqOptions(
                steps=count, weighted=False, rows=max(_ROWS // len(quantized), 16), powers_of_two=exact
            )
            each = _readers(readers, known)
            return awq_scales(torch.stack(means).sum(dim=0), weights, each, grid, options, shared=shared).s
        case SmoothQuant(alpha=alpha):
            largest = torch.stack([found.max_abs for found in magnitudes if found.max_abs is not None]).amax(dim=0)
            factors = smoothing_scales(largest, [weight.to(torch.float32) for weight in weights], alpha=alpha)
            exponents = factors.log2() if shared is None else means_of_shared(factors.log2(), shared)
            return torch.exp2(exponents.round() if exact else exponents)


def _readers(by_expert: Mapping[int | None, Sequence[Step]], known: Knowledge) -> Iterator[Reader]:
    """Every matrix with what it reads; of an expert's two that read the same it is computed once."""
    for steps in by_expert.values():
        found = known.of(steps[0], FOLD_NEEDS)
        assert found.hessian is not None, "asked for"
        for step in steps:
            yield Reader(known.weights[step.claim.name], found.hessian, found.count / known.tokens)


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
