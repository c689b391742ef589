"""Sort the rows of activations by expert into blocks of one expert each, on the device.

The launches do not depend on the routing: sizes that do are in tensors that the products read. So a step can be
captured in a CUDA graph.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait


@triton.jit
def route(
    index, order, block_expert, block_first, block_end, block_count, R,
    BINS: tl.constexpr, CHUNK: tl.constexpr, BM: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Sort R rows by expert and divide them into blocks of at most BM rows of one expert. One program per expert.

    index: [R], the expert of each row.
    order: [R] int32, the rows sorted by expert; the sort is stable.
    block_expert: int32, the expert of each block; block_first, block_end: int32, the range of its rows in `order`;
    block_count: [1] int32, the number of blocks.
    """
    if CHAINED:
        gdc_wait()
    e = tl.program_id(0)
    bins = tl.arange(0, BINS)
    lane = tl.arange(0, CHUNK)
    counts = tl.zeros((BINS,), tl.int32)
    for r in range(0, R, CHUNK):
        experts = tl.load(index + r + lane, mask=r + lane < R, other=0).to(tl.int32)
        counts += tl.histogram(experts, BINS, mask=r + lane < R)
    before = tl.sum(tl.where(bins < e, counts, 0))
    mine = tl.sum(tl.where(bins == e, counts, 0))
    needed = (counts + BM - 1) // BM
    first_block = tl.sum(tl.where(bins < e, needed, 0))
    for block in range((mine + BM - 1) // BM):
        tl.store(block_expert + first_block + block, e)
        tl.store(block_first + first_block + block, before + block * BM)
        tl.store(block_end + first_block + block, before + tl.minimum((block + 1) * BM, mine))
    if e == 0:
        tl.store(block_count, tl.sum(needed))
    for r in range(0, R, CHUNK):
        chosen = tl.load(index + r + lane, mask=r + lane < R, other=-1).to(tl.int32) == e
        place = before + tl.cumsum(chosen.to(tl.int32), 0) - 1
        tl.store(order + place, r + lane, mask=chosen)
        before += tl.sum(chosen.to(tl.int32))
