"""A warp-specialized Gluon kernel for GPUs of compute capability 9: many rows of activations times a packed matrix.

At many tokens a product is compute-bound, and the tensor cores must wait neither for activations nor for the expansion
of integers. So warps have roles. One producer warp (`produce`) has the tensor memory accelerator (TMA) copy
activations, half a block of columns at a time, into a ring of shared-memory slots. Eight consumer warps (`consume`)
expand and multiply: each group of four owns 64 rows of the matrix, loads the words of its fragments straight into
registers one block ahead (`quantlab.runtime.cuda.hopper_unpack`), and expands half a block while the tensor cores still
multiply the previous half. Matrix instructions take 93 % of a program's cycles, prologue and epilogue included, with
tiles of 256 activations, 85 % with tiles of 192 and 75 % with tiles of 128: fewer products hide less of the expansion.

As in `quantlab.runtime.cuda.kernels` the product is transposed, ``W x^T``, since only the left operand can come from
registers. Launches overlap: two programs do not fit on a multiprocessor, but a program of the next launch starts where
the first one ends, and loads its first words while others still write. The kernel is persistent, with one program per
multiprocessor. Programs first process whole tiles; the last tiles, too few for all programs, are divided into equal
ranges of blocks of columns (stream-K). Where a range begins inside a tile, its program writes its share of the sums to
memory. The program whose range begins with the tile has all shares copied into the ring, after its activations, and
adds them.

Legend: N rows (outputs), K columns (inputs), T rows of activations; tiles of BN = 128 rows of the matrix and BM of
activations, whose columns are walked in blocks of 128.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quantlab.runtime.cuda.hopper_stream_k import (
    QUARTERS,
    WAIT_UNTIL,
    add_shares,
    as_quarter,
    item_range,
    next_slot,
    previous_slot,
    program_work,
    range_owning,
    store_share,
)
from quantlab.runtime.cuda.hopper_unpack import (
    BN,
    expand_half,
    load_packed,
    sums_layout,
    tile_parts,
    to_rows,
    weights_layout,
)

RING_ROWS: gl.constexpr = gl.constexpr(1344)
"""Capacity of the ring in rows of 64 activations: 168 KB. An output tile of 192 or 256 tokens nearly fills the rest."""
PREFETCH: gl.constexpr = gl.constexpr("""{ .reg .pred one; elect.sync _|one, 0xffffffff;
@one cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }""")


def descriptors(matrix: Tensor, tokens: int, columns: int) -> tuple[TensorDescriptor, TensorDescriptor | None]:
    """TMA descriptors of a matrix, for boxes of `columns` columns and the rows of each of the two parts of a tile.

    The second is None where tiles of `tokens` activations have one part only; see `hopper_unpack.tile_parts`.
    """
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8 * matrix.element_size(), rank=2)
    first, second = tile_parts(tokens)
    second_descriptor = TensorDescriptor.from_tensor(matrix, [second, columns], layout) if second else None
    return TensorDescriptor.from_tensor(matrix, [first, columns], layout), second_descriptor


@gluon.jit
def copy_boxes(sources, row, second_row, column, slots, ready, free, phase, BM: gl.constexpr):
    """Start copying a box of each source to its slot once the slot is free; the second only if tiles have two parts."""
    mbarrier.wait(free, phase)
    mbarrier.expect(ready, BM * 128)
    tma.async_copy_global_to_shared(sources[0], [row, column], ready, slots[0])
    if tile_parts(BM)[1]:
        tma.async_copy_global_to_shared(sources[1], [second_row, column], ready, slots[1])


@gluon.jit
def produce(
    x, share_boxes, rings, ready, free, share_written, w, arrived, T, N, K, shared, sharers,
    INT4: gl.constexpr, BM: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """Producer warp: copy activations, 64 columns at a time, to each slot of the rings as soon as it is free.

    Also prefetches the words of the same block into the L2 cache, before `consume` loads them. Handles the shares of a
    tile too: counts an arrival when `consume` has written a share, and copies all shares to the rings for the program
    that adds them.
    """
    PAIRS: gl.constexpr = 16 if INT4 else 32
    A: gl.constexpr = tile_parts(BM)[0]
    B: gl.constexpr = tile_parts(BM)[1]
    blocks = (K + 127) // 128
    slabs = (N + 63) // 64
    row_blocks = (T + BM - 1) // BM
    whole_tiles, whole, items, range_index, begin, end = program_work(T, N, K, shared, sharers, BM)
    gdc_wait()
    slot = 0
    phase = 1  # initially all slots are free: the phase before the first counts as completed
    owner = -1  # range whose program adds a share that is written but not yet counted; -1 for none
    for item in range(items):
        tile, first, last = item_range(item, whole_tiles, whole, begin, end, blocks)
        row = tile % row_blocks * BM
        slab = tile // row_blocks * (BN // 64)
        for block in range(first, last):
            words = w + (block.to(gl.int64) * slabs + slab) * (64 * PAIRS)
            size = gl.minimum(slabs - slab, BN // 64) * (256 * PAIRS)
            gl.inline_asm_elementwise(PREFETCH, "=r,l,r", [words, size], dtype=gl.int32, is_pure=False, pack=1)
            for half in gl.static_range(2):
                slots = (rings[0].index(slot), rings[1].index(slot))
                copy_boxes(
                    x, row, row + A, block * 128 + half * 64, slots, ready.index(slot), free.index(slot), phase, BM
                )
                slot, phase = next_slot(slot, phase, SLOTS)
            if (owner >= 0) & (block >= gl.minimum(first + 3, last - 1)):  # the share has been written by now
                mbarrier.wait(share_written, 0)
                gl.atomic_add(arrived + owner, 1, sem="release")
                owner = -1
        first_unit = (tile - whole_tiles) * blocks
        if first > 0:
            owner = range_owning(first_unit, shared, sharers, blocks)
        elif last < blocks:
            others = range_owning(first_unit + blocks - 1, shared, sharers, blocks) - range_index
            gl.inline_asm_elementwise(
                WAIT_UNTIL, "=r,l,r", [arrived + range_index, others], dtype=gl.int32, is_pure=False, pack=1
            )
            gl.store(arrived + range_index, 0)
            for share in range(range_index + 1, range_index + 1 + others):
                for quarter in gl.static_range(QUARTERS):
                    top = share * (QUARTERS * BM) + quarter * A
                    second_top = share * (QUARTERS * BM) + QUARTERS * A + quarter * B
                    slots = (as_quarter(rings[0].index(slot), A), as_quarter(rings[1].index(slot), B))
                    copy_boxes(share_boxes, top, second_top, 0, slots, ready.index(slot), free.index(slot), phase, BM)
                    slot, phase = next_slot(slot, phase, SLOTS)
    if owner >= 0:
        mbarrier.wait(share_written, 0)
        gl.atomic_add(arrived + owner, 1, sem="release")


@gluon.jit
def store_scaled(sums, scale, out_tile, top, N, INT4: gl.constexpr, PART: gl.constexpr):
    """Store sums [BN, PART], scaled by row for int8, to shared memory."""
    if not INT4:
        n = gl.minimum(top + gl.arange(0, BN, layout=gl.SliceLayout(1, sums_layout(PART))), N - 1)
        sums *= gl.load(scale + n).to(gl.float32).expand_dims(1)
    out_tile.store(sums.to(out_tile.dtype).permute((1, 0)))


@gluon.jit
def store_tile(sums, more, scale, out, out_tiles, row, top, N, INT4: gl.constexpr, BM: gl.constexpr):
    """Start the copy of a finished tile to `out`, once the copy of the previous one has left `out_tiles`."""
    A: gl.constexpr = tile_parts(BM)[0]
    B: gl.constexpr = tile_parts(BM)[1]
    tma.store_wait(0)
    gl.thread_barrier()
    store_scaled(sums, scale, out_tiles[0], top, N, INT4, A)
    if B:
        store_scaled(more, scale, out_tiles[1], top, N, INT4, B)
    fence_async_shared()
    tma.async_copy_shared_to_global(out[0], [row, top], out_tiles[0])
    if B:
        tma.async_copy_shared_to_global(out[1], [row + A, top], out_tiles[1])


@gluon.jit
def multiply_slot(weights, rings, slot, sums, more, BM: gl.constexpr):
    """Issue sums += weights [BN, 64] times a slot of the rings. Waits for earlier products, not for these.

    The larger part is issued last: while it runs, the weights of the next half are expanded. Weights must not be
    loop-carried: the compiler would reuse their registers for the next ones while products still read them.
    """
    B: gl.constexpr = tile_parts(BM)[1]
    if B:
        same = gl.convert_layout(weights, weights_layout(B), assert_trivial=True)
        more = warpgroup_mma(same, rings[1].index(slot).permute((1, 0)), more, is_async=True)
        sums = warpgroup_mma(weights, rings[0].index(slot).permute((1, 0)), sums, is_async=True)
        return warpgroup_mma_wait(2, deps=[sums, more])
    else:
        sums = warpgroup_mma(weights, rings[0].index(slot).permute((1, 0)), sums, is_async=True)
        return warpgroup_mma_wait(1, deps=[sums]), more


@gluon.jit
def consume(
    rings, ready, free, share_written, w, scale, out, out_tiles, shares, T, N, K, shared, sharers,
    INT4: gl.constexpr, GROUP: gl.constexpr, BM: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """Consumer warps: expand, multiply, and store this program's tiles, or its share of another program's tile."""
    A: gl.constexpr = tile_parts(BM)[0]
    B: gl.constexpr = tile_parts(BM)[1]
    BFLOAT16: gl.constexpr = rings[0].dtype == gl.bfloat16
    blocks = (K + 127) // 128
    row_blocks = (T + BM - 1) // BM
    whole_tiles, whole, items, range_index, begin, end = program_work(T, N, K, shared, sharers, BM)
    slot = 0
    phase = 0
    tile, first, last = item_range(0, whole_tiles, whole, begin, end, blocks)
    words, scales = load_packed(w, scale, first, tile // row_blocks * BN, N, INT4, GROUP, A)
    gdc_wait()
    for item in range(items):
        tile, first, last = item_range(item, whole_tiles, whole, begin, end, blocks)
        top = tile // row_blocks * BN
        sums = gl.zeros((BN, A), gl.float32, layout=sums_layout(A))
        more = gl.zeros((BN, B), gl.float32, layout=sums_layout(B)) if B else 0
        for block in range(first, last):
            next_block = gl.minimum(block + 1, last - 1)
            next_words, next_scales = load_packed(w, scale, next_block, top, N, INT4, GROUP, A)
            rows = to_rows(words, INT4, A)
            for half in gl.static_range(2):
                weights = expand_half(rows, scales[2 * half], scales[2 * half + 1], half, INT4, A, BFLOAT16)
                mbarrier.wait(ready.index(slot), phase)
                sums, more = multiply_slot(weights, rings, slot, sums, more, BM)
                mbarrier.arrive(free.index(previous_slot(slot, SLOTS)), pred=(half == 1) | (block > first))
                slot, phase = next_slot(slot, phase, SLOTS)
            words = next_words
            scales = next_scales
        next_tile, next_first, _ = item_range(gl.minimum(item + 1, items - 1), whole_tiles, whole, begin, end, blocks)
        words, scales = load_packed(w, scale, next_first, next_tile // row_blocks * BN, N, INT4, GROUP, A)
        if B:
            sums, more = warpgroup_mma_wait(0, deps=[sums, more])
        else:
            sums = warpgroup_mma_wait(0, deps=[sums])
        mbarrier.arrive(free.index(previous_slot(slot, SLOTS)))
        if first > 0:
            share = shares + range_index.to(gl.int64) * (BN * BM)
            store_share(sums, share, A)
            if B:
                store_share(more, share + BN * A, B)
            gl.thread_barrier()
            mbarrier.arrive(share_written)
        else:
            if last < blocks:
                others = range_owning((tile - whole_tiles + 1) * blocks - 1, shared, sharers, blocks) - range_index
                sums, more, slot, phase = add_shares(sums, more, others, rings, ready, free, slot, phase, BM, SLOTS)
            store_tile(sums, more, scale, out, out_tiles, tile % row_blocks * BM, top, N, INT4, BM)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["T", "N", "K", "shared", "sharers"])
def wide_product(
    x, second_x, w, scale, out, second_out, shares, share_boxes, second_share_boxes, arrived, T, N, K, shared, sharers,
    INT4: gl.constexpr, GROUP: gl.constexpr, BM: gl.constexpr,
):  # fmt: skip
    """``x W^T`` by persistent programs; the last `shared` tiles are divided into ranges for `sharers` of them.

    A tile has a first part of A activations and a second of B, or none (`tile_parts`). Arguments `second_…` are the TMA
    descriptors for the second part, or None.

    x: descriptor of [T, K] for boxes [A, 64] ([B, 64]); out: of [T, N] for boxes [A, BN] ([B, BN]).
    w: see `quantlab.runtime.cuda.layout`, two words in each int32; scale: [K / g, N] of x's dtype (INT4) or [N].
    shares: float32 scratch, one tile for each range, [sharers * BN * BM / 32, 32]; share_boxes: its descriptor for
    boxes [A, 32] ([B, 32]).
    arrived: [sharers] int32 counters, one for each range, zero before and after.
    """
    gdc_launch_dependents()
    A: gl.constexpr = tile_parts(BM)[0]
    B: gl.constexpr = tile_parts(BM)[1]
    SLOTS: gl.constexpr = RING_ROWS // BM
    ring = gl.allocate_shared_memory(x.dtype, (SLOTS, A, 64), x.layout)
    out_tile = gl.allocate_shared_memory(x.dtype, (A, BN), out.layout)
    if B:
        rings = (ring, gl.allocate_shared_memory(x.dtype, (SLOTS, B, 64), x.layout))
        out_tiles = (out_tile, gl.allocate_shared_memory(x.dtype, (B, BN), out.layout))
    else:
        rings = (ring, ring)
        out_tiles = (out_tile, out_tile)
    ready = gl.allocate_shared_memory(gl.int64, (SLOTS, 1), mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, (SLOTS, 1), mbarrier.MBarrierLayout())
    share_written = gl.allocate_shared_memory(gl.int64, (1,), mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(ready.index(slot), count=1)
        mbarrier.init(free.index(slot), count=1)
    mbarrier.init(share_written, count=1)
    gl.warp_specialize(
        [
            (
                consume,
                (rings, ready, free, share_written, w, scale, (out, second_out), out_tiles, shares, T, N, K, shared, sharers,
                 INT4, GROUP, BM, SLOTS),
            ),
            (
                produce,
                ((x, second_x), (share_boxes, second_share_boxes), rings, ready, free, share_written, w, arrived, T, N, K, shared, sharers,
                 INT4, BM, SLOTS),
            ),
        ],
        [1],
        [32],
    )  # fmt: skip
