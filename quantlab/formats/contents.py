"""What a checkpoint contains, known from its plan as well as from its headers. Does not import torch.

The rules of engines and the formats of other programs judge a checkpoint by this description, so that nothing is refused
after the work. `quantlab.formats.read_contents` reads it from headers, `quantlab.plan.contents` makes it from a plan.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final, NamedTuple

from quantlab.architectures.architecture import Architecture, ModelTensor, Role
from quantlab.formats.layout import Linear
from quantlab.formats.layouts import method_of_layout
from quantlab.numerics.number_format import NumberFormat
from quantlab.recipe.schemes import LayoutName

DENSE: Final = "dense"
"""Stands for the method of a checkpoint without quantized weights."""


@dataclass(frozen=True)
class Weight:
    """One weight of a checkpoint, quantized or not.

    Attributes:
        tensor: its logical name (ending in ".weight" if it is quantized), role and rule.
        shape: of the weight; [N, K] if it is quantized.
        number: its number format; None where it is not quantized.
        layout: how it is stored.
        dtype: dtype word of its tensor, or of its scales if it is quantized.
    """

    tensor: ModelTensor
    shape: tuple[int, ...]
    number: NumberFormat | None
    layout: LayoutName
    dtype: str

    @property
    def name(self) -> str:
        """Its logical name."""
        return self.tensor.name

    @property
    def role(self) -> Role:
        """What it is for."""
        return self.tensor.role

    @property
    def module(self) -> str:
        """The name of its module."""
        return self.name.rpartition(".")[0]

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def scheme(self) -> str:
        """Its format in text."""
        return self.number.name if self.number is not None else "no scheme"


class Divided(NamedTuple):
    """Two weights that belong together and differ in format."""

    group: str
    one: Weight
    other: Weight


@dataclass(frozen=True)
class Contents:
    """What a checkpoint contains.

    Attributes:
        architecture: its family.
        config: its config.json without `quantization_config`.
        weights: all weights, in the order of its files.
        directory: where its tokenizer and other companion files are: the checkpoint, or, before it is made, its source.
        method: its `quant_method`, "dense" if it has none.
    """

    architecture: Architecture
    config: Mapping[str, Any] = field(repr=False)
    weights: tuple[Weight, ...] = field(repr=False)
    directory: Path
    method: str

    @property
    def elements(self) -> int:
        """Number of elements of all weights."""
        return sum(weight.elements for weight in self.weights)

    @property
    def quantized(self) -> tuple[Weight, ...]:
        """The weights that are quantized."""
        return tuple(weight for weight in self.weights if weight.number is not None)

    @cached_property
    def kinds(self) -> tuple[Weight, ...]:
        """The first of all linears that have role, rule, shape and format in common; without multi-token-prediction layers."""
        first: dict[object, Weight] = {}
        for weight in self.weights:
            rule = weight.tensor.rule
            if rule is not None and rule.linear and weight.role != "mtp":
                first.setdefault((weight.role, rule.pattern, weight.shape, weight.number, weight.layout), weight)
        return tuple(first.values())

    def of_role(self, role: Role) -> Iterator[Weight]:
        """The kinds of linears of a role."""
        return (weight for weight in self.kinds if weight.role == role)

    def schemes(self, role: Role) -> set[str]:
        """The formats of the linears of a role."""
        return {weight.scheme for weight in self.of_role(role)}

    @cached_property
    def experts(self) -> int:
        """Routed experts of a layer, 0 in a dense model."""
        return 1 + max(
            (weight.tensor.expert for weight in self.weights if weight.tensor.expert is not None), default=-1
        )

    @cached_property
    def divided_fusion(self) -> Divided | None:
        """Weights that engines fuse into one matrix and that differ in format, None if there are none."""
        return self._divided(lambda weight: weight.tensor.fusion_group)

    @cached_property
    def divided_layer(self) -> Divided | None:
        """Routed experts of one layer that differ in format, None if there are none."""
        return self._divided(
            lambda weight: (
                weight.tensor.block if weight.role == "routed_experts" and weight.tensor.expert is not None else None
            )
        )

    def _divided(self, group_of: Callable[[Weight], str | None]) -> Divided | None:
        groups: dict[str, list[Weight]] = defaultdict(list)
        for weight in self.weights:
            if (group := group_of(weight)) is not None:
                groups[group].append(weight)
        for group, (first, *others) in groups.items():
            for other in others:
                if first.number != other.number:
                    return Divided(group, first, other)
        return None


def method_of(weights: Sequence[Weight]) -> str:
    """The `quant_method` of a checkpoint that stores these weights."""
    quantized = (weight for weight in weights if weight.number is not None)
    return next((method_of_layout(weight.layout).word for weight in quantized), DENSE)


def described_linears(weights: Sequence[Weight], layout: Callable[[Weight], LayoutName]) -> list[Linear]:
    """The linears that a `quantization_config` must describe: all of a checkpoint, quantized or not.

    Args:
        weights: all weights.
        layout: gives the layout in which a quantized weight is written.
    """
    linears = [
        Linear(
            weight.module,
            weight.role,
            weight.tensor.layer or 0,
            weight.number,
            "dense" if weight.number is None else layout(weight),
        )
        for weight in weights
        if weight.name.endswith(".weight")
        and weight.tensor.rule is not None
        and (weight.tensor.rule.linear or weight.role == "router")
    ]
    routers = {linear.layer for linear in linears if linear.role == "router"}
    if routers and not any(linear.role == "shared_experts" for linear in linears):
        # transformers builds linears without elements for zero shared experts, which are not quantized either
        module = f"model.layers.{min(routers)}.mlp.shared_experts.down_proj"
        linears.append(Linear(module, "shared_experts", min(routers), None, "dense"))
    return linears
