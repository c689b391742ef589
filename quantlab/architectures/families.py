"""The DeepSeek families as data. Sources: README_WEIGHTS of DeepSeek-V3's release and the checkpoints' own indices."""

from collections.abc import Mapping
from typing import Any

from quantlab.architectures.architecture import Architecture, Role, TensorRule
from quantlab.errors import CheckpointError

_LAYER = "model.layers.{layer}."
_ATTENTION = _LAYER + "self_attn."


def _linear(pattern: str, role: Role, site: str, *, fused: str | None = None, columns: bool = False, bias: bool = False) -> tuple[TensorRule, ...]:
    splits = "columns" if columns else "rows"
    weight = TensorRule(pattern + ".weight", role, linear=True, site=site, fused=fused, splits=splits)  # type: ignore[arg-type]
    return (weight, TensorRule(pattern + ".bias", role)) if bias else (weight,)


def _mlp(prefix: str, role: Role) -> tuple[TensorRule, ...]:
    return (
        *_linear(prefix + "gate_proj", role, "mlp", fused="gate+up"),
        *_linear(prefix + "up_proj", role, "mlp", fused="gate+up"),
        *_linear(prefix + "down_proj", role, "down", columns=True),
    )


_OUTSIDE_THE_LAYERS = (
    TensorRule("model.embed_tokens.weight", "embeddings"),
    TensorRule("model.norm.weight", "norm"),
    TensorRule("lm_head.weight", "lm_head"),
)
_LAYER_NORMS = (
    TensorRule(_LAYER + "input_layernorm.weight", "norm"),
    TensorRule(_LAYER + "post_attention_layernorm.weight", "norm"),
)

_LLAMA = (
    *_OUTSIDE_THE_LAYERS,
    *_LAYER_NORMS,
    *_linear(_ATTENTION + "q_proj", "attention", "attention", fused="q+k+v", bias=True),
    *_linear(_ATTENTION + "k_proj", "attention", "attention", fused="q+k+v", bias=True),
    *_linear(_ATTENTION + "v_proj", "attention", "attention", fused="q+k+v", bias=True),
    *_linear(_ATTENTION + "o_proj", "attention", "o", columns=True, bias=True),
    *_mlp(_LAYER + "mlp.", "dense_mlp"),
)

_DEEPSEEK = (
    *_OUTSIDE_THE_LAYERS,
    *_LAYER_NORMS,
    *_linear(_ATTENTION + "q_proj", "attention", "attention"),
    *_linear(_ATTENTION + "q_a_proj", "attention", "attention", fused="q_a+kv_a", bias=True),
    *_linear(_ATTENTION + "kv_a_proj_with_mqa", "attention", "attention", fused="q_a+kv_a", bias=True),
    *_linear(_ATTENTION + "q_b_proj", "attention", "q_latent"),
    *_linear(_ATTENTION + "kv_b_proj", "kv_b", "kv_latent"),
    *_linear(_ATTENTION + "o_proj", "attention", "o", columns=True, bias=True),
    TensorRule(_ATTENTION + "q_a_layernorm.weight", "norm"),
    TensorRule(_ATTENTION + "kv_a_layernorm.weight", "norm"),
    TensorRule(_LAYER + "mlp.gate.weight", "router"),
    TensorRule(_LAYER + "mlp.gate.e_score_correction_bias", "router"),
    *_mlp(_LAYER + "mlp.experts.{expert}.", "routed_experts"),
    *_mlp(_LAYER + "mlp.shared_experts.", "shared_experts"),
    *_mlp(_LAYER + "mlp.", "dense_mlp"),
)

_MTP = tuple(
    TensorRule(_LAYER + name, "mtp")
    for name in ("embed_tokens.weight", "enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight", "shared_head.head.weight")
)

ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture("deepseek_v2", "DeepseekV2ForCausalLM", _DEEPSEEK),
    Architecture("deepseek_v3", "DeepseekV3ForCausalLM", _DEEPSEEK + _MTP, mtp=True),
    Architecture("llama", "LlamaForCausalLM", _LLAMA),
    Architecture("qwen2", "Qwen2ForCausalLM", _LLAMA),
)


def detect(config: Mapping[str, Any]) -> Architecture:
    """The family of a config.json.

    Raises:
        CheckpointError: the architecture is none of those quantlab knows.
    """
    classes = config.get("architectures") or []
    for architecture in ARCHITECTURES:
        if architecture.class_name in classes or (not classes and config.get("model_type") == architecture.name):
            return architecture
    raise CheckpointError(
        "the architecture is not supported",
        where="config.json, architectures",
        found=", ".join(map(str, classes)) or repr(config.get("model_type")),
        fix="supported: " + ", ".join(architecture.class_name for architecture in ARCHITECTURES),
    )
