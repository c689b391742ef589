"""The fields of config.json that families share, and what must hold between them.

Defaults are those of transformers' config classes. Fields without an effect on a model in evaluation mode (the losses of
training, `ep_size`) are not declared, except those that transformers checks when it makes a model.
"""

from collections.abc import Callable
from typing import Final

from quantlab.architectures.config import Config
from quantlab.architectures.fields import (
    DEFAULT,
    LEFT_OUT,
    ConfigFields,
    Field,
    Number,
    Section,
    Size,
    Switch,
    Tokens,
    Word,
    Words,
    contradiction,
)
from quantlab.architectures.layer import Routing

_MOST_LAYERS: Final = 10_000
_MOST_EXPERTS: Final = 100_000
_LONGEST_CONTEXT: Final = 2**31 - 1
ACTIVATIONS: Final = (
    "silu", "swish", "gelu", "gelu_10", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python", "gelu_python_tanh",
    "gelu_pytorch_tanh", "hardswish", "leaky_relu", "linear", "mish", "quick_gelu", "relu", "relu2", "relu6", "sigmoid",
    "sqrtsoftplus", "tanh",
)  # fmt: skip
"""transformers' activation functions of one tensor without parameters."""
ROTARY_TYPES: Final = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
"""transformers' kinds of rotary embeddings; all but the first and longrope stretch positions by a `factor`."""
LAYER_TYPES: Final = ("full_attention", "sliding_attention")
EXPERT_COUNTS: Final = ("num_experts", "num_local_experts")
"""Other names of the number of routed experts; each family of transformers knows one of them."""


def _heads(config: Config) -> int:
    return int(config["num_attention_heads"])


def _width_of_a_head(config: Config) -> int:
    return int(config["hidden_size"]) // _heads(config)


def key_heads(default: int | None) -> Field:
    """The number of heads of keys and values, by default as many as of queries."""
    return Size(name="num_key_value_heads", default=_heads if default is None else default, null=_heads)


def head_width(default: int | None) -> Field:
    """The width of a head, by default the hidden width divided by the number of heads."""
    return Size(name="head_dim", default=_width_of_a_head if default is None else default, null=DEFAULT)


_COMMON: Final[tuple[Field, ...]] = (
    Size(name="vocab_size"),
    Size(name="hidden_size"),
    Size(name="intermediate_size"),
    Size(name="num_hidden_layers", most=_MOST_LAYERS),
    Size(name="num_attention_heads"),
    Word(name="hidden_act", default="silu", computed=ACTIVATIONS),
    Number(name="rms_norm_eps", default=1e-6, most=1.0),
    Switch(name="tie_word_embeddings", default=False),
    Size(name="max_position_embeddings", default=LEFT_OUT, most=_LONGEST_CONTEXT),
    Number(name="rope_theta", default=LEFT_OUT, least=1.0),
    Section(name="rope_scaling", default=LEFT_OUT, null=LEFT_OUT),
    Section(name="rope_parameters", default=LEFT_OUT, null=LEFT_OUT),
    Number(name="initializer_range", default=LEFT_OUT, most=1.0, positive=False),
    Number(name="attention_dropout", default=LEFT_OUT, null=LEFT_OUT, most=1.0, positive=False),
    Switch(name="use_cache", default=LEFT_OUT),
    Tokens(name="bos_token_id", default=LEFT_OUT, null=None),
    Tokens(name="eos_token_id", default=LEFT_OUT, null=None, several=True),
    Tokens(name="pad_token_id", default=LEFT_OUT, null=None),
)
ATTENTION_BIAS: Final = Switch(name="attention_bias", default=False)
MLP_BIAS: Final = Switch(name="mlp_bias", default=False)
WINDOWS: Final[tuple[Field, ...]] = (
    Switch(name="use_sliding_window", default=False),
    Size(name="sliding_window", default=4096, null=None),
    Size(name="max_window_layers", default=28, least=0),
    Words(name="layer_types", default=LEFT_OUT, null=LEFT_OUT),
)
"""The fields of Qwen's attention windows."""
_LATENT: Final[tuple[Field, ...]] = (
    key_heads(None),
    Size(name="q_lora_rank", default=1536, null=None),
    Size(name="kv_lora_rank"),
    Size(name="qk_nope_head_dim"),
    Size(name="qk_rope_head_dim"),
    Size(name="v_head_dim"),
    ATTENTION_BIAS,
    Size(name="moe_intermediate_size"),
    Size(name="n_routed_experts", most=_MOST_EXPERTS, aliases=EXPERT_COUNTS),
    Size(name="moe_layer_freq", default=1, computed=(1,)),
    Size(name="num_nextn_predict_layers", default=0, null=0, least=0, most=_MOST_LAYERS, aliases=("num_mtp_layers",)),
    Switch(name="output_router_logits", default=LEFT_OUT),
)
"""The fields of latent attention and experts that the families of DeepSeek declare alike."""


def shared_experts(default: int) -> Field:
    """The number of shared experts; DeepSeek's own code takes null for none."""
    return Size(name="n_shared_experts", default=default, null=0, least=0, most=_MOST_EXPERTS)


def dense_layers(default: int) -> Field:
    """The number of layers with one MLP, which come first."""
    return Size(name="first_k_dense_replace", default=default, null=DEFAULT, least=0)


def grouped_fields(*fields: Field, whole_heads: bool) -> ConfigFields:
    """The fields of a dense family with grouped attention.

    Args:
        fields: those that families declare differently.
        whole_heads: whether transformers refuses heads that do not divide the hidden width.
    """
    relations = [
        _key_heads_divide,
        _pairs_in_a_head,
        _rotary_type,
        _tokens_in_the_vocabulary,
        _a_layer_type_for_every_layer,
    ]
    return ConfigFields((*_COMMON, *fields), (*([_heads_divide_the_width] if whole_heads else []), *relations))


def latent_fields(*fields: Field, routing: Callable[[Config], Routing], whole_heads: bool) -> ConfigFields:
    """The fields of a family with latent attention and routed experts.

    Args:
        fields: those that families declare differently.
        routing: reads the routing from a config.json.
        whole_heads: whether transformers refuses heads that do not divide the hidden width.
    """
    relations = [
        _key_heads_divide,
        _pairs_in_the_rotary_part,
        _rotary_type,
        _tokens_in_the_vocabulary,
        _groups_of_experts,
    ]
    return ConfigFields(
        (*_COMMON, *_LATENT, *fields),
        (
            *([_heads_divide_the_width] if whole_heads else []),
            *relations,
            lambda config: _enough_experts(routing(config), config),
        ),
    )


def _heads_divide_the_width(config: Config) -> None:
    _check_divides("num_attention_heads", "hidden_size", config, why="all heads have the same width")


def _key_heads_divide(config: Config) -> None:
    why = "every head of keys serves the same number of heads of queries"
    _check_divides("num_key_value_heads", "num_attention_heads", config, why=why)


def _groups_of_experts(config: Config) -> None:
    """The groups divide the experts, and no more groups are chosen than there are."""
    _check_divides("n_group", "n_routed_experts", config, why="all routing groups have the same number of experts")
    _check_at_most("topk_group", "n_group", config, why="a token's experts are chosen in topk_group of n_group groups")
    _check_at_most("num_experts_per_tok", "n_routed_experts", config, why="a token is routed to different experts")


def _check_divides(part: str, whole: str, config: Config, *, why: str) -> None:
    if config[whole] % config[part]:
        raise contradiction(f"{part} does not divide {whole}", _some(config, part, whole), fix=why)


def _check_at_most(small: str, large: str, config: Config, *, why: str) -> None:
    if config[small] > config[large]:
        raise contradiction(f"{small} exceeds {large}", _some(config, small, large), fix=why)


def _some(config: Config, *names: str) -> Config:
    return {name: config[name] for name in names if name in config}


def with_key_heads(config: Config) -> Config:
    """A config.json of latent attention in the form transformers' modules compute: with keys for every head of queries.

    DeepSeek's own code does not read `num_key_value_heads`; transformers would repeat the keys.
    """
    return {**config, "num_key_value_heads": config["num_attention_heads"]}


def _pairs_in_a_head(config: Config) -> None:
    if config["head_dim"] % 2:
        names = ("head_dim", "hidden_size", "num_attention_heads")
        raise contradiction("the width of a head is odd", _some(config, *names), fix="rotary embeddings rotate pairs")


def _pairs_in_the_rotary_part(config: Config) -> None:
    if config["qk_rope_head_dim"] % 2:
        names = ("qk_rope_head_dim",)
        raise contradiction("the rotary width is odd", _some(config, *names), fix="rotary embeddings rotate pairs")


def _rotary_type(config: Config) -> None:
    for name in ("rope_parameters", "rope_scaling"):
        section = config.get(name) or {}
        kind = section.get("rope_type", section.get("type", ROTARY_TYPES[0]))
        if kind not in ROTARY_TYPES:
            fix = "supported: " + ", ".join(ROTARY_TYPES)
            raise contradiction("the rotary embedding is of an unknown type", {f"{name}.rope_type": kind}, fix=fix)
        if kind in {"default", "longrope"}:
            continue
        factor = section.get("factor")
        if not Number(name="factor", least=1.0).accepts(factor):
            fields = {f"{name}.rope_type": kind, f"{name}.factor": factor}
            raise contradiction("the rotary embedding has no usable factor", fields, fix="write a number from 1 on")


def _tokens_in_the_vocabulary(config: Config) -> None:
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = config.get(name)
        tokens = value if isinstance(value, list) else [] if value is None else [value]
        if any(token >= config["vocab_size"] for token in tokens):
            raise contradiction(
                "a token is outside the vocabulary", _some(config, name, "vocab_size"), fix="tokens count from 0"
            )


def _a_layer_type_for_every_layer(config: Config) -> None:
    kinds, layers = config.get("layer_types"), config["num_hidden_layers"]
    if kinds is None:
        return
    unknown = next((kind for kind in kinds if kind not in LAYER_TYPES), None)
    if unknown is not None:
        fix = "supported: " + ", ".join(LAYER_TYPES)
        raise contradiction("a layer has an unknown type", {"layer_types": unknown}, fix=fix)
    if len(kinds) != layers:
        lengths = {"layer_types": f"{len(kinds)} types", "num_hidden_layers": layers}
        raise contradiction("layer_types does not have one type per layer", lengths, fix="name every layer's")
    windowed = config.get("use_sliding_window") and config.get("sliding_window") is not None
    if LAYER_TYPES[1] in kinds and not windowed:
        raise contradiction(
            "layers have a window of no width",
            {"layer_types": LAYER_TYPES[1]} | dict(_some(config, "use_sliding_window", "sliding_window")),
            fix="a window needs use_sliding_window and sliding_window",
        )


def _enough_experts(routing: Routing, config: Config) -> None:
    """The chosen groups have the experts of a token."""
    each = routing.experts // routing.groups
    if routing.top_k > each * routing.top_groups:
        raise contradiction(
            "num_experts_per_tok exceeds the experts of the chosen groups",
            _some(config, "num_experts_per_tok", "topk_group", "n_group", "n_routed_experts"),
            fix=f"topk_group groups of {each} experts have {each * routing.top_groups}",
        )
