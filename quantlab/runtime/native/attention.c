/* Attention of one new token per sequence to a cache: to latents, see quantlab/runtime/attention.py, or to keys and values.

   Everything is a sum of rows with weights, or a dot product of rows with a vector, over rows of 16 bits that are read once
   from memory; sums and the vectors between the steps are float32. To latents a thread takes whole heads, and the
   sequences of a batch one after the other, so that a head's part of kv_b comes from memory once; to keys and values it takes the
   heads that share them. */

#include "kernels.h"
#include "lanes.h"

/* Of the `length` places a sequence has in the cache the tokens stand at 0 … cached, or from `padding` of them on. */
typedef struct {
    const void *query; /* [B, H, N + R] */
    const uint16_t *latents, *rotary; /* [B, length, L], [B, length, R] */
    const uint16_t *weight; /* [H, N + V, L] */
    const float *mask; /* [B, cached] added to the scores, or NULL */
    const int64_t *padding; /* [B], or NULL */
    int64_t batch, heads, cached, length, latent, nope, turned, value;
    float scaling;
    int dtype;
    void *out; /* [B, H, V] */
    int64_t taken;
} Attention;

/* out [width] = the sum of `count` rows, row i counted weights[i] times. */
INLINE void mix(const uint16_t *rows, int64_t count, int64_t width, const float *weights, float *out, const int dtype) {
    memset(out, 0, width * 4);
    for (int64_t i = 0; i < count; i += 4, rows += 4 * width) {
        const int64_t some = count - i < 4 ? count - i : 4;
        for (int64_t k = 0; k < width; k += 16) {
            const __mmask16 mask = first(width - k);
            __m512 sum = _mm512_maskz_loadu_ps(mask, out + k);
            UNROLLED
            for (int j = 0; j < 4; j++)
                if (j < some)
                    sum = _mm512_fmadd_ps(load(rows + j * width, dtype, k, mask), _mm512_set1_ps(weights[i + j]), sum);
            _mm512_mask_storeu_ps(out + k, mask, sum);
        }
    }
}

/* out [count] += the dot products of `count` rows with a vector. */
INLINE void dots(const uint16_t *rows, int64_t count, int64_t width, const float *vector, float *out, const int dtype) {
    for (int64_t i = 0; i < count; i++, rows += width) {
        __m512 sum = _mm512_setzero_ps(), other = sum;
        int64_t k = 0;
        for (; k + 32 <= width; k += 32) {
            sum = _mm512_fmadd_ps(load(rows, dtype, k, 0xFFFF), _mm512_loadu_ps(vector + k), sum);
            other = _mm512_fmadd_ps(load(rows, dtype, k + 16, 0xFFFF), _mm512_loadu_ps(vector + k + 16), other);
        }
        for (; k < width; k += 16) {
            const __mmask16 mask = first(width - k);
            sum = _mm512_fmadd_ps(load(rows, dtype, k, mask), _mm512_maskz_loadu_ps(mask, vector + k), sum);
        }
        out[i] += _mm512_reduce_add_ps(_mm512_add_ps(sum, other));
    }
}

/* The scores, scaled and masked, become weights that add up to 1. */
INLINE void softmax(float *scores, int64_t count, float scaling, const float *mask) {
    __m512 largest = _mm512_set1_ps(-3.4e38f), sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < count; i += 16) {
        const __mmask16 some = first(count - i);
        __m512 score = _mm512_mul_ps(_mm512_maskz_loadu_ps(some, scores + i), _mm512_set1_ps(scaling));
        if (mask)
            score = _mm512_add_ps(score, _mm512_maskz_loadu_ps(some, mask + i));
        _mm512_mask_storeu_ps(scores + i, some, score);
        largest = _mm512_mask_max_ps(largest, some, largest, score);
    }
    const __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(largest));
    for (int64_t i = 0; i < count; i += 16) {
        const __mmask16 some = first(count - i);
        const __m512 weight = exponential(_mm512_sub_ps(_mm512_maskz_loadu_ps(some, scores + i), top));
        _mm512_mask_storeu_ps(scores + i, some, weight);
        sum = _mm512_mask_add_ps(sum, some, sum, weight);
    }
    const float all = 1 / _mm512_reduce_add_ps(sum);
    for (int64_t i = 0; i < count; i++)
        scores[i] *= all;
}

INLINE void head(const Attention *job, int64_t h, float *query, float *moved, float *scores, float *result, const int dtype) {
    const int64_t width = job->nope + job->turned, latent = job->latent;
    const uint16_t *keys = job->weight + h * (job->nope + job->value) * latent, *values = keys + job->nope * latent;
    for (int64_t b = 0; b < job->batch; b++) {
        const int64_t at = b * job->heads + h, from = job->padding ? job->padding[b] : 0, cached = job->cached - from;
        const uint16_t *latents = job->latents + (b * job->length + from) * latent;
        widen((const uint16_t *)job->query + at * width, dtype, width, round_up(width, 16), query);
        mix(keys, job->nope, latent, query, moved, dtype);
        memset(scores, 0, cached * 4);
        dots(latents, cached, latent, moved, scores, dtype);
        dots(job->rotary + (b * job->length + from) * job->turned, cached, job->turned, query + job->nope, scores, dtype);
        softmax(scores, cached, job->scaling, job->mask ? job->mask + b * job->cached + from : NULL);
        mix(latents, cached, latent, scores, moved, dtype);
        memset(result, 0, job->value * 4);
        dots(values, job->value, latent, moved, result, dtype);
        for (int64_t v = 0; v < job->value; v += 16)
            store(job->out, dtype, at * job->value + v, first(job->value - v), _mm512_loadu_ps(result + v));
    }
}

static void work(void *argument) {
    Attention *job = argument;
    int64_t from, to;
    float *query = scratch((job->nope + job->turned + 16) * 4), *moved = scratch(job->latent * 4);
    float *scores = scratch(job->cached * 4), *result = scratch((job->value + 16) * 4);
    while (take(&job->taken, job->heads, &from, &to))
        for (int64_t h = from; h < to; h++)
            if (job->dtype == FLOAT16)
                head(job, h, query, moved, scores, result, FLOAT16);
            else
                head(job, h, query, moved, scores, result, BFLOAT16);
    free(query);
    free(moved);
    free(scores);
    free(result);
}

/* out [B, H, V] of the places up to `position`, of all without one. */
void quantlab_latent_attention(const void *query, const uint16_t *latents, const uint16_t *rotary, const uint16_t *weight,
                               const float *mask, const int64_t *position, const int64_t *padding, int64_t batch, int64_t heads,
                               int64_t length, int64_t latent, int64_t nope, int64_t turned, int64_t value, float scaling,
                               int dtype, void *out) {
    const int64_t cached = position ? *position + 1 : length;
    Attention job = {query,  latents, rotary, weight, mask,  padding, batch, heads, cached,
                     length, latent,  nope,   turned, value, scaling, dtype, out,   0};
    GOMP_parallel(work, &job, 0, 0);
}

typedef struct {
    const void *query; /* [B, H, D] */
    const uint16_t *keys, *values; /* [B, G, length, D] */
    const int64_t *padding; /* [B] */
    int64_t batch, heads, key_heads, cached, length, width;
    float scaling;
    int dtype;
    void *out; /* [B, H, D] */
    int64_t taken;
} Grouped;

INLINE void group(const Grouped *job, int64_t b, int64_t g, float *query, float *scores, const int dtype) {
    const int64_t width = job->width, each = job->heads / job->key_heads, from = job->padding[b], cached = job->cached - from;
    const int64_t place = ((b * job->key_heads + g) * job->length + from) * width;
    for (int64_t h = 0; h < each; h++) {
        const int64_t at = (b * job->heads + g * each + h) * width;
        widen((const uint16_t *)job->query + at, dtype, width, round_up(width, 16), query);
        memset(scores, 0, cached * 4);
        dots(job->keys + place, cached, width, query, scores, dtype);
        softmax(scores, cached, job->scaling, NULL);
        mix(job->values + place, cached, width, scores, query, dtype);
        for (int64_t k = 0; k < width; k += 16)
            store(job->out, dtype, at + k, first(width - k), _mm512_loadu_ps(query + k));
    }
}

static void grouped_work(void *argument) {
    Grouped *job = argument;
    int64_t from, to;
    float *query = scratch((job->width + 16) * 4), *scores = scratch(job->cached * 4);
    while (take(&job->taken, job->batch * job->key_heads, &from, &to))
        for (int64_t i = from; i < to; i++)
            if (job->dtype == FLOAT16)
                group(job, i / job->key_heads, i % job->key_heads, query, scores, FLOAT16);
            else
                group(job, i / job->key_heads, i % job->key_heads, query, scores, BFLOAT16);
    free(query);
    free(scores);
}

/* The heads of a group attend to the same keys; out [B, H, D] of the places up to `position`. */
void quantlab_grouped_attention(const void *query, const uint16_t *keys, const uint16_t *values, const int64_t *position,
                                const int64_t *padding, int64_t batch, int64_t heads, int64_t key_heads, int64_t length,
                                int64_t width, float scaling, int dtype, void *out) {
    Grouped job = {query, keys, values, padding, batch, heads, key_heads, *position + 1, length, width, scaling, dtype, out, 0};
    GOMP_parallel(grouped_work, &job, 0, 0);
}
