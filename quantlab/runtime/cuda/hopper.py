"""The product of many rows of activations with a packed matrix on GPUs of compute capability 9, written in Gluon.

At many tokens a product costs arithmetic, and the tensor cores must never wait: neither for activations, nor for the
integers to be expanded. So warps have roles. One warp (`fetch`) has the copy engine bring activations, half a block of
columns at a time, into a ring of places in shared memory. Eight warps (`consume`) expand and multiply: each four own 64
rows of the matrix, read the words of their part straight into registers, as they lie, a block ahead
(`quantlab.runtime.cuda.hopper_words`), and expand half a block while the tensor cores still multiply the half before. With
tiles of 256 activations products take 93 % of the cycles of such a program, beginning and end included, with tiles of 192
85 %, of 128 75 %: behind fewer products expanding is hidden less.

As in `quantlab.runtime.cuda.kernels` the product is transposed, ``W x^T``, since weights can come from registers only on the
left, and launches overlap: there is no room for a second program beside one, but the next takes the place of the first that
ends, and reads its first words while others still write. Programs stay, one per multiprocessor. First each takes whole
tiles; the last tiles, too few for all programs, are cut into equal runs of blocks of columns. Where a run begins inside a
tile, its program leaves its share in memory; the program whose run begins with the tile has all shares copied into the ring,
after its activations, and adds them.

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
"""Rows of 64 activations in shared memory, at most: 168 KB, which with results of 192 or 256 tokens is nearly all there is."""
PREFETCH: gl.constexpr = gl.constexpr("""{ .reg .pred one; elect.sync _|one, 0xffffffff;
@one cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }""")


def descriptors(matrix: Tensor, tokens: int, columns: int) -> tuple[TensorDescriptor, TensorDescriptor | None]:
    """A matrix as the copy engine reads and writes it, in boxes of columns and as many rows as both parts of a tile have."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8 * matrix.element_size(), rank=2)
    first, second = tile_parts(tokens)
    second_descriptor = TensorDescriptor.from_tensor(matrix, [second, columns], layout) if second else None
    return TensorDescriptor.from_tensor(matrix, [first, columns], layout), second_descriptor


@gluon.jit
def copy_boxes(sources, row, second_row, column, slots, ready, free, phase, BM: gl.constexpr):
    """Have a box of each source copied to its place once that is free; the second only if tiles have a second part."""
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
    """Have activations copied, 64 columns at a time, to each place of the rings as soon as it is free.

    The words of the same block are sent for: they come to the second-level cache before `consume` asks for them. Shares of a
    tile go the same way: when `consume` has left one, its arrival is counted; where all are to be added, they are copied.
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
    phase = 1  # the phase before the first has passed: at first all places are free
    owner = -1  # the run that begins the tile of which a share is left and not yet counted
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
            if (owner >= 0) & (block >= gl.minimum(first + 3, last - 1)):  # its sums have been written meanwhile
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
    """Sums [BN, PART], int8 scaled, to shared memory."""
    if not INT4:
        n = gl.minimum(top + gl.arange(0, BN, layout=gl.SliceLayout(1, sums_layout(PART))), N - 1)
        sums *= gl.load(scale + n).to(gl.float32).expand_dims(1)
    out_tile.store(sums.to(out_tile.dtype).permute((1, 0)))


@gluon.jit
def store_tile(sums, more, scale, out, out_tiles, row, top, N, INT4: gl.constexpr, BM: gl.constexpr):
    """Have a tile copied to its place, int8 scaled, once the one before has left `out_tiles`."""
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
    """Weights [BN, 64] times a place of the rings, added to the sums; products begun before have ended, these have not.

    The larger part comes last: while its last product runs, weights are expanded for the next. Weights must not be carried over
    a loop: that merges their registers with those of the next while products still read them.
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
    """Expand and multiply; write the tiles of this program, or leave its share of a tile that another begins."""
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
    """``x W^T`` by programs that stay; the last `shared` tiles are cut into equal runs for `sharers` of them.

    Tiles have a part of A activations and one of B or none (`parts_of`), for which `second_` descriptors are, or None.

    x: descriptor of [T, K] for boxes [A, 64], and [B, 64]; out: of [T, N] for boxes [A, BN], and [B, BN].
    w: see `quantlab.runtime.cuda.layout`, two words in each int32; scale: [K / g, N] of x's dtype (INT4) or [N].
    shares: float32 scratch for a tile of each run, [sharers * BN * BM / 32, 32]; left: of it for boxes [A, 32], and [B, 32].
    arrived: [sharers] int32, by run, zero before and after.
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
