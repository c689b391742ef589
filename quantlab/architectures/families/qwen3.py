"""Qwen3, dense: DeepSeek-R1-0528-Qwen3-8B. Llama with per-head RMS norms of queries and keys (arXiv 2505.09388)."""

from quantlab.architectures.architecture import Architecture, Dimensions
from quantlab.architectures.fields import ReadConfig
from quantlab.architectures.known_fields import ATTENTION_BIAS, WINDOWS, grouped_fields, head_width, key_heads
from quantlab.architectures.layer import GroupedAttention, HeadNorms
from quantlab.architectures.rotary import with_attention_factor
from quantlab.architectures.rules import GROUPED, grouped_dimensions, head_norms, qwen_window

_NORMS = HeadNorms()


def _dimensions(config: ReadConfig) -> Dimensions:
    return grouped_dimensions(config, qkv_bias=config["attention_bias"], o_bias=config["attention_bias"])


QWEN3 = Architecture(
    "qwen3",
    "Qwen3ForCausalLM",
    grouped_fields(key_heads(32), head_width(128), ATTENTION_BIAS, *WINDOWS, whole_heads=False),
    GROUPED + head_norms(_NORMS),
    _dimensions,
    GroupedAttention(head_norms=_NORMS, window=qwen_window),
    adapted=with_attention_factor,
)
