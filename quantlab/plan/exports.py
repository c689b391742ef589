"""The exports of a plan: what formats of other programs cannot express is refused before any work."""

from quantlab.errors import PlanError
from quantlab.exports.target import Contents, Weight
from quantlab.exports.targets import TARGETS
from quantlab.plan.config import artifact_config
from quantlab.plan.model import Plan, VariantPlan


def check_exports(plan: Plan) -> None:
    """Check that every format can express the artifacts that are to be written in it.

    Raises:
        PlanError: one cannot.
    """
    for variant in plan.variants:
        if not variant.exports:
            continue
        contents = planned_contents(plan, variant)
        for name in variant.exports:
            reason = TARGETS[name].refuses(contents)
            if reason is not None:
                able = [other for other, target in TARGETS.items() if target.refuses(contents) is None]
                raise PlanError(
                    f"the format {name} cannot express the variant",
                    where=f"variant {variant.name}, format",
                    found=reason,
                    fix=f"leave {name} out; formats that can: {', '.join(able)}",
                )


def planned_contents(plan: Plan, variant: VariantPlan) -> Contents:
    """What the artifact of a variant will contain."""
    weights = tuple(
        Weight(
            step.tensor.name,
            step.tensor.role,
            step.scheme.format if step.scheme else None,
            step.dtype,
            step.source.shape,
        )
        for step in variant.steps
        if step.outputs
    )
    return Contents(plan.architecture, artifact_config(plan, variant), weights, plan.checkpoint.directory)
