"""Rewrites scaled rotary embeddings of a config.json in the fields that transformers reads."""

import math

from quantlab.architectures.config import Config, number_of


def with_attention_factor(config: Config) -> Config:
    """Rewrite YaRN's `attn_factor` as `attention_factor`.

    YaRN (arXiv 2309.00071, section 3.4) multiplies cos and sin by 0.1 ln(factor) + 1. vLLM, SGLang and llama.cpp also
    multiply by `attn_factor`; transformers ignores that field and reads the whole product from `attention_factor`.
    DeepSeek-R1-0528-Qwen3-8B has factor 4 and `attn_factor` 1 / (0.1 ln 4 + 1), so its cos and sin are not scaled.

    Raises:
        CheckpointError: `factor` or `attn_factor` is not a number.
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
