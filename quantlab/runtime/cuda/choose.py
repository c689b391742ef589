"""The router of a mixture of experts for few tokens: scores, groups, top-k experts and weights in one launch."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

LOWEST: tl.constexpr = tl.constexpr(-3e38)
"""Preference of an expert whose group was not selected or whose score is NaN: below that of all other experts, above
that of an expert that has already been selected (-inf). So TOP_K experts are always found, and a token of NaNs gets NaN
weights."""


@triton.jit
def select_experts(
    logits, bias, index, weights, scaling,
    E: tl.constexpr, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, TOP_K: tl.constexpr, SIGMOID: tl.constexpr,
    NORMED: tl.constexpr, GW: tl.constexpr, PW: tl.constexpr, KW: tl.constexpr,
):  # fmt: skip
    """Select the experts of one row from its logits [E]; see `choose`."""
    per: tl.constexpr = E // GROUPS
    g = tl.arange(0, GW)
    p = tl.arange(0, PW)
    expert = g[:, None] * per + p[None, :]
    real = (g < GROUPS)[:, None] & (p < per)[None, :]
    read = tl.load(logits + expert, mask=real, other=float("-inf"), cache_modifier=".cg")
    if SIGMOID:
        scores = tl.where(real, 1.0 / (1.0 + tl.exp(-read)), 0.0)
        preference = scores + tl.load(bias + expert, mask=real, other=0)
    else:
        exponentials = tl.exp(read - tl.max(tl.max(read, axis=1), axis=0))
        scores = exponentials / tl.sum(tl.sum(exponentials, axis=1), axis=0)
        preference = scores
    preference = tl.where(real, tl.where(preference == preference, preference, LOWEST), float("-inf"))
    if TOP_GROUPS < GROUPS:
        group = tl.max(preference, axis=1)
        if SIGMOID:
            at = tl.min(tl.where(preference == group[:, None], p[None, :], PW), axis=1)
            group += tl.max(tl.where(p[None, :] == at[:, None], float("-inf"), preference), axis=1)
        remaining = group
        for _ in tl.static_range(TOP_GROUPS):
            best = tl.min(tl.where(remaining == tl.max(remaining, axis=0), g, GW), axis=0)
            remaining = tl.where(g == best, float("-inf"), remaining)
        group_dropped = (remaining > float("-inf"))[:, None]
        if SIGMOID:
            preference = tl.where(group_dropped & real, LOWEST, preference)
        else:
            scores = tl.where(group_dropped, 0.0, scores)
            preference = tl.where(group_dropped & real, 0.0, preference)
    total = 0.0
    for k in tl.static_range(TOP_K):
        best = tl.max(tl.max(preference, axis=1), axis=0)
        found = tl.min(tl.min(tl.where(preference == best, expert, E), axis=1), axis=0)
        chosen = (expert == found) & real
        score = tl.sum(tl.sum(tl.where(chosen, scores, 0.0), axis=1), axis=0)
        preference = tl.where(chosen, float("-inf"), preference)
        total += score
        tl.store(index + k, found.to(tl.int64))
        tl.store(weights + k, score * scaling)
    if NORMED:
        tl.debug_barrier()
        k = tl.arange(0, KW)
        at = weights + k
        tl.store(at, tl.load(at, mask=k < TOP_K, other=0) / (total + 1e-20), mask=k < TOP_K)


@triton.jit
def choose(
    x, weight, bias, logits, index, weights, arrived, H, scaling,
    E: tl.constexpr, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, TOP_K: tl.constexpr, SIGMOID: tl.constexpr,
    NORMED: tl.constexpr, GW: tl.constexpr, PW: tl.constexpr, KW: tl.constexpr,
    BE: tl.constexpr, BH: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Select TOP_K of E experts for each row of x [T, H]. The grid is (T, ceil(E / BE)). All arithmetic is float32.

    SIGMOID: as in DeepSeek-V3 (report, eq. 14–16 and 2.1.2): scores are sigmoids, experts are ranked by score + `bias`
    [E], and a group by the sum of its two best. Else as in DeepSeek-V2: scores are a softmax, and a group is ranked by
    its best expert. Experts are selected from the TOP_GROUPS best groups only. NORMED: the weights are divided by their
    sum.

    weight: [E, H]; logits: [T, E] float32 scratch; index: [T, TOP_K] int64; weights: [T, TOP_K] float32, times
    `scaling`.
    arrived: [T] int32, zero before and after. GW, PW, KW: powers of two, at least GROUPS, E / GROUPS and TOP_K.
    """
    if CHAINED:
        gdc_wait()
    t = tl.program_id(0)
    e = tl.program_id(1) * BE + tl.arange(0, BE)
    products = tl.zeros((BE, BH), tl.float32)
    for first in range(0, H, BH):
        column = first + tl.arange(0, BH)
        read = tl.load(x + t.to(tl.int64) * H + column, mask=column < H, other=0).to(tl.float32)
        at = weight + e[:, None] * H + column[None, :]
        products += tl.load(at, mask=(e < E)[:, None] & (column < H)[None, :], other=0).to(tl.float32) * read[None, :]
    tl.store(logits + t * E + e, tl.sum(products, axis=1), mask=e < E)
    tl.debug_barrier()
    if tl.atomic_add(arrived + t, 1) == tl.num_programs(1) - 1:
        tl.store(arrived + t, 0)
        select_experts(
            logits + t * E, bias, index + t * TOP_K, weights + t * TOP_K, scaling,
            E, GROUPS, TOP_GROUPS, TOP_K, SIGMOID, NORMED, GW, PW, KW,
        )  # fmt: skip
