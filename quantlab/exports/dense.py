"""The format `dense`: the weights expanded to 16 bits, as a plain checkpoint. Does not import torch."""

from dataclasses import dataclass

from quantlab.formats.contents import Contents
from quantlab.recipe.schemes import FormatName


@dataclass(frozen=True)
class Dense:
    """See the module's docstring."""

    name: FormatName = "dense"
    description: str = "the dequantized weights as a plain 16-bit checkpoint, which every program reads"

    def refuses(self, contents: Contents) -> str | None:
        """See `Target`; quantized activations are left out, which the notes of the export say."""
        return None


TARGET = Dense()
