"""Attention that stays on torch's fused CPU kernel when values are narrower than queries, as in MLA.

`scaled_dot_product_attention` takes its fused path only where queries, keys and values have heads of one width; MLA's
values have 128 of 192 (64 of 96). Values padded with zeros to the width of the queries give the same output with zeros
behind it, which are cut off again.
"""

from typing import Final

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PADDED_SDPA: Final = "quantlab_padded_sdpa"


def register() -> None:
    """Make the implementation known to transformers under the name `PADDED_SDPA`."""
    AttentionInterface.register(PADDED_SDPA, padded_sdpa)
    AttentionMaskInterface.register(PADDED_SDPA, sdpa_mask)


def padded_sdpa(  # type: ignore[no-untyped-def]  # noqa: ANN201
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options,  # noqa: ANN003 - what transformers' attention modules pass on
):
    """transformers' attention call: query, key [B, H, T, D], value [B, H, S, V] -> [B, T, H, V] and no weights."""
    width = value.shape[-1]
    if query.shape[2] == 1:  # one new token: the fused kernel has nothing to share out and is slower than two products
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    padded = torch.nn.functional.pad(value, (0, query.shape[-1] - width))
    output, weights = sdpa_attention_forward(module, query, key, padded, attention_mask, **options)
    return output[..., :width], weights
