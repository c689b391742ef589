/* AVX-512: conversions between 16-bit types and float32. */

#ifndef QUANTLAB_SIMD_H
#define QUANTLAB_SIMD_H

#include "work.h"

/* A mask of the first `count` lanes. */
INLINE __mmask16 lane_mask(int64_t count) { return count >= 16 ? 0xFFFF : (__mmask16)((1u << count) - 1); }

INLINE __m512 from_bfloat16(__m256i bits) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

INLINE __m512 from_sixteen(__m256i bits, int dtype) {
    return dtype == FLOAT16 ? _mm512_cvtph_ps(bits) : from_bfloat16(bits);
}

/* Round to nearest, ties to even. NaN stays NaN, subnormal numbers are not flushed. */
INLINE __m256i to_bfloat16(__m512 value) {
    __m512i bits = _mm512_castps_si512(value);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    __mmask16 lost = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, lost, _mm512_set1_epi32(0x7FC00000)), 16));
}

INLINE __m256i to_sixteen(__m512 value, int dtype) {
    return dtype == FLOAT16 ? _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT) : to_bfloat16(value);
}

/* Elements i … i + 15 as float32, zero where `mask` is not set. */
INLINE __m512 load(const void *x, int dtype, int64_t i, __mmask16 mask) {
    if (dtype == FLOAT32)
        return _mm512_maskz_loadu_ps(mask, (const float *)x + i);
    return from_sixteen(_mm256_maskz_loadu_epi16(mask, (const uint16_t *)x + i), dtype);
}

/* A masked store of 16-bit lanes takes dozens of cycles on Zen 4, so a full vector is stored without a mask. */
INLINE void store(void *out, int dtype, int64_t i, __mmask16 mask, __m512 value) {
    if (dtype == FLOAT32)
        _mm512_mask_storeu_ps((float *)out + i, mask, value);
    else if (mask == 0xFFFF)
        _mm256_storeu_si256((__m256i *)((uint16_t *)out + i), to_sixteen(value, dtype));
    else
        _mm256_mask_storeu_epi16((uint16_t *)out + i, mask, to_sixteen(value, dtype));
}

INLINE float scalar(const void *x, int dtype, int64_t i) {
    if (dtype == FLOAT32)
        return ((const float *)x)[i];
    const __m128i bits = _mm_cvtsi32_si128(((const uint16_t *)x)[i]);
    return _mm_cvtss_f32(dtype == FLOAT16 ? _mm_cvtph_ps(bits) : _mm_castsi128_ps(_mm_slli_epi32(bits, 16)));
}

INLINE void store_scalar(void *out, int dtype, int64_t i, float value) {
    if (dtype == FLOAT32)
        ((float *)out)[i] = value;
    else
        ((uint16_t *)out)[i] = _mm256_extract_epi16(to_sixteen(_mm512_castps128_ps512(_mm_set_ss(value)), dtype), 0);
}

/* x [count] -> float32 (widen) or bfloat16 (narrow), with zeros up to `padded`. */
INLINE void widen(const void *x, int dtype, int64_t count, int64_t padded, float *out) {
    for (int64_t i = 0; i < padded; i += 16)
        _mm512_storeu_ps(out + i, load(x, dtype, i < count ? i : 0, i < count ? lane_mask(count - i) : 0));
}

INLINE void narrow(const void *x, int dtype, int64_t count, int64_t padded, uint16_t *out) {
    for (int64_t i = 0; i < padded; i += 16)
        _mm256_storeu_si256((__m256i *)(out + i),
                            to_bfloat16(load(x, dtype, i < count ? i : 0, i < count ? lane_mask(count - i) : 0)));
}

/* e^x, to about one ulp of float32; overflows to infinity and underflows to zero. */
INLINE __m512 exponential(__m512 x) {
    x = _mm512_min_ps(_mm512_set1_ps(200), _mm512_max_ps(_mm512_set1_ps(-200), x)); /* keeps NaN, the second operand */
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 y = _mm512_set1_ps(1.0f / 5040);
    const float terms[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1, 1};
    UNROLLED
    for (int i = 0; i < 7; i++)
        y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(terms[i]));
    return _mm512_scalef_ps(y, n);
}

#endif
