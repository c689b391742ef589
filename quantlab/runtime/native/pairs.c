/* bfloat16 weights in oneDNN's blocked layout, times a few rows of bfloat16 activations. oneDNN multiplies many rows in
   the same layout, so the weights are stored once.

   Layout: rows are padded to a multiple of 64, columns to a multiple of 32. A block of 64 rows stores its pairs of
   neighbouring columns one after the other, and each pair for all 64 rows side by side. */

#include "kernels.h"
#include "simd.h"

#define TOKENS 4 /* rows of activations multiplied per pass over a block */

typedef struct {
    const uint16_t *weight;
    int64_t rows, padded; /* N, and K rounded up to a multiple of 32 */
    const uint16_t *x; /* [T, stride], zero beyond K */
    int64_t x_stride, tokens;
    const uint16_t *bias; /* [N], or NULL */
    uint16_t *out;
    int64_t next_unit;
} Pairs;

INLINE void multiply_block(const Pairs *job, int64_t top, int64_t token, const int tokens) {
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
                    __m512 *to = &sum[s][m][tokens == 1 ? i : 0]; /* one token: two chains hide the latency */
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
                    both = _mm512_add_ps(both, load(job->bias, BFLOAT16, top + 16 * s, lane_mask(left)));
                store(job->out, BFLOAT16, (token + m) * job->rows + top + 16 * s, lane_mask(left), both);
            }
        }
}

static void worker(void *argument) {
    Pairs *job = argument;
    int64_t from, to;
    while (next_chunk(&job->next_unit, (job->rows + 63) / 64, &from, &to))
        for (int64_t unit = from; unit < to; unit++)
            for (int64_t token = 0; token < job->tokens; token += TOKENS)
                switch (job->tokens - token) {
                case 1: multiply_block(job, unit * 64, token, 1); break;
                case 2: multiply_block(job, unit * 64, token, 2); break;
                case 3: multiply_block(job, unit * 64, token, 3); break;
                default: multiply_block(job, unit * 64, token, 4);
                }
}

/* out [T, N] = x [T, K] times one matrix, plus the bias; `stride` is the row stride of x in elements. */
void quantlab_paired_product(const uint16_t *weight, int64_t rows, int64_t columns, const uint16_t *x, int64_t stride,
                             int64_t tokens, const uint16_t *bias, uint16_t *out) {
    const int64_t padded = round_up(columns, 32), copy_stride = padded + 32;
    uint16_t *copy = scratch(tokens * copy_stride * 2);
    for (int64_t t = 0; t < tokens; t++) {
        memcpy(copy + t * copy_stride, x + t * stride, columns * 2);
        memset(copy + t * copy_stride + columns, 0, (padded - columns) * 2);
    }
    Pairs job = {weight, rows, padded, copy, copy_stride, tokens, bias, out, 0};
    GOMP_parallel(worker, &job, 0, 0);
    free(copy);
}
