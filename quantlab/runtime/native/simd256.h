/* AVX2, FMA and F16C: conversions between 16-bit types and float32, eight lanes at a time. */

#ifndef QUANTLAB_SIMD256_H
#define QUANTLAB_SIMD256_H

#include "work.h"

/* Round to bfloat16, to nearest with ties to even, and keep the result as float32. The NaN of an operation stays NaN. */
INLINE __m256 rounded_to_bfloat16(__m256 value) {
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i raised = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    return _mm256_castsi256_ps(_mm256_and_si256(raised, _mm256_set1_epi32((int)0xFFFF0000)));
}

/* Round to `dtype`, and keep the result as float32. */
INLINE __m256 rounded8(__m256 value, int dtype) {
    if (dtype == FLOAT32)
        return value;
    if (dtype == FLOAT16)
        return _mm256_cvtph_ps(_mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
    return rounded_to_bfloat16(value);
}

/* Elements i … i + 7 as float32. */
INLINE __m256 load8(const void *x, int dtype, int64_t i) {
    if (dtype == FLOAT32)
        return _mm256_loadu_ps((const float *)x + i);
    const __m128i bits = _mm_loadu_si128((const __m128i *)((const uint16_t *)x + i));
    if (dtype == FLOAT16)
        return _mm256_cvtph_ps(bits);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

INLINE void store8(void *out, int dtype, int64_t i, __m256 value) {
    if (dtype == FLOAT32) {
        _mm256_storeu_ps((float *)out + i, value);
        return;
    }
    __m128i bits;
    if (dtype == FLOAT16)
        bits = _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT);
    else {
        const __m256i upper = _mm256_srli_epi32(_mm256_castps_si256(rounded_to_bfloat16(value)), 16);
        bits = _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256(upper, 1));
    }
    _mm_storeu_si128((__m128i *)((uint16_t *)out + i), bits);
}

/* Store the first `count` of eight elements (all of them if there are more). */
INLINE void store_up_to8(void *out, int dtype, int64_t i, int64_t count, __m256 value) {
    if (count >= 8) {
        store8(out, dtype, i, value);
        return;
    }
    float all[8];
    store8(all, dtype, 0, value);
    memcpy((char *)out + i * width_of(dtype), all, count * width_of(dtype));
}

INLINE float sum8(__m256 value) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

INLINE float scalar8(const void *x, int dtype, int64_t i) {
    if (dtype == FLOAT32)
        return ((const float *)x)[i];
    const __m128i bits = _mm_cvtsi32_si128(((const uint16_t *)x)[i]);
    return _mm_cvtss_f32(dtype == FLOAT16 ? _mm_cvtph_ps(bits) : _mm_castsi128_ps(_mm_slli_epi32(bits, 16)));
}

/* x [count] -> float32, with zeros up to `padded`, a multiple of 8. */
INLINE void widen8(const void *x, int dtype, int64_t count, int64_t padded, float *out) {
    const int64_t whole = count / 8 * 8;
    for (int64_t i = 0; i < whole; i += 8)
        _mm256_storeu_ps(out + i, load8(x, dtype, i));
    for (int64_t i = whole; i < padded; i++)
        out[i] = i < count ? scalar8(x, dtype, i) : 0;
}

#endif
