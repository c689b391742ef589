"""The metadata of a model card, as the Hugging Face hub reads it: the YAML before the text.

Source: the hub's documentation of model cards (`base_model`, `base_model_relation`, `license`, `library_name`, `tags`).
"""

from pathlib import Path
from typing import Any, Final

import yaml

from quantlab.plan.model import Plan, VariantPlan
from quantlab.recipe.load import LoadedRecipe

_LICENCE: Final = ("license", "license_name", "license_link")
_CARD: Final = "README.md"


def front_matter(plan: Plan, variant: VariantPlan, recipe: LoadedRecipe) -> str:
    """The YAML block of an artifact's card: where it comes from, under which licence, and how the hub files it."""
    quantized = any(step.quantize is not None for step in variant.steps)
    metadata: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    metadata |= _licence(plan.checkpoint.directory)
    if recipe.hub_id is not None:
        metadata["base_model"] = recipe.hub_id[0]
        if quantized:  # the hub has no word for a model that was only pruned or cast
            metadata["base_model_relation"] = "quantized"
    methods = ["compressed-tensors"] if quantized and variant.layouts[0] != "fp8-blocks" else []
    metadata["tags"] = ["deepseek", "quantlab", *methods]
    return f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---\n"


def _licence(source: Path) -> dict[str, str]:
    """The licence of the source, from its own card; empty if that does not state it."""
    try:
        text = (source / _CARD).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return {}
    opening, _, rest = text.partition("---\n")
    block, closing, _ = rest.partition("\n---")
    if opening.strip() or not closing:
        return {}
    try:
        found = yaml.safe_load(block)
    except yaml.YAMLError:
        return {}
    stated = found if isinstance(found, dict) else {}
    return {name: stated[name] for name in _LICENCE if isinstance(stated.get(name), str)}
