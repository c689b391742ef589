"""Scale folds of a variant: one tensor is divided by a factor per channel, and all readers of the channels are
multiplied.

The model's function is unchanged; the rounding errors of its weights and activations are not.
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
    """One fold.

    Attributes:
        site: the input site whose channels are scaled.
        algorithm: the algorithm that chooses the factors.
        producers: the norm or the linear (with its bias) that produces the channels; they are divided by the factors.
        consumers: every linear that reads the channels, and the router; their columns are multiplied by the factors.
    """

    site: str
    algorithm: Awq | SmoothQuant
    producers: tuple[Step, ...]
    consumers: tuple[Step, ...]


def folds_of(steps: Iterable[Step]) -> tuple[Fold, ...]:
    """The folds of one block in the order of its forward pass."""
    order = [site for stage in STAGES for site in stage]
    return tuple(
        sorted((fold for fold in _all_folds(steps) if not _is_skipped(fold)), key=lambda f: order.index(f.site))
    )


def unsmoothed(steps: Iterable[Step]) -> tuple[str, ...]:
    """Names of the weights of one block that SmoothQuant rounds without smoothing their inputs.

    Experts behind a shared norm would have to share one factor per channel, which fits none of them well.
    """
    skipped = (fold for fold in _all_folds(steps) if _is_skipped(fold))
    return tuple(step.tensor.name for fold in skipped for step in fold.consumers if _folding(step))


def _is_skipped(fold: Fold) -> bool:
    experts = any(step.tensor.expert is not None for step in fold.consumers)
    return isinstance(fold.algorithm, SmoothQuant) and fold.site == "mlp" and experts


def _all_folds(steps: Iterable[Step]) -> list[Fold]:
    producers: dict[tuple[str, int | None, bool], list[Step]] = defaultdict(list)
    readers: dict[str, list[Step]] = defaultdict(list)
    for step in steps:
        rule = step.tensor.rule
        if rule is None or not step.outputs or step.tensor.role == "mtp" or not step.source.elements:
            continue
        if rule.feeds is not None:
            producers[rule.feeds, step.tensor.expert, rule.role == "norm"].append(step)
        if rule.site is not None:
            readers[rule.site].append(step)
    folds = []
    for (site, expert, norm), members in producers.items():
        consumers = [step for step in readers[site] if norm or step.tensor.expert == expert]
        algorithm = next((found for step in consumers if (found := _folding(step))), None)
        if algorithm is not None:
            folds.append(Fold(site, algorithm, tuple(members), tuple(consumers)))
    return folds


def _folding(step: Step) -> Awq | SmoothQuant | None:
    algorithm = step.quantize.algorithm if step.quantize else None
    return algorithm if isinstance(algorithm, Awq | SmoothQuant) else None


def fold_notes(steps: Sequence[Step]) -> tuple[str, ...]:
    """Notes on a variant's folds."""
    count = sum(len(unsmoothed(block)) for block in _by_block(steps).values())
    if not count:
        return ()
    return (
        f"smoothquant rounds {count} expert matrices without smoothing their inputs: the experts share the norm before "
        "them, and one factor for all experts fits none of them well",
    )


def mark_folds(steps: Sequence[Step], *, variant: str) -> list[Step]:
    """The steps, with the outcome "folded" for tensors that only a fold changes.

    Raises:
        PlanError: two algorithms scale the same channels, or the module that produces them has a tensor that is not
            known to produce them too.
    """
    folds = []
    for block in _by_block(steps).values():
        for fold in folds_of(block):
            _check_one_algorithm(fold, variant=variant)
            _check_whole_producer(fold, block, variant=variant)
            folds.append(fold)
    folded = {step.tensor.name: fold.algorithm.name for fold in folds for step in (*fold.producers, *fold.consumers)}
    return [
        replace(step, outcome="folded", reason=f"takes part in the scales of {folded[step.tensor.name]}")
        if step.tensor.name in folded and step.outcome in {"kept", "cast"}
        else step
        for step in steps
    ]


def check_folds_of_fewer_experts(steps: Sequence[Step], *, variant: str) -> None:
    """Refuse folds into experts in a variant that removes experts and compares with the unchanged layer, which has all.

    Args:
        steps: steps of a variant that removes experts and propagates the outputs of the changed blocks.
        variant: name of the variant.

    Raises:
        PlanError: the variant folds into experts, and an algorithm compensates for the errors of earlier layers.
    """
    corrects = next((step for step in steps if step.corrects), None)
    for fold in (fold for block in _by_block(steps).values() for fold in folds_of(block)):
        if corrects is not None and any(step.tensor.role == "routed_experts" for step in fold.consumers):
            raise PlanError(
                "a variant cannot remove experts, scale them and compare them with the unchanged model at once",
                where=f"variant {variant}, {fold.producers[0].tensor.name}",
                found=f"{fold.algorithm.name} scales the channels of experts, and {corrects.tensor.role} have a `correction`",
                fix="write `correction: 0` for gptq, `propagate: original` for the calibration, or use one algorithm for all linears",
            )


def _by_block(steps: Iterable[Step]) -> dict[str, list[Step]]:
    blocks: dict[str, list[Step]] = defaultdict(list)
    for step in steps:
        blocks[step.tensor.block].append(step)
    return blocks


def _check_one_algorithm(fold: Fold, *, variant: str) -> None:
    """Refuse two algorithms for the readers of the same channels: they share one set of factors."""
    first = next(step for step in fold.consumers if _folding(step) == fold.algorithm)
    other = next((step for step in fold.consumers if _folding(step) not in {None, fold.algorithm}), None)
    if other is not None:
        found = " and ".join(f"{step.tensor.role}: {_folding(step)!r}" for step in (first, other))
        raise PlanError(
            "two algorithms scale the same channels",
            where=f"variant {variant}, {fold.producers[0].tensor.name} and its readers",
            found=found,
            fix=f"give {first.tensor.role} and {other.tensor.role} the same algorithm with the same options, or one of them rtn",
        )


def _check_whole_producer(fold: Fold, block: Iterable[Step], *, variant: str) -> None:
    """Refuse to divide a part of a module: every tensor of the producing norm or linear must be a producer."""
    known = {step.tensor.name for step in fold.producers}
    modules = {name.rpartition(".")[0] for name in known}
    unknown = [step.tensor.name for step in block if step.tensor.name.rpartition(".")[0] in modules - {""}]
    unknown = [name for name in unknown if name not in known]
    if unknown:
        raise PlanError(
            f"{fold.algorithm.name} cannot scale channels whose producer has an unknown tensor: it might not be scaled with them",
            where=f"variant {variant}, {fold.producers[0].tensor.name}",
            found=", ".join(unknown),
            fix="quantize these linears with rtn or gptq, which scale no channels",
        )
