"""Plans that remove whole experts: the number that stays, and the outcome of every tensor of a layer.

Calibration decides which experts stay; their number, and so every size, is known in advance. In the plan the steps of
an expert stand for a slot: slots 0 … E' - 1 will hold the experts that stay, in their original order.
"""

from collections.abc import Sequence
from dataclasses import replace

from quantlab.architectures.architecture import Architecture
from quantlab.architectures.config import Config
from quantlab.architectures.layer import Routing
from quantlab.errors import PlanError
from quantlab.plan.model import Outcome, Step
from quantlab.recipe.algorithms import ExpertRemoval
from quantlab.recipe.schema import Prune


def kept_experts(removal: Prune, architecture: Architecture, config: Config, *, variant: str) -> int:
    """How many experts of a layer stay: the same number in every routing group, at least what the router needs.

    Raises:
        PlanError: nothing would be removed, fewer would stay than the router needs, or none can be removed at all.
    """
    assert architecture.mixture is not None, "the pass targets routed experts"
    routing = architecture.mixture.routing(config)
    groups, each = routing.groups, routing.experts // routing.groups
    needed = max(-(-routing.top_k // routing.top_groups), routing.group_score, 1)
    removed = round(removal.ratio * each)
    where = f"variant {variant}, prune {removal.ratio:.3g} ({removal.algorithm.name})"
    none = f"no share of the experts can be removed: leave {removal.algorithm.name} out" if each <= needed else None
    if not removed:
        raise PlanError(
            "no expert would be removed",
            where=where,
            found=f"{removal.ratio:.3g} of {_count(each, groups)}" + (f", and {_why_needed(routing)}" if none else ""),
            fix=none or f"prune at least {1 / each:.3g}",
        )
    if each - removed < needed:
        raise PlanError(
            "the router would pick more experts than stay",
            where=where,
            found=f"{each - removed} of {_count(each, groups)} would stay, and {_why_needed(routing)}",
            fix=none or f"prune at most {(each - needed) / each:.3g}",
        )
    return (each - removed) * groups


def _count(each: int, groups: int) -> str:
    return f"{each} experts" + (f" in each of {groups} routing groups" if groups > 1 else "")


def _why_needed(routing: Routing) -> str:
    """What the router needs in each of its groups, or of all experts without groups."""
    picks = -(-routing.top_k // routing.top_groups)
    if routing.groups == 1:
        return f"the router picks {routing.top_k} for a token" + (
            f" and scores {routing.group_score}" if routing.group_score > picks else ""
        )
    if routing.group_score > picks:
        return f"the score of a group is computed from its {routing.group_score} best"
    return f"the router picks {routing.top_k} for a token from {routing.top_groups} groups, so each needs {picks}"


def without_experts(steps: Sequence[Step], removal: ExpertRemoval, *, kept: int) -> list[Step]:
    """The steps of a variant in which every MoE layer keeps `kept` experts, in slots 0 … kept - 1."""
    return [_without(step, removal.name, kept) for step in steps]


def _without(step: Step, algorithm: str, kept: int) -> Step:
    tensor = step.tensor
    passes = tuple(change for change in step.passes if not isinstance(change.algorithm, ExpertRemoval))
    if tensor.role == "mtp":
        reason = "its experts are never run in calibration, and the config has one number of experts for all layers"
        return replace(step, outcome="dropped", reason=reason, outputs=())
    if tensor.role == "routed_experts" and tensor.expert is not None and tensor.expert >= kept:
        return replace(step, passes=(), outcome="dropped", reason=f"its expert is removed ({algorithm})", outputs=())
    if tensor.role == "router":
        ((name, dtype, shape),) = step.outputs
        outputs = ((name, dtype, (kept, *shape[1:])),)
        return replace(
            step, outcome="pruned", reason=f"the rows of the experts that stay ({algorithm})", outputs=outputs
        )
    if passes == step.passes:
        return step
    outcome: Outcome = step.outcome if passes else ("cast" if step.dtype != step.source.dtype else "kept")
    return replace(
        step, passes=passes, outcome=outcome, reason=step.reason if passes else f"its expert stays ({algorithm})"
    )


def removal_notes(steps: Sequence[Step], *, kept: int | None) -> tuple[str, ...]:
    """Notes on an artifact with fewer experts."""
    if kept is None:
        return ()
    notes = [f"every layer keeps {kept} routed experts; they are renumbered, and config.json has the new number"]
    if any(step.tensor.role == "mtp" for step in steps):
        notes.append("the multi-token-prediction layer is left out: its experts are never run in calibration")
    return tuple(notes)
