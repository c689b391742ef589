/* Bands of int4 and int8 matrices dequantized to float32 or bfloat16, for products of many rows by torch's matmul.

   A weight is q * scale rounded to the dtype of the scale, as the number formats define it, then to the dtype of the
   band. Only AVX2, FMA and F16C are used, so the same code runs on every processor that has native kernels. */

#include "kernels.h"
#include "simd256.h"

#define STEP 8 /* columns in a lane of the int4 layout */

typedef struct {
    const void *q, *scale;
    int64_t rows, columns, group, from, to;
    int scale_dtype, dtype;
    void *out;
    int64_t next_unit;
} Expansion;

/* The branches on dtypes are compile-time constants here: loops without them are twice as fast. */
INLINE void expand_int4(Expansion *job, const int scale_dtype, const int dtype) {
    const int64_t groups = job->columns / job->group, padded = round_up(job->rows, 16), out_rows = job->to - job->from;
    const __m256i mask = _mm256_set1_epi32(15), eight = _mm256_set1_epi32(8);
    static const int shift[STEP] = {0, 16, 4, 20, 8, 24, 12, 28};
    int64_t step, stop;
    while (next_chunk(&job->next_unit, job->columns / STEP, &step, &stop))
        for (; step < stop; step++)
            for (int64_t row = job->from; row < job->to; row += 8) {
                const int64_t top = row / 64 * 64, column_step = padded - top < 64 ? (padded - top) / 16 : 4;
                const uint8_t *q = (const uint8_t *)job->q + top * job->columns / 2 + step * column_step * 64 + (row - top) * 4;
                const __m256i w = _mm256_loadu_si256((const __m256i *)q);
                const int64_t at = (row / 16 * groups + step * STEP / job->group) * 16 + row % 16;
                const __m256 scale = load8(job->scale, scale_dtype, at);
                UNROLLED
                for (int k = 0; k < STEP; k++) {
                    const __m256i nibble = _mm256_and_si256(_mm256_srli_epi32(w, shift[k]), mask);
                    const __m256 value = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(nibble, eight)), scale);
                    store_up_to8(job->out, dtype, (step * STEP + k) * out_rows + row - job->from, job->to - row,
                                 rounded8(value, scale_dtype));
                }
            }
}

static void int4_worker(void *argument) {
    Expansion *job = argument;
    if (job->scale_dtype == BFLOAT16)
        job->dtype == FLOAT32 ? expand_int4(job, BFLOAT16, FLOAT32) : expand_int4(job, BFLOAT16, BFLOAT16);
    else
        job->dtype == FLOAT32 ? expand_int4(job, FLOAT16, FLOAT32) : expand_int4(job, FLOAT16, BFLOAT16);
}

/* out [K, to - from] of `dtype` (float32 or bfloat16) = rows `from` to `to` of one matrix in the layout of int4.c,
   transposed. `from` is a multiple of 16, and the scales are of 16 bits. */
void quantlab_int4_expand(const uint8_t *q, const uint16_t *scale, int64_t rows, int64_t columns, int64_t group,
                          int scale_dtype, int64_t from, int64_t to, int dtype, void *out) {
    Expansion job = {q, scale, rows, columns, group, from, to, scale_dtype, dtype, out, 0};
    GOMP_parallel(int4_worker, &job, 0, 0);
}

INLINE void expand_int8(Expansion *job, const int scale_dtype, const int dtype) {
    int64_t row, stop;
    while (next_chunk(&job->next_unit, job->to - job->from, &row, &stop))
        for (; row < stop; row++) {
            const int8_t *q = (const int8_t *)job->q + (job->from + row) * job->columns;
            const __m256 scale = _mm256_set1_ps(scalar8(job->scale, scale_dtype, job->from + row));
            for (int64_t k = 0; k < job->columns; k += 8) {
                const __m256i wide = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(q + k)));
                const __m256 value = _mm256_mul_ps(_mm256_cvtepi32_ps(wide), scale);
                store8(job->out, dtype, row * job->columns + k, rounded8(value, scale_dtype));
            }
        }
}

static void int8_worker(void *argument) {
    Expansion *job = argument;
    const int wide = job->dtype == FLOAT32;
    switch (job->scale_dtype) {
    case BFLOAT16: wide ? expand_int8(job, BFLOAT16, FLOAT32) : expand_int8(job, BFLOAT16, BFLOAT16); break;
    case FLOAT16: wide ? expand_int8(job, FLOAT16, FLOAT32) : expand_int8(job, FLOAT16, BFLOAT16); break;
    default: wide ? expand_int8(job, FLOAT32, FLOAT32) : expand_int8(job, FLOAT32, BFLOAT16);
    }
}

/* out [to - from, K] of `dtype` (float32 or bfloat16) = rows `from` to `to` of one row-major matrix with a scale per
   row. K is a multiple of 8. */
void quantlab_int8_expand(const int8_t *q, const void *scale, int64_t columns, int scale_dtype, int64_t from, int64_t to,
                          int dtype, void *out) {
    Expansion job = {q, scale, to, columns, columns, from, to, scale_dtype, dtype, out, 0};
    GOMP_parallel(int8_worker, &job, 0, 0);
}
