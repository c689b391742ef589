"""What a family of models looks like on disk: tensor names, what each is for, and what belongs together.

A rule claims tensors by name. `{layer}` and `{expert}` in its pattern stand for a number, so that no count of layers or
experts is written anywhere; they are derived from the names of the checkpoint. The rules of a family are data
(`families.py`); this file is the little code that reads them.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

from quantlab.errors import CheckpointError

Role = Literal[
    "routed_experts",
    "shared_experts",
    "dense_mlp",
    "attention",
    "kv_b",
    "router",
    "norm",
    "embeddings",
    "lm_head",
    "mtp",
    "other",
]
QuantizableRole = Literal["routed_experts", "shared_experts", "dense_mlp", "attention", "kv_b"]
Config = Mapping[str, Any]
Dimensions = Mapping[str, int]

QUANTIZABLE_ROLES: tuple[QuantizableRole, ...] = get_args(QuantizableRole)
DEFAULT_TARGETS: tuple[QuantizableRole, ...] = ("routed_experts", "shared_experts", "dense_mlp", "attention")


@dataclass(frozen=True)
class TensorRule:
    """One kind of tensor.

    Attributes:
        pattern: its name, with `{layer}` and `{expert}` for numbers.
        role: what it is for.
        shape: the names of its dimensions, see `Architecture.dimensions`.
        layers: which layers have it: "every" hidden layer, the "dense" or the "moe" ones, the "mtp" ones; "none" for
            tensors outside the layers.
        needs: a dimension without which the tensor does not exist; with a leading "!" one that excludes it.
        linear: whether it is the weight [out_features, in_features] of a linear layer.
        site: the input site: what has the same site in the same layer (and expert) reads the same activations.
        feeds: the input site whose channels are this tensor's outputs, row by row or head by head: where a scale per channel
            can be folded in. Everything that reads the site is a linear or the router.
        fused: the group that serving engines fuse into one matrix; its members share one scheme.
        splits: the dimension tensor parallelism divides: "rows" (outputs), "columns" (inputs), or None.
        exact: whether it keeps its dtype in every variant because engines compute with it in float32.
    """

    pattern: str
    role: Role
    shape: tuple[str, ...]
    layers: Literal["none", "every", "dense", "moe", "mtp"] = "none"
    needs: str = ""
    linear: bool = False
    site: str | None = None
    feeds: str | None = None
    fused: str | None = None
    splits: Literal["rows", "columns"] | None = None
    exact: bool = False

    @cached_property
    def regex(self) -> re.Pattern[str]:
        escaped = re.escape(self.pattern)
        return re.compile(escaped.replace(r"\{layer\}", r"(?P<layer>\d+)").replace(r"\{expert\}", r"(?P<expert>\d+)"))


@dataclass(frozen=True)
class Claim:
    """A tensor name with the rule that claims it and the numbers in its name."""

    name: str
    role: Role
    rule: TensorRule | None
    layer: int | None
    expert: int | None

    @property
    def block(self) -> str:
        """The unit of streaming the tensor belongs to."""
        if self.layer is not None:
            return f"layer {self.layer}"
        return "embeddings" if self.role == "embeddings" else "head"

    @property
    def fusion_group(self) -> str | None:
        """Name of the matrix that engines fuse this tensor into, unique in the model."""
        if self.rule is None or self.rule.fused is None:
            return None
        return f"{self.block}{'' if self.expert is None else f' expert {self.expert}'} {self.rule.fused}"


@dataclass(frozen=True)
class Architecture:
    """A family of checkpoints.

    Attributes:
        name: the `model_type` of config.json.
        class_name: the entry of `architectures` in config.json.
        rules: what its tensors are; the first rule that matches claims.
        dimensions: reads the named sizes out of a config.json; a size that is 0 stands for something the model lacks.
        mtp: whether layers past `num_hidden_layers` are multi-token-prediction layers.
    """

    name: str
    class_name: str
    rules: tuple[TensorRule, ...]
    dimensions: Callable[[Config], Dimensions]
    mtp: bool = False

    def fed_rows(self, claim: Claim, config: Config, *, channels: int) -> Sequence[int]:
        """For every channel of the site a tensor feeds, the row (or element, of a norm) of the tensor it comes from.

        Args:
            claim: a tensor whose rule feeds a site.
            config: config.json.
            channels: how many channels the site has.
        """
        assert claim.rule is not None
        if claim.rule.feeds != "o":
            return range(channels)
        heads = size_of(config, "num_attention_heads", least=1)
        width = channels // heads
        if claim.role == "kv_b":  # the rows of each head are its keys' and, behind them, its values'
            keys = size_of(config, "qk_nope_head_dim")
            return [head * (keys + width) + keys + row for head in range(heads) for row in range(width)]
        shared_by = heads // size_of(config, "num_key_value_heads", default=heads, least=1)
        return [head // shared_by * width + row for head in range(heads) for row in range(width)]

    def claim(self, name: str, *, hidden_layers: int) -> Claim:
        """Say what the tensor `name` is; a name no rule knows gets the role "other"."""
        for rule in self.rules:
            if match := rule.regex.fullmatch(name):
                numbers = {key: int(value) for key, value in match.groupdict().items()}
                layer = numbers.get("layer")
                past_the_end = layer is not None and layer >= hidden_layers
                role: Role = "mtp" if self.mtp and past_the_end else rule.role
                return Claim(name, role, rule, layer, numbers.get("expert"))
        layer_of_unknown = re.match(r"model\.layers\.(\d+)\.", name)
        return Claim(name, "other", None, int(layer_of_unknown[1]) if layer_of_unknown else None, None)

    def expected(self, config: Config, *, with_mtp: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every tensor a checkpoint of this config must have.

        Args:
            config: config.json.
            with_mtp: whether the multi-token-prediction layers are there; releases exist with and without.

        Raises:
            CheckpointError: the config lacks a field.
        """
        sizes = self.dimensions(config)
        for rule in self.rules:
            if rule.needs and bool(sizes[rule.needs.lstrip("!")]) == rule.needs.startswith("!"):
                continue
            shape = tuple(sizes[word] for word in rule.shape)
            experts = range(sizes["experts"]) if "{expert}" in rule.pattern else (0,)
            for layer in self._layers_of(rule, sizes, with_mtp=with_mtp):
                for expert in experts:
                    yield rule.pattern.format(layer=layer, expert=expert), shape

    def _layers_of(self, rule: TensorRule, sizes: Dimensions, *, with_mtp: bool) -> Iterable[int]:
        hidden, past = range(sizes["layers"]), range(sizes["layers"], sizes["layers"] + sizes.get("mtp_layers", 0))
        extra = past if with_mtp and self.mtp else range(0)
        dense = {layer for layer in hidden if layer < sizes["first_moe"] or layer % sizes["moe_every"]}
        match rule.layers:
            case "none":
                return (0,)
            case "every":
                return (*hidden, *extra)
            case "dense":
                return sorted(dense)
            case "moe":
                return (*sorted(set(hidden) - dense), *extra)
            case "mtp":
                return extra


STAGES: tuple[tuple[str, ...], ...] = (("attention",), ("q_latent", "kv_latent"), ("o",), ("mlp",), ("down",))
"""The input sites of a layer in the order its forward pass reaches them; those of one stage do not depend on each other."""

_LARGEST_SIZE = 10_000_000


def size_of(config: Config, field: str, *, default: int | None = None, least: int = 0) -> int:
    """A size of config.json, at least `least`.

    Raises:
        CheckpointError: the field is missing and has no default, or is no whole number.
    """
    value = config.get(field)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= _LARGEST_SIZE:
        raise CheckpointError(
            f"config.json has no usable {field}",
            where="config.json",
            found=repr(value),
            fix="use the config.json of the original release",
        )
    return value
