/* The router of a mixture of experts for few tokens: as quantlab/runtime/cuda/choose.py, whose words these are. */

#include <math.h>

#include "kernels.h"
#include "lanes.h"

typedef struct {
    const float *x; /* [T, apart], zeros behind H */
    const void *weight; /* [E, H] */
    float *logits; /* [T, E] */
    int64_t tokens, apart, hidden, experts;
    int dtype;
    int64_t taken;
} Logits;

INLINE void dots(const Logits *job, int64_t expert, const int dtype) {
    for (int64_t t = 0; t < job->tokens; t++) {
        __m512 sum = _mm512_setzero_ps(), other = sum;
        const float *x = job->x + t * job->apart;
        for (int64_t k = 0; k < job->hidden; k += 32) {
            const int64_t left = job->hidden - k, at = expert * job->hidden + k;
            sum = _mm512_fmadd_ps(load(job->weight, dtype, at, first(left)), _mm512_loadu_ps(x + k), sum);
            if (left > 16)
                other = _mm512_fmadd_ps(load(job->weight, dtype, at + 16, first(left - 16)), _mm512_loadu_ps(x + k + 16), other);
        }
        job->logits[t * job->experts + expert] = _mm512_reduce_add_ps(_mm512_add_ps(sum, other));
    }
}

static void work(void *argument) {
    Logits *job = argument;
    int64_t from, to;
    while (take(&job->taken, job->experts, &from, &to))
        for (int64_t expert = from; expert < to; expert++)
            switch (job->dtype) {
            case FLOAT32: dots(job, expert, FLOAT32); break;
            case FLOAT16: dots(job, expert, FLOAT16); break;
            default: dots(job, expert, BFLOAT16);
            }
}

/* The first of the largest. */
static int64_t best(const float *x, int64_t count) {
    int64_t found = 0;
    for (int64_t i = 1; i < count; i++)
        if (x[i] > x[found])
            found = i;
    return found;
}

/* What is wanted of an expert of a group that was not chosen, or with a score that is no number: less than of others, more than
   of one that is chosen already. So there are always top_k experts, and a token of NaNs gets weights of NaN. */
#define LEAST -3e38f

/* The experts of one token by its logits, which become scores. wanted [E], group [groups]: scratch. */
static void pick(float *scores, const float *bias, const Choice *how, int64_t *index, float *weights, float *wanted, float *group) {
    const int64_t experts = how->experts, per = experts / how->groups;
    const float top = how->sigmoid ? 0 : scores[best(scores, experts)];
    float sum = 0;
    for (int64_t i = 0; i < experts; i += 16) {
        const __mmask16 mask = first(experts - i);
        const __m512 logit = _mm512_maskz_loadu_ps(mask, scores + i), one = _mm512_set1_ps(1);
        const __m512 shifted = _mm512_sub_ps(logit, _mm512_set1_ps(top));
        const __m512 power = exponential(how->sigmoid ? _mm512_sub_ps(_mm512_setzero_ps(), logit) : shifted);
        const __m512 score = how->sigmoid ? _mm512_div_ps(one, _mm512_add_ps(one, power)) : power;
        _mm512_mask_storeu_ps(scores + i, mask, score);
        sum += _mm512_mask_reduce_add_ps(mask, score);
    }
    for (int64_t i = 0; i < experts; i++) {
        scores[i] /= how->sigmoid ? 1 : sum;
        const float value = scores[i] + (bias ? bias[i] : 0);
        wanted[i] = value == value ? value : LEAST;
    }
    if (how->top_groups < how->groups) {
        for (int64_t g = 0; g < how->groups; g++) {
            float *mine = wanted + g * per;
            const int64_t at = best(mine, per);
            const float most = group[g] = mine[at];
            if (how->sigmoid) { /* the sum of the two best */
                mine[at] = -INFINITY;
                group[g] += mine[best(mine, per)];
                mine[at] = most;
            }
        }
        for (int64_t k = 0; k < how->top_groups; k++)
            group[best(group, how->groups)] = -INFINITY;
        for (int64_t g = 0; g < how->groups; g++)
            for (int64_t i = g * per; i < (g + 1) * per && group[g] > -INFINITY; i++) {
                wanted[i] = how->sigmoid ? LEAST : 0;
                scores[i] = how->sigmoid ? scores[i] : 0;
            }
    }
    float total = 0;
    for (int64_t k = 0; k < how->top_k; k++) {
        index[k] = best(wanted, experts);
        wanted[index[k]] = -INFINITY;
        total += scores[index[k]];
    }
    for (int64_t k = 0; k < how->top_k; k++)
        weights[k] = scores[index[k]] * how->scaling / (how->normed ? total + 1e-20f : 1);
}

/* index, weights [T, top_k] of the experts for x [T, H], by weight [E, H] and bias [E] or NULL. */
void quantlab_choose(const void *x, int64_t tokens, int64_t hidden, int dtype, const void *weight, int weight_dtype,
                     const float *bias, const Choice *how, int64_t *index, float *weights) {
    const int64_t apart = round_up(hidden, 32);
    float *wide = scratch(tokens * apart * 4), *logits = scratch(tokens * how->experts * 4);
    float *wanted = scratch(how->experts * 4), *group = scratch(how->groups * 4);
    for (int64_t t = 0; t < tokens; t++)
        widen((const char *)x + t * hidden * width_of(dtype), dtype, hidden, apart, wide + t * apart);
    Logits job = {wide, weight, logits, tokens, apart, hidden, how->experts, weight_dtype, 0};
    GOMP_parallel(work, &job, 0, 0);
    for (int64_t t = 0; t < tokens; t++)
        pick(logits + t * how->experts, bias, how, index + t * how->top_k, weights + t * how->top_k, wanted, group);
    free(wide);
    free(logits);
    free(wanted);
    free(group);
}
