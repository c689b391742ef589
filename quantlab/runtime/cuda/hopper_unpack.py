"""Load packed words and expand them, in the register layouts of the tensor cores, for `quantlab.runtime.cuda.hopper`.

Legend: tiles of BN = 128 rows of the matrix and BM of activations, in one or two parts of PART of them; blocks of 128 columns,
whose words are in the order of `quantlab.runtime.cuda.layout`, two in each int32.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

BN: gl.constexpr = gl.constexpr(128)
"""Matrix rows of a tile: 64 for each group of four warps."""

# Two quarters of int4 words, scaled; `quantlab.runtime.cuda.unpack` explains the constants.
_BFLOAT16_FROM_INT4 = """
{{ .reg .b32 t, one, m; mov.b32 one, 0x3f803f80; mov.b32 m, 0xc308c308;
{0} lop3.b32 t, {2}, 0x000f000f, 0x43004300, 0xea; fma.rn.bf16x2 $0, t, one, m; mul.rn.bf16x2 $0, $0, $3;
{1} lop3.b32 t, t, 0x000f000f, 0x43004300, 0xea; fma.rn.bf16x2 $1, t, one, m; mul.rn.bf16x2 $1, $1, $4; }}
"""
_FLOAT16_FROM_INT4 = """
{{ .reg .b32 t, m; mov.b32 m, 0x64086408;
{0} lop3.b32 t, {2}, 0x000f000f, 0x64006400, 0xea; sub.rn.f16x2 $0, t, m; mul.rn.f16x2 $0, $0, $3;
{1} lop3.b32 t, t, 0x000f000f, 0x64006400, 0xea; sub.rn.f16x2 $1, t, m; mul.rn.f16x2 $1, $1, $4; }}
"""
_QUARTERS = (("", "shr.u32 t, $2, 4;", "$2"), ("shr.u32 t, $2, 8;", "shr.u32 t, $2, 12;", "t"))
BFLOAT16_FROM_INT4: gl.constexpr = gl.constexpr([_BFLOAT16_FROM_INT4.format(*shifts) for shifts in _QUARTERS])
FLOAT16_FROM_INT4: gl.constexpr = gl.constexpr([_FLOAT16_FROM_INT4.format(*shifts) for shifts in _QUARTERS])

_BFLOAT16_FROM_INT8 = """
{{ .reg .b32 t, u, s, minus; mov.b32 minus, 0xbf80bf80; {0}
lop3.b32 u, {1}, 0x007f007f, 0x43004300, 0xea; lop3.b32 s, {1}, 0x00800080, 0x43004300, 0xea;
fma.rn.bf16x2 $0, s, minus, u; }}
"""
_FLOAT16_FROM_INT8 = """
{{ .reg .b32 t, u, m; mov.b32 m, 0x64806480; {0}
lop3.b32 u, {1}, 0x00ff00ff, 0x64806480, 0x6a; sub.rn.f16x2 $0, u, m; }}
"""
_BYTES = (("", "$1"), ("shr.u32 t, $1, 8;", "t"))
BFLOAT16_FROM_INT8: gl.constexpr = gl.constexpr([_BFLOAT16_FROM_INT8.format(*shift) for shift in _BYTES])
FLOAT16_FROM_INT8: gl.constexpr = gl.constexpr([_FLOAT16_FROM_INT8.format(*shift) for shift in _BYTES])


@gluon.constexpr_function
def tile_parts(BM):
    """Sizes of the two parts of a tile's activations; the second may be 0. Tensor sizes must be powers of two."""
    return (128, 64) if BM == 192 else (BM, 0)


@gluon.constexpr_function
def sums_layout(PART):
    """Register layout of the sums [BN, PART]."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[8, 1], instr_shape=[16, PART, 16])


@gluon.constexpr_function
def weights_layout(PART):
    """Register layout of the weights [BN, ·], as left operand."""
    return gl.DotOperandLayout(operand_index=0, parent=sums_layout(PART), k_width=2)


@gluon.constexpr_function
def words_layout(PAIRS):
    """Register layout of the word pairs of two consecutive slabs: 16 bytes per thread, one slab for each four warps."""
    slab_bases = [[512], [1024]][: PAIRS // 16]
    return gl.DistributedLinearLayout(
        reg_bases=[[1], [2], *slab_bases],
        lane_bases=[[4], [8], [16], [32], [64]],
        warp_bases=[[128], [256], [64 * PAIRS]],
        block_bases=[],
        shape=[128 * PAIRS],
    )


@gluon.jit
def load_packed(w, scale, block, top, N, INT4: gl.constexpr, GROUP: gl.constexpr, PART: gl.constexpr):
    """Word pairs of a block of columns from row `top`, in memory order; for int4 also the scales [BN] of quarters."""
    PAIRS: gl.constexpr = 16 if INT4 else 32
    size: gl.constexpr = 64 * PAIRS
    slabs = (N + 63) // 64
    i = gl.arange(0, BN * PAIRS, layout=words_layout(PAIRS))
    offset = gl.minimum(top // 64 + i // size, slabs - 1) * size + i % size
    words = gl.load(w + block.to(gl.int64) * slabs * size + offset)
    n = gl.minimum(top + gl.arange(0, BN, layout=gl.SliceLayout(1, weights_layout(PART))), N - 1)
    first = scale + block * (128 // GROUP) * N + n
    if not INT4:
        return words, (0, 0, 0, 0)
    elif GROUP == 128:
        a = gl.load(first)
        return words, (a, a, a, a)
    elif GROUP == 64:
        a = gl.load(first)
        b = gl.load(first + N)
        return words, (a, a, b, b)
    else:
        return words, (gl.load(first), gl.load(first + N), gl.load(first + 2 * N), gl.load(first + 3 * N))


@gluon.jit
def to_rows(words, INT4: gl.constexpr, PART: gl.constexpr):
    """Word pairs in memory order -> words [BN, ·]; no data moves between threads."""
    PAIRS: gl.constexpr = 16 if INT4 else 32
    single = gl.join((words & 0xFFFF).to(gl.int16), (words >> 16).to(gl.int16))
    parts = single.reshape((BN // 64, PAIRS // 8, 4, 8, 4, 2, 2, 2)).permute((0, 2, 6, 3, 1, 5, 4, 7))
    return gl.convert_layout(parts.reshape((BN, 2 * PAIRS)), weights_layout(PART), assert_trivial=True)


@gluon.jit
def expand_half(words, s0, s1, HALF: gl.constexpr, INT4: gl.constexpr, PART: gl.constexpr, BFLOAT16: gl.constexpr):
    """Weights [BN, 64] of half a block; int4 is scaled by quarter and rounded as the number format defines it."""
    if INT4:
        s0, _ = gl.broadcast(s0.expand_dims(1), words)
        s1, _ = gl.broadcast(s1.expand_dims(1), words)
        asm: gl.constexpr = BFLOAT16_FROM_INT4[HALF] if BFLOAT16 else FLOAT16_FROM_INT4[HALF]
        two: gl.constexpr = (gl.bfloat16, gl.bfloat16) if BFLOAT16 else (gl.float16, gl.float16)
        a, b = gl.inline_asm_elementwise(asm, "=&r,=&r,r,r,r", [words, s0, s1], dtype=two, is_pure=True, pack=2)
        weights = gl.join(a, b).permute((0, 2, 1)).reshape((BN, 64))
    elif BFLOAT16:
        asm: gl.constexpr = BFLOAT16_FROM_INT8[HALF]
        weights = gl.inline_asm_elementwise(asm, "=&r,r", [words], dtype=gl.bfloat16, is_pure=True, pack=2)
    else:
        asm: gl.constexpr = FLOAT16_FROM_INT8[HALF]
        weights = gl.inline_asm_elementwise(asm, "=&r,r", [words], dtype=gl.float16, is_pure=True, pack=2)
    return gl.convert_layout(weights, weights_layout(PART), assert_trivial=True)
