"""Row-wise kernels between the matrix products: quantization of tokens, weighted sum of expert outputs, RMS norm.

CHAINED: see `quantlab.runtime.cuda.kernels`.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

MIN_SCALE: tl.constexpr = tl.constexpr(2.0**-120)
"""Lower bound of a token's scale."""


@triton.jit
def nan_max(a, b):
    """The larger of two numbers; NaN if either is NaN."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def quantize_tokens(x, q, scale, K, WIDTH: tl.constexpr, CHAINED: tl.constexpr, EARLY: tl.constexpr):
    """Quantize each row of x [T, K] to int8 with ``scale = max|x| / 127``: q [T, K] int8, scale [T] float32.

    Equal to `quantlab.runtime.banks.int8.quantize_tokens`: in float32, ties to even; a row that is not finite gets an
    infinite scale. Quotients are correctly rounded, by Markstein's correction of a product with the reciprocal (IBM J.
    Res. Dev. 34(1), 1990).
    EARLY: the next kernel may launch at once, else after the row has been read.
    """
    if CHAINED and EARLY:
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, WIDTH)
    if CHAINED:
        gdc_wait()
    values = tl.load(x + row * K + k, mask=k < K, other=0).to(tl.float32)
    if CHAINED and not EARLY:
        gdc_launch_dependents()
    s = tl.div_rn(tl.reduce(tl.abs(values), 0, nan_max), 127.0)
    s = tl.where(s == s, tl.maximum(s, MIN_SCALE), float("inf"))
    reciprocal = tl.div_rn(1.0, s)
    quotient = values * reciprocal
    quotient = tl.fma(tl.fma(-quotient, s, values), reciprocal, quotient)
    shifted = (
        quotient + 12582912.0
    )  # adding 1.5 * 2^23 leaves the integer, rounded with ties to even, in the lowest bits
    tl.store(q + row * K + k, shifted.to(tl.int32, bitcast=True).to(tl.int8), mask=k < K)
    tl.store(scale + row, s)


@triton.jit
def combine(
    rows, weights, added, out, H, TOP_K: tl.constexpr, BH: tl.constexpr, ADDED: tl.constexpr, CHAINED: tl.constexpr
):
    """``out[t] = sum_k weights[t, k] * rows[t * TOP_K + k]``, in float32: rows [T * TOP_K, H], weights [T, TOP_K], out
    [T, H].

    added: [T, H], added to the result where ADDED.
    """
    if CHAINED:
        gdc_wait()
    t = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    total = tl.zeros((BH,), tl.float32)
    for k in tl.static_range(TOP_K):
        row = tl.load(rows + (t * TOP_K + k) * H + h, mask=h < H, other=0).to(tl.float32)
        total += row * tl.load(weights + t * TOP_K + k).to(tl.float32)
    if ADDED:
        total += tl.load(added + t * H + h, mask=h < H, other=0).to(tl.float32)
    tl.store(out + t * H + h, total.to(out.dtype.element_ty), mask=h < H)


@triton.jit
def normalize_row(x, weight, width, epsilon):
    """RMS norm of a row: ``weight * (x / sqrt(mean(x^2) + epsilon))`` in float32, rounded to x's dtype before the
    weight.

    x must be zero beyond `width`.
    """
    values = x.to(tl.float32)
    scaled = values * tl.rsqrt(tl.sum(values * values, axis=0) / width + epsilon)
    return (weight.to(tl.float32) * scaled.to(x.dtype).to(tl.float32)).to(x.dtype)


@triton.jit
def rms_norm(x, weight, out, K, epsilon, WIDTH: tl.constexpr, CHAINED: tl.constexpr):
    """RMS norm of each row of x [T, K]; see `normalize_row`."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, WIDTH)
    factors = tl.load(weight + k, mask=k < K, other=0)
    if CHAINED:
        gdc_wait()
    read = tl.load(x + row * K + k, mask=k < K, other=0)
    if CHAINED:
        gdc_launch_dependents()
    tl.store(out + row * K + k, normalize_row(read, factors, K, epsilon), mask=k < K)
