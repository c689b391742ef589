"""The format `gptq`: the layout of AutoGPTQ and its successor GPTQModel. Does not import torch."""

from dataclasses import dataclass
from typing import Final

from quantlab.formats.contents import Contents, Weight
from quantlab.formats.gptq import GptqConfig, describe, layout_for
from quantlab.formats.layout import Linear
from quantlab.recipe.schemes import FormatName

_UNQUANTIZED_TOO: Final = ("router", "lm_head")
"""Roles of linears that no rule calls linear, because they are never quantized."""


@dataclass(frozen=True)
class Gptq:
    """See the module's docstring."""

    name: FormatName = "gptq"
    description: str = "packed integers as AutoGPTQ and its successor GPTQModel store them"

    def refuses(self, contents: Contents) -> str | None:
        """See `Target`."""
        if not contents.quantized:
            return "nothing is quantized, and it has no description of plain checkpoints"
        for weight in contents.quantized:
            assert weight.number is not None, "it is quantized"
            reason = layout_for(weight.number).can_express(weight.number)
            if reason is not None:
                return f"{weight.number.name}: {reason} ({weight.name})"
            rows, per_word = weight.shape[0], 32 // weight.number.bits
            if rows % per_word:
                return f"{rows} rows do not fill words of {per_word} zero points ({weight.name})"
        if len({weight.number.symmetric for weight in contents.quantized if weight.number}) > 1:
            return "some linears have zero points and others not, and its description has one layout for all"
        return None


TARGET = Gptq()


def description(contents: Contents) -> GptqConfig:
    """The description of an artifact in this format, which does not refuse it."""
    return describe([_linear(weight) for weight in contents.weights if _is_linear(weight)])


def _is_linear(weight: Weight) -> bool:
    """Whether it is the weight of a linear, quantized or not."""
    rule = weight.tensor.rule
    return bool(weight.name.endswith(".weight") and rule and (rule.linear or weight.role in _UNQUANTIZED_TOO))


def _linear(weight: Weight) -> Linear:
    layout = "dense" if weight.number is None else layout_for(weight.number).name
    return Linear(weight.module, weight.role, weight.tensor.layer or 0, weight.number, layout)
