"""What the artifact of a variant will contain, as far as the plan decides it."""

from collections.abc import Sequence
from typing import Any

from quantlab.architectures.architecture import Architecture
from quantlab.checkpoint.index import Checkpoint
from quantlab.formats.contents import Contents, Weight, method_of
from quantlab.plan.model import Plan, Step, VariantPlan


def artifact_config(
    checkpoint: Checkpoint, architecture: Architecture, *, dtype: str, experts: int | None
) -> dict[str, Any]:
    """The source's config.json with a new dtype, without `quantization_config`, and with the number of experts if some are removed.

    Serialising it through a config class would lose fields unknown to the class: `topk_method`, `scoring_func`.

    Args:
        checkpoint: the source.
        architecture: its family.
        dtype: of the artifact's floating-point tensors, as config.json spells it.
        experts: number of routed experts that every MoE layer keeps, None if all stay.
    """
    config = dict(checkpoint.config)
    config.pop("quantization_config", None)
    for field in [field for field in ("torch_dtype", "dtype") if field in config] or ["torch_dtype"]:
        config[field] = dtype
    return config if experts is None else architecture.with_experts(config, experts)


def planned_contents(
    steps: Sequence[Step], checkpoint: Checkpoint, architecture: Architecture, *, dtype: str, experts: int | None
) -> Contents:
    """What an artifact will contain: the outputs of `steps`; for the other arguments see `artifact_config`."""
    config = artifact_config(checkpoint, architecture, dtype=dtype, experts=experts)
    weights = tuple(_weight(step) for step in steps if step.outputs)
    return Contents(architecture, config, weights, checkpoint.directory, method_of(weights))


def contents_of_variant(plan: Plan, variant: VariantPlan) -> Contents:
    """What the artifact of a planned variant will contain."""
    return planned_contents(
        tuple(variant.steps), plan.checkpoint, plan.architecture, dtype=variant.dtype, experts=variant.experts
    )


def _weight(step: Step) -> Weight:
    if step.scheme is None:
        ((_, dtype, shape),) = step.outputs
        return Weight(step.tensor, shape, None, step.layout, dtype)
    number = step.scheme.format
    return Weight(step.tensor, step.source.shape, number, step.layout, number.scale or step.dtype)
