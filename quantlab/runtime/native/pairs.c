/* bfloat16 weights in the blocks oneDNN multiplies at many rows, times few rows of bfloat16 activations.

   Layout: rows padded to a multiple of 64, columns to one of 32; blocks of 64 rows, in a block the pairs of neighbouring
   columns one after the other, each pair with its 64 rows side by side. */

#include "lanes.h"

#define TOKENS 4 /* rows of activations multiplied in one pass over a block */

typedef struct {
    const uint16_t *weight;
    int64_t rows, padded; /* N, and K rounded up to a multiple of 32 */
    const uint16_t *x; /* [T, stride], zeros behind K */
    int64_t x_stride, tokens;
    const uint16_t *bias; /* [N], or NULL */
    uint16_t *out;
    int64_t taken;
} Pairs;

INLINE void block(const Pairs *job, int64_t top, int64_t token, const int tokens) {
    const uint16_t *w = job->weight + top * job->padded, *x = job->x + token * job->x_stride;
    __m512 sum[4][TOKENS][2];
    UNROLLED
    for (int s = 0; s < 4; s++)
        UNROLLED
        for (int m = 0; m < tokens; m++)
            sum[s][m][0] = sum[s][m][1] = _mm512_setzero_ps();
    for (int64_t k = 0; k < job->padded; k += 4, w += 256, x += 4)
        UNROLLED
        for (int i = 0; i < 2; i++) {
            __m512bh pair[TOKENS];
            UNROLLED
            for (int m = 0; m < tokens; m++) {
                int32_t two;
                memcpy(&two, x + m * job->x_stride + 2 * i, 4);
                pair[m] = (__m512bh)_mm512_set1_epi32(two);
            }
            UNROLLED
            for (int s = 0; s < 4; s++) {
                const uint16_t *at = w + 128 * i + 32 * s;
                _mm_prefetch((const char *)at + 1024, _MM_HINT_T0);
                const __m512bh rows = (__m512bh)_mm512_loadu_si512(at);
                UNROLLED
                for (int m = 0; m < tokens; m++) {
                    __m512 *to = &sum[s][m][tokens == 1 ? i : 0]; /* two chains where one would wait for itself */
                    *to = _mm512_dpbf16_ps(*to, rows, pair[m]);
                }
            }
        }
    UNROLLED
    for (int s = 0; s < 4; s++)
        UNROLLED
        for (int m = 0; m < tokens; m++) {
            const int64_t left = job->rows - top - 16 * s;
            __m512 both = _mm512_add_ps(sum[s][m][0], sum[s][m][1]);
            if (left > 0) {
                if (job->bias)
                    both = _mm512_add_ps(both, load(job->bias, BFLOAT16, top + 16 * s, first(left)));
                store(job->out, BFLOAT16, (token + m) * job->rows + top + 16 * s, first(left), both);
            }
        }
}

static void work(void *argument) {
    Pairs *job = argument;
    int64_t from, to;
    while (take(&job->taken, (job->rows + 63) / 64, &from, &to))
        for (int64_t unit = from; unit < to; unit++)
            for (int64_t token = 0; token < job->tokens; token += TOKENS)
                switch (job->tokens - token) {
                case 1: block(job, unit * 64, token, 1); break;
                case 2: block(job, unit * 64, token, 2); break;
                case 3: block(job, unit * 64, token, 3); break;
                default: block(job, unit * 64, token, 4);
                }
}

/* out [T, N] = x [T, K], rows `stride` numbers apart, times one matrix, and the bias added. */
void quantlab_paired_product(const uint16_t *weight, int64_t rows, int64_t columns, const uint16_t *x, int64_t stride,
                             int64_t tokens, const uint16_t *bias, uint16_t *out) {
    const int64_t padded = round_up(columns, 32), apart = padded + 32;
    uint16_t *copy = scratch(tokens * apart * 2);
    for (int64_t t = 0; t < tokens; t++) {
        memcpy(copy + t * apart, x + t * stride, columns * 2);
        memset(copy + t * apart + columns, 0, (padded - columns) * 2);
    }
    Pairs job = {weight, rows, padded, copy, apart, tokens, bias, out, 0};
    GOMP_parallel(work, &job, 0, 0);
    free(copy);
}

typedef struct {
    const int8_t *q;
    int64_t rows, columns;
    uint16_t *out;
    int64_t taken;
} Blocking;

/* 16 vectors of 16 numbers of 32 bits: rows become columns. */
INLINE void transpose(__m512i v[16]) {
    __m512i t[16], u[16];
    UNROLLED
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
    }
    UNROLLED
    for (int i = 0; i < 16; i += 4)
        UNROLLED
        for (int j = 0; j < 2; j++) {
            u[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
            u[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
        }
    UNROLLED
    for (int j = 0; j < 4; j++) { /* u[4 i + j] has column 4 l + j of rows 4 i … 4 i + 3 in its quarter l */
        const __m512i a = _mm512_shuffle_i32x4(u[j], u[4 + j], 0x88), b = _mm512_shuffle_i32x4(u[j], u[4 + j], 0xDD);
        const __m512i c = _mm512_shuffle_i32x4(u[8 + j], u[12 + j], 0x88), d = _mm512_shuffle_i32x4(u[8 + j], u[12 + j], 0xDD);
        v[j] = _mm512_shuffle_i32x4(a, c, 0x88);
        v[4 + j] = _mm512_shuffle_i32x4(b, d, 0x88);
        v[8 + j] = _mm512_shuffle_i32x4(a, c, 0xDD);
        v[12 + j] = _mm512_shuffle_i32x4(b, d, 0xDD);
    }
}

/* Two neighbouring columns of 16 rows, integers in the upper byte of 32 bits, as pairs of bfloat16: exact, so cut off. */
INLINE __m512i pair_of(__m512i even, __m512i odd) {
    const __m512i a = _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_srai_epi32(even, 24)));
    const __m512i b = _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_srai_epi32(odd, 24)));
    return _mm512_or_si512(_mm512_srli_epi32(a, 16), _mm512_and_si512(b, _mm512_set1_epi32((int32_t)0xFFFF0000)));
}

static void into_blocks(void *argument) {
    Blocking *job = argument;
    int64_t unit, stop;
    while (take(&job->taken, (job->rows + 15) / 16, &unit, &stop))
        for (; unit < stop; unit++) {
            const int64_t row = unit * 16, held = job->rows - row < 16 ? job->rows - row : 16;
            uint16_t *out = job->out + row / 64 * 64 * job->columns + row % 64 * 2;
            for (int64_t k = 0; k < job->columns; k += 64) {
                const int64_t wide = job->columns - k < 64 ? job->columns - k : 64;
                __m512i v[16];
                UNROLLED
                for (int r = 0; r < 16; r++)
                    v[r] = r < held ? _mm512_maskz_loadu_epi8(~0ull >> (64 - wide), job->q + (row + r) * job->columns + k)
                                    : _mm512_setzero_si512();
                transpose(v);
                UNROLLED
                for (int i = 0; i < 16; i++)
                    if (4 * i < wide) {
                        uint16_t *to = out + (k / 2 + 2 * i) * 128;
                        _mm512_storeu_si512(to, pair_of(_mm512_slli_epi32(v[i], 24), _mm512_slli_epi32(v[i], 16)));
                        _mm512_storeu_si512(to + 128, pair_of(_mm512_slli_epi32(v[i], 8), v[i]));
                    }
            }
        }
}

/* int8 rows [N, K], K a multiple of 32, as bfloat16 numbers in this layout. */
void quantlab_int8_pairs(const int8_t *q, int64_t rows, int64_t columns, uint16_t *out) {
    Blocking job = {q, rows, columns, out, 0};
    GOMP_parallel(into_blocks, &job, 0, 0);
}
