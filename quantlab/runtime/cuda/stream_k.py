"""Index arithmetic of `kernels.run_product`: the stream-K range of a program, and the rows of activations in a block of
rows.

Stream-K (Osama et al. 2023, arXiv 2301.03598) divides all work units of a product, the blocks of columns of all its
tiles, into one contiguous range for each program.
"""

import triton
import triton.language as tl


@triton.jit
def range_start(program, per_program, remainder):
    """The first unit of a program's range; the first `remainder` programs have one unit more than `per_program`."""
    return program * per_program + tl.minimum(program, remainder)


@triton.jit
def program_owning(unit, per_program, remainder):
    """The program whose range contains a unit: the inverse of `range_start`."""
    units_of_longer = remainder * (per_program + 1)
    return tl.where(
        unit < units_of_longer, unit // (per_program + 1), remainder + (unit - units_of_longer) // per_program
    )


@triton.jit
def block_rows(block_first, block_end, block, BM: tl.constexpr, ALONE: tl.constexpr):
    """The sorted positions [BM] from the start of a block of rows, and a mask of those that belong to the block."""
    first = block if ALONE else tl.load(block_first + block)
    position = first + tl.arange(0, BM)
    return position, position < (block + 1 if ALONE else tl.load(block_end + block))


@triton.jit
def row_maps(order, position, TOP_K: tl.constexpr, ROUTED: tl.constexpr, ALONE: tl.constexpr):
    """The rows of x and of the result that sorted positions refer to; see `kernels.run_product`."""
    if not ROUTED:
        return position.to(tl.int64), position
    elif ALONE:
        return (position // TOP_K if TOP_K else position).to(tl.int64), position
    elif TOP_K:
        return (tl.load(order + position) // TOP_K).to(tl.int64), position
    else:
        return position.to(tl.int64), tl.load(order + position)
