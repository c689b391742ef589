/* What lies between the products, for few rows: each of these is several small operations of torch's, which at one row cost
   more than the arithmetic. They run in the calling thread. */

#include "lanes.h"

/* RMS norm: out [T, K] = x / sqrt(mean(x^2) + epsilon), rounded to the dtype of x, times weight [K]. */
void quantlab_norm(const void *x, const void *weight, int64_t rows, int64_t columns, float epsilon, int dtype, void *out) {
    for (int64_t row = 0; row < rows; row++) {
        const int64_t at = row * columns;
        __m512 sum = _mm512_setzero_ps();
        for (int64_t k = 0; k < columns; k += 16) {
            const __m512 value = load(x, dtype, at + k, first(columns - k));
            sum = _mm512_fmadd_ps(value, value, sum);
        }
        const __m128 mean = _mm_set_ss(_mm512_reduce_add_ps(sum) / columns + epsilon);
        const __m512 scale = _mm512_set1_ps(1 / _mm_cvtss_f32(_mm_sqrt_ss(mean)));
        for (int64_t k = 0; k < columns; k += 16) {
            const __mmask16 mask = first(columns - k);
            __m512 value = _mm512_mul_ps(load(x, dtype, at + k, mask), scale);
            if (dtype != FLOAT32)
                value = from_sixteen(to_sixteen(value, dtype), dtype);
            store(out, dtype, at + k, mask, _mm512_mul_ps(value, load(weight, dtype, k, mask)));
        }
    }
}

/* SiLU(gate) * up: gate and up are the halves of the rows of x [T, 2 K]; out [T, K]. */
void quantlab_gate(const void *x, int64_t rows, int64_t columns, int dtype, void *out) {
    const __m512 one = _mm512_set1_ps(1);
    for (int64_t row = 0; row < rows; row++)
        for (int64_t k = 0; k < columns; k += 16) {
            const __mmask16 mask = first(columns - k);
            const __m512 gate = load(x, dtype, 2 * row * columns + k, mask);
            const __m512 up = load(x, dtype, (2 * row + 1) * columns + k, mask);
            const __m512 sigmoid = _mm512_div_ps(one, _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), gate))));
            store(out, dtype, row * columns + k, mask, _mm512_mul_ps(_mm512_mul_ps(gate, sigmoid), up));
        }
}

/* out [K] = the rows of x [T, K], each times its weight, added in float32. */
void quantlab_weighted_sum(const void *x, const float *weights, int64_t rows, int64_t columns, int dtype, void *out) {
    for (int64_t k = 0; k < columns; k += 16) {
        const __mmask16 mask = first(columns - k);
        __m512 sum = _mm512_setzero_ps();
        for (int64_t row = 0; row < rows; row++)
            sum = _mm512_fmadd_ps(load(x, dtype, row * columns + k, mask), _mm512_set1_ps(weights[row]), sum);
        store(out, dtype, k, mask, sum);
    }
}
