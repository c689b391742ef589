"""Llama: DeepSeek-LLM, DeepSeek-Coder, and the distilled R1 models on Llama."""

from quantlab.architectures.architecture import Architecture, Dimensions
from quantlab.architectures.config import Config
from quantlab.architectures.layer import GroupedAttention
from quantlab.architectures.rules import GROUPED, grouped_dimensions


def _dimensions(config: Config) -> Dimensions:
    attention, mlp = (bool(config.get(field)) for field in ("attention_bias", "mlp_bias"))
    return grouped_dimensions(config, qkv_bias=attention, mlp_bias=mlp)


LLAMA = Architecture("llama", "LlamaForCausalLM", GROUPED, _dimensions, GroupedAttention())
