"""config.json of an artifact, as far as the plan decides it."""

from typing import Any

from quantlab.plan.model import Plan, VariantPlan


def artifact_config(plan: Plan, variant: VariantPlan) -> dict[str, Any]:
    """The source's config.json with a new dtype, without `quantization_config`, and with the number of experts if some are removed.

    Serialising it through a config class would lose fields unknown to the class: `topk_method`, `scoring_func`.
    """
    config = dict(plan.checkpoint.config)
    config.pop("quantization_config", None)
    for field in [field for field in ("torch_dtype", "dtype") if field in config] or ["torch_dtype"]:
        config[field] = variant.dtype
    return config if variant.experts is None else plan.architecture.with_experts(config, variant.experts)
