/* int4 weights times few rows of bfloat16 activations, at the rate the weights come from memory.

   A 32-bit lane holds 8 consecutive columns of one row, a vector 16 rows. Masked with 000F000F a lane holds two nibbles,
   and or-ed into 4300 each becomes the bfloat16 number 128 + nibble, exactly: shift, one ternary operation and one
   product of pairs per 32 weights. What is added too much, 136 (128 and the nibble's offset of 8) times the sum of the
   group's activations, is the accumulator's first value, negated.

   Layout: rows padded to a multiple of 16; blocks of four times 16 rows, the last one may have fewer; in a block, for every
   8 columns, the vectors of its 16 rows one after the other. The nibbles 0, 4, 1, 5, 2, 6, 3, 7 of a lane, lowest first, are
   columns 0 … 7: each mask gives two neighbours. Scales lie as [N / 16, G, 16]. */

#include "kernels.h"
#include "lanes.h"

#define STEP 8 /* columns in a lane */
#define TOKENS 4 /* rows of activations multiplied in one pass over a block */

typedef struct {
    const uint8_t *q;
    const uint16_t *scale;
    int64_t rows, columns, group;
    int scale_dtype;
    Groups groups;
    const uint16_t *x; /* [T, K] bfloat16 */
    const float *first; /* [T, G] the accumulators' first values */
    int64_t x_stride, first_stride;
    void *out;
    int dtype;
    int64_t taken;
} Int4;

/* 16 rows from row `row` of matrix `which` on, `subs` of them, times `tokens` rows of activations. The vectors of neighbouring
   columns lie `apart` vectors from each other. From the fifth on the 16 rows are those of another block, `far` rows away: two
   streams from memory bring more than one, and share what is done to the activations. */
INLINE void block(const Int4 *job, const uint8_t *q, int64_t apart, const uint16_t *scale, int64_t row, int64_t far, int64_t token,
                  const int subs, const int tokens) {
    const __m512i mask = _mm512_set1_epi32(0x000F000F), base = _mm512_set1_epi32(0x43004300);
    const int64_t groups = job->columns / job->group, steps = job->group / STEP;
    const uint16_t *x = job->x + token * job->x_stride;
    const float *start = job->first + token * job->first_stride;
    const int chains = subs * tokens < 8 ? 2 : 1;
    __m512 total[8][TOKENS];
    UNROLLED
    for (int s = 0; s < subs; s++)
        UNROLLED
        for (int m = 0; m < tokens; m++)
            total[s][m] = _mm512_setzero_ps();
    for (int64_t g = 0; g < groups; g++) {
        __m512 sum[8][TOKENS][2];
        UNROLLED
        for (int s = 0; s < subs; s++)
            UNROLLED
            for (int m = 0; m < tokens; m++) {
                sum[s][m][0] = _mm512_set1_ps(start[m * job->first_stride + g]);
                sum[s][m][1] = _mm512_setzero_ps();
            }
        for (int64_t step = 0; step < steps; step++, q += apart * 64, x += STEP) {
            __m512i w[8];
            UNROLLED
            for (int s = 0; s < subs; s++) {
                const uint8_t *at = q + s % 4 * 64 + (s < 4 ? 0 : far * job->columns / 2);
                if (tokens > 1)
                    _mm_prefetch((const char *)at + 1024, _MM_HINT_T0);
                w[s] = _mm512_loadu_si512(at);
            }
            UNROLLED
            for (int i = 0; i < 4; i++) {
                __m512bh pair[TOKENS];
                UNROLLED
                for (int m = 0; m < tokens; m++) {
                    int32_t two;
                    memcpy(&two, x + m * job->x_stride + 2 * i, 4);
                    pair[m] = (__m512bh)_mm512_set1_epi32(two);
                }
                UNROLLED
                for (int s = 0; s < subs; s++) {
                    const __m512bh v = (__m512bh)_mm512_ternarylogic_epi32(w[s], mask, base, 0xEA); /* (a & b) | c */
                    UNROLLED
                    for (int m = 0; m < tokens; m++) {
                        __m512 *to = &sum[s][m][chains == 2 ? i & 1 : 0];
                        *to = _mm512_dpbf16_ps(*to, v, pair[m]);
                    }
                    w[s] = _mm512_srli_epi32(w[s], 4);
                }
            }
        }
        UNROLLED
        for (int s = 0; s < subs; s++) {
            const int64_t at = (s % 4 * groups + g) * 16 + (s < 4 ? 0 : far * groups);
            const __m512 each = load(scale, job->scale_dtype, at, 0xFFFF);
            UNROLLED
            for (int m = 0; m < tokens; m++) {
                const __m512 both = chains == 2 ? _mm512_add_ps(sum[s][m][0], sum[s][m][1]) : sum[s][m][0];
                total[s][m] = _mm512_fmadd_ps(each, both, total[s][m]);
            }
        }
    }
    UNROLLED
    for (int s = 0; s < subs; s++)
        UNROLLED
        for (int m = 0; m < tokens; m++) {
            const int64_t at = row + s % 4 * 16 + (s < 4 ? 0 : far);
            store(job->out, job->dtype, (token + m) * job->rows + at, first(job->rows - at), total[s][m]);
        }
}

#define EACH(subs, tokens) case tokens: block(job, q, apart, scale, row, 0, token, subs, tokens); break;

/* One block of up to 64 rows from row `top` on, times the rows of group `i`. */
static void block_of_group(const Int4 *job, int64_t i, int64_t top) {
    const int64_t padded = round_up(job->rows, 16), groups = job->columns / job->group;
    const int64_t apart = padded - top < 64 ? (padded - top) / 16 : 4, above = job->groups.which[i] * padded + top;
    for (int64_t t = 0; t < job->groups.count[i]; t += TOKENS) {
        const int64_t token = job->groups.start[i] + t, left = job->groups.count[i] - t;
        for (int64_t sub = 0; sub < apart; sub += apart == 4 ? 4 : 1) {
            const uint8_t *q = job->q + above * job->columns / 2 + sub * 64;
            const uint16_t *scale = job->scale + (above + sub * 16) * groups;
            const int64_t row = top + sub * 16;
            if (apart == 4)
                switch (left < TOKENS ? left : TOKENS) { EACH(4, 1) EACH(4, 2) EACH(4, 3) EACH(4, 4) }
            else
                switch (left < TOKENS ? left : TOKENS) { EACH(1, 1) EACH(1, 2) EACH(1, 3) EACH(1, 4) }
        }
    }
}

/* Two blocks of 64 rows, from row `top` and `far` rows after it on, times the only row of group `i`. */
static void two_blocks(const Int4 *job, int64_t i, int64_t top, int64_t far) {
    const int64_t above = job->groups.which[i] * round_up(job->rows, 16) + top;
    block(job, job->q + above * job->columns / 2, 4, job->scale + above * (job->columns / job->group), top, far,
          job->groups.start[i], 8, 1);
}

static void work(void *argument) {
    Int4 *job = argument;
    const int64_t blocks = (job->rows + 63) / 64, whole = round_up(job->rows, 16) / 64;
    int64_t from, to;
    while (take(&job->taken, blocks * job->groups.number, &from, &to))
        for (int64_t unit = from, run; unit < to; unit += run) {
            run = run_of(&job->groups, unit, to, blocks);
            const int64_t i = unit / blocks, top = unit % blocks;
            const int64_t half = job->groups.count[i] == 1 ? (run - (top + run > whole)) / 2 : 0;
            for (int64_t each = top; each < top + half; each++)
                two_blocks(job, i, each * 64, half * 64);
            for (int64_t each = top + 2 * half; each < top + run; each++)
                block_of_group(job, i, each * 64);
        }
}

/* out [T, N] = x [T, K] times the matrices of a bank, in the dtype of x, whose rows are `stride` numbers apart (0: all are
   the same row). */
void quantlab_int4_product(const uint8_t *q, const uint16_t *scale, int64_t rows, int64_t columns, int64_t group,
                           int scale_dtype, const void *x, int64_t stride, int64_t tokens, int dtype, const int64_t *which,
                           const int64_t *start, const int64_t *count, int64_t number, void *out) {
    const int64_t groups = columns / group, held = stride ? tokens : 1, apart = columns + 32;
    uint16_t *narrowed = scratch(held * apart * 2);
    float *starts = scratch(held * groups * 4);
    for (int64_t t = 0; t < held; t++) {
        narrow((const char *)x + t * stride * width_of(dtype), dtype, columns, columns, narrowed + t * apart);
        for (int64_t g = 0; g < groups; g++) {
            __m512 sum = _mm512_setzero_ps();
            for (int64_t k = g * group; k < (g + 1) * group; k += 16)
                sum = _mm512_add_ps(sum, load(narrowed, BFLOAT16, t * apart + k, 0xFFFF));
            starts[t * groups + g] = -136 * _mm512_reduce_add_ps(sum);
        }
    }
    Int4 job = {q,        scale,  rows,    columns, group, scale_dtype, {which, start, count, number},
                narrowed, starts, stride ? apart : 0, stride ? groups : 0, out, dtype, 0};
    GOMP_parallel(work, &job, 0, 0);
    free(narrowed);
    free(starts);
}

typedef struct {
    const uint8_t *q;
    const uint16_t *scale;
    int64_t rows, columns, group, from, to;
    int scale_dtype;
    uint16_t *out;
    int64_t taken;
} Expansion;

static void expand(void *argument) {
    Expansion *job = argument;
    const int64_t groups = job->columns / job->group, padded = round_up(job->rows, 16), wide = job->to - job->from;
    const __m512i mask = _mm512_set1_epi32(15);
    const int order[8] = {0, 16, 4, 20, 8, 24, 12, 28};
    int64_t step, stop;
    while (take(&job->taken, job->columns / STEP, &step, &stop))
        for (; step < stop; step++)
            for (int64_t row = job->from; row < job->to; row += 16) {
                const int64_t top = row / 64 * 64, apart = padded - top < 64 ? (padded - top) / 16 : 4;
                const __m512i w = _mm512_loadu_si512(job->q + top * job->columns / 2 + (step * apart + (row - top) / 16) * 64);
                const int64_t at = (row / 16 * groups + step * STEP / job->group) * 16;
                const __m512 scale = load(job->scale, job->scale_dtype, at, 0xFFFF);
                for (int k = 0; k < STEP; k++) {
                    __m512i nibble = _mm512_and_si512(_mm512_srli_epi32(w, order[k]), mask);
                    __m512 value = _mm512_cvtepi32_ps(_mm512_sub_epi32(nibble, _mm512_set1_epi32(8)));
                    store(job->out, job->scale_dtype, (step * STEP + k) * wide + row - job->from, first(job->to - row),
                          _mm512_mul_ps(value, scale));
                }
            }
}

/* Rows from … to of one matrix, transposed: out [K, to - from] in the dtype of the scales; `from` is a multiple of 16. */
void quantlab_int4_expand(const uint8_t *q, const uint16_t *scale, int64_t rows, int64_t columns, int64_t group,
                          int scale_dtype, int64_t from, int64_t to, uint16_t *out) {
    Expansion job = {q, scale, rows, columns, group, from, to, scale_dtype, out, 0};
    GOMP_parallel(expand, &job, 0, 0);
}
