/* Every function that Python calls, in one place: a source that defines one includes this header, so that the compiler compares the
   two, and a test compares the prototypes with the ctypes signatures of kernels.py. A slip between them would corrupt memory.

   dtype codes are those of lanes.h: 0 float32, 1 float16, 2 bfloat16. Sizes and strides count elements. */

#ifndef QUANTLAB_KERNELS_H
#define QUANTLAB_KERNELS_H

#include <stdint.h>

/* Products of activations with int4 matrices, and their expansion; layout and arguments are described in int4.c. */
void quantlab_int4_product(const uint8_t *q, const uint16_t *scale, int64_t rows, int64_t columns, int64_t group, int scale_dtype,
    const void *x, int64_t stride, int64_t tokens, int dtype, const int64_t *which, const int64_t *start, const int64_t *count,
    int64_t number, void *out);
void quantlab_int4_expand(const uint8_t *q, const uint16_t *scale, int64_t rows, int64_t columns, int64_t group, int scale_dtype,
    int64_t from, int64_t to, uint16_t *out);

/* Products with int8 matrices: activations rounded to int8 per row, or to bfloat16. */
void quantlab_int8_product(const int8_t *q, const void *scale, int64_t rows, int64_t columns, int scale_dtype, const void *x,
    int64_t stride, int64_t tokens, int dtype, const int64_t *which, const int64_t *start, const int64_t *count, int64_t number,
    void *out);
void quantlab_int8_weight_product(const int8_t *q, const void *scale, int64_t rows, int64_t columns, int scale_dtype, const void
    *x, int64_t stride, int64_t tokens, int dtype, const int64_t *which, const int64_t *start, const int64_t *count, int64_t
    number, void *out);

/* Products with matrices of a 16-bit dtype. */
void quantlab_dense_product(const uint16_t *weight, int64_t rows, int64_t columns, const void *x, int64_t stride, int64_t tokens,
    int dtype, const int64_t *which, const int64_t *start, const int64_t *count, int64_t number, void *out);

/* Products with bfloat16 matrices in the blocked layout of oneDNN. */
void quantlab_paired_product(const uint16_t *weight, int64_t rows, int64_t columns, const uint16_t *x, int64_t stride, int64_t
    tokens, const uint16_t *bias, uint16_t *out);

/* Attention of one new token per sequence to a fixed cache: to latents, or to keys and values of groups of heads. */
void quantlab_latent_attention(const void *query, const uint16_t *latents, const uint16_t *rotary, const uint16_t *weight, const
    float *mask, const int64_t *position, const int64_t *padding, int64_t batch, int64_t heads, int64_t length, int64_t latent,
    int64_t nope, int64_t turned, int64_t value, float scaling, int dtype, void *out);
void quantlab_grouped_attention(const void *query, const uint16_t *keys, const uint16_t *values, const int64_t *position, const
    int64_t *padding, int64_t batch, int64_t heads, int64_t key_heads, int64_t length, int64_t width, float scaling, int dtype,
    void *out);

/* How a router chooses among experts; see router.c. */
typedef struct {
    int64_t experts, groups, top_groups, top_k;
    float scaling;
    int sigmoid, normed;
} Choice;

/* The router of a mixture of experts. */
void quantlab_choose(const void *x, int64_t tokens, int64_t hidden, int dtype, const void *weight, int weight_dtype, const float
    *bias, const Choice *how, int64_t *index, float *weights);

/* Strides of the rows of a rotary embedding, in elements: between tokens, heads and positions of a cache. */
typedef struct {
    int64_t token, head, place;
    int in_pairs; /* whether the two numbers that rotate together are neighbours; if not, they are half the width apart */
} Rows;

/* Operations on few rows between the products. */
void quantlab_norm(const void *x, int64_t x_apart, const void *weight, int64_t rows, int64_t columns, float epsilon, int dtype,
    void *out, int64_t out_apart, const int64_t *position);
void quantlab_gate(const void *x, int64_t rows, int64_t columns, int dtype, void *out);
void quantlab_weighted_sum(const void *x, const float *weights, int64_t rows, int64_t columns, int dtype, void *out);
void quantlab_add(void *out, const void *x, int64_t count, int dtype);
void quantlab_turn(const void *x, const Rows *of, void *out, const Rows *to, int64_t tokens, int64_t heads, int64_t width, const
    float *cos, const float *sin, const int64_t *position, const int64_t *padding, int dtype);

#endif
