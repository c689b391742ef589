"""The product of rows of activations with packed matrices: one Triton kernel for linears and experts, and its parts.

A program computes a tile of the transposed product, ``W x^T``: BN rows of a matrix times BM rows of activations. With the
weights on the left, tensor cores take them from registers, straight from where the integers were expanded; and since few
tokens fill only few columns of a tile, one kernel serves from one token to thousands.

Integers lie in slabs of 64 rows and 128 columns, all slabs of a block of columns after one another. Words within a slab are
ordered as the tensor cores want them (`quantlab.runtime.cuda.layout`): a thread reads 16 bytes and has the words of its own
part of the product, in order. Integers that share a word are a quarter (int4) or half (int8) of the block apart, so that
words [BN, 32] give four tiles [BN, 32] of neighbouring columns. No number ever moves between threads.

Launches of few rows overlap (CHAINED; programmatic dependent launch): a kernel is launched before the one ahead of it has ended.
Every program of such a kernel waits for that end before it reads what another wrote, and before it writes; so whatever comes
after it may rely on all that came before. Only weights and their scales, which no kernel of a step writes, are read before.
Those that say when they are nearly done let the next one begin then, else it begins with their end.

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
"""Rows of activations of a tile up to which scales are read ahead of the sums, so that nothing waits for them; where there are
more, the sums need the registers."""


@triton.jit
def load_activations(x, row, valid, column, K, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    """Columns `column` to `column + WIDTH` of rows `row` [BM], transposed: [WIDTH, BM], zeros where there are none."""
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

    Few activations: sums of integers times activations are scaled. Many: the weights are, rounded as the format says.
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
    """Rows n [BN] of an int8 matrix times rows of x, over blocks `first` to `last`, not yet scaled: [BN, BM] float32."""
    sums = tl.zeros((n.shape[0], row.shape[0]), tl.float32)
    for block in tl.range(first, last, num_stages=STAGES):
        words = load_words(w, slab, slabs, block, GATED, n.shape[0], 64, WARPS)
        w0, w1 = from_int8(words, x.dtype.element_ty)
        sums = tl.dot(concat_columns(w0, w1), load_activations(x, row, valid, block * 128, K, 128, EVEN), sums)
    return sums


@triton.jit
def integer_sums(x, row, valid, w, n, first, last, N, K, EVEN: tl.constexpr, STAGES: tl.constexpr, PAIRS: tl.constexpr):
    """Rows n [BN] of an int8 matrix times rows of int8 x, over blocks `first` to `last`: [BN, BM] int32, exact.

    PAIRS: two blocks a step; if their number is odd, the last step has its block twice, once with zeros for activations.
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
    """The sums of a tile for every kind of matrix: [BN, BM] float32, or int32 where activations are integers."""
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
    """The scales [BN] of rows of an int8 matrix."""
    if KIND == INT8 or KIND == INT8_TOKENS:
        return tl.load(scale + n).to(tl.float32)
    else:
        return n


@triton.jit
def token_scales(x_scale, row, valid, KIND: tl.constexpr):
    """The scales [BM] of integer rows of activations."""
    if KIND == INT8_TOKENS:
        return tl.load(x_scale + row, mask=valid, other=0.0)
    else:
        return row


@triton.jit
def store_tile(
    sums, per_row, per_token, valid, added, out, out_row, tile_n, N,
    KIND: tl.constexpr, GATED: tl.constexpr, ADDED: tl.constexpr,
):  # fmt: skip
    """Scale a tile by its rows (int8) and tokens, gate it if asked, add where ADDED, and store it where `valid`."""
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
    """The rows [BN] of a tile; where GATED, half a tile of the gate's and the same of up's."""
    i = tl.arange(0, BN)
    if GATED:
        half: tl.constexpr = BN // 2
        return tl.minimum(tile_n * half + i % half, N // 2 - 1) + (i // half) * (N // 2)
    else:
        return tl.minimum(tile_n * BN + i, N - 1)


@triton.jit
def reduce_partials(sums, valid, partial, slot, first_slot, arrived, contributors):
    """Leave the sums [BN, BM] of one of `contributors` in a slot; the last of them gets them all, added in order.

    Args: slots of other contributors follow `first_slot`; arrived: a counter, zero before and after.
    Returns: the sums, and whether this program has them all.
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
    """One tile of ``x W^T``, or a share of its blocks of columns where SPLIT; the grid is (tiles, splits).

    x: [T, K], or int8 with x_scale [T] float32 where KIND is INT8_TOKENS.
    w: see `quantlab.runtime.cuda.layout`; scale: [K / g, N] (INT4) or [N].
    out: [T, N], or [T, N / 2] where GATED: ``silu(gate) * up`` of a matrix with the gate's rows first, then up's.
    added: [T, N] of out's dtype, added to the product where ADDED.
    partial: [tiles, splits, BM, BN] scratch; arrived: [tiles] int32, zero before and after.
    CHAINED: see above; the rows of the first AHEAD blocks are sent for before the wait, where KIND is INT8_TOKENS.
    PAIRS: of INT8_TOKENS, see `integer_sums`.
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
    """Have int8 rows of a tile brought into the second-level cache: their runs of 128 bytes in blocks `first` to `last`."""
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
    """Have `size` bytes from `start` on brought into the second-level cache; one thread asks."""
    tl.inline_asm_elementwise(PREFETCH, "=r,l,r", [start, size], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def expert_base(w, scale, expert, blocks, N, K, KIND: tl.constexpr, GROUP: tl.constexpr):
    """Where the matrix of an expert and its scales begin."""
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
    """As `product`, by any number of programs; where ROUTED, rows meet the matrices of their experts.

    How many blocks of rows are routed is known only on the device. So the work is all tiles times all their blocks of
    columns, one after the other, cut into equal runs; where a run ends inside a tile, `collect` adds its shares.

    w, scale: where ROUTED, of E matrices. partial: [2 * programs, BM, BN] scratch; arrived: [programs] int32 zeros.
    order, block_expert, block_first, block_end, block_count: what `routing.route` wrote. With TOP_K, row p of the product
    reads row ``order[p] / TOP_K`` of x and stays at p; without, it reads row p and writes row ``order[p]``.
    ALONE: all T rows are of one token; row p is block p and meets expert ``block_expert[p]``, and no other of these is read.
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
            first_program = program_owning(unit, per_program, remainder)
            contributors = program_owning(unit + blocks - 1, per_program, remainder) - first_program + 1
            # tiles that are shared begin with different programs: 2 * starter on, none takes the slots of another
            slot = (first_program + program).to(tl.int64)
            first_slot = slot - program + first_program
            sums, complete = reduce_partials(
                sums, valid, partial, slot, first_slot, arrived + first_program, contributors
            )
        if complete:
            store_tile(sums, per_row, per_token, valid, x, out, out_row, tile_n, N, KIND, GATED, False)
