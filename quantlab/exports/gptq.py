"""The format `gptq`: the layout of AutoGPTQ and its successor GPTQModel. Does not import torch."""

from dataclasses import dataclass

from quantlab.formats.contents import Contents, Weight, described_linears
from quantlab.formats.gptq import GptqConfig, describe, layout_for
from quantlab.recipe.schemes import FormatName, LayoutName


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
    return describe(described_linears(contents.weights, _layout))


def _layout(weight: Weight) -> LayoutName:
    assert weight.number is not None, "it is quantized"
    return layout_for(weight.number).name
