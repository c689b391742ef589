"""Load words of packed integers in tensor-core order, and convert them to floats in registers.

A 16-bit float with a large enough exponent has a spacing of one. OR-ing an integer into its lowest mantissa bits therefore gives
the integer plus a constant, which one subtraction removes. Each instruction handles two weights.
"""

import triton
import triton.language as tl

INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)

_BFLOAT16_FROM_INT4: tl.constexpr = tl.constexpr("""
{ .reg .b32 t, one, m; mov.b32 one, 0x3f803f80; mov.b32 m, 0xc308c308;
lop3.b32 t, $4, 0x000f000f, 0x43004300, 0xea; fma.rn.bf16x2 $0, t, one, m;
shr.u32 t, $4, 4;  lop3.b32 t, t, 0x000f000f, 0x43004300, 0xea; fma.rn.bf16x2 $1, t, one, m;
shr.u32 t, $4, 8;  lop3.b32 t, t, 0x000f000f, 0x43004300, 0xea; fma.rn.bf16x2 $2, t, one, m;
shr.u32 t, $4, 12; lop3.b32 t, t, 0x000f000f, 0x43004300, 0xea; fma.rn.bf16x2 $3, t, one, m; }
""")
"""0x4300 is 128 with a spacing of 1, so 0x4300 | n is 128 + n; 0xc308 is -136."""
_FLOAT16_FROM_INT4: tl.constexpr = tl.constexpr("""
{ .reg .b32 t, m; mov.b32 m, 0x64086408;
lop3.b32 $0, $4, 0x000f000f, 0x64006400, 0xea; sub.rn.f16x2 $0, $0, m;
shr.u32 t, $4, 4;  lop3.b32 $1, t, 0x000f000f, 0x64006400, 0xea; sub.rn.f16x2 $1, $1, m;
shr.u32 t, $4, 8;  lop3.b32 $2, t, 0x000f000f, 0x64006400, 0xea; sub.rn.f16x2 $2, $2, m;
shr.u32 t, $4, 12; lop3.b32 $3, t, 0x000f000f, 0x64006400, 0xea; sub.rn.f16x2 $3, $3, m; }
""")
"""0x6400 is 1024 with a spacing of 1; 0x6408 is 1032."""
_BFLOAT16_FROM_INT8: tl.constexpr = tl.constexpr("""
{ .reg .b32 t, u, s, minus; mov.b32 minus, 0xbf80bf80;
lop3.b32 u, $2, 0x007f007f, 0x43004300, 0xea; lop3.b32 s, $2, 0x00800080, 0x43004300, 0xea;
fma.rn.bf16x2 $0, s, minus, u;
shr.u32 t, $2, 8; lop3.b32 u, t, 0x007f007f, 0x43004300, 0xea; lop3.b32 s, t, 0x00800080, 0x43004300, 0xea;
fma.rn.bf16x2 $1, s, minus, u; }
""")
"""128 + (q without its sign bit), minus 128, or minus 256 (0x4380) where the sign bit is set; 0xbf80 is -1."""
_FLOAT16_FROM_INT8: tl.constexpr = tl.constexpr("""
{ .reg .b32 t, m; mov.b32 m, 0x64806480;
lop3.b32 $0, $2, 0x00ff00ff, 0x64806480, 0x6a; sub.rn.f16x2 $0, $0, m;
shr.u32 t, $2, 8; lop3.b32 $1, t, 0x00ff00ff, 0x64806480, 0x6a; sub.rn.f16x2 $1, $1, m; }
""")
"""(q & 255) ^ 0x6480 is 1024 + (q + 128); 0x6480 is 1152."""


@triton.jit
def from_int4(words, dtype: tl.constexpr):
    """Words [BN, 32] int16 of four nibbles -> four tensors [BN, 32] of integers -8 … 7 in `dtype`, low bits first."""
    if INTERPRETED:
        a = ((words & 15) - 8).to(tl.float32).to(dtype)
        b = (((words >> 4) & 15) - 8).to(tl.float32).to(dtype)
        c = (((words >> 8) & 15) - 8).to(tl.float32).to(dtype)
        d = (((words >> 12) & 15) - 8).to(tl.float32).to(dtype)
        return a, b, c, d
    else:
        bf16: tl.constexpr = (tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16)
        fp16: tl.constexpr = (tl.float16, tl.float16, tl.float16, tl.float16)
        if dtype == tl.bfloat16:
            return tl.inline_asm_elementwise(
                _BFLOAT16_FROM_INT4, "=&r,=&r,=&r,=&r,r", [words], dtype=bf16, is_pure=True, pack=2
            )
        else:
            return tl.inline_asm_elementwise(
                _FLOAT16_FROM_INT4, "=&r,=&r,=&r,=&r,r", [words], dtype=fp16, is_pure=True, pack=2
            )


@triton.jit
def from_int8(words, dtype: tl.constexpr):
    """Words [BN, 64] int16 of two bytes -> two tensors [BN, 64] of integers -128 … 127 in `dtype`, low byte first."""
    if INTERPRETED:
        return words.to(tl.int8).to(tl.float32).to(dtype), (words >> 8).to(tl.float32).to(dtype)
    else:
        if dtype == tl.bfloat16:
            return tl.inline_asm_elementwise(
                _BFLOAT16_FROM_INT8, "=&r,=&r,r", [words], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=2
            )
        else:
            return tl.inline_asm_elementwise(
                _FLOAT16_FROM_INT8, "=&r,=&r,r", [words], dtype=(tl.float16, tl.float16), is_pure=True, pack=2
            )


@triton.jit
def concat_columns(a, b):
    """Concatenate the columns of a [BN, n] and b [BN, n]: [BN, 2 n]."""
    return tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), (a.shape[0], 2 * a.shape[1]))


@triton.jit
def load_words(w, slab, slabs, block, GATED: tl.constexpr, BN: tl.constexpr, WORDS: tl.constexpr, WARPS: tl.constexpr):
    """Words [BN, WORDS] of a block of columns, starting at slab `slab`; where GATED, one slab of gate rows and one of
    up rows.

    Eight warps share two slabs: each group of four reads one slab contiguously.
    """
    size: tl.constexpr = 64 * WORDS
    i = tl.arange(0, BN * WORDS)
    first = w + (block * slabs + slab) * size
    slab_stride = slabs // 2 * size if GATED else size
    if WARPS == 8:
        pair = i // (2 * size) * (2 * size) + i // 1024 % 2 * slab_stride
        words = tl.load(first + pair + i // 2048 % (size // 1024) * 1024 + i % 1024)
        parts = tl.reshape(words, (BN // 128, WORDS // 16, 2, 4, 8, 4, 2, 2, 2))
        return tl.reshape(tl.permute(parts, (0, 2, 3, 7, 4, 1, 6, 5, 8)), (BN, WORDS))
    else:
        words = tl.load(first + i // size * slab_stride + i % size) if GATED else tl.load(first + i)
        parts = tl.reshape(words, (BN // 64, WORDS // 16, 4, 8, 4, 2, 2, 2))
        return tl.reshape(tl.permute(parts, (0, 2, 6, 3, 1, 5, 4, 7)), (BN, WORDS))
