/* Row-major int8 weights with one scale per row, times int8 activations with one scale per token (W8A8) or times 16-bit
   activations (W8A16). */

#include "kernels.h"
#include "simd.h"

#define ROWS 4             /* rows of the matrix in a register tile */
#define TOKENS 4           /* rows of activations in a register tile */
#define CONVERTED_TOKENS 6 /* the same, where weights are converted to bfloat16 */
#define PANEL_ROWS 16      /* rows converted together: they stay in the L2 cache while all activations are multiplied */

typedef struct {
    const int8_t *q;
    const void *scale;
    int64_t rows, columns;
    int scale_dtype;
    Groups groups;
    const void *x; /* [T, stride] int8 or bfloat16, zero beyond K; deinterleaved for the nibble kernel */
    int64_t x_stride, token_stride;
    const float *token_scale;
    const int32_t *offset_sum; /* [T] 128 times the sum of a token's integers */
    const float *sums; /* [T, 16] sums of a token's activations by vector lane */
    void *out;
    int dtype;
    int64_t next_unit;
} Int8;

INLINE void store_scaled(const Int8 *job, int64_t token, int64_t row, int64_t matrix, float value) {
    const float scale = scalar(job->scale, job->scale_dtype, matrix * job->rows + row);
    store_scalar(job->out, job->dtype, token * job->rows + row, value * scale);
}

/* VPDPBUSD multiplies unsigned by signed bytes. So weights are shifted to 0 … 255, and 128 times the sum of the
   activations is subtracted from the result. 32-bit sums are exact up to 65536 columns. */
INLINE void dot_int8(const int8_t *q, int64_t row_step, const int8_t *x, int64_t stride, __mmask64 mask, const int rows,
                     const int tokens, __m512i sum[ROWS][TOKENS]) {
    __m512i t[TOKENS];
    UNROLLED
    for (int m = 0; m < tokens; m++)
        t[m] = _mm512_loadu_si512(x + m * stride);
    UNROLLED
    for (int r = 0; r < rows; r++) {
        const __m512i w = _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, q + r * row_step), _mm512_set1_epi8(-128));
        UNROLLED
        for (int m = 0; m < tokens; m++)
            sum[r][m] = _mm512_dpbusd_epi32(sum[r][m], w, t[m]);
    }
}

INLINE void multiply_int8(const Int8 *job, int64_t matrix, int64_t row, int64_t row_step, int64_t token, const int rows,
                          const int tokens) {
    const int8_t *q = job->q + (matrix * job->rows + row) * job->columns;
    const int8_t *x = (const int8_t *)job->x + token * job->x_stride;
    const int64_t left = job->columns % 64, whole = job->columns - left;
    __m512i sum[ROWS][TOKENS];
    UNROLLED
    for (int r = 0; r < rows; r++)
        UNROLLED
        for (int m = 0; m < tokens; m++)
            sum[r][m] = _mm512_setzero_si512();
    for (int64_t k = 0; k < whole; k += 64)
        dot_int8(q + k, row_step * job->columns, x + k, job->x_stride, ~0ull, rows, tokens, sum);
    if (left)
        dot_int8(q + whole, row_step * job->columns, x + whole, job->x_stride, (1ull << left) - 1, rows, tokens, sum);
    UNROLLED
    for (int r = 0; r < rows; r++)
        UNROLLED
        for (int m = 0; m < tokens; m++) {
            const int64_t at = (token + m) * job->token_stride;
            const int32_t exact = _mm512_reduce_add_epi32(sum[r][m]) - job->offset_sum[at];
            store_scaled(job, token + m, row + r * row_step, matrix, (float)exact * job->token_scale[at]);
        }
}

/* A weight plus 128 is two nibbles, and 4300 OR-ed with a nibble is exactly the bfloat16 number 128 + nibble, which is
   cheaper than a conversion. Of 64 columns, the even ones are the low bytes and the odd ones the high bytes of the
   16-bit lanes, so the activations are deinterleaved accordingly. Accumulators start at the negated excess; high
   nibbles have weight 16. */
INLINE void dot_nibbles(const int8_t *q, int64_t row_step, const uint16_t *x, int64_t stride, __mmask64 mask, const int rows,
                        const int tokens, __m512 low[2][ROWS][TOKENS], __m512 high[2][ROWS][TOKENS]) {
    const __m512i nibble = _mm512_set1_epi16(15), base = _mm512_set1_epi16(0x4300), moved = _mm512_set1_epi16(0x4308);
    UNROLLED
    for (int r = 0; r < rows; r++) {
        const __m512i w = _mm512_maskz_loadu_epi8(mask, q + r * row_step);
        UNROLLED
        for (int half = 0; half < 2; half++) {
            const __m512i lower = half ? _mm512_srli_epi16(w, 8) : w;
            const __m512i l = _mm512_ternarylogic_epi32(lower, nibble, base, 0x6A); /* (a & b) ^ c */
            const __m512i h = _mm512_ternarylogic_epi32(_mm512_srli_epi16(w, half ? 12 : 4), nibble, moved, 0x6A);
            UNROLLED
            for (int m = 0; m < tokens; m++) {
                const __m512bh t = (__m512bh)_mm512_loadu_si512(x + m * stride + 32 * half);
                low[half][r][m] = _mm512_dpbf16_ps(low[half][r][m], (__m512bh)l, t);
                high[half][r][m] = _mm512_dpbf16_ps(high[half][r][m], (__m512bh)h, t);
            }
        }
    }
}

INLINE void multiply_nibbles(const Int8 *job, int64_t matrix, int64_t row, int64_t row_step, int64_t token, const int rows,
                             const int tokens) {
    const int8_t *q = job->q + (matrix * job->rows + row) * job->columns;
    const uint16_t *x = (const uint16_t *)job->x + token * job->x_stride;
    const int64_t left = job->columns % 64, whole = job->columns - left;
    __m512 low[2][ROWS][TOKENS], high[2][ROWS][TOKENS]; /* [even or odd columns]: independent dependency chains */
    UNROLLED
    for (int r = 0; r < rows; r++)
        UNROLLED
        for (int m = 0; m < tokens; m++) {
            const __m512 sums = _mm512_loadu_ps(job->sums + (token + m) * job->token_stride * 16);
            low[0][r][m] = _mm512_mul_ps(sums, _mm512_set1_ps(-128));
            high[0][r][m] = _mm512_mul_ps(sums, _mm512_set1_ps(-136));
            low[1][r][m] = high[1][r][m] = _mm512_setzero_ps();
        }
    for (int64_t k = 0; k < whole; k += 64)
        dot_nibbles(q + k, row_step * job->columns, x + k, job->x_stride, ~0ull, rows, tokens, low, high);
    if (left)
        dot_nibbles(q + whole, row_step * job->columns, x + whole, job->x_stride, (1ull << left) - 1, rows, tokens, low, high);
    UNROLLED
    for (int r = 0; r < rows; r++)
        UNROLLED
        for (int m = 0; m < tokens; m++) {
            const __m512 upper = _mm512_add_ps(high[0][r][m], high[1][r][m]), lower = _mm512_add_ps(low[0][r][m], low[1][r][m]);
            store_scaled(job, token + m, row + r * row_step, matrix,
                         _mm512_reduce_add_ps(_mm512_fmadd_ps(upper, _mm512_set1_ps(16), lower)));
        }
}

/* q [columns] int8 -> bfloat16, exactly. For more tokens the conversion pays: a pair of weights then costs one pairwise
   dot product instead of two. */
INLINE void to_bfloat16_row(const int8_t *q, int64_t columns, uint16_t *out) {
    for (int64_t k = 0; k < columns; k += 64) {
        const __m512i w = _mm512_maskz_loadu_epi8(columns - k < 64 ? (1ull << (columns - k)) - 1 : ~0ull, q + k);
        const __m512 a = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm512_castsi512_si128(w)));
        const __m512 b = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm512_extracti32x4_epi32(w, 1)));
        const __m512 c = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm512_extracti32x4_epi32(w, 2)));
        const __m512 d = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm512_extracti32x4_epi32(w, 3)));
        _mm512_storeu_si512(out + k, (__m512i)_mm512_cvtne2ps_pbh(b, a));
        _mm512_storeu_si512(out + k + 32, (__m512i)_mm512_cvtne2ps_pbh(d, c));
    }
}

INLINE void multiply_converted(const Int8 *job, const uint16_t *w, int64_t padded, int64_t matrix, int64_t row, int64_t token,
                               const int rows, const int tokens) {
    const uint16_t *x = (const uint16_t *)job->x + token * job->x_stride;
    __m512 sum[ROWS][CONVERTED_TOKENS];
    UNROLLED
    for (int r = 0; r < rows; r++)
        UNROLLED
        for (int m = 0; m < tokens; m++)
            sum[r][m] = _mm512_setzero_ps();
    for (int64_t k = 0; k < padded; k += 32) {
        __m512bh weights[ROWS];
        UNROLLED
        for (int r = 0; r < rows; r++)
            weights[r] = (__m512bh)_mm512_loadu_si512(w + r * padded + k);
        UNROLLED
        for (int m = 0; m < tokens; m++) {
            const __m512bh t = (__m512bh)_mm512_loadu_si512(x + m * job->x_stride + k);
            UNROLLED
            for (int r = 0; r < rows; r++)
                sum[r][m] = _mm512_dpbf16_ps(sum[r][m], weights[r], t);
        }
    }
    UNROLLED
    for (int r = 0; r < rows; r++)
        UNROLLED
        for (int m = 0; m < tokens; m++)
            store_scaled(job, token + m, row + r, matrix, _mm512_reduce_add_ps(sum[r][m]));
}

#define BLOCK(kernel, wide)                                                 \
    switch (left < TOKENS ? left : TOKENS) {                                \
        case 1: EACH_ROW(kernel, wide, 1) case 2: EACH_ROW(kernel, wide, 2) \
        case 3: EACH_ROW(kernel, wide, 3) case 4: EACH_ROW(kernel, wide, 4) \
    }

enum { INT8_KERNEL, NIBBLE_KERNEL };

/* A unit of work is a block of ROWS rows of one group's matrix, times all activations of the group. */
INLINE void worker(Int8 *job, const int kind) {
    const int64_t blocks = (job->rows + ROWS - 1) / ROWS;
    int64_t from, to;
    while (next_chunk(&job->next_unit, blocks * job->groups.number, &from, &to))
        for (int64_t unit = from, run; unit < to; unit += run) {
            run = blocks_at_once(&job->groups, unit, to, blocks);
            const int64_t i = unit / blocks, top = unit % blocks * ROWS, matrix = job->groups.which[i];
            const int64_t last = top + run * ROWS < job->rows ? top + run * ROWS : job->rows;
            const int few = job->groups.count[i] <= FEW_TOKENS;
            for (int64_t t = 0; t < job->groups.count[i]; t += TOKENS) {
                const int64_t token = job->groups.start[i] + t, left = job->groups.count[i] - t;
                if (kind == INT8_KERNEL)
                    BLOCK(multiply_int8, 4)
                else
                    BLOCK(multiply_nibbles, 2)
            }
        }
}

static void int8_worker(void *job) { worker(job, INT8_KERNEL); }

static void nibble_worker(void *job) { worker(job, NIBBLE_KERNEL); }

#define EACH_CONVERTED(tokens)                                                                               \
    case tokens:                                                                                             \
        for (; row + ROWS <= last; row += ROWS)                                                              \
            multiply_converted(job, panel + (row - top) * padded, padded, matrix, row, token, ROWS, tokens); \
        for (; row < last; row++)                                                                            \
            multiply_converted(job, panel + (row - top) * padded, padded, matrix, row, token, 1, tokens);    \
        break;

static void converted_worker(void *argument) {
    Int8 *job = argument;
    const int64_t padded = round_up(job->columns, 64), blocks = (job->rows + PANEL_ROWS - 1) / PANEL_ROWS;
    uint16_t *panel = scratch(PANEL_ROWS * padded * 2);
    int64_t from, to;
    while (next_chunk(&job->next_unit, blocks * job->groups.number, &from, &to))
        for (int64_t unit = from; unit < to; unit++) {
            const int64_t i = unit / blocks, top = unit % blocks * PANEL_ROWS, matrix = job->groups.which[i];
            const int64_t last = top + PANEL_ROWS < job->rows ? top + PANEL_ROWS : job->rows;
            for (int64_t row = top; row < last; row++)
                to_bfloat16_row(job->q + (matrix * job->rows + row) * job->columns, job->columns, panel + (row - top) * padded);
            const int64_t count = job->groups.count[i], passes = (count + CONVERTED_TOKENS - 1) / CONVERTED_TOKENS;
            for (int64_t pass = 0; pass < passes; pass++) {
                const int64_t first_token = pass * count / passes, token = job->groups.start[i] + first_token;
                int64_t row = top;
                switch ((pass + 1) * count / passes - first_token) {
                    EACH_CONVERTED(1) EACH_CONVERTED(2) EACH_CONVERTED(3)
                    EACH_CONVERTED(4) EACH_CONVERTED(5) EACH_CONVERTED(6)
                }
            }
        }
    free(panel);
}

/* Quantize one token; returns its scale max|x| / 127, at least 2^-120, and not finite if any element of x is not. */
static float quantize(const void *x, int dtype, int64_t count, int64_t padded, int8_t *out, int32_t *offset_sum) {
    __m512i largest = _mm512_setzero_si512(), sum = _mm512_setzero_si512();
    const __m512i magnitude = _mm512_set1_epi32(0x7FFFFFFF);
    for (int64_t i = 0; i < count; i += 16) { /* compared as integers, NaN is greater than infinity and propagates */
        __m512i bits = _mm512_castps_si512(load(x, dtype, i, lane_mask(count - i)));
        largest = _mm512_max_epi32(largest, _mm512_and_si512(bits, magnitude));
    }
    const int32_t bits = _mm512_reduce_max_epi32(largest);
    float scale;
    memcpy(&scale, &bits, 4);
    scale /= 127;
    if (scale < 0x1p-120f)
        scale = 0x1p-120f;
    for (int64_t i = 0; i < padded; i += 16) {
        __m512 value = i < count ? load(x, dtype, i, lane_mask(count - i)) : _mm512_setzero_ps();
        __m512i rounded = _mm512_cvtps_epi32(_mm512_div_ps(value, _mm512_set1_ps(scale)));
        sum = _mm512_add_epi32(sum, rounded);
        _mm_storeu_si128((__m128i *)(out + i), _mm512_cvtepi32_epi8(rounded));
    }
    *offset_sum = 128 * _mm512_reduce_add_epi32(sum);
    return scale;
}

/* W8A8: out [T, N] in the dtype of x [T, K]. */
void quantlab_int8_product(const int8_t *q, const void *scale, int64_t rows, int64_t columns, int scale_dtype,
                           const void *x, int64_t stride, int64_t tokens, int dtype, const int64_t *which,
                           const int64_t *start, const int64_t *count, int64_t number, void *out) {
    const int64_t held = stride ? tokens : 1, padded = round_up(columns, 64), copy_stride = padded + 64;
    int8_t *integer = scratch(held * copy_stride);
    float *token_scale = scratch(held * 4);
    int32_t *offset_sum = scratch(held * 4);
    for (int64_t t = 0; t < held; t++)
        token_scale[t] = quantize((const char *)x + t * stride * width_of(dtype), dtype, columns, padded,
                                  integer + t * copy_stride, offset_sum + t);
    Int8 job = {q, scale, rows, columns, scale_dtype, {which, start, count, number}, integer, stride ? copy_stride : 0,
                stride ? 1 : 0, token_scale, offset_sum, NULL, out, dtype, 0};
    GOMP_parallel(int8_worker, &job, 0, 0);
    free(integer);
    free(token_scale);
    free(offset_sum);
}

/* One token in bfloat16, with the even columns of each 64 before the odd ones, and its sums by vector lane. */
static void deinterleave_token(const void *x, int dtype, int64_t count, int64_t padded, uint16_t *out, float *sums) {
    uint16_t order[32];
    for (int i = 0; i < 32; i++)
        order[i] = 2 * i;
    const __m512i even = _mm512_loadu_si512(order), odd = _mm512_add_epi16(even, _mm512_set1_epi16(1));
    const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3F80);
    __m512 sum = _mm512_setzero_ps();
    narrow(x, dtype, count, padded, out);
    for (int64_t k = 0; k < padded; k += 64) {
        const __m512i a = _mm512_loadu_si512(out + k), b = _mm512_loadu_si512(out + k + 32);
        const __m512i evens = _mm512_permutex2var_epi16(a, even, b), odds = _mm512_permutex2var_epi16(a, odd, b);
        _mm512_storeu_si512(out + k, evens);
        _mm512_storeu_si512(out + k + 32, odds);
        sum = _mm512_dpbf16_ps(_mm512_dpbf16_ps(sum, (__m512bh)evens, ones), (__m512bh)odds, ones);
    }
    _mm512_storeu_ps(sums, sum);
}

/* W8A16: as quantlab_int8_product, with the activations rounded to bfloat16. */
void quantlab_int8_weight_product(const int8_t *q, const void *scale, int64_t rows, int64_t columns, int scale_dtype,
                                  const void *x, int64_t stride, int64_t tokens, int dtype, const int64_t *which,
                                  const int64_t *start, const int64_t *count, int64_t number, void *out) {
    const int64_t held = stride ? tokens : 1, padded = round_up(columns, 64), copy_stride = padded + 32;
    uint16_t *prepared = scratch(held * copy_stride * 2);
    float *sums = scratch(held * 64);
    int64_t most = 0;
    for (int64_t i = 0; i < number; i++)
        most = count[i] > most ? count[i] : most;
    const int few = most <= 2; /* memory-bound: the kernel with the fewest instructions per weight wins */
    for (int64_t t = 0; t < held; t++) {
        const void *from = (const char *)x + t * stride * width_of(dtype);
        if (few)
            deinterleave_token(from, dtype, columns, padded, prepared + t * copy_stride, sums + t * 16);
        else
            narrow(from, dtype, columns, padded, prepared + t * copy_stride);
    }
    Int8 job = {q, scale, rows, columns, scale_dtype, {which, start, count, number}, prepared, stride ? copy_stride : 0,
                stride ? 1 : 0, NULL, NULL, sums, out, dtype, 0};
    GOMP_parallel(few ? nibble_worker : converted_worker, &job, 0, 0);
    free(prepared);
    free(sums);
}
