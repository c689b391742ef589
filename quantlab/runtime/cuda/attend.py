"""Attention of one new token per sequence to a fixed cache: rotation, cache and softmax in one launch.

The tokens seen are cut into shares, one program each, so that a small batch fills the GPU (Dao et al. 2023, "Flash-Decoding
for long-context inference"). How many tokens there are is known only on the device, so the shares are made there, and one
captured launch serves every position. The last program of a head to finish adds its shares up.

Widths need not be powers of two: HALF, WIDTH and the like are the next ones, at least 16, and what is beyond reads as zero.

Legend: B sequences, S tokens the cache has room for, H heads, D their width, L width of latents, R of their rotary part.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quantlab.runtime.cuda.rows import norm_of

NOTHING: tl.constexpr = tl.constexpr(-1e30)
"""The logarithm of nothing, finite: differences of two of them are numbers."""


@triton.jit
def share_of(position, shares, BS: tl.constexpr):
    """This program's tokens: `begin` to `end`, of 0 to `position` with it, in multiples of BS."""
    each = tl.cdiv(tl.cdiv(position + 1, shares), BS) * BS
    begin = tl.program_id(1) * each
    return begin, tl.minimum(begin + each, position + 1)


@triton.jit
def pair(at, i, width, mask, PAIRS: tl.constexpr):
    """The numbers turned together: neighbours where PAIRS, else half the width apart."""
    if PAIRS:
        return tl.load(at + 2 * i, mask=mask, other=0), tl.load(at + 2 * i + 1, mask=mask, other=0)
    else:
        return tl.load(at + i, mask=mask, other=0), tl.load(at + i + width // 2, mask=mask, other=0)


@triton.jit
def store_pair(at, first, second, i, width, mask, PAIRS: tl.constexpr):
    """The inverse of `pair`."""
    if PAIRS:
        tl.store(at + 2 * i, first, mask=mask)
        tl.store(at + 2 * i + 1, second, mask=mask)
    else:
        tl.store(at + i, first, mask=mask)
        tl.store(at + i + width // 2, second, mask=mask)


@triton.jit
def angles_of(cos, sin, i, width):
    """Cosines and sines of the angles of pairs i, zero beyond those of `width` numbers."""
    there = i < width // 2
    return tl.load(cos + i, mask=there, other=0).to(tl.float32), tl.load(sin + i, mask=there, other=0).to(tl.float32)


@triton.jit
def turned(first, second, cos, sin):
    """Pairs of numbers turned by angles, in float32, rounded to their own dtype."""
    a = first.to(tl.float32)
    b = second.to(tl.float32)
    return (a * cos - b * sin).to(first.dtype), (b * cos + a * sin).to(first.dtype)


@triton.jit
def nothing_seen(BH: tl.constexpr, WIDTH: tl.constexpr):
    """Where a softmax begins: the highest scores [BH], their sums [BH], sums of values [BH, WIDTH]."""
    return tl.full((BH,), NOTHING, tl.float32), tl.zeros((BH,), tl.float32), tl.zeros((BH, WIDTH), tl.float32)


@triton.jit
def seen_more(scores, visible, values, highest, total, sums):
    """Softmax as it goes (Milakov and Gimelshein 2018, eq. 7): scores [BH, BS] to base 2, values [BS, D], sums [BH, D]."""
    scores = tl.where(visible, scores, NOTHING)
    above = tl.maximum(highest, tl.max(scores, axis=1))
    before = tl.exp2(highest - above)
    weights = tl.where(visible, tl.exp2(scores - above[:, None]), 0.0)
    total = total * before + tl.sum(weights, axis=1)
    sums = tl.dot(weights.to(values.dtype), values, sums * before[:, None])
    return above, total, sums


@triton.jit
def finish(
    highest, total, sums, out, valid, partial, arrived, shares,
    BH: tl.constexpr, WIDTH: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """Write ``sums / total`` [BH, WIDTH] where `valid`; of up to MOST > 1 shares, the last program does, for all.

    out: pointers [BH, WIDTH]; partial: [rows of the grid, shares, BH * (WIDTH + 2)] float32 scratch; arrived: a counter
    for each row of the grid, zero before and after.
    """
    complete = True
    if MOST > 1:
        size: tl.constexpr = BH * (WIDTH + 2)
        first = partial + tl.program_id(0).to(tl.int64) * shares * size
        h = tl.arange(0, BH)
        cell = h[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        mine = first + tl.program_id(1) * size
        tl.store(mine + cell, sums)
        tl.store(mine + BH * WIDTH + h, highest)
        tl.store(mine + BH * (WIDTH + 1) + h, total)
        tl.debug_barrier()
        complete = tl.atomic_add(arrived + tl.program_id(0), 1) == shares - 1
        if complete:
            tl.store(arrived + tl.program_id(0), 0)
            which = tl.arange(0, MOST)
            at = first + which[:, None] * size + BH * WIDTH + h[None, :]
            there = (which < shares)[:, None]
            highs = tl.load(at, mask=there, other=NOTHING, cache_modifier=".cg")
            highest = tl.max(highs, axis=0)
            totals = tl.load(at + BH, mask=there, other=0, cache_modifier=".cg")
            total = tl.sum(totals * tl.exp2(highs - highest[None, :]), axis=0)
            sums = tl.zeros((BH, WIDTH), tl.float32)
            for share in tl.range(0, shares, loop_unroll_factor=4):  # nothing that is loaded waits for what was
                other = first + share * size
                factor = tl.exp2(tl.load(other + BH * WIDTH + h, cache_modifier=".cg") - highest)
                sums += tl.load(other + cell, cache_modifier=".cg") * factor[:, None]
    if complete:
        tl.store(out, (sums / total[:, None]).to(out.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["S", "shares"])
def attend(
    q, k, v, q_row, k_row, v_row, cos, sin, angles, position, padding, keys, values, out, partial, arrived,
    S, shares, scaling,
    PER_KEY: tl.constexpr, KEY_HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr,
    BH: tl.constexpr, BS: tl.constexpr, MOST: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Attention in groups of PER_KEY heads with one key. The grid is (B * KEY_HEADS, shares).

    q: [B, KEY_HEADS * PER_KEY * D], k, v: [B, KEY_HEADS * D], rows `q_row`, `k_row`, `v_row` apart, not yet turned.
    cos, sin: of the angles of D / 2 pairs, a row for each sequence, `angles` apart.
    position: [1] int64, where the new tokens stand in the cache; padding: [B] int64, how many places before are empty.
    keys, values: [B, KEY_HEADS, S, D]; the new ones are written there.
    out: [B, KEY_HEADS * PER_KEY * D]; partial, arrived: see `finish`.
    scaling: of the scores, times log2(e).
    """
    if CHAINED:
        gdc_wait()
    sequence = (tl.program_id(0) // KEY_HEADS).to(tl.int64)
    head = tl.program_id(0) % KEY_HEADS
    here = tl.load(position).to(tl.int32)
    empty = tl.load(padding + sequence).to(tl.int32)
    begin, end = share_of(here, shares, BS)
    h = tl.arange(0, BH)
    i = tl.arange(0, HALF)
    d = tl.arange(0, WIDTH)
    c, s = angles_of(cos + sequence * angles, sin + sequence * angles, i, D)
    mine = (h < PER_KEY)[:, None]
    across = (i < D // 2)[None, :]
    q_at = q + sequence * q_row + (head * PER_KEY + h)[:, None] * D
    q0, q1 = pair(q_at, i[None, :], D, mine & across, False)
    q0, q1 = turned(q0, q1, c[None, :], s[None, :])
    k_cache = keys + tl.program_id(0).to(tl.int64) * S * D
    v_cache = values + tl.program_id(0).to(tl.int64) * S * D
    if (begin <= here) & (here < end):
        k0, k1 = pair(k + sequence * k_row + head * D, i, D, i < D // 2, False)
        k0, k1 = turned(k0, k1, c, s)
        store_pair(k_cache + here * D, k0, k1, i, D, i < D // 2, False)
        new = tl.load(v + sequence * v_row + head * D + d, mask=d < D, other=0)
        tl.store(v_cache + here * D + d, new, mask=d < D)
        tl.debug_barrier()  # they are read back below
    highest, total, sums = nothing_seen(BH, WIDTH)
    for first in range(begin, end, BS):
        place = first + tl.arange(0, BS)
        within = (place < end)[:, None]
        k0, k1 = pair(k_cache + place[:, None] * D, i[None, :], D, within & across, False)
        scores = tl.dot(q1, tl.trans(k1), tl.dot(q0, tl.trans(k0))) * scaling
        seen = tl.load(v_cache + place[:, None] * D + d[None, :], mask=within & (d < D)[None, :], other=0)
        visible = ((place < end) & (place >= empty))[None, :]
        highest, total, sums = seen_more(scores, visible, seen, highest, total, sums)
    if CHAINED:
        gdc_launch_dependents()
    out_at = out + (tl.program_id(0).to(tl.int64) * PER_KEY + h)[:, None] * D + d[None, :]
    finish(highest, total, sums, out_at, mine & (d < D)[None, :], partial, arrived, shares, BH, WIDTH, MOST)


@triton.jit(do_not_specialize=["S"])
def keep_latents(
    kv, kv_row, weight, epsilon, q_a, q_a_row, q_weight, q_epsilon, q_out, Q, cos, sin, angles, position, latents, rotary,
    S,
    L: tl.constexpr, R: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr, Q_WIDTH: tl.constexpr,
    IN_PAIRS: tl.constexpr, OUT_PAIRS: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """What one token leaves in the cache of latent attention. The grid is (B, 2), or (B, 1) without a latent of queries.

    kv: [B, L + R], rows `kv_row` apart: the latent, which is normed and written to latents [B, 1, S, L] at `position`,
    and the rotary key, which is turned and written to rotary [B, 1, S, R].
    q_a: [B, Q], rows `q_a_row` apart: normed and written to q_out [B, Q].
    IN_PAIRS, OUT_PAIRS: where the numbers that are turned together lie in kv and in the cache; see `pair`.
    """
    if CHAINED:
        gdc_wait()
    if CHAINED:
        gdc_launch_dependents()
    sequence = tl.program_id(0).to(tl.int64)
    if tl.program_id(1) == 0:
        here = sequence * S + tl.load(position)
        column = tl.arange(0, WIDTH)
        read = tl.load(kv + sequence * kv_row + column, mask=column < L, other=0)
        factors = tl.load(weight + column, mask=column < L, other=0)
        tl.store(latents + here * L + column, norm_of(read, factors, L, epsilon), mask=column < L)
        i = tl.arange(0, HALF)
        c, s = angles_of(cos + sequence * angles, sin + sequence * angles, i, R)
        first, second = pair(kv + sequence * kv_row + L, i, R, i < R // 2, IN_PAIRS)
        first, second = turned(first, second, c, s)
        store_pair(rotary + here * R, first, second, i, R, i < R // 2, OUT_PAIRS)
    else:
        wide = tl.arange(0, Q_WIDTH)
        q_read = tl.load(q_a + sequence * q_a_row + wide, mask=wide < Q, other=0)
        q_factors = tl.load(q_weight + wide, mask=wide < Q, other=0)
        tl.store(q_out + sequence * Q + wide, norm_of(q_read, q_factors, Q, q_epsilon), mask=wide < Q)


@triton.jit(do_not_specialize=["S", "shares"])
def attend_latents(
    q_latent, q_head, q_sequence, q, q_row, q_width, cos, sin, angles, position, padding, latents, rotary,
    out, out_head, out_sequence, partial, arrived, S, shares, scaling,
    HEADS: tl.constexpr, L: tl.constexpr, R: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr,
    BH: tl.constexpr, BS: tl.constexpr, IN_PAIRS: tl.constexpr, OUT_PAIRS: tl.constexpr,
    MOST: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Attention of all heads to the latents, which hold the new token already. The grid is (B * ceil(HEADS / BH), shares).

    q_latent: for each head and sequence, `q_head` and `q_sequence` apart, a query [L] in the space of the latents.
    q: [B, HEADS * q_width], rows `q_row` apart; the last R numbers of each head are turned here.
    latents: [B, 1, S, L]; rotary: [B, 1, S, R], turned; see `keep_latents`.
    out: weighted sums of latents [L], `out_head` and `out_sequence` apart; the rest as in `attend`.
    """
    if CHAINED:
        gdc_wait()
    blocks: tl.constexpr = (HEADS + BH - 1) // BH
    sequence = (tl.program_id(0) // blocks).to(tl.int64)
    head = tl.program_id(0) % blocks * BH + tl.arange(0, BH)
    here = tl.load(position).to(tl.int32)
    empty = tl.load(padding + sequence).to(tl.int32)
    begin, end = share_of(here, shares, BS)
    i = tl.arange(0, HALF)
    column = tl.arange(0, WIDTH)
    mine = (head < HEADS)[:, None]
    across = (i < R // 2)[None, :]
    c, s = angles_of(cos + sequence * angles, sin + sequence * angles, i, R)
    q_at = q + sequence * q_row + head[:, None] * q_width + q_width - R
    q0, q1 = pair(q_at, i[None, :], R, mine & across, IN_PAIRS)
    q0, q1 = turned(q0, q1, c[None, :], s[None, :])
    whole = (column < L)[None, :]
    query_at = q_latent + sequence * q_sequence + head[:, None] * q_head + column[None, :]
    query = tl.load(query_at, mask=mine & whole, other=0)
    highest, total, sums = nothing_seen(BH, WIDTH)
    for first in range(begin, end, BS):
        place = first + tl.arange(0, BS)
        within = (place < end)[:, None]
        cached = (sequence * S + place)[:, None]
        k0, k1 = pair(rotary + cached * R, i[None, :], R, within & across, OUT_PAIRS)
        latent = tl.load(latents + cached * L + column[None, :], mask=within & whole, other=0)
        scores = tl.dot(q1, tl.trans(k1), tl.dot(q0, tl.trans(k0), tl.dot(query, tl.trans(latent)))) * scaling
        visible = ((place < end) & (place >= empty))[None, :]
        highest, total, sums = seen_more(scores, visible, latent, highest, total, sums)
    if CHAINED:
        gdc_launch_dependents()
    out_at = out + sequence * out_sequence + head[:, None] * out_head + column[None, :]
    finish(highest, total, sums, out_at, mine & whole, partial, arrived, shares, BH, WIDTH, MOST)
