/* bfloat16 weights in the blocks oneDNN multiplies at many rows, times few rows of bfloat16 activations.

   Layout: rows padded to a multiple of 64, columns to one of 32; blocks of 64 rows, in a block the pairs of neighbouring
   columns one after the other, each pair with its 64 rows side by side. */

#include "kernels.h"
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
