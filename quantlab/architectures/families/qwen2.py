"""Qwen2: the distilled R1 models on Qwen2.5. Its projections of queries, keys and values always have biases."""

from quantlab.architectures.architecture import Architecture, Dimensions
from quantlab.architectures.config import Config
from quantlab.architectures.layer import GroupedAttention
from quantlab.architectures.rules import GROUPED, grouped_dimensions, qwen_window


def _dimensions(config: Config) -> Dimensions:
    return grouped_dimensions(config, qkv_bias=True)


QWEN2 = Architecture("qwen2", "Qwen2ForCausalLM", GROUPED, _dimensions, GroupedAttention(window=qwen_window))
