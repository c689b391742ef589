"""Where a variant folds scales: a tensor gives up a factor per channel, and everything that reads the channels takes it on.

The model computes the same before and after; what changes is how hard its weights and activations are to round.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from quantlab.architectures.architecture import STAGES
from quantlab.errors import PlanError
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
    order = [site for stage in STAGES for site in stage]
    return tuple(sorted((fold for fold in _possible(steps) if not _unhelpful(fold)), key=lambda f: order.index(f.site)))


def unsmoothed(steps: Iterable[Step]) -> tuple[str, ...]:
    """Names of the weights of one block that SmoothQuant rounds without smoothing what they read: one factor for all experts
    behind a norm serves none of them well."""
    skipped = (fold for fold in _possible(steps) if _unhelpful(fold))
    return tuple(step.claim.name for fold in skipped for step in fold.consumers if _folding(step))


def _unhelpful(fold: Fold) -> bool:
    experts = any(step.claim.expert is not None for step in fold.consumers)
    return isinstance(fold.algorithm, SmoothQuant) and fold.site == "mlp" and experts


def _possible(steps: Iterable[Step]) -> list[Fold]:
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
        if algorithm is not None:
            folds.append(Fold(site, algorithm, tuple(members), tuple(consumers)))
    return folds


def _folding(step: Step) -> Awq | SmoothQuant | None:
    algorithm = step.quantize.algorithm if step.quantize else None
    return algorithm if isinstance(algorithm, Awq | SmoothQuant) else None


def fold_notes(steps: Sequence[Step]) -> tuple[str, ...]:
    """What of a variant's folds should be known."""
    count = sum(len(unsmoothed(block)) for block in _by_block(steps).values())
    if not count:
        return ()
    return (
        f"smoothquant rounds {count} matrices of experts behind a norm they share without smoothing what they read: one "
        "factor for all experts serves none of them well",
    )


def mark_folds(steps: Sequence[Step], *, variant: str) -> list[Step]:
    """The steps with the outcome "folded" where folding is all that changes a tensor.

    Raises:
        PlanError: two algorithms want to scale the same channels.
    """
    folds = [fold for block in _by_block(steps).values() for fold in folds_of(block)]
    for fold in folds:
        _check_one_algorithm(fold, variant=variant)
    folded = {step.claim.name: fold.algorithm.name for fold in folds for step in (*fold.producers, *fold.consumers)}
    return [
        replace(step, outcome="folded", reason=f"takes part in the scales of {folded[step.claim.name]}")
        if step.claim.name in folded and step.outcome in {"kept", "cast"}
        else step
        for step in steps
    ]


def check_folds_of_fewer_experts(steps: Sequence[Step], *, variant: str) -> None:
    """Refuse a fold into experts in a variant that removes some and compares with the unchanged layer, which has all of them.

    Args:
        steps: of a variant that removes experts and propagates the changed blocks' outputs.
        variant: its name.

    Raises:
        PlanError: it folds into experts, and an algorithm compensates for the errors of earlier layers.
    """
    corrects = next((step for step in steps if step.corrects), None)
    for fold in (fold for block in _by_block(steps).values() for fold in folds_of(block)):
        if corrects is not None and any(step.claim.role == "routed_experts" for step in fold.consumers):
            raise PlanError(
                "experts cannot be removed, scaled and compared with the unchanged model at once",
                where=f"variant {variant}, {fold.producers[0].claim.name}",
                found=f"{fold.algorithm.name} scales the channels of experts, and {corrects.claim.role} have a `correction`",
                fix="write `correction: 0` for gptq, `propagate: original` for the calibration, or use one algorithm for all linears",
            )


def _by_block(steps: Iterable[Step]) -> dict[str, list[Step]]:
    blocks: dict[str, list[Step]] = defaultdict(list)
    for step in steps:
        blocks[step.claim.block].append(step)
    return blocks


def _check_one_algorithm(fold: Fold, *, variant: str) -> None:
    """What reads the same channels is scaled by the same factors, which one algorithm finds."""
    first = next(step for step in fold.consumers if _folding(step) == fold.algorithm)
    other = next((step for step in fold.consumers if _folding(step) not in {None, fold.algorithm}), None)
    if other is not None:
        found = " and ".join(f"{step.claim.role}: {_folding(step)!r}" for step in (first, other))
        raise PlanError(
            "two algorithms scale the same channels",
            where=f"variant {variant}, {fold.producers[0].claim.name} and what reads it",
            found=found,
            fix=f"give {first.claim.role} and {other.claim.role} the same algorithm with the same options, or one of them rtn",
        )
