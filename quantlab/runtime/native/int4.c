/* int4 weights times a few rows of bfloat16 activations, at memory bandwidth.

   A 32-bit lane holds 8 consecutive columns of one row; a vector holds 16 rows. Masking a lane with 000F000F leaves two
   nibbles, and OR-ing each with 4300 gives exactly the bfloat16 number 128 + nibble. So 32 weights cost one shift, one
   ternary logic operation and one pairwise dot product. The excess is 136 (128 plus the nibble's offset of 8) times the
   sum of the group's activations; its negative is the initial value of the accumulator.

   Layout: rows are padded to a multiple of 16 and grouped into blocks of 64 rows (four vectors; the last block may have
   fewer). A block stores, for each 8 columns, its vectors one after the other. In a lane, the nibbles 0, 4, 1, 5, 2, 6,
   3, 7 (lowest first) are columns 0 … 7, so each mask yields two neighbouring columns. Scales are stored as [N / 16, G,
   16]. */

#include "kernels.h"
#include "simd.h"

#define STEP 8 /* columns in a lane */
#define TOKENS 4 /* rows of activations multiplied per pass over a block */

typedef struct {
    const uint8_t *q;
    const uint16_t *scale;
    int64_t rows, columns, group;
    int scale_dtype;
    Groups groups;
    const uint16_t *x; /* [T, K] bfloat16 */
    const float *initial_sums; /* [T, G] initial values of the accumulators */
    int64_t x_stride, initial_stride;
    void *out;
    int dtype;
    int64_t next_unit;
} Int4;

/* `vectors` vectors of 16 rows, starting at row `row`, times `tokens` rows of activations. Consecutive column steps are
   `column_step` vectors apart. Vectors 4 … 7, if any, belong to another block that starts `second_block` rows later:
   two streams get more memory bandwidth than one, and the work on the activations is shared. */
INLINE void multiply_block(const Int4 *job, const uint8_t *q, int64_t column_step, const uint16_t *scale, int64_t row,
                           int64_t second_block, int64_t token, const int vectors, const int tokens) {
    const __m512i mask = _mm512_set1_epi32(0x000F000F), base = _mm512_set1_epi32(0x43004300);
    const int64_t groups = job->columns / job->group, group_steps = job->group / STEP;
    const uint16_t *x = job->x + token * job->x_stride;
    const float *initial = job->initial_sums + token * job->initial_stride;
    const int chains = vectors * tokens < 8 ? 2 : 1;
    __m512 total[8][TOKENS];
    UNROLLED
    for (int s = 0; s < vectors; s++)
        UNROLLED
        for (int m = 0; m < tokens; m++)
            total[s][m] = _mm512_setzero_ps();
    for (int64_t g = 0; g < groups; g++) {
        __m512 sum[8][TOKENS][2];
        UNROLLED
        for (int s = 0; s < vectors; s++)
            UNROLLED
            for (int m = 0; m < tokens; m++) {
                sum[s][m][0] = _mm512_set1_ps(initial[m * job->initial_stride + g]);
                sum[s][m][1] = _mm512_setzero_ps();
            }
        for (int64_t step = 0; step < group_steps; step++, q += column_step * 64, x += STEP) {
            __m512i w[8];
            UNROLLED
            for (int s = 0; s < vectors; s++) {
                const uint8_t *at = q + s % 4 * 64 + (s < 4 ? 0 : second_block * job->columns / 2);
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
                for (int s = 0; s < vectors; s++) {
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
        for (int s = 0; s < vectors; s++) {
            const int64_t at = (s % 4 * groups + g) * 16 + (s < 4 ? 0 : second_block * groups);
            const __m512 group_scale = load(scale, job->scale_dtype, at, 0xFFFF);
            UNROLLED
            for (int m = 0; m < tokens; m++) {
                const __m512 both = chains == 2 ? _mm512_add_ps(sum[s][m][0], sum[s][m][1]) : sum[s][m][0];
                total[s][m] = _mm512_fmadd_ps(group_scale, both, total[s][m]);
            }
        }
    }
    UNROLLED
    for (int s = 0; s < vectors; s++)
        UNROLLED
        for (int m = 0; m < tokens; m++) {
            const int64_t at = row + s % 4 * 16 + (s < 4 ? 0 : second_block);
            store(job->out, job->dtype, (token + m) * job->rows + at, lane_mask(job->rows - at), total[s][m]);
        }
}

#define EACH(vectors, tokens) \
    case tokens: multiply_block(job, q, column_step, scale, row, 0, token, vectors, tokens); break;

/* The block of up to 64 rows that starts at row `top`, times all rows of group `i`. */
static void multiply_group(const Int4 *job, int64_t i, int64_t top) {
    const int64_t padded = round_up(job->rows, 16), groups = job->columns / job->group;
    const int64_t column_step = padded - top < 64 ? (padded - top) / 16 : 4;
    const int64_t first_row = job->groups.which[i] * padded + top;
    for (int64_t t = 0; t < job->groups.count[i]; t += TOKENS) {
        const int64_t token = job->groups.start[i] + t, left = job->groups.count[i] - t;
        for (int64_t sub = 0; sub < column_step; sub += column_step == 4 ? 4 : 1) {
            const uint8_t *q = job->q + first_row * job->columns / 2 + sub * 64;
            const uint16_t *scale = job->scale + (first_row + sub * 16) * groups;
            const int64_t row = top + sub * 16;
            if (column_step == 4)
                switch (left < TOKENS ? left : TOKENS) { EACH(4, 1) EACH(4, 2) EACH(4, 3) EACH(4, 4) }
            else
                switch (left < TOKENS ? left : TOKENS) { EACH(1, 1) EACH(1, 2) EACH(1, 3) EACH(1, 4) }
        }
    }
}

/* Two blocks of 64 rows, at row `top` and `second_block` rows later, times the only row of group `i`. */
static void multiply_two_blocks(const Int4 *job, int64_t i, int64_t top, int64_t second_block) {
    const int64_t first_row = job->groups.which[i] * round_up(job->rows, 16) + top;
    multiply_block(job, job->q + first_row * job->columns / 2, 4, job->scale + first_row * (job->columns / job->group), top,
                   second_block, job->groups.start[i], 8, 1);
}

static void worker(void *argument) {
    Int4 *job = argument;
    const int64_t blocks = (job->rows + 63) / 64, whole = round_up(job->rows, 16) / 64;
    int64_t from, to;
    while (next_chunk(&job->next_unit, blocks * job->groups.number, &from, &to))
        for (int64_t unit = from, run; unit < to; unit += run) {
            run = blocks_at_once(&job->groups, unit, to, blocks);
            const int64_t i = unit / blocks, top = unit % blocks;
            const int64_t half = job->groups.count[i] == 1 ? (run - (top + run > whole)) / 2 : 0;
            for (int64_t each = top; each < top + half; each++)
                multiply_two_blocks(job, i, each * 64, half * 64);
            for (int64_t each = top + 2 * half; each < top + run; each++)
                multiply_group(job, i, each * 64);
        }
}

/* out [T, N] = x [T, K] times the bank's matrices, in the dtype of x. `stride` is the row stride of x in elements; 0
   means that all T rows are the same row. */
void quantlab_int4_product(const uint8_t *q, const uint16_t *scale, int64_t rows, int64_t columns, int64_t group,
                           int scale_dtype, const void *x, int64_t stride, int64_t tokens, int dtype, const int64_t *which,
                           const int64_t *start, const int64_t *count, int64_t number, void *out) {
    const int64_t groups = columns / group, held = stride ? tokens : 1, copy_stride = columns + 32;
    uint16_t *narrowed = scratch(held * copy_stride * 2);
    float *initial_sums = scratch(held * groups * 4);
    for (int64_t t = 0; t < held; t++) {
        narrow((const char *)x + t * stride * width_of(dtype), dtype, columns, columns, narrowed + t * copy_stride);
        for (int64_t g = 0; g < groups; g++) {
            __m512 sum = _mm512_setzero_ps();
            for (int64_t k = g * group; k < (g + 1) * group; k += 16)
                sum = _mm512_add_ps(sum, load(narrowed, BFLOAT16, t * copy_stride + k, 0xFFFF));
            initial_sums[t * groups + g] = -136 * _mm512_reduce_add_ps(sum);
        }
    }
    Int4 job = {q,        scale,  rows,    columns, group, scale_dtype, {which, start, count, number},
                narrowed, initial_sums, stride ? copy_stride : 0, stride ? groups : 0, out, dtype, 0};
    GOMP_parallel(worker, &job, 0, 0);
    free(narrowed);
    free(initial_sums);
}
