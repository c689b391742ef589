"""Kernels of a fused decode step on the CPU; implements the protocol `Kernels`."""

import torch
from torch import Tensor

from quantlab.architectures.layer import Routing
from quantlab.runtime.decoding.kernel_interface import CachePosition, Latents, Router, RowNorm
from quantlab.runtime.native import kernels


def norm_heads(x: Tensor, norm: RowNorm) -> Tensor:
    """See `Kernels.norm_heads`."""
    return kernels.norm(x.reshape(-1, len(norm.weight)), norm.weight, norm.epsilon).view(x.shape)


def attend(
    q: Tensor, k: Tensor, v: Tensor, cache_position: CachePosition, keys: Tensor, values: Tensor, scaling: float
) -> Tensor:
    """See `Kernels.attend`."""
    shape = (keys.shape[0], -1, keys.shape[3])
    query = torch.empty(q.shape, dtype=q.dtype).view(shape)
    kernels.turn(q.view(shape), cache_position, query)
    kernels.turn(k.view(shape), cache_position, keys)
    kernels.put(v.view(shape), cache_position, values)
    return kernels.grouped_attention(query, keys, values, cache_position, scaling=scaling).flatten(1)


def write_latents(
    kv: Tensor,
    norm: RowNorm,
    cache_position: CachePosition,
    cache: Latents,
    q_a: Tensor | None = None,
    q_norm: RowNorm | None = None,
) -> Tensor | None:
    """See `Kernels.write_latents`."""
    width, pairs = cache.latents.shape[3], cache.pairs
    kernels.put_norm(kv[:, :width], norm.weight, norm.epsilon, cache_position, cache.latents)
    kernels.turn(kv[:, None, width:], cache_position, cache.rotary, in_pairs=pairs.projected, out_in_pairs=pairs.cached)
    return None if q_a is None or q_norm is None else kernels.norm(q_a, q_norm.weight, q_norm.epsilon)


def attend_absorbed(q: Tensor, weight: Tensor, cache_position: CachePosition, cache: Latents, scaling: float) -> Tensor:
    """See `Kernels.attend_absorbed`; applies the rotary embedding to q in place."""
    rotary = q[..., q.shape[2] - cache.rotary.shape[3] :]
    kernels.turn(rotary, cache_position, rotary, in_pairs=cache.pairs.projected, out_in_pairs=cache.pairs.cached)
    tensors = (q.unsqueeze(2), cache.latents, cache.rotary, weight)
    return kernels.latent_attention(*tensors, scaling=scaling, cache_position=cache_position).flatten(1)


def router(weight: Tensor, bias: Tensor | None, routing: Routing) -> Router:
    """See `Kernels.router`."""
    added = None if bias is None else bias.float()
    return lambda x: kernels.choose(x, weight, added, routing)


def add(x: Tensor, y: Tensor) -> Tensor:
    """x + y [B, H], written to x."""
    return kernels.add(x, y)
