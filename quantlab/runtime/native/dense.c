/* 16-bit weights, in rows, times few rows of activations of the same dtype. */

#include "kernels.h"
#include "lanes.h"

#define ROWS 4 /* of a matrix, and */
#define TOKENS 4 /* of activations: multiplied together */

typedef struct {
    const uint16_t *weight;
    int64_t rows, columns;
    Groups groups;
    const void *x; /* [T, stride] float32 (float16 weights) or bfloat16, zeros behind K */
    int64_t x_stride;
    void *out;
    int dtype;
    int64_t taken;
} Dense;

/* 32 columns. */
INLINE void half(const uint16_t *w, int64_t apart, const float *x, int64_t stride, __mmask32 mask, const int rows,
                 const int tokens, __m512 sum[ROWS][TOKENS]) {
    UNROLLED
    for (int part = 0; part < 32; part += 16) {
        __m512 t[TOKENS];
        UNROLLED
        for (int m = 0; m < tokens; m++)
            t[m] = _mm512_loadu_ps(x + m * stride + part);
        UNROLLED
        for (int r = 0; r < rows; r++) {
            const __m512 wide = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16((__mmask16)(mask >> part), w + r * apart + part));
            UNROLLED
            for (int m = 0; m < tokens; m++)
                sum[r][m] = _mm512_fmadd_ps(wide, t[m], sum[r][m]);
        }
    }
}

INLINE void brain(const uint16_t *w, int64_t apart, const uint16_t *x, int64_t stride, __mmask32 mask, const int rows,
                  const int tokens, __m512 sum[ROWS][TOKENS]) {
    __m512bh t[TOKENS];
    UNROLLED
    for (int m = 0; m < tokens; m++)
        t[m] = (__m512bh)_mm512_loadu_si512(x + m * stride);
    UNROLLED
    for (int r = 0; r < rows; r++) {
        const __m512bh pairs = (__m512bh)_mm512_maskz_loadu_epi16(mask, w + r * apart);
        UNROLLED
        for (int m = 0; m < tokens; m++)
            sum[r][m] = _mm512_dpbf16_ps(sum[r][m], pairs, t[m]);
    }
}

INLINE void products(const Dense *job, int64_t matrix, int64_t row, int64_t apart, int64_t token, const int rows,
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
            half(w + k, apart * job->columns, x + k, stride, ~0u, rows, tokens, sum);
        if (left)
            half(w + whole, apart * job->columns, x + whole, stride, last, rows, tokens, sum);
    } else {
        const uint16_t *x = (const uint16_t *)job->x + token * stride;
        for (int64_t k = 0; k < whole; k += 32)
            brain(w + k, apart * job->columns, x + k, stride, ~0u, rows, tokens, sum);
        if (left)
            brain(w + whole, apart * job->columns, x + whole, stride, last, rows, tokens, sum);
    }
    UNROLLED
    for (int r = 0; r < rows; r++)
        UNROLLED
        for (int m = 0; m < tokens; m++)
            store_scalar(job->out, job->dtype, (token + m) * job->rows + row + r * apart, _mm512_reduce_add_ps(sum[r][m]));
}

/* Some rows of a matrix times the activations of its group. */
static void work(void *argument) {
    Dense *job = argument;
    const int64_t blocks = (job->rows + ROWS - 1) / ROWS;
    int64_t from, to;
    while (take(&job->taken, blocks * job->groups.number, &from, &to))
        for (int64_t unit = from, run; unit < to; unit += run) {
            run = run_of(&job->groups, unit, to, blocks);
            const int64_t i = unit / blocks, top = unit % blocks * ROWS, matrix = job->groups.which[i];
            const int64_t last = top + run * ROWS < job->rows ? top + run * ROWS : job->rows;
            const int few = job->groups.count[i] <= FEW;
            for (int64_t t = 0; t < job->groups.count[i]; t += TOKENS) {
                const int64_t token = job->groups.start[i] + t, left = job->groups.count[i] - t;
                switch (left < TOKENS ? left : TOKENS) {
                    case 1: EACH_ROW(products, 4, 1) case 2: EACH_ROW(products, 4, 2)
                    case 3: EACH_ROW(products, 4, 3) case 4: EACH_ROW(products, 4, 4)
                }
            }
        }
}

/* out [T, N] = x [T, K] times the matrices of a bank, all of one 16-bit dtype. */
void quantlab_dense_product(const uint16_t *weight, int64_t rows, int64_t columns, const void *x, int64_t stride,
                            int64_t tokens, int dtype, const int64_t *which, const int64_t *start, const int64_t *count,
                            int64_t number, void *out) {
    const int64_t held = stride ? tokens : 1, padded = round_up(columns, 32), apart = padded + 32;
    void *copy = scratch(held * apart * 4);
    for (int64_t t = 0; t < held; t++) {
        const char *row = (const char *)x + t * stride * 2;
        if (dtype == FLOAT16)
            widen(row, dtype, columns, padded, (float *)copy + t * apart);
        else {
            memcpy((uint16_t *)copy + t * apart, row, columns * 2);
            memset((uint16_t *)copy + t * apart + columns, 0, (padded - columns) * 2);
        }
    }
    Dense job = {weight, rows, columns, {which, start, count, number}, copy, stride ? apart : 0, out, dtype, 0};
    GOMP_parallel(work, &job, 0, 0);
    free(copy);
}
