"""The layouts of compressed-tensors, and how config.json describes them to vLLM, SGLang and transformers.

`pack-quantized` stores int32 words: weight_packed, weight_scale, weight_shape, and where there are zero points
weight_zero_point [N b / 32, G], packed along the rows. `int-quantized` stores int8: weight, weight_scale; `float-quantized` the
same with FP8 e4m3; no scheme has it, but an export does. The description names linears by class ("Linear") or by regular expression, and the ones to
leave alone. The same description is what our runtime reads back, so an artifact of ours and one made elsewhere take the same path.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from quantlab.architectures.architecture import MODULE_PATTERNS, Role
from quantlab.checkpoint.header import TensorEntry
from quantlab.errors import ArtifactError
from quantlab.formats.compressed_layouts import FLOAT, PACKED, PLAIN, FloatQuantized, IntQuantized, PackQuantized
from quantlab.formats.layout import Linear, Method, Stored, present
from quantlab.formats.misfit import FLOAT_SCALES, check_scale_dtype, misfit, unreadable
from quantlab.numerics.number_format import (
    E4M3,
    INT4,
    INT8,
    ROW,
    TENSOR,
    Activations,
    Element,
    Granularity,
    NumberFormat,
    block,
    group,
)
from quantlab.recipe.schemes import LayoutName

_VERSION = "0.20.0"
_READABLE = (
    "symmetric int4 and int8 and asymmetric packed int4, one scale per row or per group of 32, 64 or 128; "
    "int8 per row with int8 activations per token; FP8 e4m3 per matrix, row or block, activations rounded at run time or not at all"
)


_LAYOUTS: Final[Mapping[str, PackQuantized | IntQuantized | FloatQuantized]] = {
    "pack-quantized": PACKED,
    "int-quantized": PLAIN,
    "float-quantized": FLOAT,
    "naive-quantized": PLAIN,  # an old name
}


_STORED_AS: Final[Mapping[str, PackQuantized | IntQuantized | FloatQuantized]] = {
    "I32": PACKED,
    "I8": PLAIN,
    "F8_E4M3": FLOAT,
}
"""The layout of a quantized weight by the dtype word of its numbers."""


@dataclass(frozen=True)
class Group:
    """Linears of one format.

    Attributes:
        targets: class names, names or "re:…" patterns.
        number: their format.
        layout: how they are stored.
    """

    targets: tuple[str, ...]
    number: NumberFormat
    layout: LayoutName


@dataclass(frozen=True)
class QuantizationConfig:
    """Which linear of a model has which format.

    Attributes:
        groups: of linears.
        ignore: names or "re:…" patterns of linears that are not quantized.
    """

    groups: tuple[Group, ...]
    ignore: tuple[str, ...]

    @property
    def formats(self) -> tuple[NumberFormat, ...]:
        """The number formats that occur, in order."""
        return tuple(dict.fromkeys(group.number for group in self.groups))

    def stored(self, name: str, tensors: Mapping[str, TensorEntry]) -> Stored | None:
        """How the weight `name` is stored, None if its tensors are floating point.

        Raises:
            ArtifactError: its tensors are integers, and config.json gives them no format.
            CheckpointError: its scales are not floating point.
        """
        prefix = name.removesuffix("weight")
        numbers = tensors.get(prefix + "weight_packed") or tensors.get(name)
        layout = None if numbers is None else _STORED_AS.get(numbers.dtype)
        if layout is None:
            return None
        parts = present(prefix, layout.parts, tensors)
        scale = tensors.get(prefix + "weight_scale")
        if scale is None:
            raise misfit(name, f"no {prefix}weight_scale")
        check_scale_dtype(scale, FLOAT_SCALES if layout is not FLOAT else (*FLOAT_SCALES, "F8_E8M0"))
        number = self.format_of(prefix.removesuffix("."))
        if number is None:
            raise misfit(name, f"{parts[0].dtype} numbers, which config.json gives no scheme")
        rows, columns = (*parts[0].shape, 0, 0)[:2]
        per_word = 32 // number.bits if parts[0].dtype == "I32" else 1
        return Stored(number, layout.name, parts[0], scale, parts, (rows, columns * per_word))

    def format_of(self, module: str) -> NumberFormat | None:
        """The format of the linear `module` (its weight's name without ".weight"), None if it is not quantized."""
        if any(_matches(pattern, module) for pattern in self.ignore):
            return None
        for by_name in (True, False):  # a group that names the module wins over one that takes every Linear
            for one in self.groups:
                if any(_matches(target, module) if by_name else target == "Linear" for target in one.targets):
                    return one.number
        return None

    def to_json(self) -> dict[str, Any]:
        """The `quantization_config` of config.json."""
        layouts = {one.layout for one in self.groups}
        return {
            "config_groups": {f"group_{index}": _group_json(one) for index, one in enumerate(self.groups)},
            "format": layouts.pop() if len(layouts) == 1 else "mixed-precision",
            "global_compression_ratio": None,
            "ignore": list(self.ignore),
            "kv_cache_scheme": None,
            "quant_method": METHOD.word,
            "quantization_status": "compressed",
            "version": _VERSION,
        }


def parse_config(quantization_config: Mapping[str, Any], where: str) -> QuantizationConfig:
    """Read a `quantization_config` of method compressed-tensors.

    Raises:
        ArtifactError: it describes numbers quantlab does not read.
    """
    for key, plain in (("sparsity_config", {None, "dense"}), ("transform_config", {None})):
        described = quantization_config.get(key) or {}
        if not isinstance(described, Mapping) or described.get("format") not in plain or described.get("config_groups"):
            raise ArtifactError(
                "the artifact's weights are stored in a way quantlab does not read",
                where=f"{where}, {key}",
                found=repr(described)[:120],
                fix="export without sparse storage and without transforms at run time",
            )
    described, ignore = quantization_config.get("config_groups", {}), quantization_config.get("ignore") or ()
    if not isinstance(described, Mapping):
        raise _malformed(f"{where}, config_groups", described)
    groups = []
    for name, one in described.items():
        if not isinstance(one, Mapping) or not isinstance(one.get("weights"), Mapping | None):
            raise _malformed(f"{where}, {name}", one)
        if one.get("weights") is not None:
            targets = _patterns(one.get("targets"), where=f"{where}, {name}, targets")
            layout = one.get("format") or quantization_config.get("format")
            groups.append(_group(targets, one, layout, where=f"{where}, {name}"))
    return QuantizationConfig(tuple(groups), _patterns(ignore, where=f"{where}, ignore"))


def _patterns(found: object, *, where: str) -> tuple[str, ...]:
    """Validate names and "re:…" patterns."""
    if not isinstance(found, list | tuple) or not all(isinstance(pattern, str) for pattern in found):
        raise _malformed(where, found)
    for pattern in found:
        try:
            re.compile(pattern.removeprefix("re:") if pattern.startswith("re:") else "")
        except re.error as error:
            raise _malformed(where, f"{pattern}: {error}") from error
    return tuple(found)


def _malformed(where: str, found: object) -> ArtifactError:
    return ArtifactError(
        "a description of quantized weights is malformed",
        where=where,
        found=repr(found)[:120],
        fix="write config groups as compressed-tensors does",
    )


def _group(targets: tuple[str, ...], described: Mapping[str, Any], word: object, *, where: str) -> Group:
    """Parse one config group; its layout must be able to store its number format."""
    weights, activations = described["weights"], described.get("input_activations")
    layout = _LAYOUTS.get(word) if isinstance(word, str) else None
    element = _ELEMENTS.get((weights.get("type", "int"), weights.get("num_bits")))
    granularity = _granularity(weights)
    rounding = _activations(activations)
    if layout is not None and element is not None and granularity is not None and rounding is not False:
        number = NumberFormat(
            element,
            granularity,
            symmetric=bool(weights.get("symmetric", True)),
            activations=rounding,
        )
        if layout.can_express(number) is None:
            return Group(targets, number, layout.name)
    raise unreadable(where, f"{weights} with activations {activations} as {word}", _READABLE)


_ELEMENTS: Final[Mapping[tuple[object, object], Element]] = {("int", 4): INT4, ("int", 8): INT8, ("float", 8): E4M3}


def _granularity(weights: Mapping[str, Any]) -> Granularity | None:
    """The weights that share a scale, None for an unknown description."""
    size, structure = weights.get("group_size"), weights.get("block_structure")
    match weights.get("strategy"):
        case "channel":
            return ROW
        case "group" if isinstance(size, int):
            return group(size)
        case "tensor" if weights.get("type") == "float":
            return TENSOR
        case "block" if (
            isinstance(structure, list) and len(structure) == 2 and all(isinstance(n, int) for n in structure)
        ):
            return block(*structure)
    return None


def _activations(described: Mapping[str, Any] | None) -> Activations | Literal[False] | None:
    """The dynamic, symmetric quantization of activations; None without one, False if it is of another kind."""
    if not described:
        return None
    element = _ELEMENTS.get((described.get("type", "int"), described.get("num_bits")))
    dynamic = described.get("dynamic") is True and described.get("symmetric", True)
    size = described.get("group_size")
    if element is None or not dynamic:
        return False
    if described.get("strategy") == "token":
        return Activations(element)
    return Activations(element, size) if described.get("strategy") == "group" and isinstance(size, int) else False


def _group_json(one: Group) -> dict[str, Any]:
    number = one.number
    weights = {
        "num_bits": number.bits,
        "type": number.element.kind,
        "symmetric": number.symmetric,
        "dynamic": False,
        "actorder": None,
        **_strategy(number.granularity),
    }
    return {
        "format": one.layout,
        "input_activations": None if number.activations is None else _activations_json(number.activations),
        "output_activations": None,
        "targets": list(one.targets),
        "weights": weights,
    }


def _strategy(granularity: Granularity) -> dict[str, Any]:
    rows, columns = granularity.rows, granularity.columns
    if rows == 1:
        return {"strategy": "group" if columns else "channel", "group_size": columns}
    if rows is None:
        return {"strategy": "tensor", "group_size": None}
    return {"strategy": "block", "group_size": None, "block_structure": [rows, columns]}


def _activations_json(activations: Activations) -> dict[str, Any]:
    described = {"num_bits": activations.element.bits, "type": activations.element.kind, "symmetric": True}
    if activations.group_size is None:
        return {**described, "strategy": "token", "dynamic": True}
    return {**described, "strategy": "group", "group_size": activations.group_size, "dynamic": True}


def _matches(pattern: str, module: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    return module == pattern


def describe(linears: Sequence[Linear]) -> QuantizationConfig:
    """The description of an artifact, for engines.

    With one format, every Linear is a target and the others are ignored. With several formats, each group lists its
    roles, or single modules if a role has several formats. The routed experts' format comes first, because transformers
    applies the first group that names experts to all of them. Single linears that are not quantized are ignored by
    name.
    """
    modules: dict[Role, dict[tuple[NumberFormat, LayoutName] | None, list[str]]] = {}
    for linear in linears:
        key = None if linear.number is None else (linear.number, linear.layout)
        modules.setdefault(linear.role, {}).setdefault(key, []).append(linear.module)
    used = {key for keys in modules.values() for key in keys if key is not None}
    groups: dict[tuple[NumberFormat, LayoutName], list[str]] = {}
    for role in sorted(modules, key=lambda role: role != "routed_experts"):
        named = {key: names for key, names in modules[role].items() if key is not None}
        for key, names in named.items():
            groups.setdefault(key, []).extend([MODULE_PATTERNS[role]] if len(named) == 1 else names)
    described = [
        Group(("Linear",) if len(used) == 1 else tuple(targets), number, layout)
        for (number, layout), targets in groups.items()
    ]
    config = QuantizationConfig(tuple(described), tuple(dict.fromkeys(_ignored(linears, modules))))
    for linear in linears:
        found = config.format_of(linear.module)
        assert found == linear.number, f"{linear.module} is described as {found}"
    return config


def _ignored(linears: Sequence[Linear], modules: Mapping[Role, Mapping[Any, list[str]]]) -> list[str]:
    """Patterns of the linears that are not quantized: one per role if the whole role is not, else one per linear."""
    whole = {role for role, keys in modules.items() if set(keys) == {None}} | {"lm_head"}
    ignore = [pattern for role, pattern in MODULE_PATTERNS.items() if role in whole]
    for layer in sorted({linear.layer for linear in linears if linear.role == "mtp"}):
        # SGLang builds the layer under the name `decoder`
        ignore += [rf"re:model\.layers\.{layer}\..*", r"re:model\.decoder\..*"]
    left = (names.get(None, []) for role, names in modules.items() if role not in whole and role != "mtp")
    return ignore + [name for names in left for name in names]


METHOD: Final = Method("compressed-tensors", (PACKED, PLAIN, FLOAT), parse_config, describe)
