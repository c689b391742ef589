"""The format `gptq`: the layout of AutoGPTQ and its successor GPTQModel. Does not import torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from quantlab.exports.target import Contents, Weight
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
    layers = contents.config["num_hidden_layers"]
    return describe([_linear(weight, contents, layers) for weight in _linears(contents, layers)])


def _linears(contents: Contents, layers: int) -> Sequence[Weight]:
    """The weights of linears, quantized or not."""
    found = []
    for weight in contents.weights:
        rule = contents.architecture.classify(weight.name, hidden_layers=layers).rule
        if weight.name.endswith(".weight") and rule and (rule.linear or weight.role in _UNQUANTIZED_TOO):
            found.append(weight)
    return found


def _linear(weight: Weight, contents: Contents, layers: int) -> Linear:
    layer = contents.architecture.classify(weight.name, hidden_layers=layers).layer
    layout = "dense" if weight.number is None else layout_for(weight.number).name
    return Linear(weight.module, weight.role, layer or 0, weight.number, layout)
