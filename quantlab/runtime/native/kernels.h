/* Prototypes of all functions that Python calls. Every source includes this header, so the compiler checks definitions
   against prototypes; a test checks the prototypes against the ctypes signatures in kernels.py. A mismatch would
   corrupt memory.

   dtype codes are those of work.h: 0 float32, 1 float16, 2 bfloat16. Sizes and strides count elements. */

#ifndef QUANTLAB_KERNELS_H
#define QUANTLAB_KERNELS_H

#include <stdint.h>

/* Products with int4 matrices; int4.c describes the layout and the arguments. */
void quantlab_int4_product(const uint8_t *q, const uint16_t *scale, int64_t rows, int64_t columns, int64_t group, int scale_dtype,
    const void *x, int64_t stride, int64_t tokens, int dtype, const int64_t *which, const int64_t *start, const int64_t *count,
    int64_t number, void *out);

/* Products with int8 matrices: activations rounded to int8 per row, or to bfloat16. */
void quantlab_int8_product(const int8_t *q, const void *scale, int64_t rows, int64_t columns, int scale_dtype, const void *x,
    int64_t stride, int64_t tokens, int dtype, const int64_t *which, const int64_t *start, const int64_t *count, int64_t number,
    void *out);
void quantlab_int8_weight_product(const int8_t *q, const void *scale, int64_t rows, int64_t columns, int scale_dtype, const void
    *x, int64_t stride, int64_t tokens, int dtype, const int64_t *which, const int64_t *start, const int64_t *count, int64_t
    number, void *out);

/* Exact sums of int8 products; only with AVX2 (products256.c). */
void quantlab_int8_sums(const int8_t *q, int64_t rows, int64_t columns, const int8_t *x, int64_t tokens, int32_t *out);

/* Bands of int4 and int8 matrices, dequantized. */
void quantlab_int4_expand(const uint8_t *q, const uint16_t *scale, int64_t rows, int64_t columns, int64_t group, int scale_dtype,
    int64_t from, int64_t to, int dtype, void *out);
void quantlab_int8_expand(const int8_t *q, const void *scale, int64_t columns, int scale_dtype, int64_t from, int64_t to, int
    dtype, void *out);

/* Products with 16-bit matrices. */
void quantlab_dense_product(const uint16_t *weight, int64_t rows, int64_t columns, const void *x, int64_t stride, int64_t tokens,
    int dtype, const int64_t *which, const int64_t *start, const int64_t *count, int64_t number, void *out);

/* Products with bfloat16 matrices in oneDNN's blocked layout. */
void quantlab_paired_product(const uint16_t *weight, int64_t rows, int64_t columns, const uint16_t *x, int64_t stride, int64_t
    tokens, const uint16_t *bias, uint16_t *out);

/* Attention of one new token per sequence to a static cache of latents, or of keys and values (grouped-query
   attention). */
void quantlab_latent_attention(const void *query, const uint16_t *latents, const uint16_t *rotary, const uint16_t *weight, const
    float *mask, const int64_t *position, const int64_t *padding, int64_t batch, int64_t heads, int64_t length, int64_t latent,
    int64_t nope, int64_t turned, int64_t value, float scaling, int dtype, void *out);
void quantlab_grouped_attention(const void *query, const uint16_t *keys, const uint16_t *values, const int64_t *position, const
    int64_t *padding, int64_t batch, int64_t heads, int64_t key_heads, int64_t length, int64_t width, float scaling, int dtype,
    void *out);

/* How a router selects experts: number of experts and of groups, groups and experts selected, factor of the weights,
   sigmoid or softmax scores, weights divided by their sum or not. See quantlab/runtime/cuda/choose.py. */
typedef struct {
    int64_t experts, groups, top_groups, top_k;
    float scaling;
    int sigmoid, normed;
} Choice;

/* The router of a mixture of experts. */
void quantlab_choose(const void *x, int64_t tokens, int64_t hidden, int dtype, const void *weight, int weight_dtype, const float
    *bias, const Choice *how, int64_t *index, float *weights);

/* Strides of the rows that are rotated, in elements, between tokens, heads and cache positions. */
typedef struct {
    int64_t token, head, position;
    int in_pairs; /* whether the two elements of a pair are neighbours, or else half the width apart */
} RotaryStrides;

/* Row-wise operations between the products. */
void quantlab_norm(const void *x, int64_t x_stride, const void *weight, int64_t rows, int64_t columns, float epsilon, int dtype,
    void *out, int64_t out_stride, const int64_t *position);
void quantlab_gate(const void *x, int64_t rows, int64_t columns, int dtype, void *out);
void quantlab_weighted_sum(const void *x, const float *weights, int64_t rows, int64_t columns, int dtype, void *out);
void quantlab_add(void *out, const void *x, int64_t count, int dtype);
void quantlab_turn(const void *x, const RotaryStrides *of, void *out, const RotaryStrides *to, int64_t tokens, int64_t heads,
    int64_t width, const float *cos, const float *sin, const int64_t *position, const int64_t *padding, int dtype);

#endif
