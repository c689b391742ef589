/* Bands of int4 and int8 matrices dequantized to float32 or bfloat16, for products of many rows by torch's matmul.

   A weight is q * scale rounded to the dtype of the scale, as the number formats define it, then to the dtype of the
   band. The vectors have the width of the set that the file is compiled for: 16 floats with AVX-512, else 8. */

#include "kernels.h"

#ifdef __AVX512F__
#include "simd.h"

#define LANES 16
typedef __m512 Floats;
typedef __m512i Integers;

INLINE Integers load_words(const uint8_t *q) { return _mm512_loadu_si512(q); }

/* The first `count` of the next integers, all of them if there are more. */
INLINE Integers load_bytes(const int8_t *q, int64_t count) {
    return _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(lane_mask(count), q));
}

INLINE Integers nibbles(Integers words, int shift) {
    const __m512i some = _mm512_and_si512(_mm512_srli_epi32(words, shift), _mm512_set1_epi32(15));
    return _mm512_sub_epi32(some, _mm512_set1_epi32(8));
}

INLINE Floats scaled(Integers q, Floats scale) { return _mm512_mul_ps(_mm512_cvtepi32_ps(q), scale); }

INLINE Floats load_scales(const void *scale, int dtype, int64_t i) { return load(scale, dtype, i, 0xFFFF); }

INLINE Floats same_scale(const void *scale, int dtype, int64_t i) { return _mm512_set1_ps(scalar(scale, dtype, i)); }

/* Round to `scale_dtype` and store the first `count` elements as `dtype`, all of them if there are more. */
INLINE void store_rounded(void *out, int dtype, int64_t i, int64_t count, Floats value, int scale_dtype) {
    if (scale_dtype != FLOAT32 && scale_dtype != dtype)
        value = from_sixteen(to_sixteen(value, scale_dtype), scale_dtype);
    store(out, dtype, i, lane_mask(count), value);
}
#else
#include "simd256.h"

#define LANES 8
typedef __m256 Floats;
typedef __m256i Integers;

INLINE Integers load_words(const uint8_t *q) { return _mm256_loadu_si256((const __m256i *)q); }

INLINE Integers load_bytes(const int8_t *q, int64_t count) { /* columns come in eights: `count` is at least 8 */
    (void)count;
    return _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)q));
}

INLINE Integers nibbles(Integers words, int shift) {
    const __m256i some = _mm256_and_si256(_mm256_srli_epi32(words, shift), _mm256_set1_epi32(15));
    return _mm256_sub_epi32(some, _mm256_set1_epi32(8));
}

INLINE Floats scaled(Integers q, Floats scale) { return _mm256_mul_ps(_mm256_cvtepi32_ps(q), scale); }

INLINE Floats load_scales(const void *scale, int dtype, int64_t i) { return load8(scale, dtype, i); }

INLINE Floats same_scale(const void *scale, int dtype, int64_t i) { return _mm256_set1_ps(scalar8(scale, dtype, i)); }

INLINE void store_rounded(void *out, int dtype, int64_t i, int64_t count, Floats value, int scale_dtype) {
    store_up_to8(out, dtype, i, count, rounded8(value, scale_dtype));
}
#endif

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
    static const int shift[STEP] = {0, 16, 4, 20, 8, 24, 12, 28};
    int64_t step, stop;
    while (next_chunk(&job->next_unit, job->columns / STEP, &step, &stop))
        for (; step < stop; step++)
            for (int64_t row = job->from; row < job->to; row += LANES) {
                const int64_t top = row / 64 * 64, column_step = padded - top < 64 ? (padded - top) / 16 : 4;
                const uint8_t *q = (const uint8_t *)job->q + top * job->columns / 2 + step * column_step * 64 + (row - top) * 4;
                const Integers words = load_words(q);
                const Floats scale = load_scales(job->scale, scale_dtype, (row / 16 * groups + step * STEP / job->group) * 16 + row % 16);
                UNROLLED
                for (int k = 0; k < STEP; k++)
                    store_rounded(job->out, dtype, (step * STEP + k) * out_rows + row - job->from, job->to - row,
                                  scaled(nibbles(words, shift[k]), scale), scale_dtype);
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
            const Floats scale = same_scale(job->scale, scale_dtype, job->from + row);
            for (int64_t k = 0; k < job->columns; k += LANES)
                store_rounded(job->out, dtype, row * job->columns + k, job->columns - k,
                              scaled(load_bytes(q + k, job->columns - k), scale), scale_dtype);
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
