"""Launches of the CUDA kernels of a fused decode step; implements the protocol `Kernels`."""

from typing import Final

import torch
from torch import Tensor

from quantlab.architectures.layer import Routing
from quantlab.runtime.cuda import attend as attend_kernels
from quantlab.runtime.cuda import choose as choose_kernels
from quantlab.runtime.cuda.banks import rms_norm
from quantlab.runtime.cuda.guard import hash_in_order, on_its_device
from quantlab.runtime.cuda.launch import chained, chip, power
from quantlab.runtime.decoding.kernel_interface import CachePosition, Latents, Router, RowNorm

hash_in_order(attend_kernels, choose_kernels)

LOG2_E: Final = 1.4426950408889634
MOST_TOKENS: Final = 64
"""Token limit of the router kernel, which reads the router's weight once per token.

Above it these reads cost more than the saved launches.
"""


def norm_heads(x: Tensor, norm: RowNorm) -> Tensor:
    """See `Kernels.norm_heads`."""
    return rms_norm(x.view(x.shape[0], -1, len(norm.weight)), norm.weight, norm.epsilon).view(x.shape)


@on_its_device
def attend(
    q: Tensor, k: Tensor, v: Tensor, cache_position: CachePosition, keys: Tensor, values: Tensor, scaling: float
) -> Tensor:
    """See `Kernels.attend` and the kernel `attend.attend`."""
    batch, key_heads, length, width = keys.shape
    per_key = q.shape[1] // (key_heads * width)
    rows, wide, high = batch * key_heads, max(power(width), 16), max(power(per_key), 16)
    shares = _shares(rows, length, 64, q.device)
    out = torch.empty(batch, q.shape[1], dtype=q.dtype, device=q.device)
    assert rows <= cache_position.arrived.shape[0], "a counter for every sequence and head"
    attend_kernels.attend[(rows, shares)](
        q, k, v, q.stride(0), k.stride(0), v.stride(0), cache_position.cos, cache_position.sin, cache_position.cos.stride(0), cache_position.index,
        cache_position.padding, keys, values, out, _partial(rows, shares, high, wide, q.device), cache_position.arrived,
        length, shares, scaling * LOG2_E,
        PER_KEY=per_key, KEY_HEADS=key_heads, D=width, HALF=max(power(width // 2), 16), WIDTH=wide, BH=high, BS=64,
        MOST=power(shares), num_warps=4, num_stages=2, **chained(q),
    )  # fmt: skip
    return out


@on_its_device
def write_latents(
    kv: Tensor,
    norm: RowNorm,
    cache_position: CachePosition,
    cache: Latents,
    q_a: Tensor | None = None,
    q_norm: RowNorm | None = None,
) -> Tensor | None:
    """See `Kernels.write_latents`."""
    batch, _, length, width = cache.latents.shape
    turned, columns = cache.rotary.shape[3], 0 if q_a is None else q_a.shape[1]
    q_out = None if q_a is None else torch.empty(batch, columns, dtype=kv.dtype, device=kv.device)
    read, by, written = (kv, norm, kv) if q_a is None or q_norm is None or q_out is None else (q_a, q_norm, q_out)
    attend_kernels.write_latents[(batch, 1 if q_a is None else 2)](
        kv, kv.stride(0), norm.weight, norm.epsilon, read, read.stride(0), by.weight, by.epsilon, written, columns,
        cache_position.cos, cache_position.sin, cache_position.cos.stride(0), cache_position.index, cache.latents, cache.rotary, length,
        L=width, R=turned, WIDTH=power(width), HALF=power(turned // 2), Q_WIDTH=power(columns),
        IN_PAIRS=cache.pairs.projected, OUT_PAIRS=cache.pairs.cached, num_warps=4, **chained(kv),
    )  # fmt: skip
    return q_out


@on_its_device
def attend_latents(
    q_latent: Tensor, q: Tensor, cache_position: CachePosition, cache: Latents, scaling: float
) -> Tensor:
    """Attention of all heads of one new token per sequence to the cached latents; kernel `attend.attend_latents`.

    Args:
        q_latent: [H, B, L].
        q: [B, H, n], whose last R elements get the rotary embedding; rows need not be contiguous.
        cache_position: cache position of the new tokens.
        cache: must already contain the latents of the new tokens.
        scaling: factor of the attention scores.

    Returns:
        [H, B, L], weighted sums of latents.
    """
    heads, batch, width = q_latent.shape
    length, turned = cache.rotary.shape[2:]
    high = 16
    rows, wide = batch * -(-heads // high), max(power(width), 16)
    shares = _shares(rows, length, 32, q.device)
    out = torch.empty_like(q_latent)
    assert rows <= cache_position.arrived.shape[0], "a counter for every sequence and block of heads"
    attend_kernels.attend_latents[(rows, shares)](
        q_latent, q_latent.stride(0), q_latent.stride(1), q, q.stride(0), q.shape[2],
        cache_position.cos, cache_position.sin, cache_position.cos.stride(0), cache_position.index, cache_position.padding, cache.latents, cache.rotary,
        out, out.stride(0), out.stride(1), _partial(rows, shares, high, wide, q.device), cache_position.arrived,
        length, shares, scaling * LOG2_E,
        HEADS=heads, L=width, R=turned, WIDTH=wide, HALF=max(power(turned // 2), 16), BH=high, BS=32,
        IN_PAIRS=cache.pairs.projected, OUT_PAIRS=cache.pairs.cached, MOST=power(shares), num_warps=8, num_stages=2, **chained(q),
    )  # fmt: skip
    return out


def attend_absorbed(q: Tensor, weight: Tensor, cache_position: CachePosition, cache: Latents, scaling: float) -> Tensor:
    """See `Kernels.attend_absorbed`; runs `attend_latents` between the two products with kv_b."""
    nope = q.shape[2] - cache.rotary.shape[3]
    q_latent = torch.bmm(q[..., :nope].transpose(0, 1), weight[:, :nope])
    seen = torch.bmm(attend_latents(q_latent, q, cache_position, cache, scaling), weight[:, nope:].mT)
    return seen.transpose(0, 1).reshape(q.shape[0], -1)


def router(weight: Tensor, bias: Tensor | None, routing: Routing) -> Router:
    """See `Kernels.router`; x [T, H] has at most `MOST_TOKENS` tokens."""
    arrived = torch.zeros(MOST_TOKENS, dtype=torch.int32, device=weight.device)
    return lambda x: choose(x, weight, bias, routing, arrived)


def add(x: Tensor, y: Tensor) -> Tensor:
    """x + y [B, H]."""
    return x + y


def _shares(rows: int, length: int, block: int, device: torch.device) -> int:
    """Number of splits of the cached tokens.

    Aims at two programs per multiprocessor and gives every split at least one block of tokens.
    """
    return min(max(2 * chip(device).multiprocessors // rows, 1), -(-length // block))


def _partial(rows: int, shares: int, high: int, wide: int, device: torch.device) -> Tensor:
    return torch.empty(rows * shares * high * (wide + 2) if shares > 1 else 0, dtype=torch.float32, device=device)


@on_its_device
def choose(x: Tensor, weight: Tensor, bias: Tensor | None, routing: Routing, arrived: Tensor) -> tuple[Tensor, Tensor]:
    """Choose k experts for each token of x [T, H] with the router's weight [E, H] and bias [E].

    Args:
        x, weight, bias: activations and the router's parameters.
        routing: scoring, groups and number of experts per token.
        arrived: [>= T] int32 zeros, one counter per token.

    Returns:
        Indices of the experts [T, k] int64 and their weights [T, k] float32.
    """
    tokens, hidden = x.shape
    experts = weight.shape[0]
    index = torch.empty(tokens, routing.top_k, dtype=torch.int64, device=x.device)
    weights = torch.empty(tokens, routing.top_k, dtype=torch.float32, device=x.device)
    logits = torch.empty(tokens, experts, dtype=torch.float32, device=x.device)
    each = max(power(experts // chip(x.device).multiprocessors), 1)
    assert tokens <= arrived.shape[0], "a counter for every token"
    choose_kernels.choose[(tokens, -(-experts // each))](
        x, weight, logits if bias is None else bias, logits, index, weights, arrived, hidden, routing.scaling,
        E=experts, GROUPS=routing.groups, TOP_GROUPS=routing.top_groups, TOP_K=routing.top_k,
        SIGMOID=routing.scoring == "sigmoid", NORMED=routing.normalised,
        GW=power(routing.groups), PW=power(experts // routing.groups), KW=power(routing.top_k), BE=each,
        BH=min(power(hidden), 1024), num_warps=4, **chained(x),
    )  # fmt: skip
    return index, weights
