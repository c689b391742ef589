"""Attention: multi-head latent attention (MLA) without expanding its cache, and torch's fused kernel otherwise.

MLA caches one latent vector and one rotary key per token. At every step, transformers multiplies the whole cache by
kv_b to get the keys and values of every head. For one new token this is S times the work of the token itself. The
products can be reordered. Let W_k and W_v be the rows of kv_b for a head's keys and values, and c the latents:

    q . (W_k c)  =  (q W_k) . c          sum_s p_s (W_v c_s)  =  W_v (sum_s p_s c_s)

The query is projected to the latent space, all heads attend to the same vectors, and the result is multiplied by W_v
("weight absorption", DeepSeek-V2, arXiv:2405.04434). No tensor of the size cache x heads exists. For many new tokens,
expanding the cache once is cheaper, because they share the expansion.

transformers calls `expand_kv` to expand the cache. `pass_latents_through` replaces this method on the instance, so that
the attention function below receives the latents and rotary keys unchanged and chooses the cheaper order.

The fused kernel of `scaled_dot_product_attention` requires queries, keys and values of one head width; MLA's values
have 128 of 192 (or 64 of 96). Values are therefore padded with zeros to the width of the queries, and the output is
cut.

Legend: B sequences, H heads, T new tokens, S tokens in the cache, L latent width, N width of a head's keys without the
rotary part, V width of a head's values, R width of the rotary part.
"""

from typing import Final

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import is_flash_attn_2_available

from quantlab.architectures.layer import LatentAttention
from quantlab.errors import DeviceError
from quantlab.runtime.modules.linear import DenseLinear
from quantlab.runtime.native import kernels
from quantlab.runtime.native.library import library

LATENT_SDPA: Final = "quantlab_latent_sdpa"
IMPLEMENTATIONS: Final = (LATENT_SDPA, "sdpa", "eager", "flash_attention_2")
"""The implementation of this file, and those of transformers for comparison."""


def register(implementation: str) -> None:
    """Register the implementation of this file with transformers under the name `LATENT_SDPA`.

    Args:
        implementation: the one that a model is about to use.

    Raises:
        DeviceError: `implementation` is not in `IMPLEMENTATIONS` or not installed.
    """
    missing = implementation == "flash_attention_2" and not is_flash_attn_2_available()
    if missing or implementation not in IMPLEMENTATIONS:
        raise DeviceError(
            "the attention implementation is not available",
            where=f"attention {implementation}",
            found="the package flash-attn, with CUDA, is not installed" if missing else "an unknown name",
            fix="use one of " + ", ".join(IMPLEMENTATIONS[:3]),
        )
    AttentionInterface.register(LATENT_SDPA, latent_sdpa)
    AttentionMaskInterface.register(LATENT_SDPA, sdpa_mask)


def pass_latents_through(module: nn.Module) -> None:
    """Make a latent attention module pass its latents to the attention function unexpanded.

    The module stays unchanged if `LATENT_UP` is not a dense matrix or if the attention implementation is not that of
    this file.
    """
    up = module.get_submodule(LatentAttention.LATENT_UP)
    if not hasattr(type(module), "expand_kv") or module.config._attn_implementation != LATENT_SDPA:  # type: ignore[union-attr]
        return
    if isinstance(up, DenseLinear) and up.bias is None:
        module.expand_kv = _latents_unchanged


def passes_latents(module: nn.Module) -> bool:
    """Whether `pass_latents_through` changed an attention module."""
    return getattr(module, "expand_kv", None) is _latents_unchanged


def _latents_unchanged(latents: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
    """Replacement of `expand_kv`: returns latents [B, 1, S, L] and rotary keys [B, 1, S, R] unchanged."""
    return latents, rotary


def latent_sdpa(  # type: ignore[no-untyped-def]  # noqa: ANN201
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options,  # noqa: ANN003 - passed by transformers' attention modules
):
    """Attention with the signature that transformers calls.

    Query [B, H, T, D], key [B, H, S, D] and value [B, H, S, V] give [B, T, H, V]. After `pass_latents_through(module)`,
    key and value are the latents [B, 1, S, L] and rotary keys [B, 1, S, R]. The second result, the attention weights,
    is None.
    """
    if passes_latents(module):
        weight = module.get_parameter(f"{LatentAttention.LATENT_UP}.weight").view(query.shape[1], -1, key.shape[3])
        if _absorbing_is_cheaper(query, key, weight, attention_mask):
            return absorbed(query, key, value, weight, mask=attention_mask, scaling=options["scaling"]), None
        key, value = type(module).expand_kv(module, key, value)  # type: ignore[attr-defined]
    width = value.shape[-1]
    if (
        query.shape[2] == 1
    ):  # one new token: the fused kernel has no tiles to distribute and is slower than two products
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    padded = torch.nn.functional.pad(value, (0, query.shape[-1] - width))
    output, weights = sdpa_attention_forward(module, query, key, padded, attention_mask, **options)
    return output[..., :width], weights


def _absorbing_is_cheaper(query: Tensor, latents: Tensor, weight: Tensor, mask: Tensor | None) -> bool:
    """Whether attending to the latents takes fewer multiplications than expanding them.

    False without a mask, unless T = 1.
    """
    new, cached = query.shape[2], latents.shape[2]
    if new > 1 and mask is None:
        return False  # no mask means a causal mask, which `absorbed` does not apply
    rows, width = weight.shape[1:]
    return new * (rows * width + cached * (2 * width - rows)) <= cached * rows * width or new == 1


def absorbed(
    query: Tensor, latents: Tensor, rotary: Tensor, weight: Tensor, *, mask: Tensor | None, scaling: float
) -> Tensor:
    """Attention of all heads to the latents, with the weight of kv_b absorbed into query and output.

    Args:
        query: [B, H, T, N + R].
        latents: [B, 1, S, L].
        rotary: [B, 1, S, R].
        weight: weight of kv_b, [H, N + V, L].
        mask: [B or 1, 1, T, S], boolean (True: attend) or added to the scores; None if no token is masked.
        scaling: factor of the scores.

    Returns:
        [B, T, H, V].
    """
    batch, heads, new, width = query.shape
    native = query.device.type == "cpu" and query.dtype != torch.float32 and query.dtype == weight.dtype
    if new == 1 and native and library() is not None:
        added = None if mask is None else _added(mask, latents.shape)
        tensors = (query.contiguous(), latents.contiguous(), rotary.contiguous(), weight)
        return kernels.latent_attention(*tensors, mask=added, scaling=scaling)
    nope = width - rotary.shape[3]
    keys, values = weight[:, :nope], weight[:, nope:]
    by_head = query[..., :nope].transpose(0, 1).reshape(heads, batch * new, nope)
    q_latent = torch.bmm(by_head, keys).view(heads, batch, new, -1).transpose(0, 1).reshape(batch, heads * new, -1)
    q_rotary = query[..., nope:].reshape(batch, heads * new, -1)
    cached, turned = latents.squeeze(1), rotary.squeeze(1)
    scores = torch.baddbmm(torch.bmm(q_rotary, turned.mT), q_latent, cached.mT).float().mul_(scaling)
    scores = scores.view(batch, heads, new, -1)
    if mask is not None:
        if mask.dtype == torch.bool:
            scores.masked_fill_(~mask, torch.finfo(torch.float32).min)
        else:
            scores += mask
    weights = scores.softmax(dim=-1).to(query.dtype).view(batch, heads * new, -1)
    seen = torch.bmm(weights, cached).view(batch, heads, new, -1).transpose(0, 1).reshape(heads, batch * new, -1)
    return torch.bmm(seen, values.mT).view(heads, batch, new, -1).permute(1, 2, 0, 3).contiguous()


def _added(mask: Tensor, shape: torch.Size) -> Tensor:
    """A boolean or additive mask [B or 1, 1, 1, S] as an additive float32 mask [B, S].

    `shape` is the shape of the latents, [B, 1, S, L].
    """
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=torch.float32).masked_fill_(~mask, torch.finfo(torch.float32).min)
    return mask.to(torch.float32).expand(shape[0], 1, 1, shape[2]).reshape(shape[0], shape[2]).contiguous()
