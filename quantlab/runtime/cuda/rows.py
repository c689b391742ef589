"""What is done to each row of activations between the products."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

SMALLEST: tl.constexpr = tl.constexpr(2.0**-120)
"""The least scale of a token."""


@triton.jit
def quantize_tokens(x, q, scale, K, WIDTH: tl.constexpr, CHAINED: tl.constexpr):
    """Each row of x [T, K] on its own int8 grid, ``scale = max|x| / 127``: q [T, K] int8, scale [T] float32.

    As `quantlab.runtime.int8.quantize_tokens`: in float32, ties to even, a row that is not finite gets an infinite scale. CHAINED lets
    the product that reads these start.
    """
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, WIDTH)
    if CHAINED:
        gdc_launch_dependents()
    values = tl.load(x + row * K + k, mask=k < K, other=0).to(tl.float32)
    size = tl.where(values == values, tl.abs(values), float("inf"))
    s = tl.div_rn(tl.max(size, axis=0), 127.0)
    s = tl.where(s < SMALLEST, SMALLEST, s)
    shifted = tl.div_rn(values, s) + 12582912.0  # 1.5 * 2^23: adding it rounds to an integer, ties to even
    tl.store(q + row * K + k, (shifted - 12582912.0).to(tl.int8), mask=k < K)
    tl.store(scale + row, s)


@triton.jit
def combine(rows, weights, out, H, TOP_K: tl.constexpr, BH: tl.constexpr):
    """``out[t] = sum_k weights[t, k] * rows[t * TOP_K + k]``, in float32: rows [T * TOP_K, H], weights [T, TOP_K], out [T, H]."""
    t = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    total = tl.zeros((BH,), tl.float32)
    for k in tl.static_range(TOP_K):
        row = tl.load(rows + (t * TOP_K + k) * H + h, mask=h < H, other=0).to(tl.float32)
        total += row * tl.load(weights + t * TOP_K + k).to(tl.float32)
    tl.store(out + t * H + h, total.to(out.dtype.element_ty), mask=h < H)


@triton.jit
def rms_norm(x, weight, out, K, epsilon, WIDTH: tl.constexpr):
    """``weight * (x / sqrt(mean(x^2) + epsilon))`` of each row: float32, rounded to x's dtype before the weight."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, WIDTH)
    values = tl.load(x + row * K + k, mask=k < K, other=0).to(tl.float32)
    scaled = values * tl.rsqrt(tl.sum(values * values, axis=0) / K + epsilon)
    factor = tl.load(weight + k, mask=k < K, other=0).to(tl.float32)
    tl.store(
        out + row * K + k, (factor * scaled.to(x.dtype.element_ty).to(tl.float32)).to(x.dtype.element_ty), mask=k < K
    )
