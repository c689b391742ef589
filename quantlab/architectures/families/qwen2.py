"""Qwen2: the distilled R1 models on Qwen2.5. Its projections of queries, keys and values always have biases, no other has.

Its modules do not read `attention_bias`, which some of its configs have.
"""

from quantlab.architectures.architecture import Architecture, Dimensions
from quantlab.architectures.fields import ReadConfig
from quantlab.architectures.known_fields import WINDOWS, grouped_fields, head_width, key_heads
from quantlab.architectures.layer import GroupedAttention
from quantlab.architectures.rules import GROUPED, grouped_dimensions, qwen_window


def _dimensions(config: ReadConfig) -> Dimensions:
    return grouped_dimensions(config, qkv_bias=True, o_bias=False)


QWEN2 = Architecture(
    "qwen2",
    "Qwen2ForCausalLM",
    grouped_fields(key_heads(32), head_width(None), *WINDOWS, whole_heads=False),
    GROUPED,
    _dimensions,
    GroupedAttention(window=qwen_window),
)
