"""The exports of a plan: what formats of other programs cannot express is refused before any work."""

from quantlab.errors import PlanError
from quantlab.exports.target import Contents, Weight
from quantlab.exports.targets import TARGETS
from quantlab.plan.config import artifact_config
from quantlab.plan.model import Plan, Step, VariantPlan


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
    weights = tuple(_weight(step) for step in variant.steps if step.outputs)
    return Contents(plan.architecture, artifact_config(plan, variant), weights, plan.checkpoint.directory)


def _weight(step: Step) -> Weight:
    if step.scheme is None:
        ((_, dtype, shape),) = step.outputs
        return Weight(step.tensor.name, step.tensor.role, None, dtype, shape)
    number = step.scheme.format
    return Weight(step.tensor.name, step.tensor.role, number, number.scale or step.dtype, step.source.shape)
