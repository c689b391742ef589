"""A family of models: names and roles of its tensors, computation of its layers, and its fields of config.json.

A rule matches tensors by name. `{layer}` and `{expert}` in its pattern stand for numbers, so that no count of layers or
experts is hard-coded; the numbers are parsed from the names in the checkpoint. A family is data (`families/`, one file
each, listed in `detect.py`); this file is the code that interprets it.
"""

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, get_args

from quantlab.architectures.config import Config, size_of
from quantlab.architectures.fields import ConfigFields, ReadConfig
from quantlab.architectures.layer import ATTENTION, GATED_MLP, MLP, Attention, MixtureOfExperts, Sublayer

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
Dimensions = Mapping[str, int]

QUANTIZABLE_ROLES: tuple[QuantizableRole, ...] = get_args(QuantizableRole)
DEFAULT_TARGETS: tuple[QuantizableRole, ...] = ("routed_experts", "shared_experts", "dense_mlp", "attention")
STAGES: tuple[tuple[str, ...], ...] = (*ATTENTION.stages, *MLP.stages)
"""The input sites of a layer in the order its forward pass reaches them; those of one stage do not depend on each other."""
MODULE_PATTERNS: Mapping[Role, str] = {
    "routed_experts": r"re:.*mlp\.experts.*",
    "shared_experts": r"re:.*mlp\.shared_experts\..*",
    "dense_mlp": r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",
    "attention": r"re:.*self_attn\.(?!kv_b_proj).*",
    "kv_b": r"re:.*self_attn\.kv_b_proj.*",
    "router": r"re:.*mlp\.gate$",
    "lm_head": "lm_head",
}
"""The linears of a role as engines address them, fused names (gate_up_proj, fused_qkv_a_proj) included."""
_MTP_LAYERS = "num_nextn_predict_layers"
_STORAGE_FIELDS = {"quantization_config", "dtype", "torch_dtype"}


@dataclass(frozen=True)
class TensorRule:
    """One kind of tensor.

    Attributes:
        pattern: its name, with `{layer}` and `{expert}` for numbers.
        role: what it is for.
        shape: the names of its dimensions, see `Architecture.dimensions`.
        layers: the layers that have it: "every" hidden layer, the "dense", "moe" or "mtp" ones; "none" for tensors
            outside the layers.
        needs: a dimension that must be nonzero for the tensor to exist; with a leading "!" it must be zero.
        linear: whether it is the weight [out_features, in_features] of a linear layer.
        site: its input site; tensors with the same site in the same layer (and expert) read the same activations.
        feeds: the input site whose channels are this tensor's outputs, row by row or head by head, so that a scale per
            channel can be folded into it. All readers of the site are linears or the router.
        fused: the group that serving engines fuse into one matrix; its members share one scheme.
        splits: the dimension that tensor parallelism splits: "rows" (outputs), "columns" (inputs), or None.
        exact: whether it keeps its dtype in every variant, because engines compute with it in float32.
        optional: whether releases exist without it, because it is a copy of another tensor.
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
    optional: bool = False

    def exists(self, sizes: Dimensions) -> bool:
        """Whether a model of these sizes has the tensor, see `needs`."""
        return not self.needs or bool(sizes[self.needs.lstrip("!")]) != self.needs.startswith("!")

    @cached_property
    def regex(self) -> re.Pattern[str]:
        escaped = re.escape(self.pattern)
        return re.compile(escaped.replace(r"\{layer\}", r"(?P<layer>\d+)").replace(r"\{expert\}", r"(?P<expert>\d+)"))


@dataclass(frozen=True)
class ModelTensor:
    """A tensor classified by its name: role, matching rule, layer and expert.

    Attributes:
        name: its name in the checkpoint.
        role: its role, "other" without a rule.
        rule: the rule that matches its name, None if no rule does.
        layer: number of its decoder layer, None outside the layers.
        expert: number of its routed expert, None outside routed experts.
    """

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

    def in_expert(self, expert: int) -> str:
        """Name of the same tensor of another routed expert of the layer."""
        assert self.rule is not None and self.expert is not None, "a tensor of a routed expert"  # noqa: PT018
        return self.rule.pattern.format(layer=self.layer, expert=expert)


class ExpertNames(NamedTuple):
    """Names of the weights of one routed expert: gate and up [I, H], down [H, I]."""

    gate: str
    up: str
    down: str


def as_it_stands(config: Config) -> Config:
    """The config unchanged, for families whose config.json transformers interprets correctly."""
    return config


@dataclass(frozen=True)
class Architecture:
    """A family of checkpoints.

    Attributes:
        name: the `model_type` of config.json.
        class_name: the entry of `architectures` in config.json.
        fields: the fields of its config.json.
        rules: rules for its tensors; the first matching rule applies.
        sizes: named sizes from a config.json with all fields; a size of 0 means that the model lacks the part.
        attention: kind of attention of every layer.
        halves: the two sublayers that every layer consists of, attention and mlp.
        mixture: the layers with routed experts, None in a dense family.
        mtp: whether layers past `num_hidden_layers` are multi-token-prediction layers.
        adapted: rewrites a config.json so that transformers computes the same as serving engines.
    """

    name: str
    class_name: str
    fields: ConfigFields
    rules: tuple[TensorRule, ...]
    sizes: Callable[[ReadConfig], Dimensions]
    attention: Attention
    halves: tuple[Sublayer, Sublayer] = (ATTENTION, MLP)
    mixture: MixtureOfExperts | None = None
    mtp: bool = False
    adapted: Callable[[Config], Config] = as_it_stands

    def read(self, config: Config) -> ReadConfig:
        """A config.json with the values of all fields of the family, see `ConfigFields.read`.

        Raises:
            CheckpointError: it cannot be right, or the family's modules do not compute what it says.
        """
        return self.fields.read(config)

    def dimensions(self, config: Config) -> Dimensions:
        """The named sizes of a model.

        Raises:
            CheckpointError: as `read`.
        """
        return self.sizes(self.read(config))

    def for_transformers(self, config: Config) -> Config:
        """The config.json from which transformers makes a model that computes as the plan and serving engines do.

        Raises:
            CheckpointError: as `read`, or a parameter of the rotary embedding is not a number.
        """
        return self.adapted(self.read(config))

    def model_fields(self, config: Config) -> dict[str, Any]:
        """The fields of a config.json for transformers' config class, without those that say how weights are stored."""
        plain = {key: copy.deepcopy(value) for key, value in config.items() if key not in _STORAGE_FIELDS}
        return dict(self.for_transformers(plain))

    def with_experts(self, config: Config, experts: int) -> dict[str, Any]:
        """The config.json of the same model with fewer routed experts in every layer and no multi-token-prediction layer.

        The number stands under every name that config.json has for it.
        """
        assert self.mixture is not None, f"{self.name} has no routed experts"
        counted = self.mixture.count_field
        return {
            **config,
            counted: experts,
            **self._spelled(config, counted, experts),
            **self._spelled(config, _MTP_LAYERS, 0),
        }

    def _spelled(self, config: Config, name: str, value: int) -> dict[str, int]:
        """The value of a field under those of its names that a config.json has."""
        field = self.fields.field(name)
        return {name: value for name in (field.name, *field.aliases) if name in config}

    def dense_and_moe(self, config: Config) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Numbers of the layers with one MLP, and of those with routed experts."""
        return _dense_and_moe(self.dimensions(config))

    def with_layers(self, config: Config, *, dense: int, moe: int, vocabulary: int) -> dict[str, Any]:
        """The config.json of a smaller model of the same width.

        Args:
            config: config.json of the whole model.
            dense: number of its layers with one MLP, which come first.
            moe: number of its layers with routed experts.
            vocabulary: rows of its embedding and head.
        """
        changed = {"num_hidden_layers": dense + moe, "vocab_size": vocabulary}
        if self.mixture is not None:
            changed |= {"first_k_dense_replace": dense, _MTP_LAYERS: 0} | self._spelled(config, _MTP_LAYERS, 0)
        tokens = {"bos_token_id", "eos_token_id", "pad_token_id"}  # may lie outside the smaller vocabulary
        return {name: value for name, value in config.items() if name not in tokens} | changed

    def context_length(self, config: Config) -> int:
        """Largest context length in tokens, 0 if config.json does not specify it."""
        return size_of(config, "max_position_embeddings", default=0)

    def same_input(self, site: str, config: Config) -> tuple[str, ...]:
        """Module names, in the sublayer, of the linears outside the experts that read an input site, in rule order."""
        sizes = self.dimensions(config)
        readers = (rule for rule in self.rules if rule.linear and rule.site == site and rule.exists(sizes))
        return tuple(rule.pattern.removesuffix(".weight").rpartition(".")[2] for rule in readers)

    def expert_names(self, layer: int, expert: int) -> ExpertNames:
        """Names of the weights of a routed expert."""
        assert self.mixture is not None, f"{self.name} has no routed experts"
        prefix = f"model.layers.{layer}.{self.halves[1].module}.{self.mixture.EXPERTS}.{expert}."
        return ExpertNames(*(f"{prefix}{name}.weight" for name in (GATED_MLP.gate, GATED_MLP.up, GATED_MLP.down)))

    def outside_the_model(self, name: str, config: Config) -> bool:
        """Whether transformers' model lacks a tensor of the checkpoint: multi-token-prediction layers, a tied head."""
        sizes = self.dimensions(config)
        if name == "lm_head.weight":
            return bool(sizes["tied"])
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        past = sizes["layers"] + sizes.get("mtp_layers", 0)
        return layer is not None and sizes["layers"] <= int(layer[1]) < past

    def fed_rows(self, tensor: ModelTensor, config: Config, *, channels: int) -> Sequence[int]:
        """For every channel of the site that a tensor feeds: the tensor's row (or element, for a norm) that produces
        it.

        Args:
            tensor: a tensor whose rule feeds a site.
            config: config.json.
            channels: number of channels of the site.
        """
        assert tensor.rule is not None
        if tensor.rule.feeds != "o":
            return range(channels)
        return self.attention.output_rows(self.read(config), channels=channels)

    def classify(self, name: str, *, hidden_layers: int) -> ModelTensor:
        """Classify a tensor by its name; a name without a matching rule gets the role "other"."""
        for rule in self.rules:
            if match := rule.regex.fullmatch(name):
                numbers = {key: int(value) for key, value in match.groupdict().items()}
                layer = numbers.get("layer")
                past_the_end = layer is not None and layer >= hidden_layers
                role: Role = "mtp" if self.mtp and past_the_end else rule.role
                return ModelTensor(name, role, rule, layer, numbers.get("expert"))
        layer_of_unknown = re.match(r"model\.layers\.(\d+)\.", name)
        return ModelTensor(name, "other", None, int(layer_of_unknown[1]) if layer_of_unknown else None, None)

    def expected(self, config: Config, *, with_mtp: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every tensor a checkpoint of this config must have.

        Args:
            config: config.json.
            with_mtp: whether to include the multi-token-prediction layers; releases exist with and without them.

        Raises:
            CheckpointError: as `read`.
        """
        sizes = self.dimensions(config)
        for rule in self.rules:
            if not rule.exists(sizes):
                continue
            shape = tuple(sizes[word] for word in rule.shape)
            experts = range(sizes["experts"]) if "{expert}" in rule.pattern else (0,)
            for layer in self._layers_of(rule, sizes, with_mtp=with_mtp):
                for expert in experts:
                    yield rule.pattern.format(layer=layer, expert=expert), shape

    def _layers_of(self, rule: TensorRule, sizes: Dimensions, *, with_mtp: bool) -> Iterable[int]:
        hidden, past = range(sizes["layers"]), range(sizes["layers"], sizes["layers"] + sizes.get("mtp_layers", 0))
        extra = past if with_mtp and self.mtp else range(0)
        dense, moe = _dense_and_moe(sizes)
        match rule.layers:
            case "none":
                return (0,)
            case "every":
                return (*hidden, *extra)
            case "dense":
                return dense
            case "moe":
                return (*moe, *extra)
            case "mtp":
                return extra


def _dense_and_moe(sizes: Dimensions) -> tuple[tuple[int, ...], tuple[int, ...]]:
    first = min(sizes["first_moe"], sizes["layers"])
    return tuple(range(first)), tuple(range(first, sizes["layers"]))
