/* What all kernels share: threads, the groups of a bank, and numbers of 16 bits on their way to and from float32.

   Threads are those of the OpenMP runtime torch has loaded: nothing is linked, the functions below are found in the
   process. So torch's number of threads holds here too, and the same threads serve both. */

#ifndef QUANTLAB_LANES_H
#define QUANTLAB_LANES_H

#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

void GOMP_parallel(void (*work)(void *), void *job, unsigned threads, unsigned flags);
int omp_get_num_threads(void);

#define INLINE static inline __attribute__((always_inline))
#define UNROLLED _Pragma("GCC unroll 16") /* sums in arrays become registers only if no loop over them is left */

enum { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2 };

/* Group i: rows start[i] … start[i] + count[i] of the activations meet matrix which[i]. */
typedef struct {
    const int64_t *which, *start, *count;
    int64_t number;
} Groups;

/* The next piece of `units` pieces of work, false when none is left. Pieces get smaller towards the end: they are long streams
   from memory, and no thread waits long for one that was interrupted. */
INLINE int take(int64_t *taken, int64_t units, int64_t *from, int64_t *to) {
    const int64_t threads = omp_get_num_threads(), least = units / (32 * threads) + 1;
    *from = __atomic_load_n(taken, __ATOMIC_RELAXED);
    do {
        const int64_t part = (units - *from) / (2 * threads), size = part > least ? part : least;
        *to = *from + size < units ? *from + size : units;
    } while (*from < units && !__atomic_compare_exchange_n(taken, from, *to, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return *from < units;
}

/* The rows top … last of a matrix, `wide` at a time and what is left one by one, each set times some activations: by
   kernel(job, matrix, row, apart, token, wide, tokens), whose rows are `apart` from each other.

   For one or two tokens memory is waited for, and it delivers most to a few streams: the rows of a set are those of as many parts
   of the range. Next to each other they would be streams 2^n bytes apart, which costs a third of the rate. For more tokens they
   are next to each other, and stay in the cache for the tokens that follow. */
#define EACH_ROW(kernel, wide, tokens)                                                                    \
    {                                                                                                     \
        const int64_t apart = few ? (last - top) / wide : 1, end = few ? top + apart : last - wide + 1;    \
        int64_t row = top;                                                                                \
        for (; row < end; row += few ? 1 : wide)                                                          \
            kernel(job, matrix, row, apart, token, wide, tokens);                                         \
        for (row = few ? top + wide * apart : row; row < last; row++)                                     \
            kernel(job, matrix, row, 1, token, 1, tokens);                                                \
        break;                                                                                            \
    }

#define FEW 2 /* tokens */

/* How many of the blocks `unit` … `to` are worked on at once: those of the same matrix, of `blocks`, if its tokens are few, else one. */
INLINE int64_t run_of(const Groups *groups, int64_t unit, int64_t to, int64_t blocks) {
    const int64_t left = blocks - unit % blocks;
    return groups->count[unit / blocks] > FEW ? 1 : to - unit < left ? to - unit : left;
}

INLINE void *scratch(size_t bytes) { return aligned_alloc(64, (bytes + 127) / 64 * 64); }

INLINE int64_t round_up(int64_t number, int64_t multiple) { return (number + multiple - 1) / multiple * multiple; }

INLINE size_t width_of(int dtype) { return dtype == FLOAT32 ? 4 : 2; }

INLINE __mmask16 first(int64_t count) { return count >= 16 ? 0xFFFF : (__mmask16)((1u << count) - 1); }

INLINE __m512 from_bfloat16(__m256i bits) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

INLINE __m512 from_sixteen(__m256i bits, int dtype) {
    return dtype == FLOAT16 ? _mm512_cvtph_ps(bits) : from_bfloat16(bits);
}

/* Round to nearest, ties to even; NaN stays NaN, numbers below the normal range keep their bits. */
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

/* Activations are copied with 64 bytes between their rows: rows 2^n bytes apart would all want the same lines of the cache. */

/* Element i and the up to 15 after it, as many as `mask` says; zeros behind them. */
INLINE __m512 load(const void *x, int dtype, int64_t i, __mmask16 mask) {
    if (dtype == FLOAT32)
        return _mm512_maskz_loadu_ps(mask, (const float *)x + i);
    return from_sixteen(_mm256_maskz_loadu_epi16(mask, (const uint16_t *)x + i), dtype);
}

/* A store of 16-bit lanes under a mask takes Zen 4 dozens of cycles: only where there are fewer than 16. */
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

/* x, `count` numbers, to float32 or bfloat16; zeros from there up to `padded`. */
INLINE void widen(const void *x, int dtype, int64_t count, int64_t padded, float *out) {
    for (int64_t i = 0; i < padded; i += 16)
        _mm512_storeu_ps(out + i, load(x, dtype, i < count ? i : 0, i < count ? first(count - i) : 0));
}

INLINE void narrow(const void *x, int dtype, int64_t count, int64_t padded, uint16_t *out) {
    for (int64_t i = 0; i < padded; i += 16)
        _mm256_storeu_si256((__m256i *)(out + i),
                            to_bfloat16(load(x, dtype, i < count ? i : 0, i < count ? first(count - i) : 0)));
}

/* e^x, to about the last bit of float32; infinity and zero beyond its range. */
INLINE __m512 exponential(__m512 x) {
    x = _mm512_min_ps(_mm512_set1_ps(200), _mm512_max_ps(_mm512_set1_ps(-200), x)); /* NaN stays: the second operand */
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
