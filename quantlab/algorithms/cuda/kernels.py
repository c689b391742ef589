"""Triton kernels of `blocks`.

Rows are independent, so each program processes some rows of a block through all of its columns in registers. A column
is extracted by a masked sum.

Legend: C columns of the block, R rows of a program; tensors are [B, C, N] and contiguous.
"""

import triton
import triton.language as tl


@triton.jit
def nearest(x, low, high):
    """The nearest integer within limits, ties to even: adding 1.5 * 2^23 to a float32 rounds away its fraction."""
    x = tl.minimum(tl.maximum(x, low), high)
    return (x + 12582912.0) - 12582912.0


@triton.jit
def round_columns(
    target,
    step,
    U,
    removed,
    q,
    errors,
    columns,
    rows,
    low,
    high,
    MASKED: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
):
    """Algorithm 1 of GPTQ within a block: round each column and propagate its error to the later columns."""
    batch = tl.program_id(1).to(tl.int64)
    c, r = tl.arange(0, C), tl.program_id(0) * R + tl.arange(0, R)
    inside = (c < columns)[:, None] & (r < rows)[None, :]
    at = batch * columns * rows + c[:, None] * rows + r[None, :]
    V = tl.load(target + at, mask=inside, other=0.0)
    s = tl.load(step + at, mask=inside, other=1.0)
    gone = tl.load(removed + at, mask=inside, other=0).to(tl.float32) if MASKED else tl.zeros((C, R), tl.float32)
    chosen, lost = tl.zeros((C, R), tl.float32), tl.zeros((C, R), tl.float32)
    for j in range(columns):
        here = (c == j)[:, None]
        w = tl.sum(tl.where(here, V, 0.0), 0)
        width = tl.sum(tl.where(here, s, 0.0), 0)
        best = nearest(tl.div_rn(w, width), low, high)
        if MASKED:
            best = tl.where(tl.sum(tl.where(here, gone, 0.0), 0) > 0, 0.0, best)
        u = tl.load(U + batch * columns * columns + j * columns + c, mask=c < columns, other=0.0)
        error = tl.div_rn(w - best * width, tl.sum(tl.where(c == j, u, 0.0), 0))
        V -= tl.where(c > j, u, 0.0)[:, None] * error[None, :]
        chosen = tl.where(here, best[None, :], chosen)
        lost = tl.where(here, error[None, :], lost)
    tl.store(q + at, chosen.to(tl.int8), mask=inside)
    tl.store(errors + at, lost, mask=inside)


@triton.jit
def descend_columns(
    residual,
    step,
    H,
    removed,
    q,
    moved,
    columns,
    rows,
    low,
    high,
    MASKED: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
):
    """Set the integers of each column to their optimum in turn, and update the residuals of the later columns."""
    batch = tl.program_id(1).to(tl.int64)
    c, r = tl.arange(0, C), tl.program_id(0) * R + tl.arange(0, R)
    inside = (c < columns)[:, None] & (r < rows)[None, :]
    at = batch * columns * rows + c[:, None] * rows + r[None, :]
    left = tl.load(residual + at, mask=inside, other=0.0)
    s = tl.load(step + at, mask=inside, other=1.0)
    before = tl.load(q + at, mask=inside, other=0).to(tl.float32)
    gone = tl.load(removed + at, mask=inside, other=0).to(tl.float32) if MASKED else tl.zeros((C, R), tl.float32)
    chosen = before
    for j in range(columns):
        here = (c == j)[:, None]
        width = tl.sum(tl.where(here, s, 0.0), 0)
        old = tl.sum(tl.where(here, before, 0.0), 0)
        h = tl.load(H + batch * columns * columns + c * columns + j, mask=c < columns, other=0.0)
        gain = tl.div_rn(tl.sum(tl.where(here, left, 0.0), 0), tl.sum(tl.where(c == j, h, 0.0), 0))
        best = nearest(old + tl.div_rn(gain, width), low, high)
        if MASKED:
            best = tl.where(tl.sum(tl.where(here, gone, 0.0), 0) > 0, 0.0, best)
        change = (best - old) * width
        left -= tl.where(c > j, h, 0.0)[:, None] * change[None, :]
        chosen = tl.where(here, best[None, :], chosen)
    tl.store(q + at, chosen.to(tl.int8), mask=inside)
    tl.store(moved + at, (chosen - before) * s, mask=inside)
