"""The product of many rows of activations with a packed matrix on GPUs of compute capability 9, written in Gluon.

At many tokens a product costs arithmetic, and the tensor cores must never wait: neither for activations, nor for the
integers to be expanded. So warps have roles. One warp (`fetch`) has the copy engine bring activations, half a block of
columns at a time, into a ring of places in shared memory. Eight warps (`consume`) expand and multiply: each four own 64
rows of the matrix, read the words of their part straight into registers, as they lie, a block ahead
(`quantlab.runtime.cuda.hopper_words`), and expand half a block while the tensor cores still multiply the half before. Of the
cycles of such a program between the first and the last block, tensor cores are busy in 97 %.

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

from quantlab.runtime.cuda.hopper_words import BN, expanded, in_rows, packed, sums_layout

RING: gl.constexpr = gl.constexpr(1280)
"""Rows of 64 activations in shared memory: 160 KB, which with a tile of results of 256 activations is all there is."""
QUARTERS: gl.constexpr = gl.constexpr(4)
"""Places of the ring that the sums of a tile take, and …"""
QUARTER: gl.constexpr = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2))
"""… how they lie there: [BM, 32] float32."""

SEND_FOR: gl.constexpr = gl.constexpr("""{ .reg .pred one; elect.sync _|one, 0xffffffff;
@one cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }""")

UNTIL: gl.constexpr = gl.constexpr("""{ .reg .pred less; .reg .u32 seen;
look: ld.relaxed.gpu.global.u32 seen, [$1]; setp.lt.u32 less, seen, $2; @less bra look;
bar.warp.sync 0xffffffff; fence.acq_rel.gpu; fence.proxy.async.global; mov.u32 $0, 0; }""")
"""Wait until the number at $1 is not less than $2; what others wrote before can then be copied, and the number be set."""


def boxes(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A matrix as the copy engine reads and writes it, in boxes of rows and columns."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8 * matrix.element_size(), rank=2)
    return TensorDescriptor.from_tensor(matrix, [rows, columns], layout)


@gluon.jit
def work(T, N, K, shared, sharers, BM: gl.constexpr):
    """The items of this program: how many tiles it takes whole, how many in all, and its run of the shared tiles' blocks.

    The first programs have the last runs. So each waits only for shares of programs that begin before it does: GPUs give
    multiprocessors to programs in their order, though CUDA does not promise it.
    """
    blocks = (K + 127) // 128
    program = gl.program_id(0)
    run = sharers - 1 - program
    begin = gl.maximum(run, 0) * (shared * blocks) // sharers
    end = gl.maximum(run + 1, 0) * (shared * blocks) // sharers
    whole_tiles = (N + BN - 1) // BN * ((T + BM - 1) // BM) - shared
    whole = (gl.maximum(whole_tiles - program, 0) + gl.num_programs(0) - 1) // gl.num_programs(0)
    met = gl.where(end > begin, (end + blocks - 1) // blocks - begin // blocks, 0)
    return whole_tiles, whole, whole + met, run, begin, end


@gluon.jit
def run_of(unit, shared, sharers, blocks):
    """The run that block `unit` is in, all blocks of the shared tiles counted one after the other."""
    return ((unit + 1) * sharers - 1) // (shared * blocks)


@gluon.jit
def item_of(item, whole_tiles, whole, begin, end, blocks):
    """Tile of an item, and its blocks `first` to `last`."""
    met = begin // blocks + item - whole
    is_whole = item < whole
    tile = gl.where(is_whole, gl.program_id(0) + item * gl.num_programs(0), whole_tiles + met)
    first = gl.where(is_whole, 0, gl.maximum(begin - met * blocks, 0))
    last = gl.where(is_whole, blocks, gl.minimum(end - met * blocks, blocks))
    return tile, first, last


@gluon.jit
def after(place, phase, PLACES: gl.constexpr):
    """The next place of the ring, and the phase its barriers are in."""
    wraps = place == PLACES - 1
    return gl.where(wraps, 0, place + 1), gl.where(wraps, phase ^ 1, phase)


@gluon.jit
def fetch(
    x, ring, ready, free, handed, w, partial, arrived, T, N, K, shared, sharers,
    INT4: gl.constexpr, BM: gl.constexpr, PLACES: gl.constexpr,
):  # fmt: skip
    """Have activations copied, 64 columns at a time, to each place of the ring as soon as it is free.

    The words of the same block are sent for: they come to the second-level cache before `consume` asks for them. Shares of a
    tile go the same way: when `consume` has left one, its arrival is counted; where all are to be added, they are copied.
    """
    PAIRS: gl.constexpr = 16 if INT4 else 32
    blocks = (K + 127) // 128
    slabs = (N + 63) // 64
    row_blocks = (T + BM - 1) // BM
    whole_tiles, whole, items, run, begin, end = work(T, N, K, shared, sharers, BM)
    gdc_wait()
    place = 0
    phase = 1  # the phase before the first has passed: at first all places are free
    starter = -1  # the run that begins the tile of which a share is left and not yet counted
    for item in range(items):
        tile, first, last = item_of(item, whole_tiles, whole, begin, end, blocks)
        row = tile % row_blocks * BM
        slab = tile // row_blocks * (BN // 64)
        for block in range(first, last):
            words = w + (block.to(gl.int64) * slabs + slab) * (64 * PAIRS)
            size = gl.minimum(slabs - slab, BN // 64) * (256 * PAIRS)
            gl.inline_asm_elementwise(SEND_FOR, "=r,l,r", [words, size], dtype=gl.int32, is_pure=False, pack=1)
            for half in gl.static_range(2):
                mbarrier.wait(free.index(place), phase)
                mbarrier.expect(ready.index(place), BM * 128)
                column = block * 128 + half * 64
                tma.async_copy_global_to_shared(x, [row, column], ready.index(place), ring.index(place))
                place, phase = after(place, phase, PLACES)
            if (starter >= 0) & (block >= gl.minimum(first + 3, last - 1)):  # its sums have been written meanwhile
                mbarrier.wait(handed, 0)
                gl.atomic_add(arrived + starter, 1, sem="release")
                starter = -1
        unit = (tile - whole_tiles) * blocks
        if first > 0:
            starter = run_of(unit, shared, sharers, blocks)
        elif last < blocks:
            others = run_of(unit + blocks - 1, shared, sharers, blocks) - run
            gl.inline_asm_elementwise(UNTIL, "=r,l,r", [arrived + run, others], dtype=gl.int32, is_pure=False, pack=1)
            gl.store(arrived + run, 0)
            for quarter in range((run + 1) * QUARTERS, (run + 1 + others) * QUARTERS):
                mbarrier.wait(free.index(place), phase)
                mbarrier.expect(ready.index(place), BM * 128)
                target = ring.index(place)._reinterpret(gl.float32, (BM, 32), QUARTER)
                tma.async_copy_global_to_shared(partial, [quarter * BM, 0], ready.index(place), target)
                place, phase = after(place, phase, PLACES)
    if starter >= 0:
        mbarrier.wait(handed, 0)
        gl.atomic_add(arrived + starter, 1, sem="release")


@gluon.jit
def in_quarters(sums, BM: gl.constexpr):
    """Sums [BN, BM] -> their quarters [BM, 32], 16 bytes of a row a thread; nothing moves."""
    cells = sums.reshape((8, 2, 8, BM // 8, 4, 2)).permute((3, 0, 2, 4, 1, 5)).reshape((2, 2, BM, 32))
    even, odd = gl.split(cells.permute((2, 3, 0, 1)))
    q0, q2 = gl.split(even)
    q1, q3 = gl.split(odd)
    return q0, q1, q2, q3


@gluon.jit
def of_quarters(q0, q1, q2, q3, BM: gl.constexpr):
    """The inverse of `in_quarters`."""
    cells = gl.join(gl.join(q0, q2), gl.join(q1, q3)).permute((2, 3, 0, 1)).reshape((BM // 8, 8, 8, 4, 2, 2))
    sums = cells.permute((1, 4, 2, 0, 3, 5)).reshape((BN, BM))
    return gl.convert_layout(sums, sums_layout(BM), assert_trivial=True)


@gluon.jit
def leave(sums, shares, run, handed, BM: gl.constexpr):
    """Write the sums [BN, BM] of a tile's share where `fetch` of another program finds them."""
    quarters = in_quarters(sums, BM)
    row = gl.arange(0, BM, layout=gl.SliceLayout(1, quarters[0].type.layout))
    column = gl.arange(0, 32, layout=gl.SliceLayout(0, quarters[0].type.layout))
    first = shares + run.to(gl.int64) * (BN * BM)
    for quarter in gl.static_range(QUARTERS):
        gl.store(first + quarter * (BM * 32) + row[:, None] * 32 + column[None, :], quarters[quarter])
    gl.thread_barrier()
    mbarrier.arrive(handed)


@gluon.jit
def plus(quarter, ring, ready, free, place, phase, BM: gl.constexpr, PLACES: gl.constexpr):
    """A quarter of sums with that of a share in a place of the ring; and the next place.

    Added by what the compiler takes for a side effect: else it reads all quarters first, for which there are no registers.
    """
    mbarrier.wait(ready.index(place), phase)
    share = ring.index(place)._reinterpret(gl.float32, (BM, 32), QUARTER).load(quarter.type.layout)
    both = gl.inline_asm_elementwise(
        "add.f32 $0, $1, $2;", "=f,f,f", [quarter, share], gl.float32, is_pure=False, pack=1
    )
    fence_async_shared()  # the share has been read before the copy engine writes here again
    gl.thread_barrier()
    mbarrier.arrive(free.index(place))
    place, phase = after(place, phase, PLACES)
    return both, place, phase


@gluon.jit
def collect(sums, others, ring, ready, free, place, phase, BM: gl.constexpr, PLACES: gl.constexpr):
    """The sums [BN, BM] of a tile with all `others` shares, which are in the ring one after the other; and the next place."""
    q0, q1, q2, q3 = in_quarters(sums, BM)
    for _ in range(others):
        q0, place, phase = plus(q0, ring, ready, free, place, phase, BM, PLACES)
        q1, place, phase = plus(q1, ring, ready, free, place, phase, BM, PLACES)
        q2, place, phase = plus(q2, ring, ready, free, place, phase, BM, PLACES)
        q3, place, phase = plus(q3, ring, ready, free, place, phase, BM, PLACES)
    return of_quarters(q0, q1, q2, q3, BM), place, phase


@gluon.jit
def write(sums, scale, out, out_tile, row, top, N, INT4: gl.constexpr, BM: gl.constexpr):
    """Have a tile copied to its place, int8 scaled, once the one before has left `out_tile`."""
    if not INT4:
        n = gl.minimum(top + gl.arange(0, BN, layout=gl.SliceLayout(1, sums_layout(BM))), N - 1)
        sums *= gl.load(scale + n).to(gl.float32).expand_dims(1)
    tma.store_wait(0)
    gl.thread_barrier()
    out_tile.store(sums.to(out_tile.dtype).permute((1, 0)))
    fence_async_shared()
    tma.async_copy_shared_to_global(out, [row, top], out_tile)


@gluon.jit
def consume(
    ring, ready, free, handed, w, scale, out, out_tile, shares, T, N, K, shared, sharers,
    INT4: gl.constexpr, GROUP: gl.constexpr, BM: gl.constexpr, PLACES: gl.constexpr,
):  # fmt: skip
    """Expand and multiply; write the tiles of this program, or leave its share of a tile that another begins."""
    BFLOAT16: gl.constexpr = ring.dtype == gl.bfloat16
    blocks = (K + 127) // 128
    row_blocks = (T + BM - 1) // BM
    whole_tiles, whole, items, run, begin, end = work(T, N, K, shared, sharers, BM)
    place = 0
    phase = 0
    tile, first, last = item_of(0, whole_tiles, whole, begin, end, blocks)
    words, s0, s1, s2, s3 = packed(w, scale, first, tile // row_blocks * BN, N, INT4, GROUP, BM)
    gdc_wait()
    for item in range(items):
        tile, first, last = item_of(item, whole_tiles, whole, begin, end, blocks)
        top = tile // row_blocks * BN
        sums = gl.zeros((BN, BM), gl.float32, layout=sums_layout(BM))
        for block in range(first, last):
            next_block = gl.minimum(block + 1, last - 1)
            next_words, n0, n1, n2, n3 = packed(w, scale, next_block, top, N, INT4, GROUP, BM)
            rows = in_rows(words, INT4, BM)
            left = expanded(rows, s0, s1, 0, INT4, BM, BFLOAT16)
            mbarrier.wait(ready.index(place), phase)
            flying = warpgroup_mma(left, ring.index(place).permute((1, 0)), sums, is_async=True)
            sums = warpgroup_mma_wait(1, deps=[flying])
            mbarrier.arrive(free.index(gl.where(place == 0, PLACES - 1, place - 1)), pred=block > first)
            left_place = place
            place, phase = after(place, phase, PLACES)
            right = expanded(rows, s2, s3, 1, INT4, BM, BFLOAT16)
            mbarrier.wait(ready.index(place), phase)
            flying = warpgroup_mma(right, ring.index(place).permute((1, 0)), sums, is_async=True)
            sums = warpgroup_mma_wait(1, deps=[flying])
            mbarrier.arrive(free.index(left_place))
            place, phase = after(place, phase, PLACES)
            words = next_words
            s0 = n0
            s1 = n1
            s2 = n2
            s3 = n3
        next_tile, next_first, _ = item_of(gl.minimum(item + 1, items - 1), whole_tiles, whole, begin, end, blocks)
        words, s0, s1, s2, s3 = packed(w, scale, next_first, next_tile // row_blocks * BN, N, INT4, GROUP, BM)
        sums = warpgroup_mma_wait(0, deps=[sums])
        mbarrier.arrive(free.index(gl.where(place == 0, PLACES - 1, place - 1)))
        if first > 0:
            leave(sums, shares, run, handed, BM)
        else:
            if last < blocks:
                others = run_of((tile - whole_tiles + 1) * blocks - 1, shared, sharers, blocks) - run
                sums, place, phase = collect(sums, others, ring, ready, free, place, phase, BM, PLACES)
            write(sums, scale, out, out_tile, tile % row_blocks * BM, top, N, INT4, BM)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["T", "N", "K", "shared", "sharers"])
def wide_product(
    x, w, scale, out, partial, shares, arrived, T, N, K, shared, sharers,
    INT4: gl.constexpr, GROUP: gl.constexpr, BM: gl.constexpr,
):  # fmt: skip
    """``x W^T`` by programs that stay; the last `shared` tiles are cut into equal runs for `sharers` of them.

    x: descriptor of [T, K] for boxes [BM, 64]; out: of [T, N] for boxes [BM, BN].
    w: see `quantlab.runtime.cuda.layout`, two words in each int32; scale: [K / g, N] of x's dtype (INT4) or [N].
    shares: float32 scratch for a tile of each sharer, [sharers * BN * BM / 32, 32]; partial: its descriptor for boxes [BM, 32].
    arrived: [sharers] int32, by run, zero before and after.
    """
    gdc_launch_dependents()
    PLACES: gl.constexpr = RING // BM
    ring = gl.allocate_shared_memory(x.dtype, (PLACES, BM, 64), x.layout)
    out_tile = gl.allocate_shared_memory(x.dtype, (BM, BN), out.layout)
    ready = gl.allocate_shared_memory(gl.int64, (PLACES, 1), mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, (PLACES, 1), mbarrier.MBarrierLayout())
    handed = gl.allocate_shared_memory(gl.int64, (1,), mbarrier.MBarrierLayout())
    for place in gl.static_range(PLACES):
        mbarrier.init(ready.index(place), count=1)
        mbarrier.init(free.index(place), count=1)
    mbarrier.init(handed, count=1)
    gl.warp_specialize(
        [
            (
                consume,
                (ring, ready, free, handed, w, scale, out, out_tile, shares, T, N, K, shared, sharers,
                 INT4, GROUP, BM, PLACES),
            ),
            (
                fetch,
                (x, ring, ready, free, handed, w, partial, arrived, T, N, K, shared, sharers, INT4, BM, PLACES),
            ),
        ],
        [1],
        [32],
    )  # fmt: skip
