"""The layouts of bitsandbytes, as transformers saves them: LLM.int8() and NF4. They are only read.

LLM.int8() stores `weight` [N, K] int8 and `SCB` [N] float32, 127 scales. NF4 stores `weight` [N K / 2, 1] bytes, the first of two
weights in the upper half, and `weight.absmax` [N K / 64], the magnitudes of 64 consecutive weights; `weight.quant_map` has the 16
levels. Double quantization rounds the magnitudes to bytes, which `weight.nested_quant_map`, `weight.nested_absmax` and an offset
restore. Shape and offset are in a JSON of a few bytes, the tensor `weight.quant_state.bitsandbytes__nf4`.

LLM.int8() rounds activations to int8, but with a threshold above 0 not those of channels beyond it: these products are read as
products with 16-bit activations.
Source: transformers' quantizer_bnb_8bit.py and quantizer_bnb_4bit.py, bitsandbytes' functional.py (`QuantState`).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from quantlab.checkpoint.header import TensorEntry, bytes_of
from quantlab.formats.layout import Method, Stored, StoredTensor, present
from quantlab.formats.misfit import misfit, unreadable
from quantlab.numerics.number_format import INT8, NF4, ROW, Activations, NumberFormat, group
from quantlab.recipe.schemes import LayoutName

STATE: Final = "weight.quant_state.bitsandbytes__nf4"
_READABLE: Final = "as bitsandbytes: LLM.int8(), and NF4 whose blocks do not span rows"


@dataclass(frozen=True)
class Bitsandbytes:
    """One of the two layouts; see the module's docstring.

    Attributes:
        name: of the layout.
        parts: names of the stored tensors.
        element: "int8" or "NF4".
    """

    name: LayoutName
    parts: tuple[str, ...]
    element: str

    def can_express(self, number: NumberFormat) -> str | None:
        """Why the layout cannot store a format, None if it can."""
        return None if str(number.element) == self.element else f"{number.element} is not {self.element}"

    def stored_tensors(
        self, name: str, shape: tuple[int, ...], number: NumberFormat | None, dtype: str
    ) -> tuple[StoredTensor, ...]:
        """See `Layout`; the layout is only read, so nothing plans its tensors."""
        raise NotImplementedError


INTEGERS: Final = Bitsandbytes("bnb-int8", ("weight", "SCB", "weight_format"), "int8")
LEVELS: Final = Bitsandbytes(
    "bnb-nf4",
    ("weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map", STATE),
    "NF4",
)


@dataclass(frozen=True)
class BitsandbytesConfig:
    """The description of the weights of a checkpoint in one of these layouts.

    Attributes:
        bits: 8 or 4.
        rounds_activations: whether all activations are rounded to int8 (threshold 0).
        where: file and key of the description.
    """

    bits: int
    rounds_activations: bool
    where: str

    @property
    def formats(self) -> tuple[NumberFormat, ...]:
        """The number format of its quantized weights."""
        if self.bits == 4:
            return (NumberFormat(NF4, group(64), scale="F32"),)
        activations = Activations(INT8) if self.rounds_activations else None
        return (NumberFormat(INT8, ROW, activations=activations),)

    def stored(self, name: str, tensors: Mapping[str, TensorEntry]) -> Stored | None:
        """How the weight `name` is stored, None if it is not quantized.

        Raises:
            ArtifactError: its tensors contradict the description or each other, or blocks span rows.
        """
        prefix = name.removesuffix("weight")
        weight, layout = tensors.get(name), LEVELS if self.bits == 4 else INTEGERS
        if weight is None or weight.dtype != ("U8" if self.bits == 4 else "I8"):
            return None
        parts = present(prefix, layout.parts, tensors)
        scale = tensors.get(prefix + layout.parts[1])
        if scale is None:
            raise misfit(name, f"no {prefix}{layout.parts[1]}")
        (number,) = self.formats
        shape = weight.shape if self.bits == 8 else self._shape(name, tensors.get(prefix + STATE))
        if len(shape) != 2 or weight.elements * 8 != shape[0] * shape[1] * self.bits:
            raise misfit(name, f"{list(weight.shape)} {weight.dtype} for a weight of {list(shape)}")
        if not number.fits((shape[0], shape[1])):
            raise unreadable(name, f"blocks of {number.group_size} in rows of {shape[1]}", _READABLE)
        return Stored(number, layout.name, weight, scale, parts, (shape[0], shape[1]))

    def _shape(self, name: str, state: TensorEntry | None) -> tuple[int, ...]:
        """The shape in the JSON of an NF4 weight."""
        try:
            described = json.loads(bytes_of(state)) if state is not None else {}
            found, size = tuple(map(int, described["shape"])), described["blocksize"]
        except (ValueError, KeyError, TypeError) as error:
            raise misfit(name, f"no usable {STATE}") from error
        if size != self.formats[0].group_size:
            raise unreadable(name, f"blocks of {size}", _READABLE)
        return found

    def to_json(self) -> dict[str, Any]:
        """The `quantization_config` of config.json."""
        return {
            "quant_method": METHOD.word,
            "load_in_8bit": self.bits == 8,
            "load_in_4bit": self.bits == 4,
            "bnb_4bit_quant_type": "nf4",
            "llm_int8_threshold": 0.0 if self.rounds_activations else 6.0,
        }


def parse_config(described: Mapping[str, Any], where: str) -> BitsandbytesConfig:
    """Read a `quantization_config` of method bitsandbytes.

    Raises:
        ArtifactError: it describes numbers quantlab does not read.
    """
    four, eight = (bool(described.get(f"load_in_{bits}bit")) for bits in (4, 8))
    kind = described.get("bnb_4bit_quant_type", "fp4")
    if four == eight or (four and kind != "nf4"):
        raise unreadable(where, f"load_in_4bit {four}, load_in_8bit {eight}, bnb_4bit_quant_type {kind!r}", _READABLE)
    threshold = described.get("llm_int8_threshold", 6.0)
    return BitsandbytesConfig(4 if four else 8, eight and threshold == 0, where)


METHOD: Final = Method("bitsandbytes", (INTEGERS, LEVELS), parse_config)
