"""The compressed-tensors layout: how integers lie on disk and how config.json describes them.

Two layouts are written: `pack-quantized` (weight_packed int32 words, weight_scale, weight_shape) and `int-quantized`
(weight int8, weight_scale). The description is the `quantization_config` that vLLM, SGLang and transformers read; it names
linears by class ("Linear") or by regular expression, and the ones to leave alone. The same description is what our
runtime reads back, so an artifact of ours and one made elsewhere take the same path.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantlab.errors import ArtifactError
from quantlab.numerics.integer import QuantizedMatrix
from quantlab.numerics.packing import pack_int32, unpack_int32
from quantlab.recipe.schemes import SCHEMES, Scheme

QUANT_METHOD = "compressed-tensors"
_VERSION = "0.20.0"


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


def decode(name: str, read: Callable[[str], Tensor], scheme: Scheme) -> QuantizedMatrix:
    """The inverse of `encode`.

    Args:
        name: the weight's name, ending in ".weight".
        read: returns a stored tensor by name.
        scheme: as found by `QuantizationConfig.scheme_of`.
    """
    prefix = name.removesuffix("weight")
    scale = read(prefix + "weight_scale")
    if not scheme.packed:
        return QuantizedMatrix(read(name), scale, scheme.bits)
    columns = int(read(prefix + "weight_shape")[1])
    return QuantizedMatrix(
        unpack_int32(read(prefix + "weight_packed"), bits=scheme.bits, columns=columns), scale, scheme.bits
    )


@dataclass(frozen=True)
class QuantizationConfig:
    """Which linear of a model has which scheme.

    Attributes:
        groups: pairs of targets (class names or "re:…" patterns) and scheme.
        ignore: names or "re:…" patterns of linears that stay as they are.
    """

    groups: tuple[tuple[tuple[str, ...], Scheme], ...]
    ignore: tuple[str, ...]

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
    groups = []
    for name, group in quantization_config.get("config_groups", {}).items():
        if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping | None):
            raise ArtifactError(
                "a config group is malformed",
                where=f"{where}, {name}",
                found=repr(group)[:120],
                fix="write groups as compressed-tensors does",
            )
        if group.get("weights") is not None:
            layout = group.get("format") or quantization_config.get("format")
            groups.append((tuple(group.get("targets", ())), _scheme(group, layout, where=f"{where}, {name}")))
    return QuantizationConfig(tuple(groups), tuple(quantization_config.get("ignore") or ()))


def _scheme(group: Mapping[str, Any], layout: str | None, *, where: str) -> Scheme:
    weights, activations = group["weights"], group.get("input_activations")
    group_size = weights.get("group_size") if weights.get("strategy") == "group" else None
    # columns ordered by activation need an index per column, which no layout here has
    regular = (
        weights.get("actorder") not in {"group", "dynamic"}
        and weights.get("type") == "int"
        and weights.get("symmetric", True)
        and weights.get("strategy") in {"group", "channel"}
    )
    kind = activations and (activations.get("num_bits"), activations.get("strategy"), bool(activations.get("dynamic")))
    per_token = kind == (8, "token", True)
    for scheme in SCHEMES.values():
        same_numbers = (scheme.bits, scheme.group_size) == (weights.get("num_bits"), group_size)
        if (
            regular
            and same_numbers
            and scheme.quantized_activations == bool(activations) == per_token
            and scheme.format == layout
        ):
            return scheme
    raise ArtifactError(
        "the artifact's numbers are of a kind quantlab does not read",
        where=where,
        found=f"{weights} with activations {activations} as {layout}",
        fix="readable: symmetric integers as "
        + "; ".join(f"{scheme.name} ({scheme.description})" for scheme in SCHEMES.values()),
    )


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
