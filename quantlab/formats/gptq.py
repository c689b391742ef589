"""The GPTQ layouts: how AutoGPTQ and its successor GPTQModel store integers, and how config.json describes them.

A linear [N, K] of b bits in G groups of columns is four tensors: `qweight` [K b / 32, N] int32, consecutive inputs in one
word, lowest bits first, as unsigned numbers; `scales` [G, N]; `qzeros` [G, N b / 32] int32, consecutive outputs in one word;
`g_idx` [K] int32, the group of every input. The first layout ("gptq") stores zero points less one, the second ("gptq_v2") as
they are. Only symmetric integers are read: every zero point is 2^(b - 1), and the weight is ``(unsigned - 2^(b - 1)) * scale``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from quantlab.checkpoint.header import TensorEntry
from quantlab.errors import ArtifactError
from quantlab.formats.layout import Method, Stored, StoredTensor, present
from quantlab.formats.misfit import check_scale_dtype, misfit, unreadable
from quantlab.numerics.number_format import ROW, Element, NumberFormat, group
from quantlab.recipe.schemes import LayoutName

_BITS: Final = (4, 8)
_GROUP_SIZES: Final = (None, 32, 64, 128)
_READABLE: Final = "as GPTQ: symmetric int4 and int8, one scale per row or per group of 32, 64 or 128"


@dataclass(frozen=True)
class Gptq:
    """One of the two layouts.

    Attributes:
        name: also the word of `checkpoint_format`.
        parts: names of the stored tensors.
    """

    name: LayoutName
    parts: tuple[str, ...] = ("qweight", "scales", "qzeros", "g_idx")

    def can_express(self, number: NumberFormat) -> str | None:
        """Why the layout cannot store a format, None if it can."""
        if not number.is_integer or number.bits not in _BITS:
            return f"{number.element} is not a 4- or 8-bit integer"
        if not number.symmetric:
            return "zero points are not supported"
        if number.activations is not None:
            return "quantized activations are not supported"
        if not number.by_row or number.group_size not in _GROUP_SIZES:
            return f"scales must belong to rows, or to groups of {', '.join(str(size) for size in _GROUP_SIZES if size)} columns"
        return None

    def stored_tensors(
        self, name: str, shape: tuple[int, ...], number: NumberFormat | None, dtype: str
    ) -> tuple[StoredTensor, ...]:
        """See `Layout`; N and K are multiples of 32 / bits."""
        assert number is not None, "a quantized weight has a format"
        (rows, columns), prefix = shape, name.removesuffix("weight")
        groups = number.groups(columns)
        return (
            (prefix + "qweight", "I32", (columns * number.bits // 32, rows)),
            (prefix + "scales", dtype, (groups, rows)),
            (prefix + "qzeros", "I32", (groups, rows * number.bits // 32)),
            (prefix + "g_idx", "I32", (columns,)),
        )


FIRST: Final = Gptq("gptq")
SECOND: Final = Gptq("gptq_v2")
_LAYOUTS: Final[Mapping[str, Gptq]] = {layout.name: layout for layout in (FIRST, SECOND)}


@dataclass(frozen=True)
class GptqConfig:
    """The description of the weights of a checkpoint in one of these layouts.

    Attributes:
        number: the format of its linears.
        layout: their layout.
        overridden: whether some linears have a format of their own (GPTQModel's `dynamic`).
        where: file and key of the description.
    """

    number: NumberFormat
    layout: Gptq
    overridden: bool
    where: str

    @property
    def formats(self) -> tuple[NumberFormat, ...]:
        """The number formats that occur, as far as the description says."""
        return (self.number,)

    def stored(self, name: str, tensors: Mapping[str, TensorEntry]) -> Stored | None:
        """How the weight `name` is stored, None if its tensors are floating point.

        Raises:
            ArtifactError: its tensors contradict the description, or their format is not supported.
            CheckpointError: its scales are not floating point.
        """
        parts = present(name.removesuffix("weight"), self.layout.parts, tensors)
        named = {part.name.rpartition(".")[2]: part for part in parts}
        integers, scales, order = (named.get(part) for part in ("qweight", "scales", "g_idx"))
        if integers is None:
            return None
        if scales is None or len(scales.shape) != 2 or len(integers.shape) != 2:
            raise misfit(name, f"qweight {list(integers.shape)}, scales {list(scales.shape) if scales else 'missing'}")
        check_scale_dtype(scales)
        given = order is not None and order.elements
        bits = 32 * integers.shape[0] // order.elements if order is not None and given else self.number.bits
        columns, groups = 32 * integers.shape[0] // max(bits, 1), scales.shape[0]
        expected = columns // (self.number.group_size or columns or 1)
        if not self.overridden and (bits, groups) != (self.number.bits, expected):
            found = f"{bits} bits in {groups} groups"
            raise misfit(name, f"{found}, {self.where} says {self.number.bits} bits in {expected}")
        per_row = groups == 1 and (bits == 8 or columns not in {32, 64, 128})
        number = _number(bits, None if per_row else columns // max(groups, 1))
        if self.layout.can_express(number) is not None:
            raise unreadable(name, f"{bits} bits in groups of {columns // max(groups, 1)}", _READABLE)
        return Stored(number, self.layout.name, integers, scales, parts, (integers.shape[1], columns))

    def to_json(self) -> dict[str, Any]:
        """The `quantization_config` of config.json."""
        return {
            "quant_method": METHOD.word,
            "bits": self.number.bits,
            "group_size": self.number.group_size or -1,
            "sym": True,
            "desc_act": False,
            "checkpoint_format": self.layout.name,
        }


def _number(bits: int, group_size: int | None) -> NumberFormat:
    return NumberFormat(Element("int", bits), ROW if group_size is None else group(group_size))


def parse_config(described: Mapping[str, Any], where: str) -> GptqConfig:
    """Read a `quantization_config` of method gptq, or a quantize_config.json.

    Raises:
        ArtifactError: it describes a layout or numbers quantlab does not read.
    """
    bits, group_size = described.get("bits"), described.get("group_size", -1)
    word = described.get("checkpoint_format") or FIRST.name
    layout = _LAYOUTS.get(word) if isinstance(word, str) else None
    if layout is None or described.get("is_marlin_format"):
        raise ArtifactError(
            "the checkpoint is in a layout of GPTQ quantlab does not read",
            where=f"{where}, checkpoint_format",
            found="marlin" if described.get("is_marlin_format") else repr(word),
            fix="readable: " + ", ".join(_LAYOUTS),
        )
    if not isinstance(bits, int) or not isinstance(group_size, int | None) or group_size == 0:
        raise unreadable(where, f"bits {bits!r}, group_size {group_size!r}", _READABLE)
    number = _number(bits, None if group_size is None or group_size < 0 else group_size)
    if layout.can_express(number) is not None:
        raise unreadable(where, f"{bits} bits in groups of {group_size}", _READABLE)
    return GptqConfig(number, layout, bool(described.get("dynamic")), where)


METHOD: Final = Method("gptq", (FIRST, SECOND), parse_config, file="quantize_config.json")
