"""Attention of one new token per sequence to a static cache: rotary embedding, cache update and softmax in one launch.

The cached tokens are divided into splits with one program each, so that a small batch fills the GPU (Dao et al. 2023,
"Flash-Decoding for long-context inference"). The number of tokens is known only on the device, so each program computes
its own range, and one captured launch serves every position. The last program of a head to finish merges the splits.

Widths need not be powers of two: HALF, WIDTH and the like are the next powers of two, at least 16; elements beyond the
width load as zero.

Legend: B sequences, S cache positions, H heads, D head dimension, L latent dimension, R rotary dimension.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quantlab.runtime.cuda.rowwise import normalize_row

MASKED: tl.constexpr = tl.constexpr(-1e30)
"""Score of a masked position. It is finite, since the difference of two infinite scores would be NaN."""


@triton.jit
def split_range(position, splits, BS: tl.constexpr):
    """This program's token range [begin, end) of 0 … position inclusive; ranges are multiples of BS long."""
    length = tl.cdiv(tl.cdiv(position + 1, splits), BS) * BS
    begin = tl.program_id(1) * length
    return begin, tl.minimum(begin + length, position + 1)


@triton.jit
def load_pair(base, i, width, mask, PAIRS: tl.constexpr):
    """The two elements of rotary pair i: neighbours where PAIRS, else half the width apart."""
    if PAIRS:
        return tl.load(base + 2 * i, mask=mask, other=0), tl.load(base + 2 * i + 1, mask=mask, other=0)
    else:
        return tl.load(base + i, mask=mask, other=0), tl.load(base + i + width // 2, mask=mask, other=0)


@triton.jit
def store_pair(base, first, second, i, width, mask, PAIRS: tl.constexpr):
    """The inverse of `pair`."""
    if PAIRS:
        tl.store(base + 2 * i, first, mask=mask)
        tl.store(base + 2 * i + 1, second, mask=mask)
    else:
        tl.store(base + i, first, mask=mask)
        tl.store(base + i + width // 2, second, mask=mask)


@triton.jit
def load_angles(cos, sin, i, width):
    """Cosines and sines of the angles of pairs i; zero beyond the width / 2 pairs."""
    valid = i < width // 2
    return tl.load(cos + i, mask=valid, other=0).to(tl.float32), tl.load(sin + i, mask=valid, other=0).to(tl.float32)


@triton.jit
def rotate(first, second, cos, sin):
    """Rotate pairs by angles, computed in float32 and rounded to their own dtype."""
    a = first.to(tl.float32)
    b = second.to(tl.float32)
    return (a * cos - b * sin).to(first.dtype), (b * cos + a * sin).to(first.dtype)


@triton.jit
def softmax_start(BH: tl.constexpr, WIDTH: tl.constexpr):
    """Initial state of an online softmax: running maximum [BH], running sum [BH], accumulator of values [BH, WIDTH]."""
    return tl.full((BH,), MASKED, tl.float32), tl.zeros((BH,), tl.float32), tl.zeros((BH, WIDTH), tl.float32)


@triton.jit
def softmax_update(scores, visible, values, row_max, row_sum, acc):
    """Online softmax (Milakov and Gimelshein 2018, eq. 7): scores [BH, BS] to base 2, values [BS, D], acc [BH, D]."""
    scores = tl.where(visible, scores, MASKED)
    new_max = tl.maximum(row_max, tl.max(scores, axis=1))
    rescale = tl.exp2(row_max - new_max)
    weights = tl.where(visible, tl.exp2(scores - new_max[:, None]), 0.0)
    row_sum = row_sum * rescale + tl.sum(weights, axis=1)
    acc = tl.dot(weights.to(values.dtype), values, acc * rescale[:, None])
    return new_max, row_sum, acc


@triton.jit
def merge_splits(
    row_max, row_sum, acc, out, valid, partial, arrived, splits,
    BH: tl.constexpr, WIDTH: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """Store ``acc / row_sum`` [BH, WIDTH] where `valid`. With MOST > 1, the last program to arrive first merges all.

    out: pointers [BH, WIDTH]; partial: [rows of the grid, splits, BH * (WIDTH + 2)] float32 scratch; arrived: one
    counter for each row of the grid, zero before and after; MOST: a power of two, at least `splits`.
    """
    complete = True
    if MOST > 1:
        size: tl.constexpr = BH * (WIDTH + 2)
        first = partial + tl.program_id(0).to(tl.int64) * splits * size
        h = tl.arange(0, BH)
        offsets = h[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        own = first + tl.program_id(1) * size
        tl.store(own + offsets, acc)
        tl.store(own + BH * WIDTH + h, row_max)
        tl.store(own + BH * (WIDTH + 1) + h, row_sum)
        tl.debug_barrier()
        complete = tl.atomic_add(arrived + tl.program_id(0), 1) == splits - 1
        if complete:
            tl.store(arrived + tl.program_id(0), 0)
            which = tl.arange(0, MOST)
            at = first + which[:, None] * size + BH * WIDTH + h[None, :]
            there = (which < splits)[:, None]
            maxima = tl.load(at, mask=there, other=MASKED, cache_modifier=".cg")
            row_max = tl.max(maxima, axis=0)
            row_sums = tl.load(at + BH, mask=there, other=0, cache_modifier=".cg")
            row_sum = tl.sum(row_sums * tl.exp2(maxima - row_max[None, :]), axis=0)
            acc = tl.zeros((BH, WIDTH), tl.float32)
            for split in tl.range(0, splits, loop_unroll_factor=4):  # loads of different splits overlap
                other = first + split * size
                factor = tl.exp2(tl.load(other + BH * WIDTH + h, cache_modifier=".cg") - row_max)
                acc += tl.load(other + offsets, cache_modifier=".cg") * factor[:, None]
    if complete:
        tl.store(out, (acc / row_sum[:, None]).to(out.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["S", "splits"])
def attend(
    q, k, v, q_row, k_row, v_row, cos, sin, angles, position, padding, keys, values, out, partial, arrived,
    S, splits, scaling,
    PER_KEY: tl.constexpr, KEY_HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr,
    BH: tl.constexpr, BS: tl.constexpr, MOST: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Grouped-query attention: PER_KEY query heads share a key head. The grid is (B * KEY_HEADS, splits).

    q: [B, KEY_HEADS * PER_KEY * D], k, v: [B, KEY_HEADS * D], before rotation; q_row, k_row, v_row: their row strides.
    cos, sin: [B, D / 2], the angles of the pairs; angles: their row stride.
    position: [1] int64, cache position of the new tokens; padding: [B] int64, empty positions at the start of the cache.
    keys, values: [B, KEY_HEADS, S, D], the cache; the new token's are written to it.
    out: [B, KEY_HEADS * PER_KEY * D]; partial, arrived: see `merge_splits`.
    scaling: factor of the scores, times log2(e).
    """
    if CHAINED:
        gdc_wait()
    sequence = (tl.program_id(0) // KEY_HEADS).to(tl.int64)
    head = tl.program_id(0) % KEY_HEADS
    current = tl.load(position).to(tl.int32)
    padded = tl.load(padding + sequence).to(tl.int32)
    begin, end = split_range(current, splits, BS)
    h = tl.arange(0, BH)
    i = tl.arange(0, HALF)
    d = tl.arange(0, WIDTH)
    c, s = load_angles(cos + sequence * angles, sin + sequence * angles, i, D)
    head_mask = (h < PER_KEY)[:, None]
    pair_mask = (i < D // 2)[None, :]
    q_at = q + sequence * q_row + (head * PER_KEY + h)[:, None] * D
    q0, q1 = load_pair(q_at, i[None, :], D, head_mask & pair_mask, False)
    q0, q1 = rotate(q0, q1, c[None, :], s[None, :])
    k_cache = keys + tl.program_id(0).to(tl.int64) * S * D
    v_cache = values + tl.program_id(0).to(tl.int64) * S * D
    if (begin <= current) & (current < end):
        k0, k1 = load_pair(k + sequence * k_row + head * D, i, D, i < D // 2, False)
        k0, k1 = rotate(k0, k1, c, s)
        store_pair(k_cache + current * D, k0, k1, i, D, i < D // 2, False)
        new = tl.load(v + sequence * v_row + head * D + d, mask=d < D, other=0)
        tl.store(v_cache + current * D + d, new, mask=d < D)
        tl.debug_barrier()  # the loop below reads them back
    row_max, row_sum, acc = softmax_start(BH, WIDTH)
    for first in range(begin, end, BS):
        key_position = first + tl.arange(0, BS)
        key_mask = (key_position < end)[:, None]
        k0, k1 = load_pair(k_cache + key_position[:, None] * D, i[None, :], D, key_mask & pair_mask, False)
        scores = tl.dot(q1, tl.trans(k1), tl.dot(q0, tl.trans(k0))) * scaling
        value = tl.load(v_cache + key_position[:, None] * D + d[None, :], mask=key_mask & (d < D)[None, :], other=0)
        visible = ((key_position < end) & (key_position >= padded))[None, :]
        row_max, row_sum, acc = softmax_update(scores, visible, value, row_max, row_sum, acc)
    if CHAINED:
        gdc_launch_dependents()
    out_at = out + (tl.program_id(0).to(tl.int64) * PER_KEY + h)[:, None] * D + d[None, :]
    merge_splits(row_max, row_sum, acc, out_at, head_mask & (d < D)[None, :], partial, arrived, splits, BH, WIDTH, MOST)


@triton.jit(do_not_specialize=["S"])
def write_latents(
    kv, kv_row, weight, epsilon, q_a, q_a_row, q_weight, q_epsilon, q_out, Q, cos, sin, angles, position, latents, rotary,
    S,
    L: tl.constexpr, R: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr, Q_WIDTH: tl.constexpr,
    IN_PAIRS: tl.constexpr, OUT_PAIRS: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Write the new tokens to the cache of latent attention. The grid is (B, 2), or (B, 1) without a query latent.

    kv: [B, L + R] with row stride `kv_row`. Its latent is normalized and written to latents [B, 1, S, L] at `position`;
    its rotary key is rotated and written to rotary [B, 1, S, R].
    q_a: [B, Q] with row stride `q_a_row`, the query latent; it is normalized and written to q_out [B, Q].
    IN_PAIRS, OUT_PAIRS: layout of the rotary pairs in kv and in the cache; see `load_pair`.
    """
    if CHAINED:
        gdc_wait()
    if CHAINED:
        gdc_launch_dependents()
    sequence = tl.program_id(0).to(tl.int64)
    if tl.program_id(1) == 0:
        current = sequence * S + tl.load(position)
        column = tl.arange(0, WIDTH)
        latent = tl.load(kv + sequence * kv_row + column, mask=column < L, other=0)
        factors = tl.load(weight + column, mask=column < L, other=0)
        tl.store(latents + current * L + column, normalize_row(latent, factors, L, epsilon), mask=column < L)
        i = tl.arange(0, HALF)
        c, s = load_angles(cos + sequence * angles, sin + sequence * angles, i, R)
        first, second = load_pair(kv + sequence * kv_row + L, i, R, i < R // 2, IN_PAIRS)
        first, second = rotate(first, second, c, s)
        store_pair(rotary + current * R, first, second, i, R, i < R // 2, OUT_PAIRS)
    else:
        wide = tl.arange(0, Q_WIDTH)
        q_latent = tl.load(q_a + sequence * q_a_row + wide, mask=wide < Q, other=0)
        q_factors = tl.load(q_weight + wide, mask=wide < Q, other=0)
        tl.store(q_out + sequence * Q + wide, normalize_row(q_latent, q_factors, Q, q_epsilon), mask=wide < Q)


@triton.jit(do_not_specialize=["S", "splits"])
def attend_latents(
    q_latent, q_head, q_sequence, q, q_row, q_width, cos, sin, angles, position, padding, latents, rotary,
    out, out_head, out_sequence, partial, arrived, S, splits, scaling,
    HEADS: tl.constexpr, L: tl.constexpr, R: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr,
    BH: tl.constexpr, BS: tl.constexpr, IN_PAIRS: tl.constexpr, OUT_PAIRS: tl.constexpr,
    MOST: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Attention of all heads to the latents, which include the new token. The grid is (B * ceil(HEADS / BH), splits).

    q_latent: for each head and sequence (strides `q_head`, `q_sequence`) a query [L] in latent space.
    q: [B, HEADS * q_width] with row stride `q_row`; the last R elements of each head are rotated here.
    latents: [B, 1, S, L]; rotary: [B, 1, S, R], rotated; see `write_latents`.
    out: for each head and sequence (strides `out_head`, `out_sequence`) the weighted sum of latents [L].
    Other arguments as in `attend`.
    """
    if CHAINED:
        gdc_wait()
    blocks: tl.constexpr = (HEADS + BH - 1) // BH
    sequence = (tl.program_id(0) // blocks).to(tl.int64)
    head = tl.program_id(0) % blocks * BH + tl.arange(0, BH)
    current = tl.load(position).to(tl.int32)
    padded = tl.load(padding + sequence).to(tl.int32)
    begin, end = split_range(current, splits, BS)
    i = tl.arange(0, HALF)
    column = tl.arange(0, WIDTH)
    head_mask = (head < HEADS)[:, None]
    pair_mask = (i < R // 2)[None, :]
    c, s = load_angles(cos + sequence * angles, sin + sequence * angles, i, R)
    q_at = q + sequence * q_row + head[:, None] * q_width + q_width - R
    q0, q1 = load_pair(q_at, i[None, :], R, head_mask & pair_mask, IN_PAIRS)
    q0, q1 = rotate(q0, q1, c[None, :], s[None, :])
    latent_mask = (column < L)[None, :]
    query_at = q_latent + sequence * q_sequence + head[:, None] * q_head + column[None, :]
    query = tl.load(query_at, mask=head_mask & latent_mask, other=0)
    row_max, row_sum, acc = softmax_start(BH, WIDTH)
    for first in range(begin, end, BS):
        key_position = first + tl.arange(0, BS)
        key_mask = (key_position < end)[:, None]
        cached = (sequence * S + key_position)[:, None]
        k0, k1 = load_pair(rotary + cached * R, i[None, :], R, key_mask & pair_mask, OUT_PAIRS)
        latent = tl.load(latents + cached * L + column[None, :], mask=key_mask & latent_mask, other=0)
        scores = tl.dot(q1, tl.trans(k1), tl.dot(q0, tl.trans(k0), tl.dot(query, tl.trans(latent)))) * scaling
        visible = ((key_position < end) & (key_position >= padded))[None, :]
        row_max, row_sum, acc = softmax_update(scores, visible, latent, row_max, row_sum, acc)
    if CHAINED:
        gdc_launch_dependents()
    out_at = out + sequence * out_sequence + head[:, None] * out_head + column[None, :]
    merge_splits(row_max, row_sum, acc, out_at, head_mask & latent_mask, partial, arrived, splits, BH, WIDTH, MOST)
