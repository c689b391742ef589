"""Qwen3, dense: DeepSeek-R1-0528-Qwen3-8B. Llama with per-head RMS norms of queries and keys (arXiv 2505.09388)."""

from quantlab.architectures.architecture import Architecture, Dimensions
from quantlab.architectures.config import Config
from quantlab.architectures.layer import GroupedAttention, HeadNorms
from quantlab.architectures.rotary import with_attention_factor
from quantlab.architectures.rules import GROUPED, grouped_dimensions, head_norms, qwen_window

_NORMS = HeadNorms()


def _dimensions(config: Config) -> Dimensions:
    return grouped_dimensions(config, qkv_bias=bool(config.get("attention_bias")), head=128)


QWEN3 = Architecture(
    "qwen3",
    "Qwen3ForCausalLM",
    GROUPED + head_norms(_NORMS),
    _dimensions,
    GroupedAttention(head_norms=_NORMS, window=qwen_window),
    for_transformers=with_attention_factor,
)
