/* int4 and int8 weights times a few rows of activations with AVX2 and FMA, for processors without AVX-512.

   There is no bfloat16 arithmetic, so activations are widened to float32 and never rounded. The layouts are those of
   int4.c and int8.c, so banks do not depend on the instruction set; only one of the two is in a library.

   int4: a nibble at bit s of a lane, masked in place and converted, is nibble * 2^s. The activations of its column are
   multiplied by 2^-s beforehand, which is exact. So eight weights cost a mask, a conversion and a multiply-add, without
   a shift. The offset of 8 is subtracted as 8 times the sum of the group's activations. */

#include "kernels.h"
#include "simd256.h"

#define STEP 8 /* columns in a lane of the int4 layout */
#define TOKENS 4

typedef struct {
    const void *q, *scale;
    int64_t rows, columns, group;
    int scale_dtype;
    Groups groups;
    const void *x; /* [T, stride] float32, or int16 for integer sums; zero beyond K */
    const float *initial_sums; /* [T, G] initial values of the accumulators */
    int64_t x_stride, initial_stride;
    void *out;
    int dtype;
    int64_t next_unit;
} Product;

/* `halves` vectors of 8 rows from row `row` on, times `tokens` rows of activations. */
INLINE void multiply_block(const Product *job, const uint8_t *q, int64_t column_step, const uint16_t *scale, int64_t row,
                           int64_t token, const int halves, const int tokens) {
    static const int shift[STEP] = {0, 16, 4, 20, 8, 24, 12, 28};
    const int64_t groups = job->columns / job->group, group_steps = job->group / STEP;
    const float *x = (const float *)job->x + token * job->x_stride;
    const float *initial = job->initial_sums + token * job->initial_stride;
    __m256 total[8][TOKENS];
    for (int h = 0; h < halves; h++)
        for (int m = 0; m < tokens; m++)
            total[h][m] = _mm256_setzero_ps();
    for (int64_t g = 0; g < groups; g++) {
        __m256 sum[8][TOKENS];
        UNROLLED
        for (int h = 0; h < halves; h++)
            UNROLLED
            for (int m = 0; m < tokens; m++)
                sum[h][m] = _mm256_set1_ps(initial[m * job->initial_stride + g]);
        for (int64_t step = 0; step < group_steps; step++, q += column_step * 64, x += STEP)
            UNROLLED
            for (int k = 0; k < STEP; k++) {
                __m256 t[TOKENS];
                UNROLLED
                for (int m = 0; m < tokens; m++)
                    t[m] = _mm256_broadcast_ss(x + m * job->x_stride + k);
                UNROLLED
                for (int h = 0; h < halves; h++) {
                    const __m256i w = _mm256_loadu_si256((const __m256i *)(q + h * 32));
                    const __m256i nibble = shift[k] == 28 ? _mm256_srli_epi32(w, 28)
                                                          : _mm256_and_si256(w, _mm256_set1_epi32(15 << shift[k]));
                    const __m256 value = _mm256_cvtepi32_ps(nibble);
                    UNROLLED
                    for (int m = 0; m < tokens; m++)
                        sum[h][m] = _mm256_fmadd_ps(value, t[m], sum[h][m]);
                }
            }
        UNROLLED
        for (int h = 0; h < halves; h++) {
            const __m256 group_scale = load8(scale, job->scale_dtype, (h / 2 * groups + g) * 16 + h % 2 * 8);
            UNROLLED
            for (int m = 0; m < tokens; m++)
                total[h][m] = _mm256_fmadd_ps(group_scale, sum[h][m], total[h][m]);
        }
    }
    for (int h = 0; h < halves; h++)
        for (int m = 0; m < tokens; m++) {
            const int64_t at = row + h * 8;
            if (at < job->rows)
                store_up_to8(job->out, job->dtype, (token + m) * job->rows + at, job->rows - at, total[h][m]);
        }
}

/* The block of up to 64 rows from row `top` on, `halves` vectors of 8 rows at a time. */
#define EACH_PART(halves, tokens)                                                                     \
    for (int64_t part = 0; part < column_step * 2; part += halves)                                    \
        multiply_block(job, q + part * 32, column_step, scale + part * 8 * groups, top + part * 8, token, halves, tokens);

static void multiply_group(const Product *job, int64_t i, int64_t top) {
    const int64_t padded = round_up(job->rows, 16), groups = job->columns / job->group;
    const int64_t column_step = padded - top < 64 ? (padded - top) / 16 : 4;
    const int64_t first_row = job->groups.which[i] * padded + top;
    const uint8_t *q = (const uint8_t *)job->q + first_row * job->columns / 2;
    const uint16_t *scale = (const uint16_t *)job->scale + first_row * groups;
    for (int64_t t = 0; t < job->groups.count[i]; t += TOKENS) {
        const int64_t token = job->groups.start[i] + t, left = job->groups.count[i] - t;
        switch (left < TOKENS ? left : TOKENS) {
        case 1:
            if (column_step == 4)
                EACH_PART(8, 1)
            else
                EACH_PART(2, 1)
            break;
        case 2: EACH_PART(2, 2) break;
        case 3: EACH_PART(2, 3) break;
        default: EACH_PART(2, 4)
        }
    }
}

static void int4_worker(void *argument) {
    Product *job = argument;
    const int64_t blocks = (job->rows + 63) / 64;
    int64_t from, to;
    while (next_chunk(&job->next_unit, blocks * job->groups.number, &from, &to))
        for (int64_t unit = from; unit < to; unit++)
            multiply_group(job, unit / blocks, unit % blocks * 64);
}

/* As in int4.c; activations are widened to float32. */
void quantlab_int4_product(const uint8_t *q, const uint16_t *scale, int64_t rows, int64_t columns, int64_t group,
                           int scale_dtype, const void *x, int64_t stride, int64_t tokens, int dtype, const int64_t *which,
                           const int64_t *start, const int64_t *count, int64_t number, void *out) {
    static const float factor[STEP] = {1, 0x1p-16f, 0x1p-4f, 0x1p-20f, 0x1p-8f, 0x1p-24f, 0x1p-12f, 1};
    const int64_t groups = columns / group, held = stride ? tokens : 1, copy_stride = columns + 16;
    const __m256 factors = _mm256_loadu_ps(factor);
    float *copy = scratch(held * copy_stride * 4), *initial_sums = scratch(held * groups * 4);
    for (int64_t t = 0; t < held; t++)
        for (int64_t g = 0; g < groups; g++) {
            __m256 sum = _mm256_setzero_ps();
            for (int64_t k = g * group; k < (g + 1) * group; k += STEP) {
                const __m256 value = load8((const char *)x + t * stride * width_of(dtype), dtype, k);
                sum = _mm256_add_ps(sum, value);
                _mm256_storeu_ps(copy + t * copy_stride + k, _mm256_mul_ps(value, factors));
            }
            initial_sums[t * groups + g] = -8 * sum8(sum);
        }
    Product job = {q,    scale,        rows,                     columns, group, scale_dtype, {which, start, count, number},
                   copy, initial_sums, stride ? copy_stride : 0, stride ? groups : 0, out, dtype, 0};
    GOMP_parallel(int4_worker, &job, 0, 0);
    free(copy);
    free(initial_sums);
}

INLINE void multiply_rows(const Product *job, int64_t matrix, int64_t row, int64_t row_step, int64_t token, const int rows,
                          const int tokens) {
    const int8_t *q = (const int8_t *)job->q + (matrix * job->rows + row) * job->columns;
    const float *x = (const float *)job->x + token * job->x_stride;
    __m256 sum[4][2];
    UNROLLED
    for (int r = 0; r < rows; r++)
        UNROLLED
        for (int m = 0; m < tokens; m++)
            sum[r][m] = _mm256_setzero_ps();
    for (int64_t k = 0; k < job->columns; k += 8)
        UNROLLED
        for (int r = 0; r < rows; r++) {
            const __m128i bytes = _mm_loadl_epi64((const __m128i *)(q + r * row_step * job->columns + k));
            const __m256 value = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
            UNROLLED
            for (int m = 0; m < tokens; m++)
                sum[r][m] = _mm256_fmadd_ps(value, _mm256_loadu_ps(x + m * job->x_stride + k), sum[r][m]);
        }
    UNROLLED
    for (int r = 0; r < rows; r++) {
        const int64_t at = row + r * row_step;
        const float scale = scalar8(job->scale, job->scale_dtype, matrix * job->rows + at);
        UNROLLED
        for (int m = 0; m < tokens; m++)
            store_up_to8(job->out, job->dtype, (token + m) * job->rows + at, 1, _mm256_set1_ps(sum8(sum[r][m]) * scale));
    }
}

/* Sums of int8 products: pairs of 16-bit products are added in 32 bits, which is exact up to 131071 columns. */
INLINE void sum_rows(const Product *job, int64_t matrix, int64_t row, int64_t row_step, int64_t token, const int rows,
                     const int tokens) {
    const int8_t *q = (const int8_t *)job->q + (matrix * job->rows + row) * job->columns;
    const int16_t *x = (const int16_t *)job->x + token * job->x_stride;
    const int64_t whole = job->columns / 16 * 16;
    __m256i sum[4][2];
    UNROLLED
    for (int r = 0; r < rows; r++)
        UNROLLED
        for (int m = 0; m < tokens; m++)
            sum[r][m] = _mm256_setzero_si256();
    for (int64_t k = 0; k < whole; k += 16)
        UNROLLED
        for (int r = 0; r < rows; r++) {
            const __m256i w = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(q + r * row_step * job->columns + k)));
            UNROLLED
            for (int m = 0; m < tokens; m++) {
                const __m256i t = _mm256_loadu_si256((const __m256i *)(x + m * job->x_stride + k));
                sum[r][m] = _mm256_add_epi32(sum[r][m], _mm256_madd_epi16(w, t));
            }
        }
    for (int r = 0; r < rows; r++)
        for (int m = 0; m < tokens; m++) {
            int32_t part[8], all = 0;
            _mm256_storeu_si256((__m256i *)part, sum[r][m]);
            for (int lane = 0; lane < 8; lane++)
                all += part[lane];
            for (int64_t k = whole; k < job->columns; k++)
                all += q[r * row_step * job->columns + k] * x[m * job->x_stride + k];
            ((int32_t *)job->out)[(token + m) * job->rows + row + r * row_step] = all;
        }
}

/* A unit of work is a block of 4 rows of one group's matrix, times all activations of the group. */
#define ROW_WORKER(name, kernel)                                                                           \
    static void name(void *argument) {                                                                     \
        Product *job = argument;                                                                           \
        const int64_t blocks = (job->rows + 3) / 4;                                                        \
        int64_t from, to;                                                                                  \
        while (next_chunk(&job->next_unit, blocks * job->groups.number, &from, &to))                       \
            for (int64_t unit = from, run; unit < to; unit += run) {                                       \
                run = blocks_at_once(&job->groups, unit, to, blocks);                                      \
                const int64_t i = unit / blocks, top = unit % blocks * 4, matrix = job->groups.which[i];   \
                const int64_t last = top + run * 4 < job->rows ? top + run * 4 : job->rows;                \
                const int few = job->groups.count[i] <= FEW_TOKENS;                                        \
                for (int64_t t = 0; t < job->groups.count[i]; t += 2) {                                    \
                    const int64_t token = job->groups.start[i] + t, left = job->groups.count[i] - t;       \
                    switch (left < 2 ? left : 2) { case 1: EACH_ROW(kernel, 4, 1) case 2: EACH_ROW(kernel, 4, 2) } \
                }                                                                                          \
            }                                                                                              \
    }

ROW_WORKER(int8_worker, multiply_rows)
ROW_WORKER(sums_worker, sum_rows)

/* As in int8.c; activations are widened to float32. K is a multiple of 8. */
void quantlab_int8_weight_product(const int8_t *q, const void *scale, int64_t rows, int64_t columns, int scale_dtype,
                                  const void *x, int64_t stride, int64_t tokens, int dtype, const int64_t *which,
                                  const int64_t *start, const int64_t *count, int64_t number, void *out) {
    const int64_t held = stride ? tokens : 1, copy_stride = columns + 16;
    float *copy = scratch(held * copy_stride * 4);
    for (int64_t t = 0; t < held; t++)
        widen8((const char *)x + t * stride * width_of(dtype), dtype, columns, columns, copy + t * copy_stride);
    Product job = {q, scale, rows, columns, columns, scale_dtype, {which, start, count, number}, copy, NULL,
                   stride ? copy_stride : 0, 0, out, dtype, 0};
    GOMP_parallel(int8_worker, &job, 0, 0);
    free(copy);
}

/* out [T, N] int32 = x [T, K] int8, with contiguous rows, times one int8 matrix [N, K]; exact. */
void quantlab_int8_sums(const int8_t *q, int64_t rows, int64_t columns, const int8_t *x, int64_t tokens, int32_t *out) {
    const int64_t which = 0, start = 0, copy_stride = round_up(columns, 16) + 32;
    int16_t *copy = scratch(tokens * copy_stride * 2);
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t k = 0; k < columns; k++)
            copy[t * copy_stride + k] = x[t * columns + k];
    Product job = {q, NULL, rows, columns, columns, FLOAT32, {&which, &start, &tokens, 1}, copy, NULL,
                   copy_stride, 0, out, FLOAT32, 0};
    GOMP_parallel(sums_worker, &job, 0, 0);
    free(copy);
}
