/* Row-major 16-bit weights times a few rows of activations of the same dtype. */

#include "kernels.h"
#include "simd.h"

#define ROWS 4   /* rows of the matrix in a register tile */
#define TOKENS 4 /* rows of activations in a register tile */

typedef struct {
    const uint16_t *weight;
    int64_t rows, columns;
    Groups groups;
    const void *x; /* [T, stride] float32 for float16 weights, else bfloat16; zero beyond K */
    int64_t x_stride;
    void *out;
    int dtype;
    int64_t next_unit;
} Dense;

/* 32 columns of `rows` float16 rows, `row_step` elements apart, times `tokens` rows of float32 activations. */
INLINE void multiply_float16(const uint16_t *w, int64_t row_step, const float *x, int64_t stride, __mmask32 mask,
                             const int rows, const int tokens, __m512 sum[ROWS][TOKENS]) {
    UNROLLED
    for (int part = 0; part < 32; part += 16) {
        __m512 t[TOKENS];
        UNROLLED
        for (int m = 0; m < tokens; m++)
            t[m] = _mm512_loadu_ps(x + m * stride + part);
        UNROLLED
        for (int r = 0; r < rows; r++) {
            const __m512 wide = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16((__mmask16)(mask >> part), w + r * row_step + part));
            UNROLLED
            for (int m = 0; m < tokens; m++)
                sum[r][m] = _mm512_fmadd_ps(wide, t[m], sum[r][m]);
        }
    }
}

/* The same in bfloat16. */
INLINE void multiply_bfloat16(const uint16_t *w, int64_t row_step, const uint16_t *x, int64_t stride, __mmask32 mask,
                              const int rows, const int tokens, __m512 sum[ROWS][TOKENS]) {
    __m512bh t[TOKENS];
    UNROLLED
    for (int m = 0; m < tokens; m++)
        t[m] = (__m512bh)_mm512_loadu_si512(x + m * stride);
    UNROLLED
    for (int r = 0; r < rows; r++) {
        const __m512bh pairs = (__m512bh)_mm512_maskz_loadu_epi16(mask, w + r * row_step);
        UNROLLED
        for (int m = 0; m < tokens; m++)
            sum[r][m] = _mm512_dpbf16_ps(sum[r][m], pairs, t[m]);
    }
}

INLINE void multiply_rows(const Dense *job, int64_t matrix, int64_t row, int64_t row_step, int64_t token, const int rows,
                          const int tokens) {
    const int64_t left = job->columns % 32, whole = job->columns - left, stride = job->x_stride;
    const uint16_t *w = job->weight + (matrix * job->rows + row) * job->columns;
    const __mmask32 last = (1u << left) - 1;
    __m512 sum[ROWS][TOKENS];
    UNROLLED
    for (int r = 0; r < rows; r++)
        UNROLLED
        for (int m = 0; m < tokens; m++)
            sum[r][m] = _mm512_setzero_ps();
    if (job->dtype == FLOAT16) {
        const float *x = (const float *)job->x + token * stride;
        for (int64_t k = 0; k < whole; k += 32)
            multiply_float16(w + k, row_step * job->columns, x + k, stride, ~0u, rows, tokens, sum);
        if (left)
            multiply_float16(w + whole, row_step * job->columns, x + whole, stride, last, rows, tokens, sum);
    } else {
        const uint16_t *x = (const uint16_t *)job->x + token * stride;
        for (int64_t k = 0; k < whole; k += 32)
            multiply_bfloat16(w + k, row_step * job->columns, x + k, stride, ~0u, rows, tokens, sum);
        if (left)
            multiply_bfloat16(w + whole, row_step * job->columns, x + whole, stride, last, rows, tokens, sum);
    }
    UNROLLED
    for (int r = 0; r < rows; r++)
        UNROLLED
        for (int m = 0; m < tokens; m++)
            store_scalar(job->out, job->dtype, (token + m) * job->rows + row + r * row_step, _mm512_reduce_add_ps(sum[r][m]));
}

/* A unit of work is a block of ROWS rows of one group's matrix, times all activations of the group. */
static void worker(void *argument) {
    Dense *job = argument;
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
                switch (left < TOKENS ? left : TOKENS) {
                    case 1: EACH_ROW(multiply_rows, 4, 1) case 2: EACH_ROW(multiply_rows, 4, 2)
                    case 3: EACH_ROW(multiply_rows, 4, 3) case 4: EACH_ROW(multiply_rows, 4, 4)
                }
            }
        }
}

/* out [T, N] = x [T, K] times the bank's matrices; x, weights and out have the same 16-bit dtype. */
void quantlab_dense_product(const uint16_t *weight, int64_t rows, int64_t columns, const void *x, int64_t stride,
                            int64_t tokens, int dtype, const int64_t *which, const int64_t *start, const int64_t *count,
                            int64_t number, void *out) {
    const int64_t held = stride ? tokens : 1, padded = round_up(columns, 32), copy_stride = padded + 32;
    void *copy = scratch(held * copy_stride * 4);
    for (int64_t t = 0; t < held; t++) {
        const char *row = (const char *)x + t * stride * 2;
        if (dtype == FLOAT16)
            widen(row, dtype, columns, padded, (float *)copy + t * copy_stride);
        else {
            memcpy((uint16_t *)copy + t * copy_stride, row, columns * 2);
            memset((uint16_t *)copy + t * copy_stride + columns, 0, (padded - columns) * 2);
        }
    }
    Dense job = {weight, rows, columns, {which, start, count, number}, copy, stride ? copy_stride : 0, out, dtype, 0};
    GOMP_parallel(worker, &job, 0, 0);
    free(copy);
}
