"""What of the work a program of `kernels.run_product` takes, and which rows of activations a block of rows stands for."""

import triton
import triton.language as tl


@triton.jit
def range_start(program, per_program, remainder):
    """Where the run of a program starts, if the first `rest` programs have one unit more than `per_program`."""
    return program * per_program + tl.minimum(program, remainder)


@triton.jit
def program_owning(unit, per_program, remainder):
    """Whose run a unit is in: the inverse of `run_start`."""
    units_of_longer = remainder * (per_program + 1)
    return tl.where(
        unit < units_of_longer, unit // (per_program + 1), remainder + (unit - units_of_longer) // per_program
    )


@triton.jit
def block_rows(block_first, block_end, block, BM: tl.constexpr, ALONE: tl.constexpr):
    """The sorted positions [BM] from the beginning of a block of rows on, and which of them are its own."""
    first = block if ALONE else tl.load(block_first + block)
    position = first + tl.arange(0, BM)
    return position, position < (block + 1 if ALONE else tl.load(block_end + block))


@triton.jit
def row_maps(order, position, TOP_K: tl.constexpr, ROUTED: tl.constexpr, ALONE: tl.constexpr):
    """Which rows of x and of the result sorted positions stand for; see `kernels.run_product`."""
    if not ROUTED:
        return position.to(tl.int64), position
    elif ALONE:
        return (position // TOP_K if TOP_K else position).to(tl.int64), position
    elif TOP_K:
        return (tl.load(order + position) // TOP_K).to(tl.int64), position
    else:
        return position.to(tl.int64), tl.load(order + position)
