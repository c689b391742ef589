"""Stream-K for `quantlab.runtime.cuda.hopper`: the work of each program, and the reduction of shared tiles.

The last tiles are divided into equal ranges of blocks of columns. Where a range begins inside a tile, its program
writes its share of the sums to memory. The program whose range begins with the tile has all shares copied into the
ring, after its activations, and adds them.

Legend: N rows (outputs), K columns (inputs), T rows of activations; tiles of BN = 128 rows of the matrix and BM of
activations, in one or two parts of PART of them (`quantlab.runtime.cuda.hopper_unpack.tile_parts`); blocks of 128
columns.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from quantlab.runtime.cuda.hopper_unpack import BN, sums_layout, tile_parts

QUARTERS: gl.constexpr = gl.constexpr(4)
"""Ring slots that the sums of a tile take."""
QUARTER: gl.constexpr = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2))
"""Shared-memory layout of one part of a quarter, [PART, 32] float32."""

WAIT_UNTIL: gl.constexpr = gl.constexpr("""{ .reg .pred less; .reg .u32 seen;
look: ld.relaxed.gpu.global.u32 seen, [$1]; setp.lt.u32 less, seen, $2; @less bra look;
bar.warp.sync 0xffffffff; fence.acq_rel.gpu; fence.proxy.async.global; mov.u32 $0, 0; }""")
"""Spin until the counter at $1 is at least $2. Then data written before the increments may be copied."""


@gluon.jit
def program_work(T, N, K, shared, sharers, BM: gl.constexpr):
    """This program's work items.

    The first programs have the last ranges. So each waits only for shares of programs that start earlier: GPUs schedule
    programs in order, though CUDA does not guarantee it.

    Returns:
        The number of unshared tiles of the product; the number of tiles that this program computes whole; the number of
        its items, which also include its parts of shared tiles; the index of its range; the range [begin, end) of
        shared tiles' blocks.
    """
    blocks = (K + 127) // 128
    program = gl.program_id(0)
    range_index = sharers - 1 - program
    begin = gl.maximum(range_index, 0) * (shared * blocks) // sharers
    end = gl.maximum(range_index + 1, 0) * (shared * blocks) // sharers
    whole_tiles = (N + BN - 1) // BN * ((T + BM - 1) // BM) - shared
    whole = (gl.maximum(whole_tiles - program, 0) + gl.num_programs(0) - 1) // gl.num_programs(0)
    shared_items = gl.where(end > begin, (end + blocks - 1) // blocks - begin // blocks, 0)
    return whole_tiles, whole, whole + shared_items, range_index, begin, end


@gluon.jit
def range_owning(unit, shared, sharers, blocks):
    """The range that contains block `unit`, where the blocks of all shared tiles are numbered consecutively."""
    return ((unit + 1) * sharers - 1) // (shared * blocks)


@gluon.jit
def item_range(item, whole_tiles, whole, begin, end, blocks):
    """The tile of an item, and its blocks [first, last)."""
    shared_tile = begin // blocks + item - whole
    is_whole = item < whole
    tile = gl.where(is_whole, gl.program_id(0) + item * gl.num_programs(0), whole_tiles + shared_tile)
    first = gl.where(is_whole, 0, gl.maximum(begin - shared_tile * blocks, 0))
    last = gl.where(is_whole, blocks, gl.minimum(end - shared_tile * blocks, blocks))
    return tile, first, last


@gluon.jit
def next_slot(slot, phase, SLOTS: gl.constexpr):
    """The next slot of the ring, and the phase of its barriers."""
    wraps = slot == SLOTS - 1
    return gl.where(wraps, 0, slot + 1), gl.where(wraps, phase ^ 1, phase)


@gluon.jit
def previous_slot(slot, SLOTS: gl.constexpr):
    """The previous slot of the ring."""
    return gl.where(slot == 0, SLOTS - 1, slot - 1)


@gluon.jit
def to_quarters(sums, PART: gl.constexpr):
    """Sums [BN, PART] -> four quarters [PART, 32], 16 bytes of a row per thread; no data moves between threads."""
    elements = sums.reshape((8, 2, 8, PART // 8, 4, 2)).permute((3, 0, 2, 4, 1, 5)).reshape((2, 2, PART, 32))
    even, odd = gl.split(elements.permute((2, 3, 0, 1)))
    q0, q2 = gl.split(even)
    q1, q3 = gl.split(odd)
    return q0, q1, q2, q3


@gluon.jit
def from_quarters(q0, q1, q2, q3, PART: gl.constexpr):
    """The inverse of `to_quarters`."""
    elements = gl.join(gl.join(q0, q2), gl.join(q1, q3)).permute((2, 3, 0, 1)).reshape((PART // 8, 8, 8, 4, 2, 2))
    sums = elements.permute((1, 4, 2, 0, 3, 5)).reshape((BN, PART))
    return gl.convert_layout(sums, sums_layout(PART), assert_trivial=True)


@gluon.jit
def as_quarter(slot, PART: gl.constexpr):
    """A slot of a ring, reinterpreted as a quarter [PART, 32] of the sums; unchanged if PART is 0."""
    return slot._reinterpret(gl.float32, (PART, 32), QUARTER) if PART else slot


@gluon.jit
def store_share(sums, share, PART: gl.constexpr):
    """Write one part of a share, sums [BN, PART], to memory; `hopper.produce` of another program copies it."""
    quarters = to_quarters(sums, PART)
    row = gl.arange(0, PART, layout=gl.SliceLayout(1, quarters[0].type.layout))
    column = gl.arange(0, 32, layout=gl.SliceLayout(0, quarters[0].type.layout))
    for quarter in gl.static_range(QUARTERS):
        gl.store(share + quarter * (PART * 32) + row[:, None] * 32 + column[None, :], quarters[quarter])


@gluon.jit
def add_quarter(quarter, slot, PART: gl.constexpr):
    """Add the quarter [PART, 32] of a share in a ring slot to a quarter of the sums.

    The inline assembly is marked impure: otherwise the compiler loads all quarters first and runs out of registers.
    """
    share = as_quarter(slot, PART).load(quarter.type.layout)
    return gl.inline_asm_elementwise(
        "add.f32 $0, $1, $2;", "=f,f,f", [quarter, share], gl.float32, is_pure=False, pack=1
    )


@gluon.jit
def replace_one(four, index: gl.constexpr, value):
    """A tuple of four tensors with one replaced: Gluon cannot assign to an element of a tuple."""
    if index == 0:
        return value, four[1], four[2], four[3]
    elif index == 1:
        return four[0], value, four[2], four[3]
    elif index == 2:
        return four[0], four[1], value, four[3]
    else:
        return four[0], four[1], four[2], value


@gluon.jit
def add_shares(sums, more, others, rings, ready, free, slot, phase, BM: gl.constexpr, SLOTS: gl.constexpr):
    """Add all `others` shares of a tile, which arrive in the rings one after the other, to the sums of both its parts.

    Returns the sums of both parts, the next slot and its phase.
    """
    A: gl.constexpr = tile_parts(BM)[0]
    B: gl.constexpr = tile_parts(BM)[1]
    first = to_quarters(sums, A)
    second = to_quarters(more, B) if B else (0, 0, 0, 0)
    for _ in range(others):
        for quarter in gl.static_range(QUARTERS):
            mbarrier.wait(ready.index(slot), phase)
            first = replace_one(first, quarter, add_quarter(first[quarter], rings[0].index(slot), A))
            if B:
                second = replace_one(second, quarter, add_quarter(second[quarter], rings[1].index(slot), B))
            fence_async_shared()  # the share is read before TMA writes to the slot again
            gl.thread_barrier()
            mbarrier.arrive(free.index(slot))
            slot, phase = next_slot(slot, phase, SLOTS)
    if B:
        more = from_quarters(second[0], second[1], second[2], second[3], B)
    return from_quarters(first[0], first[1], first[2], first[3], A), more, slot, phase
