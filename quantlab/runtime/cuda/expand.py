"""Dequantization of packed matrices into a buffer, for products of so many rows that a library's kernel is fastest."""

import triton
import triton.language as tl

from quantlab.runtime.cuda.unpack import load_words


@triton.jit
def expand(w, scale, out, first, rows, N, K, INT4: tl.constexpr, GROUP: tl.constexpr, BN: tl.constexpr):
    """Dequantize rows `first` (a multiple of 64) to ``first + rows`` of packed matrix w into out [rows, K].

    The product of integer and scale is rounded to the scale's dtype, as the number format defines it.
    """
    PARTS: tl.constexpr = 4 if INT4 else 2
    WORDS: tl.constexpr = 128 // PARTS
    block = tl.program_id(1)
    words = load_words(w, (first + tl.program_id(0) * BN) // 64, tl.cdiv(N, 64), block, False, BN, WORDS, 4)
    i = tl.program_id(0) * BN + tl.arange(0, BN)
    n = tl.minimum(first + i, N - 1)
    for part in tl.static_range(PARTS):
        if INT4:
            s = tl.load(scale + (block * 128 + part * WORDS) // GROUP * N + n)
            q = ((words >> (4 * part)) & 15) - 8
        else:
            s = tl.load(scale + n)
            q = (words << (8 * (1 - part))) >> 8
        value = (q.to(tl.float32) * s.to(tl.float32)[:, None]).to(s.dtype)
        k = block * 128 + part * WORDS + tl.arange(0, WORDS)
        pointers = out + i.to(tl.int64)[:, None] * K + k[None, :]
        tl.store(pointers, value.to(out.dtype.element_ty), mask=(i < rows)[:, None] & (k < K)[None, :])
