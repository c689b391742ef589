"""Keyword arguments for a KV cache, whose name changed in transformers 5.24."""

import inspect
from functools import cache
from typing import Any

from transformers import Cache, LlamaForCausalLM


def cache_arguments(tokens: Cache) -> dict[str, Any]:
    """Keyword arguments that make a transformers model read and extend a KV cache."""
    return {_argument(): tokens, "use_cache": True}


@cache
def _argument() -> str:
    return "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
