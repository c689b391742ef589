"""Scaled rotary embeddings as a config.json describes them, in the words that transformers reads."""

import math

from quantlab.architectures.config import Config, number_of


def with_attention_factor(config: Config) -> Config:
    """The config with YaRN's `attn_factor` written as `attention_factor`.

    cos and sin of YaRN (arXiv 2309.00071, section 3.4) are multiplied by 0.1 ln(factor) + 1. vLLM, SGLang and llama.cpp multiply
    that by `attn_factor`; transformers does not read the field and takes the whole product from `attention_factor`.
    DeepSeek-R1-0528-Qwen3-8B has a factor of 4 and the reciprocal of 0.1 ln 4 + 1: its cos and sin are not scaled.

    Raises:
        CheckpointError: `factor` or `attn_factor` is no number.
    """
    field = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    scaling = config.get(field)
    if not isinstance(scaling, dict) or "yarn" not in (scaling.get("rope_type"), scaling.get("type")):
        return config
    if "attn_factor" not in scaling or "attention_factor" in scaling:
        return config
    factor = number_of(scaling, "factor", default=1.0)
    scale = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
    return {**config, field: {**scaling, "attention_factor": scale * number_of(scaling, "attn_factor", default=1.0)}}
