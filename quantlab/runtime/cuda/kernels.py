"""Triton kernels that multiply rows of activations by packed matrices, for linears and for routed experts.

A program computes a tile of the transposed product ``W x^T``: BN rows of a matrix times BM rows of activations. As the
left operand, weights come from the registers in which the integers were expanded. Few tokens fill only few columns of a
tile, so one kernel serves from one token to thousands.

Integers are stored in the order of the tensor-core fragments (`quantlab.runtime.cuda.layout`): a thread loads 16 bytes
and has the words of its own fragment. Integers that share a word are a quarter (int4) or half (int8) of a block apart,
so that words [BN, 32] expand to four tiles [BN, 32] of neighbouring columns. No data moves between threads.

Launches of few rows overlap (CHAINED; programmatic dependent launch): a kernel launches before its predecessor has
finished. Every program waits for the predecessor before it reads another kernel's output and before it writes, so order
holds for all later kernels too. Only weights and their scales, which no kernel of a step writes, are read before the
wait. A kernel's successor launches when it calls `gdc_launch_dependents`, or else when it ends.

Legend: E matrices, N rows (outputs), K columns (inputs), T rows of activations, tile sizes BN and BM.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quantlab.runtime.cuda.stream_k import block_rows, program_owning, range_start, row_maps
from quantlab.runtime.cuda.unpack import concat_columns, from_int4, from_int8, load_words

PREFETCH: tl.constexpr = tl.constexpr("""{ .reg .pred first; .reg .u32 thread;
mov.u32 thread, %tid.x; setp.eq.u32 first, thread, 0;
@first cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }""")

INT4: tl.constexpr = tl.constexpr(0)
INT8: tl.constexpr = tl.constexpr(1)
INT8_TOKENS: tl.constexpr = tl.constexpr(2)
FLOAT: tl.constexpr = tl.constexpr(3)
FEW_ROWS: tl.constexpr = tl.constexpr(64)
"""Up to this many rows of activations in a tile, there are registers to load scales before the main loop."""


@triton.jit
def load_activations(x, row, valid, column, K, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    """Columns `column` to `column + WIDTH` of rows `row` [BM], transposed: [WIDTH, BM], zero out of bounds."""
    k = column + tl.arange(0, WIDTH)
    pointers = x + row[None, :] * K + k[:, None]
    if EVEN:
        return tl.load(pointers, mask=valid[None, :], other=0)
    else:
        return tl.load(pointers, mask=valid[None, :] & (k < K)[:, None], other=0)


@triton.jit
def int4_scales(scale, block, n, N, GROUP: tl.constexpr):
    """The scales [BN] of the four quarters of a block of 128 columns, from [K / g, N]."""
    per_block: tl.constexpr = 128 // GROUP
    first = scale + block * per_block * N + n
    a = tl.load(first)
    if GROUP == 128:
        return a, a, a, a
    elif GROUP == 64:
        b = tl.load(first + N)
        return a, a, b, b
    else:
        return a, tl.load(first + N), tl.load(first + 2 * N), tl.load(first + 3 * N)


@triton.jit
def int4_sums(
    x, row, valid, w, slab, slabs, scale, n, first, last, N, K,
    GROUP: tl.constexpr, GATED: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """Rows n [BN] of an int4 matrix times rows of x, over blocks `first` to `last`: [BN, BM] float32.

    With few rows of activations group sums are scaled; with many, weights are, rounded as the number format defines it.
    """
    dtype: tl.constexpr = x.dtype.element_ty
    BN: tl.constexpr = n.shape[0]
    BM: tl.constexpr = row.shape[0]
    scale_weights: tl.constexpr = BM >= 128 and scale.dtype.element_ty == dtype
    sums = tl.zeros((BN, BM), tl.float32)
    s0, s1, s2, s3 = int4_scales(scale, first, n, N, GROUP)
    for block in tl.range(first, last, num_stages=STAGES):
        words = load_words(w, slab, slabs, block, GATED, BN, 32, WARPS)
        n0, n1, n2, n3 = int4_scales(scale, tl.minimum(block + 1, last - 1), n, N, GROUP)
        w0, w1, w2, w3 = from_int4(words, dtype)
        if scale_weights:
            weights = concat_columns(
                concat_columns(w0 * s0[:, None], w1 * s1[:, None]), concat_columns(w2 * s2[:, None], w3 * s3[:, None])
            )
            sums = tl.dot(weights, load_activations(x, row, valid, block * 128, K, 128, EVEN), sums)
        elif GROUP == 128:
            part = tl.dot(
                concat_columns(concat_columns(w0, w1), concat_columns(w2, w3)),
                load_activations(x, row, valid, block * 128, K, 128, EVEN),
            )
            sums += part * s0.to(tl.float32)[:, None]
        elif GROUP == 64:
            part = tl.dot(concat_columns(w0, w1), load_activations(x, row, valid, block * 128, K, 64, EVEN))
            sums += part * s0.to(tl.float32)[:, None]
            part = tl.dot(concat_columns(w2, w3), load_activations(x, row, valid, block * 128 + 64, K, 64, EVEN))
            sums += part * s2.to(tl.float32)[:, None]
        else:
            part = tl.dot(w0, load_activations(x, row, valid, block * 128, K, 32, EVEN))
            sums += part * s0.to(tl.float32)[:, None]
            part = tl.dot(w1, load_activations(x, row, valid, block * 128 + 32, K, 32, EVEN))
            sums += part * s1.to(tl.float32)[:, None]
            part = tl.dot(w2, load_activations(x, row, valid, block * 128 + 64, K, 32, EVEN))
            sums += part * s2.to(tl.float32)[:, None]
            part = tl.dot(w3, load_activations(x, row, valid, block * 128 + 96, K, 32, EVEN))
            sums += part * s3.to(tl.float32)[:, None]
        s0, s1, s2, s3 = n0, n1, n2, n3
    return sums


@triton.jit
def int8_sums(
    x, row, valid, w, slab, slabs, n, first, last, K,
    GATED: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """Rows n [BN] of an int8 matrix times rows of x, over blocks `first` to `last`, unscaled: [BN, BM] float32."""
    sums = tl.zeros((n.shape[0], row.shape[0]), tl.float32)
    for block in tl.range(first, last, num_stages=STAGES):
        words = load_words(w, slab, slabs, block, GATED, n.shape[0], 64, WARPS)
        w0, w1 = from_int8(words, x.dtype.element_ty)
        sums = tl.dot(concat_columns(w0, w1), load_activations(x, row, valid, block * 128, K, 128, EVEN), sums)
    return sums


@triton.jit
def integer_sums(x, row, valid, w, n, first, last, N, K, EVEN: tl.constexpr, STAGES: tl.constexpr, PAIRS: tl.constexpr):
    """Rows n [BN] of an int8 matrix times rows of int8 x, over blocks `first` to `last`: [BN, BM] int32, exact.

    PAIRS: two blocks per iteration; an odd last block is loaded twice, once with zero activations.
    """
    weights_at = w + n[:, None] * 128 + tl.arange(0, 128)[None, :]
    sums = tl.zeros((n.shape[0], row.shape[0]), tl.int32)
    for block in tl.range(first, last, 2 if PAIRS else 1, num_stages=STAGES):
        weights = tl.load(weights_at + block * N * 128)
        columns = load_activations(x, row, valid, block * 128, K, 128, EVEN)
        if PAIRS:
            second = tl.minimum(block + 1, last - 1)
            second_weights = tl.load(weights_at + second * N * 128)
            second_columns = load_activations(x, row, valid & (second > block), second * 128, K, 128, EVEN)
            sums = tl.dot(second_weights, second_columns, sums, out_dtype=tl.int32)
        sums = tl.dot(weights, columns, sums, out_dtype=tl.int32)
    return sums


@triton.jit
def float_sums(x, row, valid, w, n, first, last, K, EVEN: tl.constexpr, STAGES: tl.constexpr):
    """Rows n [BN] of a matrix [N, K] of x's dtype times rows of x, over blocks `first` to `last`: [BN, BM] float32."""
    k = tl.arange(0, 128)
    sums = tl.zeros((n.shape[0], row.shape[0]), tl.float32)
    for block in tl.range(first, last, num_stages=STAGES):
        pointers = w + n[:, None] * K + (block * 128 + k)[None, :]
        weights = tl.load(pointers) if EVEN else tl.load(pointers, mask=(block * 128 + k < K)[None, :], other=0)
        sums = tl.dot(weights, load_activations(x, row, valid, block * 128, K, 128, EVEN), sums)
    return sums


@triton.jit
def tile_sums(
    x, row, valid, w, scale, tile_n, n, first, last, N, K,
    KIND: tl.constexpr, GROUP: tl.constexpr, GATED: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr,
    WARPS: tl.constexpr, PAIRS: tl.constexpr = False,
):  # fmt: skip
    """The unscaled product of a tile for any kind of matrix: [BN, BM] float32, or int32 where activations are int8."""
    slabs = tl.cdiv(N, 64)
    slab = tile_n if GATED else tile_n * (n.shape[0] // 64)
    if KIND == INT4:
        return int4_sums(x, row, valid, w, slab, slabs, scale, n, first, last, N, K, GROUP, GATED, EVEN, STAGES, WARPS)
    elif KIND == INT8:
        return int8_sums(x, row, valid, w, slab, slabs, n, first, last, K, GATED, EVEN, STAGES, WARPS)
    elif KIND == INT8_TOKENS:
        return integer_sums(x, row, valid, w, n, first, last, N, K, EVEN, STAGES, PAIRS)
    else:
        return float_sums(x, row, valid, w, n, first, last, K, EVEN, STAGES)


@triton.jit
def row_scales(scale, n, KIND: tl.constexpr):
    """The scales [BN] of the rows of an int8 matrix; a placeholder for other kinds."""
    if KIND == INT8 or KIND == INT8_TOKENS:
        return tl.load(scale + n).to(tl.float32)
    else:
        return n


@triton.jit
def token_scales(x_scale, row, valid, KIND: tl.constexpr):
    """The scales [BM] of int8 rows of activations; a placeholder for other kinds."""
    if KIND == INT8_TOKENS:
        return tl.load(x_scale + row, mask=valid, other=0.0)
    else:
        return row


@triton.jit
def store_tile(
    sums, per_row, per_token, valid, added, out, out_row, tile_n, N,
    KIND: tl.constexpr, GATED: tl.constexpr, ADDED: tl.constexpr,
):  # fmt: skip
    """Store a tile where `valid`: scaled by row and token (by KIND), gated if GATED, plus `added` if ADDED."""
    BN: tl.constexpr = sums.shape[0]
    BM: tl.constexpr = sums.shape[1]
    if KIND == INT8_TOKENS:
        sums = sums.to(tl.float32) * per_token[None, :]
    if KIND == INT8 or KIND == INT8_TOKENS:
        sums = sums * per_row[:, None]
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(sums, (2, BN // 2, BM)), (1, 2, 0)))
        sums = gate / (1.0 + tl.exp(-gate)) * up
        column = tile_n * (BN // 2) + tl.arange(0, BN // 2)
        width = N // 2
    else:
        column = tile_n * BN + tl.arange(0, BN)
        width = N
    offsets = out_row.to(tl.int64)[None, :] * width + column[:, None]
    within = valid[None, :] & (column < width)[:, None]
    if ADDED:
        sums += tl.load(added + offsets, mask=within, other=0).to(tl.float32)
    tl.store(out + offsets, sums.to(out.dtype.element_ty), mask=within)


@triton.jit
def tile_rows(tile_n, N, GATED: tl.constexpr, BN: tl.constexpr):
    """The matrix rows [BN] of a tile; where GATED, half are gate rows and half are the up rows of the same outputs."""
    i = tl.arange(0, BN)
    if GATED:
        half: tl.constexpr = BN // 2
        return tl.minimum(tile_n * half + i % half, N // 2 - 1) + (i // half) * (N // 2)
    else:
        return tl.minimum(tile_n * BN + i, N - 1)


@triton.jit
def reduce_partials(sums, valid, partial, slot, first_slot, arrived, contributors):
    """Write the partial sums [BN, BM] of one of `contributors` to its slot; the last to arrive adds all, in slot order.

    Args: slots of the contributors are consecutive from `first_slot`; arrived: a counter, zero before and after.
    Returns: the sums, and whether they are complete, which they are for exactly one contributor.
    """
    size: tl.constexpr = sums.shape[0] * sums.shape[1]
    offsets = tl.arange(0, sums.shape[1])[None, :] * sums.shape[0] + tl.arange(0, sums.shape[0])[:, None]
    tl.store(partial + slot * size + offsets, sums, mask=valid[None, :])
    tl.debug_barrier()
    complete = tl.atomic_add(arrived, 1) == contributors - 1
    if complete:
        tl.store(arrived, 0)
        sums = tl.zeros_like(sums)
        for other in range(contributors):
            sums += tl.load(
                partial + (first_slot + other) * size + offsets, mask=valid[None, :], other=0, cache_modifier=".cg"
            )
    return sums, complete


@triton.jit(do_not_specialize=["T", "splits"])
def product(
    x, x_scale, w, scale, added, out, partial, arrived, T, N, K, splits,
    KIND: tl.constexpr, GROUP: tl.constexpr, GATED: tl.constexpr, ADDED: tl.constexpr, SPLIT: tl.constexpr, EVEN: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, STAGES: tl.constexpr, WARPS: tl.constexpr, CHAINED: tl.constexpr, AHEAD: tl.constexpr,
    PAIRS: tl.constexpr,
):  # fmt: skip
    """One tile of ``x W^T``, or part of its blocks of columns where SPLIT (split-K); the grid is (tiles, splits).

    x: [T, K], or int8 with x_scale [T] float32 where KIND is INT8_TOKENS.
    w: see `quantlab.runtime.cuda.layout`; scale: [K / g, N] (INT4) or [N].
    out: [T, N], or [T, N / 2] where GATED: ``silu(gate) * up`` for a matrix with the gate rows first, then the up rows.
    added: [T, N] of out's dtype, added to the product where ADDED.
    partial: [tiles, splits, BM, BN] scratch; arrived: [tiles] int32, zero before and after.
    CHAINED: see above; of INT8_TOKENS, the first AHEAD blocks are prefetched before the wait. PAIRS: see `integer_sums`.
    """
    row_blocks = tl.cdiv(T, BM)
    tile = tl.program_id(0)
    tile_n = tile // row_blocks
    blocks = tl.cdiv(K, 128)
    first = tl.program_id(1) * blocks // splits
    last = (tl.program_id(1) + 1) * blocks // splits
    n = tile_rows(tile_n, N, GATED, BN)
    if BM <= FEW_ROWS:
        per_row = row_scales(scale, n, KIND)
    if CHAINED:
        if KIND == INT8_TOKENS:
            prefetch_rows(w, tile_n, first, tl.minimum(last, first + AHEAD), N, GATED, BN)
        gdc_wait()
    position = tile % row_blocks * BM + tl.arange(0, BM)
    valid = position < T
    row = tl.where(valid, position, 0).to(tl.int64)
    if BM <= FEW_ROWS:
        per_token = token_scales(x_scale, row, valid, KIND)
    sums = tile_sums(
        x, row, valid, w, scale, tile_n, n, first, last, N, K, KIND, GROUP, GATED, EVEN, STAGES, WARPS, PAIRS
    )
    if CHAINED:
        gdc_launch_dependents()
    if BM > FEW_ROWS:
        per_token, per_row = token_scales(x_scale, row, valid, KIND), row_scales(scale, n, KIND)
    if SPLIT:
        slot = (tile * splits + tl.program_id(1)).to(tl.int64)
        sums, complete = reduce_partials(sums, valid, partial, slot, slot - tl.program_id(1), arrived + tile, splits)
        if complete:
            store_tile(sums, per_row, per_token, valid, added, out, row, tile_n, N, KIND, GATED, ADDED)
    else:
        store_tile(sums, per_row, per_token, valid, added, out, row, tile_n, N, KIND, GATED, ADDED)


@triton.jit
def prefetch_rows(w, tile_n, first, last, N, GATED: tl.constexpr, BN: tl.constexpr):
    """Prefetch the int8 rows of a tile into the L2 cache, for blocks `first` to `last` of 128 columns."""
    if GATED:
        for block in range(first, last):
            at = w + (block * N + tile_n * (BN // 2)) * 128
            prefetch_bytes(at, BN // 2 * 128)
            prefetch_bytes(at + N // 2 * 128, BN // 2 * 128)
    elif (tile_n + 1) * BN <= N:
        for block in range(first, last):
            prefetch_bytes(w + (block * N + tile_n * BN) * 128, BN * 128)


@triton.jit
def prefetch_bytes(start, size):
    """Prefetch `size` bytes from `start` into the L2 cache; one thread issues the request."""
    tl.inline_asm_elementwise(PREFETCH, "=r,l,r", [start, size], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def expert_base(w, scale, expert, blocks, N, K, KIND: tl.constexpr, GROUP: tl.constexpr):
    """Pointers to the matrix of an expert and to its scales."""
    slabs = tl.cdiv(N, 64)
    if KIND == INT4:
        return w + expert * blocks * slabs * 2048, scale + expert * blocks * N * (128 // GROUP)
    elif KIND == INT8:
        return w + expert * blocks * slabs * 4096, scale + expert * N
    elif KIND == INT8_TOKENS:
        return w + expert * blocks * N * 128, scale + expert * N
    else:
        return w + expert * N * K, scale


@triton.jit(do_not_specialize=["T"])
def run_product(
    x, x_scale, w, scale, out, partial, arrived, order, block_expert, block_first, block_end, block_count, T, N, K,
    KIND: tl.constexpr, GROUP: tl.constexpr, GATED: tl.constexpr, TOP_K: tl.constexpr, ROUTED: tl.constexpr,
    ALONE: tl.constexpr, EVEN: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, STAGES: tl.constexpr, WARPS: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """As `product`, by any number of programs (stream-K); where ROUTED, rows are multiplied by their experts' matrices.

    The number of routed blocks of rows is known only on the device. So all blocks of columns of all tiles are divided
    into equal contiguous ranges. Where a range ends inside a tile, `reduce_partials` adds the partial sums.

    w, scale: where ROUTED, of E matrices. partial: [2 * programs, BM, BN] scratch; arrived: [programs] int32 zeros.
    order, block_expert, block_first, block_end, block_count: written by `sort_by_expert.route`. With TOP_K, row p of
    the product reads row ``order[p] / TOP_K`` of x and is written to p; without, it reads row p and writes ``order[p]``.
    ALONE: all T rows belong to one token; row p is block p with expert ``block_expert[p]``. Other tables are not read.
    """
    if CHAINED:
        gdc_wait()
    row_blocks = T if ALONE else tl.load(block_count) if ROUTED else tl.cdiv(T, BM)
    blocks = tl.cdiv(K, 128)
    total = row_blocks * tl.cdiv(N, BN) * blocks
    programs = tl.minimum(tl.num_programs(0), total)
    per_program = total // programs
    remainder = total % programs
    program = tl.minimum(tl.program_id(0), programs)
    begin = range_start(program, per_program, remainder)
    end = range_start(tl.minimum(tl.program_id(0) + 1, programs), per_program, remainder)
    for tile in range(begin // blocks, tl.cdiv(end, blocks)):
        tile_n = tile // row_blocks
        row_block = tile % row_blocks
        n = tile_rows(tile_n, N, GATED, BN)
        if ROUTED:
            expert = tl.load(block_expert + row_block)
            position, valid = block_rows(block_first, block_end, row_block, BM, ALONE)
            tile_w, tile_scale = expert_base(w, scale, expert.to(tl.int64), tl.cdiv(K, 128), N, K, KIND, GROUP)
        else:
            tile_w, tile_scale = w, scale
            position = row_block * BM + tl.arange(0, BM)
            valid = position < T
        row, out_row = row_maps(order, tl.where(valid, position, 0), TOP_K, ROUTED, ALONE)
        unit = tile * blocks
        first = tl.maximum(begin - unit, 0)
        last = tl.minimum(end - unit, blocks)
        if BM <= FEW_ROWS:
            per_row, per_token = row_scales(tile_scale, n, KIND), token_scales(x_scale, row, valid, KIND)
        sums = tile_sums(
            x, row, valid, tile_w, tile_scale, tile_n, n, first, last, N, K, KIND, GROUP, GATED, EVEN, STAGES, WARPS
        )
        if BM > FEW_ROWS:
            per_token, per_row = token_scales(x_scale, row, valid, KIND), row_scales(tile_scale, n, KIND)
        complete = last - first == blocks
        if last - first < blocks:
            owner = program_owning(unit, per_program, remainder)
            contributors = program_owning(unit + blocks - 1, per_program, remainder) - owner + 1
            # shared tiles start in different programs, so their slots, from 2 * owner on, do not overlap
            slot = (owner + program).to(tl.int64)
            first_slot = slot - program + owner
            sums, complete = reduce_partials(sums, valid, partial, slot, first_slot, arrived + owner, contributors)
        if complete:
            store_tile(sums, per_row, per_token, valid, x, out, out_row, tile_n, N, KIND, GATED, False)
