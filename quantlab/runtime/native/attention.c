/* Attention of one new token per sequence to a cache of latents (quantlab/runtime/modules/attention.py) or of keys and values.

   Both are built from two operations over 16-bit rows, each read once from memory: a weighted sum of rows, and dot
   products of rows with a vector. Sums and intermediate vectors are float32.

   In latent attention a thread takes whole heads and loops over the sequences of the batch, so that a head's part of
   kv_b is read from memory once. In attention to keys and values a thread takes the group of heads that shares one key
   head. */

#include "kernels.h"
#include "simd.h"

/* The cache has `length` positions per sequence. Tokens occupy positions padding[b] (or 0) up to `cached`. */
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
    int64_t next_unit;
} Attention;

/* out [width] = the sum over i < count of weights[i] * row i. */
INLINE void sum_weighted_rows(const uint16_t *rows, int64_t count, int64_t width, const float *weights, float *out,
                              const int dtype) {
    memset(out, 0, width * 4);
    for (int64_t i = 0; i < count; i += 4, rows += 4 * width) {
        const int64_t some = count - i < 4 ? count - i : 4;
        for (int64_t k = 0; k < width; k += 16) {
            const __mmask16 mask = lane_mask(width - k);
            __m512 sum = _mm512_maskz_loadu_ps(mask, out + k);
            UNROLLED
            for (int j = 0; j < 4; j++)
                if (j < some)
                    sum = _mm512_fmadd_ps(load(rows + j * width, dtype, k, mask), _mm512_set1_ps(weights[i + j]), sum);
            _mm512_mask_storeu_ps(out + k, mask, sum);
        }
    }
}

/* out[i] += the dot product of row i with `vector` [width], for i < count. */
INLINE void add_dot_products(const uint16_t *rows, int64_t count, int64_t width, const float *vector, float *out,
                             const int dtype) {
    for (int64_t i = 0; i < count; i++, rows += width) {
        __m512 sum = _mm512_setzero_ps(), other = sum;
        int64_t k = 0;
        for (; k + 32 <= width; k += 32) {
            sum = _mm512_fmadd_ps(load(rows, dtype, k, 0xFFFF), _mm512_loadu_ps(vector + k), sum);
            other = _mm512_fmadd_ps(load(rows, dtype, k + 16, 0xFFFF), _mm512_loadu_ps(vector + k + 16), other);
        }
        for (; k < width; k += 16) {
            const __mmask16 mask = lane_mask(width - k);
            sum = _mm512_fmadd_ps(load(rows, dtype, k, mask), _mm512_maskz_loadu_ps(mask, vector + k), sum);
        }
        out[i] += _mm512_reduce_add_ps(_mm512_add_ps(sum, other));
    }
}

/* scores [count] -> softmax(scaling * scores + mask), in place. */
INLINE void softmax(float *scores, int64_t count, float scaling, const float *mask) {
    __m512 running_max = _mm512_set1_ps(-3.4e38f), sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < count; i += 16) {
        const __mmask16 some = lane_mask(count - i);
        __m512 score = _mm512_mul_ps(_mm512_maskz_loadu_ps(some, scores + i), _mm512_set1_ps(scaling));
        if (mask)
            score = _mm512_add_ps(score, _mm512_maskz_loadu_ps(some, mask + i));
        _mm512_mask_storeu_ps(scores + i, some, score);
        running_max = _mm512_mask_max_ps(running_max, some, running_max, score);
    }
    const __m512 maximum = _mm512_set1_ps(_mm512_reduce_max_ps(running_max));
    for (int64_t i = 0; i < count; i += 16) {
        const __mmask16 some = lane_mask(count - i);
        const __m512 weight = exponential(_mm512_sub_ps(_mm512_maskz_loadu_ps(some, scores + i), maximum));
        _mm512_mask_storeu_ps(scores + i, some, weight);
        sum = _mm512_mask_add_ps(sum, some, sum, weight);
    }
    const float normalizer = 1 / _mm512_reduce_add_ps(sum);
    for (int64_t i = 0; i < count; i++)
        scores[i] *= normalizer;
}

/* One head of latent attention, for all sequences. latent_vector [L] holds first the query, then the attention output,
   both in the space of the latents. */
INLINE void attend_head(const Attention *job, int64_t h, float *query, float *latent_vector, float *scores, float *result,
                        const int dtype) {
    const int64_t width = job->nope + job->turned, latent = job->latent;
    const uint16_t *keys = job->weight + h * (job->nope + job->value) * latent, *values = keys + job->nope * latent;
    for (int64_t b = 0; b < job->batch; b++) {
        const int64_t row = b * job->heads + h, from = job->padding ? job->padding[b] : 0, cached = job->cached - from;
        const uint16_t *latents = job->latents + (b * job->length + from) * latent;
        widen((const uint16_t *)job->query + row * width, dtype, width, round_up(width, 16), query);
        sum_weighted_rows(keys, job->nope, latent, query, latent_vector, dtype);
        memset(scores, 0, cached * 4);
        add_dot_products(latents, cached, latent, latent_vector, scores, dtype);
        add_dot_products(job->rotary + (b * job->length + from) * job->turned, cached, job->turned, query + job->nope, scores, dtype);
        softmax(scores, cached, job->scaling, job->mask ? job->mask + b * job->cached + from : NULL);
        sum_weighted_rows(latents, cached, latent, scores, latent_vector, dtype);
        memset(result, 0, job->value * 4);
        add_dot_products(values, job->value, latent, latent_vector, result, dtype);
        for (int64_t v = 0; v < job->value; v += 16)
            store(job->out, dtype, row * job->value + v, lane_mask(job->value - v), _mm512_loadu_ps(result + v));
    }
}

static void latent_worker(void *argument) {
    Attention *job = argument;
    int64_t from, to;
    float *query = scratch((job->nope + job->turned + 16) * 4), *latent_vector = scratch(job->latent * 4);
    float *scores = scratch(job->cached * 4), *result = scratch((job->value + 16) * 4);
    while (next_chunk(&job->next_unit, job->heads, &from, &to))
        for (int64_t h = from; h < to; h++)
            if (job->dtype == FLOAT16)
                attend_head(job, h, query, latent_vector, scores, result, FLOAT16);
            else
                attend_head(job, h, query, latent_vector, scores, result, BFLOAT16);
    free(query);
    free(latent_vector);
    free(scores);
    free(result);
}

/* out [B, H, V]: attention to the cache positions 0 … *position, or to all of them if `position` is NULL. */
void quantlab_latent_attention(const void *query, const uint16_t *latents, const uint16_t *rotary, const uint16_t *weight,
                               const float *mask, const int64_t *position, const int64_t *padding, int64_t batch, int64_t heads,
                               int64_t length, int64_t latent, int64_t nope, int64_t turned, int64_t value, float scaling,
                               int dtype, void *out) {
    const int64_t cached = position ? *position + 1 : length;
    Attention job = {query,  latents, rotary, weight, mask,  padding, batch, heads, cached,
                     length, latent,  nope,   turned, value, scaling, dtype, out,   0};
    GOMP_parallel(latent_worker, &job, 0, 0);
}

typedef struct {
    const void *query; /* [B, H, D] */
    const uint16_t *keys, *values; /* [B, G, length, D] */
    const int64_t *padding; /* [B] */
    int64_t batch, heads, key_heads, cached, length, width;
    float scaling;
    int dtype;
    void *out; /* [B, H, D] */
    int64_t next_unit;
} Grouped;

/* The query heads that share key head g, for sequence b. */
INLINE void attend_group(const Grouped *job, int64_t b, int64_t g, float *query, float *scores, const int dtype) {
    const int64_t width = job->width, heads_per_key = job->heads / job->key_heads;
    const int64_t from = job->padding[b], cached = job->cached - from;
    const int64_t cache_row = ((b * job->key_heads + g) * job->length + from) * width;
    for (int64_t h = 0; h < heads_per_key; h++) {
        const int64_t offset = (b * job->heads + g * heads_per_key + h) * width;
        widen((const uint16_t *)job->query + offset, dtype, width, round_up(width, 16), query);
        memset(scores, 0, cached * 4);
        add_dot_products(job->keys + cache_row, cached, width, query, scores, dtype);
        softmax(scores, cached, job->scaling, NULL);
        sum_weighted_rows(job->values + cache_row, cached, width, scores, query, dtype);
        for (int64_t k = 0; k < width; k += 16)
            store(job->out, dtype, offset + k, lane_mask(width - k), _mm512_loadu_ps(query + k));
    }
}

static void grouped_worker(void *argument) {
    Grouped *job = argument;
    int64_t from, to;
    float *query = scratch((job->width + 16) * 4), *scores = scratch(job->cached * 4);
    while (next_chunk(&job->next_unit, job->batch * job->key_heads, &from, &to))
        for (int64_t i = from; i < to; i++)
            if (job->dtype == FLOAT16)
                attend_group(job, i / job->key_heads, i % job->key_heads, query, scores, FLOAT16);
            else
                attend_group(job, i / job->key_heads, i % job->key_heads, query, scores, BFLOAT16);
    free(query);
    free(scores);
}

/* out [B, H, D]: grouped-query attention (H / G query heads share a key head) to cache positions 0 … *position. */
void quantlab_grouped_attention(const void *query, const uint16_t *keys, const uint16_t *values, const int64_t *position,
                                const int64_t *padding, int64_t batch, int64_t heads, int64_t key_heads, int64_t length,
                                int64_t width, float scaling, int dtype, void *out) {
    Grouped job = {query, keys, values, padding, batch, heads, key_heads, *position + 1, length, width, scaling, dtype, out, 0};
    GOMP_parallel(grouped_worker, &job, 0, 0);
}
