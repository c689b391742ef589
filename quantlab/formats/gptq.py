"""The GPTQ layouts: how AutoGPTQ and its successor GPTQModel store integers, and how config.json describes them.

A linear [N, K] of b bits in G groups of columns is four tensors: `qweight` [K b / 32, N] int32, consecutive inputs in one
word, lowest bits first, as unsigned numbers; `scales` [G, N]; `qzeros` [G, N b / 32] int32, consecutive outputs in one word;
`g_idx` [K] int32, the group of every input. The weight is ``(unsigned - zero) * scale``; in symmetric formats every zero point is
2^(b - 1). The first layout ("gptq") stores zero points less one, which a zero point of 0 does not survive in every reader: it is
read and written for symmetric integers. The second ("gptq_v2") stores them as they are, of int4 also asymmetric ones.

The description has one number format; linears that differ are listed in `dynamic`, GPTQModel's extension, by regular expressions:
"-:…" for those that are not quantized, "+:…" for those of another format. The first that matches the name of a module applies.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from quantlab.architectures.architecture import MODULE_PATTERNS
from quantlab.checkpoint.header import TensorEntry
from quantlab.errors import ArtifactError
from quantlab.formats.compressed_tensors import describe as describe_by_patterns
from quantlab.formats.layout import Linear, Method, Stored, StoredTensor, present
from quantlab.formats.misfit import check_scale_dtype, misfit, unreadable
from quantlab.numerics.number_format import INT4, ROW, Element, NumberFormat, group
from quantlab.recipe.schemes import LayoutName

_BITS: Final = (4, 8)
_GROUP_SIZES: Final = (None, 32, 64, 128)
_READABLE: Final = "as GPTQ: symmetric int4 and int8, and with checkpoint_format gptq_v2 asymmetric int4; one scale per row or per group of 32, 64 or 128"


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
        if not number.symmetric and (self.name != "gptq_v2" or number.element != INT4):
            return "zero points are stored as gptq_v2, of int4 only"
        if number.activations is not None:
            return "quantized activations are not supported"
        if not number.by_row or number.group_size not in _GROUP_SIZES:
            return f"scales must belong to rows, or to groups of {', '.join(str(size) for size in _GROUP_SIZES if size)} columns"
        return None

    def transformers_refuses(self, number: NumberFormat, shape: tuple[int, int], *, experts: bool) -> str | None:
        """See `Layout`."""
        return "GPTQ without optimum and gptqmodel"

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
        where: file and key of the description.
        dynamic: linears that differ, see the module's docstring; whoever reads a checkpoint takes bits and groups from its tensors then.
    """

    number: NumberFormat
    layout: Gptq
    where: str
    dynamic: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

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
        if not self.dynamic and (bits, groups) != (self.number.bits, expected):
            found = f"{bits} bits in {groups} groups"
            raise misfit(name, f"{found}, {self.where} says {self.number.bits} bits in {expected}")
        per_row = groups == 1 and (bits == 8 or columns not in {32, 64, 128})
        number = _number(bits, None if per_row else columns // max(groups, 1), symmetric=self.number.symmetric)
        if self.layout.can_express(number) is not None:
            raise unreadable(name, f"{bits} bits in groups of {columns // max(groups, 1)}", _READABLE)
        return Stored(number, self.layout.name, integers, scales, parts, (integers.shape[1], columns))

    def to_json(self) -> dict[str, Any]:
        """The `quantization_config` of config.json."""
        described = {
            "quant_method": METHOD.word,
            **_number_json(self.number),
            "desc_act": False,
            "lm_head": False,
            "checkpoint_format": self.layout.name,
        }
        return described | ({"dynamic": dict(self.dynamic)} if self.dynamic else {})


def _number(bits: int, group_size: int | None, *, symmetric: bool) -> NumberFormat:
    return NumberFormat(Element("int", bits), ROW if group_size is None else group(group_size), symmetric)


def _number_json(number: NumberFormat) -> dict[str, Any]:
    return {"bits": number.bits, "group_size": number.group_size or -1, "sym": number.symmetric}


def layout_for(number: NumberFormat) -> Gptq:
    """The layout that is written for a format: the first, which more programs read, unless there are zero points."""
    return FIRST if number.symmetric else SECOND


def describe(linears: Sequence[Linear]) -> GptqConfig:
    """The description of an artifact, for engines: the format of most of its linears, and those that differ.

    The format is that of the whole checkpoint if it is the only one; linears that are not quantized are then listed by "-:…",
    like the ignored ones of compressed-tensors.
    """
    counts = Counter(linear.number for linear in linears if linear.number is not None)
    most = counts.most_common(1)[0][0]
    by_pattern = describe_by_patterns(linears)
    ignored = [
        pattern for pattern in by_pattern.ignore if pattern != MODULE_PATTERNS["lm_head"]
    ]  # it has a key of its own
    dynamic: dict[str, dict[str, Any]] = {f"-:{_regex(pattern)}": {} for pattern in ignored}
    for one in by_pattern.groups:
        if one.number != most:
            dynamic |= {f"+:{_regex(target)}": _number_json(one.number) for target in one.targets}
    return GptqConfig(most, layout_for(most), "config.json", dynamic)


def _regex(pattern: str) -> str:
    """A name or "re:…" pattern as a regular expression."""
    return pattern[3:] if pattern.startswith("re:") else f"^{re.escape(pattern)}$"


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
    symmetric = described.get("sym") is not False or layout is FIRST  # the codec refuses zero points off the middle
    number = _number(bits, None if group_size is None or group_size < 0 else group_size, symmetric=symmetric)
    if layout.can_express(number) is not None:
        raise unreadable(where, f"{bits} bits in groups of {group_size}", _READABLE)
    return GptqConfig(number, layout, where, described.get("dynamic") or {})


METHOD: Final = Method("gptq", (FIRST, SECOND), parse_config, describe, file="quantize_config.json")
