"""Tensor rules and sizes shared by families: dense layers with grouped attention, MoE layers with latent attention.

Sources: README_WEIGHTS of DeepSeek-V3's release and the indices of the released checkpoints.
"""

from typing import Literal

from quantlab.architectures.architecture import Dimensions, Role, TensorRule
from quantlab.architectures.config import Config, size_of
from quantlab.architectures.fields import ReadConfig
from quantlab.architectures.layer import HeadNorms

_LAYER = "model.layers.{layer}."
_ATTENTION = _LAYER + "self_attn."
Layers = Literal["every", "dense", "moe"]


def _norm(pattern: str, size: str, feeds: str | None, *, needs: str = "") -> TensorRule:
    return TensorRule(pattern + ".weight", "norm", (size,), layers="every", needs=needs, feeds=feeds)


def _attention(
    name: str, shape: tuple[str, str], site: str, *, role: Role = "attention", fused: str | None = None, needs: str = ""
) -> TensorRule:
    splits: Literal["rows", "columns"] = "columns" if name == "o_proj" else "rows"
    feeds = "o" if name in {"v_proj", "kv_b_proj"} else None
    pattern = f"{_ATTENTION}{name}.weight"
    return TensorRule(
        pattern,
        role,
        shape,
        layers="every",
        needs=needs,
        linear=True,
        site=site,
        feeds=feeds,
        fused=fused,
        splits=splits,
    )


def _bias(name: str, size: str, *, needs: str) -> TensorRule:
    feeds = "o" if name == "v_proj" else None
    return TensorRule(f"{_ATTENTION}{name}.bias", "attention", (size,), layers="every", needs=needs, feeds=feeds)


def _mlp(prefix: str, role: Role, width: str, layers: Layers, *, needs: str = "") -> tuple[TensorRule, ...]:
    def rule(
        name: str, shape: tuple[str, str], site: str, fused: str | None, splits: Literal["rows", "columns"]
    ) -> TensorRule:
        pattern, feeds = f"{_LAYER}mlp.{prefix}{name}.weight", "down" if name == "up_proj" else None
        return TensorRule(
            pattern,
            role,
            shape,
            layers=layers,
            needs=needs,
            linear=True,
            site=site,
            feeds=feeds,
            fused=fused,
            splits=splits,
        )

    return (
        rule("gate_proj", (width, "hidden"), "mlp", "gate+up", "rows"),
        rule("up_proj", (width, "hidden"), "mlp", "gate+up", "rows"),
        rule("down_proj", ("hidden", width), "down", None, "columns"),
    )


def _mlp_biases(prefix: str, role: Role, width: str, layers: Layers) -> tuple[TensorRule, ...]:
    def rule(name: str, size: str) -> TensorRule:
        pattern, feeds = f"{_LAYER}mlp.{prefix}{name}.bias", "down" if name == "up_proj" else None
        return TensorRule(pattern, role, (size,), layers=layers, needs="mlp_bias", feeds=feeds)

    return rule("gate_proj", width), rule("up_proj", width), rule("down_proj", "hidden")


_OUTSIDE_THE_LAYERS = (
    TensorRule("model.embed_tokens.weight", "embeddings", ("vocabulary", "hidden")),
    TensorRule("model.norm.weight", "norm", ("hidden",)),
    TensorRule("lm_head.weight", "lm_head", ("vocabulary", "hidden"), needs="!tied"),
)
_LAYER_NORMS = (
    _norm(_LAYER + "input_layernorm", "hidden", "attention"),
    _norm(_LAYER + "post_attention_layernorm", "hidden", "mlp"),
)

GROUPED = (
    *_OUTSIDE_THE_LAYERS,
    *_LAYER_NORMS,
    _attention("q_proj", ("queries", "hidden"), "attention", fused="q+k+v"),
    _attention("k_proj", ("keys", "hidden"), "attention", fused="q+k+v"),
    _attention("v_proj", ("keys", "hidden"), "attention", fused="q+k+v"),
    _attention("o_proj", ("hidden", "queries"), "o"),
    _bias("q_proj", "queries", needs="qkv_bias"),
    _bias("k_proj", "keys", needs="qkv_bias"),
    _bias("v_proj", "keys", needs="qkv_bias"),
    _bias("o_proj", "hidden", needs="o_bias"),
    *_mlp("", "dense_mlp", "intermediate", "dense"),
    *_mlp_biases("", "dense_mlp", "intermediate", "dense"),
)
"""A dense layer with grouped attention; the sizes `qkv_bias`, `o_bias` and `mlp_bias` determine its biases."""

LATENT = (
    *_OUTSIDE_THE_LAYERS,
    *_LAYER_NORMS,
    _attention("q_proj", ("queries", "hidden"), "attention", needs="!q_lora"),
    _attention("q_a_proj", ("q_lora", "hidden"), "attention", fused="q_a+kv_a", needs="q_lora"),
    _attention("kv_a_proj_with_mqa", ("kv_a", "hidden"), "attention", fused="q_a+kv_a"),
    _attention("q_b_proj", ("queries", "q_lora"), "q_latent", needs="q_lora"),
    _attention("kv_b_proj", ("kv_b", "kv_lora"), "kv_latent", role="kv_b"),
    _attention("o_proj", ("hidden", "values"), "o"),
    _bias("q_a_proj", "q_lora", needs="q_a_bias"),
    _bias("kv_a_proj_with_mqa", "kv_a", needs="kv_a_bias"),
    _bias("o_proj", "hidden", needs="o_bias"),
    _norm(_ATTENTION + "q_a_layernorm", "q_lora", "q_latent", needs="q_lora"),
    _norm(_ATTENTION + "kv_a_layernorm", "kv_lora", "kv_latent"),
    TensorRule(_LAYER + "mlp.gate.weight", "router", ("experts", "hidden"), layers="moe", site="mlp"),
    TensorRule(
        _LAYER + "mlp.gate.e_score_correction_bias",
        "router",
        ("experts",),
        layers="moe",
        needs="bias_corrected",
        exact=True,
    ),
    *_mlp("experts.{expert}.", "routed_experts", "moe_intermediate", "moe"),
    *_mlp("shared_experts.", "shared_experts", "shared_intermediate", "moe", needs="shared_intermediate"),
    *_mlp("", "dense_mlp", "intermediate", "dense"),
    *_mlp_biases("shared_experts.", "shared_experts", "shared_intermediate", "moe"),
    *_mlp_biases("", "dense_mlp", "intermediate", "dense"),
)
"""Layers with latent attention, the first ones dense and the rest with experts."""

_COPIES = {"embed_tokens", "shared_head.head"}
"""Parts of a multi-token-prediction layer that it shares with the model."""
MTP = tuple(
    TensorRule(f"{_LAYER}{name}.weight", "mtp", shape, layers="mtp", optional=name in _COPIES)
    for name, shape in (
        ("embed_tokens", ("vocabulary", "hidden")),
        ("enorm", ("hidden",)),
        ("hnorm", ("hidden",)),
        ("eh_proj", ("hidden", "two_hidden")),
        ("shared_head.norm", ("hidden",)),
        ("shared_head.head", ("vocabulary", "hidden")),
    )
)
"""Tensors of a multi-token-prediction layer in addition to those of a decoder layer."""


def head_norms(names: HeadNorms) -> tuple[TensorRule, ...]:
    """The per-head norms of queries and keys. Scales cannot be folded into them, because their outputs are rotated."""
    return tuple(_norm(_ATTENTION + name, "head", None) for name in (names.query, names.key))


def grouped_dimensions(config: ReadConfig, *, qkv_bias: bool, o_bias: bool, mlp_bias: bool = False) -> Dimensions:
    """Sizes of a dense model with grouped attention.

    Args:
        config: config.json with all fields.
        qkv_bias: whether the projections of queries, keys and values have biases.
        o_bias: whether the output projection has one.
        mlp_bias: whether the linears of the mlp have biases.
    """
    layers, head = config["num_hidden_layers"], config["head_dim"]
    return {
        "vocabulary": config["vocab_size"],
        "hidden": config["hidden_size"],
        "layers": layers,
        "first_moe": layers,
        "experts": 0,
        "head": head,
        "queries": config["num_attention_heads"] * head,
        "keys": config["num_key_value_heads"] * head,
        "intermediate": config["intermediate_size"],
        "tied": int(config["tie_word_embeddings"]),
        "qkv_bias": int(qkv_bias),
        "o_bias": int(o_bias),
        "mlp_bias": int(mlp_bias),
    }


def latent_dimensions(config: ReadConfig, *, bias_corrected: bool, mlp_bias: bool = False) -> Dimensions:
    """Sizes of a model with latent attention and experts.

    Args:
        config: config.json with all fields.
        bias_corrected: whether the routers have a bias.
        mlp_bias: whether the linears of shared experts and dense layers have biases.
    """
    hidden, heads, moe = config["hidden_size"], config["num_attention_heads"], config["moe_intermediate_size"]
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    q_lora, bias = config["q_lora_rank"] or 0, config["attention_bias"]
    return {
        "vocabulary": config["vocab_size"],
        "hidden": hidden,
        "two_hidden": 2 * hidden,
        "layers": config["num_hidden_layers"],
        "mtp_layers": config["num_nextn_predict_layers"],
        "first_moe": config["first_k_dense_replace"],
        "experts": config["n_routed_experts"],
        "queries": heads * (nope + rope),
        "q_lora": q_lora,
        "kv_lora": config["kv_lora_rank"],
        "kv_a": config["kv_lora_rank"] + rope,
        "kv_b": heads * (nope + value),
        "values": heads * value,
        "intermediate": config["intermediate_size"],
        "moe_intermediate": moe,
        "shared_intermediate": moe * config["n_shared_experts"],
        "tied": int(config["tie_word_embeddings"]),
        "q_a_bias": int(bias and q_lora > 0),
        "kv_a_bias": int(bias),
        "o_bias": int(bias),
        "bias_corrected": int(bias_corrected),
        "mlp_bias": int(mlp_bias),
    }


def qwen_window(config: Config) -> int | None:
    """Attention window in tokens of the layers from `max_window_layers` on, None if no layer has a window."""
    window = config.get("sliding_window") if config.get("use_sliding_window") else None
    kinds, first = config.get("layer_types"), size_of(config, "max_window_layers", default=28)
    windowed = first < size_of(config, "num_hidden_layers") if kinds is None else "sliding_attention" in kinds
    return window if windowed else None
