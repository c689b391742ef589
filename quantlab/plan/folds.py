"""Where a variant folds scales: a tensor gives up a factor per channel, and everything that reads the channels takes it on.

The model computes the same before and after; what changes is how hard its weights and activations are to round.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from quantlab.architectures.architecture import STAGES
from quantlab.plan.model import Step
from quantlab.recipe.algorithms import Awq, SmoothQuant


@dataclass(frozen=True)
class Fold:
    """One place to fold.

    Attributes:
        site: the input site whose channels are scaled.
        algorithm: what chooses the factors.
        producers: the norm or the linear (with its bias) the channels come from; they are divided by the factors.
        consumers: every linear that reads the channels, and the router; their columns are multiplied.
    """

    site: str
    algorithm: Awq | SmoothQuant
    producers: tuple[Step, ...]
    consumers: tuple[Step, ...]


def folds_of(steps: Iterable[Step]) -> tuple[Fold, ...]:
    """The folds of one block in the order its forward pass reaches them; empty where no pass folds."""
    producers: dict[tuple[str, int | None, bool], list[Step]] = defaultdict(list)
    readers: dict[str, list[Step]] = defaultdict(list)
    for step in steps:
        rule = step.claim.rule
        if rule is None or not step.outputs or step.claim.role == "mtp":
            continue
        if rule.feeds is not None:
            producers[rule.feeds, step.claim.expert, rule.role == "norm"].append(step)
        if rule.site is not None:
            readers[rule.site].append(step)
    folds = []
    for (site, expert, norm), members in producers.items():
        consumers = [step for step in readers[site] if norm or step.claim.expert == expert]
        algorithm = next((found for step in consumers if (found := _folding(step))), None)
        if (
            isinstance(algorithm, SmoothQuant)
            and site == "mlp"
            and any(step.claim.expert is not None for step in consumers)
        ):
            continue  # one factor for all experts serves none of them well
        if algorithm is not None:
            folds.append(Fold(site, algorithm, tuple(members), tuple(consumers)))
    order = [site for stage in STAGES for site in stage]
    return tuple(sorted(folds, key=lambda fold: order.index(fold.site)))


def _folding(step: Step) -> Awq | SmoothQuant | None:
    algorithm = step.quantize.algorithm if step.quantize else None
    return algorithm if isinstance(algorithm, Awq | SmoothQuant) else None


def mark_folds(steps: Sequence[Step]) -> list[Step]:
    """The steps with the outcome "folded" where folding is all that changes a tensor."""
    blocks: dict[str, list[Step]] = defaultdict(list)
    for step in steps:
        blocks[step.claim.block].append(step)
    folded = {
        step.claim.name: fold.algorithm.name
        for block in blocks.values()
        for fold in folds_of(block)
        for step in (*fold.producers, *fold.consumers)
    }
    return [
        replace(step, outcome="folded", reason=f"takes part in the scales of {folded[step.claim.name]}")
        if step.claim.name in folded and step.outcome in {"kept", "cast"}
        else step
        for step in steps
    ]
