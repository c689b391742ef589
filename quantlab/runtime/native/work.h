/* Shared by all kernels: work distribution over threads, groups of a bank, memory.

   Threads belong to the OpenMP runtime that torch has loaded. Nothing is linked: the functions declared below are
   resolved in the process. So torch's number of threads applies here too, and both use the same threads. */

#ifndef QUANTLAB_WORK_H
#define QUANTLAB_WORK_H

#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

void GOMP_parallel(void (*work)(void *), void *job, unsigned threads, unsigned flags);
int omp_get_num_threads(void);

#define INLINE static inline __attribute__((always_inline))
#define UNROLLED _Pragma("GCC unroll 16") /* keeps arrays of accumulators in registers */

enum { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2 };

/* Group i: rows start[i] … start[i] + count[i] of the activations are multiplied by matrix which[i]. */
typedef struct {
    const int64_t *which, *start, *count;
    int64_t number;
} Groups;

/* Claim the next chunk of `units` units of work; false when none is left. Chunks shrink towards the end: long chunks
   are long memory streams, and short ones bound the wait for a thread that was interrupted. */
INLINE int next_chunk(int64_t *next_unit, int64_t units, int64_t *from, int64_t *to) {
    const int64_t threads = omp_get_num_threads(), least = units / (32 * threads) + 1;
    *from = __atomic_load_n(next_unit, __ATOMIC_RELAXED);
    do {
        const int64_t part = (units - *from) / (2 * threads), size = part > least ? part : least;
        *to = *from + size < units ? *from + size : units;
    } while (*from < units && !__atomic_compare_exchange_n(next_unit, from, *to, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return *from < units;
}

/* Multiply rows top … last of a matrix, `wide` rows at a time and the rest one by one, by calling kernel(job, matrix,
   row, row_step, token, wide, tokens), where row_step is the distance between the rows of one call.

   One or two tokens are memory-bound, and bandwidth is highest for a few separate streams. So the range is divided into
   `wide` parts and a call takes one row of each. Adjacent rows would be streams 2^n bytes apart, which costs a third of
   the bandwidth. For more tokens the rows of a call are adjacent and stay in the cache for the next tokens. */
#define EACH_ROW(kernel, wide, tokens)                                                                        \
    {                                                                                                         \
        const int64_t row_step = few ? (last - top) / wide : 1, end = few ? top + row_step : last - wide + 1; \
        int64_t row = top;                                                                                    \
        for (; row < end; row += few ? 1 : wide)                                                              \
            kernel(job, matrix, row, row_step, token, wide, tokens);                                          \
        for (row = few ? top + wide * row_step : row; row < last; row++)                                      \
            kernel(job, matrix, row, 1, token, 1, tokens);                                                    \
        break;                                                                                                \
    }

#define FEW_TOKENS 2 /* up to this many, a product is memory-bound */

/* How many of the blocks `unit` … `to` are processed together: all of the same matrix (of `blocks` blocks) if its
   tokens are few, else one. */
INLINE int64_t blocks_at_once(const Groups *groups, int64_t unit, int64_t to, int64_t blocks) {
    const int64_t left = blocks - unit % blocks;
    return groups->count[unit / blocks] > FEW_TOKENS ? 1 : to - unit < left ? to - unit : left;
}

/* Uninitialized memory, aligned to 64 bytes. Copies of activations are padded by 64 bytes per row: rows 2^n bytes apart
   would compete for the same cache sets. */
INLINE void *scratch(size_t bytes) { return aligned_alloc(64, (bytes + 127) / 64 * 64); }

INLINE int64_t round_up(int64_t number, int64_t multiple) { return (number + multiple - 1) / multiple * multiple; }

INLINE size_t width_of(int dtype) { return dtype == FLOAT32 ? 4 : 2; }

#endif
