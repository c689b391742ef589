"""Llama: DeepSeek-LLM, DeepSeek-Coder, and the distilled R1 models on Llama."""

from quantlab.architectures.architecture import Architecture, Dimensions
from quantlab.architectures.config import Config
from quantlab.architectures.layer import GroupedAttention
from quantlab.architectures.rules import GROUPED, grouped_dimensions


def _dimensions(config: Config) -> Dimensions:
    return grouped_dimensions(config, qkv_bias=bool(config.get("attention_bias")))


LLAMA = Architecture("llama", "LlamaForCausalLM", GROUPED, _dimensions, GroupedAttention())
