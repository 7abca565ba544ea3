/* avx2.c: kernels for AVX2 + FMA + F16C (Haswell, Zen and later).
 *
 * maddubs adds two products in 16 bits: with 4-bit codes at most 2·15·127 = 3810, so 8 steps stay below 2^15, and with
 * 2-bit codes 762, so a whole group does.
 */
#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#include "x86_256.h"

enum { SLICES_PER_CODE = 2, CODE_BIAS = 0, CHUNK = 8, BLOCK = 4, UNROLL = 8, TILES_AHEAD = 20 };

typedef __m256i acc;

static inline acc acc_zero(void) { return _mm256_setzero_si256(); }

/* Nothing saturates; but gcc moves a chain of plain additions behind all products, which then spill. */
static inline acc acc_step(acc words, reg codes, steps x, size_t j)
{
    return _mm256_adds_epi16(words, _mm256_maddubs_epi16(codes, x_step(x, j)));
}

static inline sums acc_sums(acc words) { return _mm256_madd_epi16(words, _mm256_set1_epi16(1)); }

#include "linear_body.h"

MQ_KERNELS(avx2)

#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
typedef int mq_avx2_is_for_x86; /* ISO C wants a declaration in every file */
#endif
