"""What a family of models looks like on disk: tensor names, what each is for, and what belongs together.

A rule claims tensors by name. `{layer}` and `{expert}` in its pattern stand for a number, so that no count of layers or
experts is written anywhere; they are derived from the names of the checkpoint. The rules of a family are data
(`families.py`); this file is the little code that reads them.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

from quantlab.errors import CheckpointError

Role = Literal[
    "routed_experts", "shared_experts", "dense_mlp", "attention", "kv_b", "router", "norm", "embeddings", "lm_head", "mtp", "other"
]
QuantizableRole = Literal["routed_experts", "shared_experts", "dense_mlp", "attention", "kv_b"]
QUANTIZABLE_ROLES: tuple[QuantizableRole, ...] = get_args(QuantizableRole)
DEFAULT_TARGETS: tuple[QuantizableRole, ...] = ("routed_experts", "shared_experts", "dense_mlp", "attention")


@dataclass(frozen=True)
class TensorRule:
    """One kind of tensor.

    Attributes:
        pattern: its name, with `{layer}` and `{expert}` for numbers.
        role: what it is for.
        linear: whether it is the weight [out_features, in_features] of a linear layer.
        site: the input site: linears with the same site in the same layer (and expert) read the same activations.
        fused: the group that serving engines fuse into one matrix; its members share one scheme.
        splits: the dimension tensor parallelism divides: "rows" (outputs), "columns" (inputs), or None.
    """

    pattern: str
    role: Role
    linear: bool = False
    site: str | None = None
    fused: str | None = None
    splits: Literal["rows", "columns"] | None = None

    @cached_property
    def regex(self) -> re.Pattern[str]:
        escaped = re.escape(self.pattern).replace(r"\{layer\}", r"(?P<layer>\d+)").replace(r"\{expert\}", r"(?P<expert>\d+)")
        return re.compile(escaped)


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
        mtp: whether layers past `num_hidden_layers` are multi-token-prediction layers.
    """

    name: str
    class_name: str
    rules: tuple[TensorRule, ...]
    mtp: bool = False

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


def hidden_layers(config: Mapping[str, Any]) -> int:
    """`num_hidden_layers` of a config.json.

    Raises:
        CheckpointError: the field is missing or no positive whole number.
    """
    value = config.get("num_hidden_layers")
    if not isinstance(value, int) or value < 1:
        raise CheckpointError("config.json has no usable num_hidden_layers", where="config.json", found=repr(value), fix="use the config.json of the original release")
    return value
