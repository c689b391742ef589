/* The router of a mixture of experts for a few tokens: the same algorithm as in quantlab/runtime/cuda/choose.py. */

#include <math.h>

#include "kernels.h"
#include "simd.h"

typedef struct {
    const float *x; /* [T, x_stride], zero beyond H */
    const void *weight; /* [E, H] */
    float *logits; /* [T, E] */
    int64_t tokens, x_stride, hidden, experts;
    int dtype;
    int64_t next_unit;
} Logits;

INLINE void dot_products(const Logits *job, int64_t expert, const int dtype) {
    for (int64_t t = 0; t < job->tokens; t++) {
        __m512 sum = _mm512_setzero_ps(), other = sum;
        const float *x = job->x + t * job->x_stride;
        for (int64_t k = 0; k < job->hidden; k += 32) {
            const int64_t left = job->hidden - k, at = expert * job->hidden + k;
            sum = _mm512_fmadd_ps(load(job->weight, dtype, at, lane_mask(left)), _mm512_loadu_ps(x + k), sum);
            if (left > 16)
                other = _mm512_fmadd_ps(load(job->weight, dtype, at + 16, lane_mask(left - 16)), _mm512_loadu_ps(x + k + 16), other);
        }
        job->logits[t * job->experts + expert] = _mm512_reduce_add_ps(_mm512_add_ps(sum, other));
    }
}

static void worker(void *argument) {
    Logits *job = argument;
    int64_t from, to;
    while (next_chunk(&job->next_unit, job->experts, &from, &to))
        for (int64_t expert = from; expert < to; expert++)
            switch (job->dtype) {
            case FLOAT32: dot_products(job, expert, FLOAT32); break;
            case FLOAT16: dot_products(job, expert, FLOAT16); break;
            default: dot_products(job, expert, BFLOAT16);
            }
}

/* The index of the largest element; the first of equal ones. */
static int64_t argmax(const float *x, int64_t count) {
    int64_t found = 0;
    for (int64_t i = 1; i < count; i++)
        if (x[i] > x[found])
            found = i;
    return found;
}

/* Preference of an expert whose group was not selected or whose score is NaN: below that of all other experts, above
   that of an expert that has already been selected (-inf). So top_k experts are always found, and a token of NaNs gets
   NaN weights. */
#define LOWEST -3e38f

/* Select the experts of one token. scores [E]: logits on entry, overwritten by the scores; preference [E], group_score
   [groups]: scratch. */
static void select_experts(float *scores, const float *bias, const Choice *how, int64_t *index, float *weights,
                           float *preference, float *group_score) {
    const int64_t experts = how->experts, group_size = experts / how->groups;
    const float max_logit = how->sigmoid ? 0 : scores[argmax(scores, experts)];
    float sum = 0;
    for (int64_t i = 0; i < experts; i += 16) {
        const __mmask16 mask = lane_mask(experts - i);
        const __m512 logit = _mm512_maskz_loadu_ps(mask, scores + i), one = _mm512_set1_ps(1);
        const __m512 shifted = _mm512_sub_ps(logit, _mm512_set1_ps(max_logit));
        const __m512 power = exponential(how->sigmoid ? _mm512_sub_ps(_mm512_setzero_ps(), logit) : shifted);
        const __m512 score = how->sigmoid ? _mm512_div_ps(one, _mm512_add_ps(one, power)) : power;
        _mm512_mask_storeu_ps(scores + i, mask, score);
        sum += _mm512_mask_reduce_add_ps(mask, score);
    }
    for (int64_t i = 0; i < experts; i++) {
        scores[i] /= how->sigmoid ? 1 : sum;
        const float value = scores[i] + (bias ? bias[i] : 0);
        preference[i] = value == value ? value : LOWEST;
    }
    if (how->top_groups < how->groups) {
        for (int64_t g = 0; g < how->groups; g++) {
            float *members = preference + g * group_size;
            const int64_t at = argmax(members, group_size);
            const float highest = group_score[g] = members[at];
            if (how->sigmoid) { /* a group's score is the sum of its two best experts */
                members[at] = -INFINITY;
                group_score[g] += members[argmax(members, group_size)];
                members[at] = highest;
            }
        }
        for (int64_t k = 0; k < how->top_groups; k++)
            group_score[argmax(group_score, how->groups)] = -INFINITY;
        for (int64_t g = 0; g < how->groups; g++)
            for (int64_t i = g * group_size; i < (g + 1) * group_size && group_score[g] > -INFINITY; i++) {
                preference[i] = how->sigmoid ? LOWEST : 0;
                scores[i] = how->sigmoid ? scores[i] : 0;
            }
    }
    float total = 0;
    for (int64_t k = 0; k < how->top_k; k++) {
        index[k] = argmax(preference, experts);
        preference[index[k]] = -INFINITY;
        total += scores[index[k]];
    }
    for (int64_t k = 0; k < how->top_k; k++)
        weights[k] = scores[index[k]] * how->scaling / (how->normed ? total + 1e-20f : 1);
}

/* index, weights [T, top_k]: the experts of x [T, H] and their weights, by the router's weight [E, H] and bias [E] (or
   NULL). */
void quantlab_choose(const void *x, int64_t tokens, int64_t hidden, int dtype, const void *weight, int weight_dtype,
                     const float *bias, const Choice *how, int64_t *index, float *weights) {
    const int64_t x_stride = round_up(hidden, 32);
    float *wide = scratch(tokens * x_stride * 4), *logits = scratch(tokens * how->experts * 4);
    float *preference = scratch(how->experts * 4), *group_scores = scratch(how->groups * 4);
    for (int64_t t = 0; t < tokens; t++)
        widen((const char *)x + t * hidden * width_of(dtype), dtype, hidden, x_stride, wide + t * x_stride);
    Logits job = {wide, weight, logits, tokens, x_stride, hidden, how->experts, weight_dtype, 0};
    GOMP_parallel(worker, &job, 0, 0);
    for (int64_t t = 0; t < tokens; t++)
        select_experts(logits + t * how->experts, bias, how, index + t * how->top_k, weights + t * how->top_k, preference,
                       group_scores);
    free(wide);
    free(logits);
    free(preference);
    free(group_scores);
}
