/* Row-wise operations between the matrix products, for a few rows. In torch each of them is several small operators,
   whose overhead at one row exceeds the arithmetic. They run in the calling thread. */

#include "kernels.h"
#include "simd.h"

/* RMS norm: out [T, K] = x / sqrt(mean(x^2) + epsilon), rounded to the dtype of x, times weight [K]. `x_stride` and
   `out_stride` are row strides in elements. If `position` is not NULL, the output of each row is shifted by *position
   rows of K elements. */
void quantlab_norm(const void *x, int64_t x_stride, const void *weight, int64_t rows, int64_t columns, float epsilon, int dtype,
                   void *out, int64_t out_stride, const int64_t *position) {
    for (int64_t row = 0; row < rows; row++) {
        const int64_t row_offset = row * x_stride, out_offset = row * out_stride + (position ? *position * columns : 0);
        __m512 sum = _mm512_setzero_ps();
        for (int64_t k = 0; k < columns; k += 16) {
            const __m512 value = load(x, dtype, row_offset + k, lane_mask(columns - k));
            sum = _mm512_fmadd_ps(value, value, sum);
        }
        const __m128 mean = _mm_set_ss(_mm512_reduce_add_ps(sum) / columns + epsilon);
        const __m512 scale = _mm512_set1_ps(1 / _mm_cvtss_f32(_mm_sqrt_ss(mean)));
        for (int64_t k = 0; k < columns; k += 16) {
            const __mmask16 mask = lane_mask(columns - k);
            __m512 value = _mm512_mul_ps(load(x, dtype, row_offset + k, mask), scale);
            if (dtype != FLOAT32)
                value = from_sixteen(to_sixteen(value, dtype), dtype);
            store(out, dtype, out_offset + k, mask, _mm512_mul_ps(value, load(weight, dtype, k, mask)));
        }
    }
}

/* SiLU(gate) * up: gate and up are the halves of the rows of x [T, 2 K]; out [T, K]. */
void quantlab_gate(const void *x, int64_t rows, int64_t columns, int dtype, void *out) {
    const __m512 one = _mm512_set1_ps(1);
    for (int64_t row = 0; row < rows; row++)
        for (int64_t k = 0; k < columns; k += 16) {
            const __mmask16 mask = lane_mask(columns - k);
            const __m512 gate = load(x, dtype, 2 * row * columns + k, mask);
            const __m512 up = load(x, dtype, (2 * row + 1) * columns + k, mask);
            const __m512 sigmoid = _mm512_div_ps(one, _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), gate))));
            store(out, dtype, row * columns + k, mask, _mm512_mul_ps(_mm512_mul_ps(gate, sigmoid), up));
        }
}

/* out [K] = the sum of the rows of x [T, K], each times its weight, in float32. */
void quantlab_weighted_sum(const void *x, const float *weights, int64_t rows, int64_t columns, int dtype, void *out) {
    for (int64_t k = 0; k < columns; k += 16) {
        const __mmask16 mask = lane_mask(columns - k);
        __m512 sum = _mm512_setzero_ps();
        for (int64_t row = 0; row < rows; row++)
            sum = _mm512_fmadd_ps(load(x, dtype, row * columns + k, mask), _mm512_set1_ps(weights[row]), sum);
        store(out, dtype, k, mask, sum);
    }
}

/* out [count] += x. */
void quantlab_add(void *out, const void *x, int64_t count, int dtype) {
    for (int64_t i = 0; i < count; i += 16) {
        const __mmask16 mask = lane_mask(count - i);
        store(out, dtype, i, mask, _mm512_add_ps(load(out, dtype, i, mask), load(x, dtype, i, mask)));
    }
}

/* Rotate one row: x [2 * half] by half angles. A pair of elements is either two neighbours or half the width apart. */
INLINE void turn(const void *x, int64_t from, int in_pairs, float *out, int out_in_pairs, const float *cos, const float *sin,
                 int64_t half, int dtype) {
    const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    const __m512i lower = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i upper = _mm512_add_epi32(lower, _mm512_set1_epi32(8));
    for (int64_t k = 0; k < half; k += 16) {
        const int64_t left = half - k;
        const __mmask16 mask = lane_mask(left), low = lane_mask(2 * left), high = left > 8 ? lane_mask(2 * left - 16) : 0;
        const __m512 c = _mm512_maskz_loadu_ps(mask, cos + k), s = _mm512_maskz_loadu_ps(mask, sin + k);
        __m512 a, b;
        if (in_pairs) {
            const __m512 l = load(x, dtype, from + 2 * k, low), u = load(x, dtype, from + 2 * k + 16, high);
            a = _mm512_permutex2var_ps(l, even, u);
            b = _mm512_permutex2var_ps(l, odd, u);
        } else {
            a = load(x, dtype, from + k, mask);
            b = load(x, dtype, from + half + k, mask);
        }
        const __m512 real = _mm512_fmsub_ps(a, c, _mm512_mul_ps(b, s)), other = _mm512_fmadd_ps(b, c, _mm512_mul_ps(a, s));
        if (out_in_pairs) {
            _mm512_mask_storeu_ps(out + 2 * k, low, _mm512_permutex2var_ps(real, lower, other));
            _mm512_mask_storeu_ps(out + 2 * k + 16, high, _mm512_permutex2var_ps(real, upper, other));
        } else {
            _mm512_mask_storeu_ps(out + k, mask, real);
            _mm512_mask_storeu_ps(out + half + k, mask, other);
        }
    }
}

/* Rotary embedding: out row (t, h) = x row (t, h), its pairs rotated by the angles of token t; out may be x. Row (t, h)
   is written at cache position *position. The first padding[t] positions of the cache are empty, so the angles are
   those of *position - padding[t], from the tables cos, sin [·, width / 2]. If cos is NULL, rows are copied without
   rotation. */
void quantlab_turn(const void *x, const RotaryStrides *of, void *out, const RotaryStrides *to, int64_t tokens, int64_t heads, int64_t width,
                   const float *cos, const float *sin, const int64_t *position, const int64_t *padding, int dtype) {
    const int64_t pairs = width / 2;
    float *rotated = scratch(width * 4);
    for (int64_t row = 0; row < tokens * heads; row++) {
        const int64_t t = row / heads, h = row % heads, from = t * of->token + h * of->head;
        const int64_t target = t * to->token + h * to->head + *position * to->position;
        const int64_t angles = (*position - padding[t]) * pairs;
        if (cos)
            turn(x, from, of->in_pairs, rotated, to->in_pairs, cos + angles, sin + angles, pairs, dtype);
        for (int64_t k = 0; k < width; k += 16) {
            const __mmask16 mask = lane_mask(width - k);
            store(out, dtype, target + k, mask, cos ? _mm512_maskz_loadu_ps(mask, rotated + k) : load(x, dtype, from + k, mask));
        }
    }
    free(rotated);
}
