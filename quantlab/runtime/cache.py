"""How transformers' models are handed a cache: its releases from 5.24 on call the argument otherwise."""

import inspect
from functools import cache
from typing import Any

from transformers import Cache, LlamaForCausalLM


def cached(tokens: Cache) -> dict[str, Any]:
    """The arguments that make a model read and extend a cache."""
    return {_argument(): tokens, "use_cache": True}


@cache
def _argument() -> str:
    return "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
