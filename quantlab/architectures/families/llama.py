"""Llama: DeepSeek-LLM, DeepSeek-Coder, and the distilled R1 models on Llama."""

from quantlab.architectures.architecture import Architecture, Dimensions
from quantlab.architectures.fields import ReadConfig
from quantlab.architectures.known_fields import ATTENTION_BIAS, MLP_BIAS, grouped_fields, head_width, key_heads
from quantlab.architectures.layer import GroupedAttention
from quantlab.architectures.rules import GROUPED, grouped_dimensions


def _dimensions(config: ReadConfig) -> Dimensions:
    attention, mlp = config["attention_bias"], config["mlp_bias"]
    return grouped_dimensions(config, qkv_bias=attention, o_bias=attention, mlp_bias=mlp)


LLAMA = Architecture(
    "llama",
    "LlamaForCausalLM",
    grouped_fields(key_heads(None), head_width(None), ATTENTION_BIAS, MLP_BIAS, whole_heads=True),
    GROUPED,
    _dimensions,
    GroupedAttention(),
)
