"""The compressed-tensors layout: how integers lie on disk and how config.json describes them.

Two layouts are written: `pack-quantized` (weight_packed int32 words, weight_scale, weight_shape) and `int-quantized`
(weight int8, weight_scale). The description is the `quantization_config` that vLLM, SGLang and transformers read; it names
linears by class ("Linear") or by regular expression, and the ones to leave alone. The same description is what our
runtime reads back, so an artifact of ours and one made elsewhere take the same path.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantlab.checkpoint.header import TensorEntry
from quantlab.errors import ArtifactError
from quantlab.formats.checks import asymmetric, check_order, misfit
from quantlab.numerics.integer import QuantizedMatrix
from quantlab.numerics.packing import pack_int32, unpack_int32
from quantlab.recipe.schemes import READABLE, Scheme, find_scheme

QUANT_METHOD = "compressed-tensors"
PARTS = ("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")
_VERSION = "0.20.0"
_LAYOUTS = ("pack-quantized", "int-quantized", "naive-quantized")
"""Layouts that are read; the last is an old name of the second."""


def encode(name: str, matrix: QuantizedMatrix, scheme: Scheme) -> dict[str, Tensor]:
    """The stored tensors of the weight `name`, in the order of `scheme.stored_tensors`."""
    prefix = name.removesuffix("weight")
    if not scheme.packed:
        return {name: matrix.q, prefix + "weight_scale": matrix.scale}
    return {
        prefix + "weight_packed": pack_int32(matrix.q, bits=scheme.bits),
        prefix + "weight_scale": matrix.scale,
        prefix + "weight_shape": torch.tensor(matrix.q.shape, dtype=torch.int64),
    }


def decode(name: str, stored: Mapping[str, Tensor], scheme: Scheme) -> QuantizedMatrix:
    """The inverse of `encode`, also for what llm-compressor writes.

    Args:
        name: the weight's name, ending in ".weight".
        stored: its parts by name. Integers are packed where there is a `weight_packed`, else int8; scales per row may lack
            their second dimension; `weight_shape` may be missing; zero points have to be zero, `weight_g_idx` in order.
        scheme: as found by `QuantizationConfig.scheme_of`.

    Raises:
        ArtifactError: the parts do not fit the scheme or each other, or hold numbers quantlab does not read.
    """
    prefix = name.removesuffix("weight")
    scale, words = stored[prefix + "weight_scale"], stored.get(prefix + "weight_packed")
    if scale.dim() == 1:
        scale = scale[:, None]
    q = stored[name] if words is None else _unpacked(name, words, stored.get(prefix + "weight_shape"), scheme)
    if q.dtype != torch.int8:
        raise misfit(name, f"integers of {q.dtype}")
    rows, columns = q.shape
    if (scheme.group_size and columns % scheme.group_size) or tuple(scale.shape) != (rows, scheme.groups(columns)):
        raise misfit(name, f"scales {list(scale.shape)} for a weight of {[rows, columns]} as {scheme.name}")
    if (order := stored.get(prefix + "weight_g_idx")) is not None:
        check_order(name, order, columns=columns, groups=scale.shape[1])
    zeros = stored.get(prefix + "weight_zero_point")
    if zeros is not None and bool((zeros != 0).any()):
        raise asymmetric(name)
    return QuantizedMatrix(q, scale, scheme.bits)


def _unpacked(name: str, words: Tensor, shape: Tensor | None, scheme: Scheme) -> Tensor:
    per_word = 32 // scheme.bits
    columns = words.shape[1] * per_word if shape is None else int(shape.flatten()[-1])
    if words.dtype != torch.int32 or words.shape[1] != -(-columns // per_word):
        raise misfit(name, f"{list(words.shape)} words of {words.dtype} for {columns} columns of {scheme.bits} bits")
    return unpack_int32(words, bits=scheme.bits, columns=columns)


@dataclass(frozen=True)
class QuantizationConfig:
    """Which linear of a model has which scheme.

    Attributes:
        groups: pairs of targets (class names or "re:…" patterns) and scheme.
        ignore: names or "re:…" patterns of linears that stay as they are.
    """

    groups: tuple[tuple[tuple[str, ...], Scheme], ...]
    ignore: tuple[str, ...]

    def scheme_stored(self, name: str, tensors: Mapping[str, TensorEntry]) -> Scheme | None:
        """The scheme of the weight `name`, None if its tensors are floating point.

        Raises:
            ArtifactError: its tensors are integers, and config.json gives them no scheme.
        """
        prefix = name.removesuffix("weight")
        integers = tensors.get(prefix + "weight_packed") or tensors.get(name)
        if integers is None or integers.dtype not in {"I8", "I32"}:
            return None
        if prefix + "weight_scale" not in tensors:
            raise misfit(name, f"no {prefix}weight_scale")
        scheme = self.scheme_of(prefix.removesuffix("."))
        if scheme is None:
            raise misfit(name, "integers, which config.json gives no scheme")
        return scheme

    def decode(self, name: str, stored: Mapping[str, Tensor], scheme: Scheme) -> QuantizedMatrix:
        """See the function `decode`."""
        return decode(name, stored, scheme)

    def scheme_of(self, module: str) -> Scheme | None:
        """The scheme of the linear `module` (its weight's name without ".weight"), None if it is not quantized."""
        if any(_matches(pattern, module) for pattern in self.ignore):
            return None
        for by_name in (True, False):  # a group that names the module wins over one that takes every Linear
            for targets, scheme in self.groups:
                if any(_matches(target, module) if by_name else target == "Linear" for target in targets):
                    return scheme
        return None

    def to_json(self) -> dict[str, Any]:
        """The `quantization_config` of config.json."""
        formats = {scheme.format for _, scheme in self.groups}
        return {
            "config_groups": {
                f"group_{index}": _group_json(targets, scheme) for index, (targets, scheme) in enumerate(self.groups)
            },
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "global_compression_ratio": None,
            "ignore": list(self.ignore),
            "kv_cache_scheme": None,
            "quant_method": QUANT_METHOD,
            "quantization_status": "compressed",
            "version": _VERSION,
        }


def parse_config(quantization_config: Mapping[str, Any], *, where: str) -> QuantizationConfig:
    """Read a `quantization_config` of method compressed-tensors.

    Raises:
        ArtifactError: it describes numbers quantlab has no scheme for.
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
    for name, group in described.items():
        if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping | None):
            raise _malformed(f"{where}, {name}", group)
        if group.get("weights") is not None:
            targets = _patterns(group.get("targets"), where=f"{where}, {name}, targets")
            layout = group.get("format") or quantization_config.get("format")
            groups.append((targets, _scheme(group, layout, where=f"{where}, {name}")))
    return QuantizationConfig(tuple(groups), _patterns(ignore, where=f"{where}, ignore"))


def _patterns(found: object, *, where: str) -> tuple[str, ...]:
    """Names and "re:…" patterns that can be matched with."""
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


def _scheme(group: Mapping[str, Any], layout: str | None, *, where: str) -> Scheme:
    weights, activations = group["weights"], group.get("input_activations")
    regular = (
        weights.get("type", "int") == "int"
        and weights.get("symmetric", True)
        and weights.get("strategy") in {"group", "channel"}
        and layout in _LAYOUTS
    )
    group_size = weights.get("group_size") if weights.get("strategy") == "group" else None
    scheme = find_scheme(weights.get("num_bits"), group_size, quantized_activations=bool(activations))
    if regular and scheme is not None and (not activations or _per_token(activations)):
        return scheme
    raise ArtifactError(
        "the artifact's numbers are of a kind quantlab does not read",
        where=where,
        found=f"{weights} with activations {activations} as {layout}",
        fix="readable: symmetric integers as "
        + "; ".join(f"{scheme.name} ({scheme.description})" for scheme in READABLE),
    )


def _per_token(activations: Mapping[str, Any]) -> bool:
    """Whether activations become symmetric int8 with a scale per token found at run time."""
    kind = activations.get("num_bits"), activations.get("strategy"), activations.get("type", "int")
    return kind == (8, "token", "int") and bool(activations.get("dynamic")) and bool(activations.get("symmetric", True))


def _group_json(targets: Sequence[str], scheme: Scheme) -> dict[str, Any]:
    weights = {"num_bits": scheme.bits, "type": "int", "symmetric": True, "dynamic": False, "actorder": None}
    if scheme.group_size is None:
        weights |= {"strategy": "channel", "group_size": None}
    else:
        weights |= {"strategy": "group", "group_size": scheme.group_size}
    activations = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    return {
        "format": scheme.format,
        "input_activations": activations if scheme.quantized_activations else None,
        "output_activations": None,
        "targets": list(targets),
        "weights": weights,
    }


def _matches(pattern: str, module: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    return module == pattern
