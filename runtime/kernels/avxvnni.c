/* avxvnni.c: kernels for AVX-VNNI, the 256-bit form of VNNI (Alder Lake and later without AVX-512, Zen 5).
 *
 * vpdpbusd adds four u8·s8 products to a 32-bit lane without saturation, so a code may have all 8 bits.
 */
#include "kernels.h"

#if defined(MQ_AVXVNNI)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avxvnni"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avxvnni")
#endif

#include "x86_256.h"

enum { SLICES_PER_CODE = 4, CODE_BIAS = 0, CHUNK = MQ_GROUP_SIZE / 4, BLOCK = 4, UNROLL = 8, TILES_AHEAD = 20 };

typedef __m256i acc;

static inline acc acc_zero(void) { return _mm256_setzero_si256(); }

static inline acc acc_step(acc total, reg codes, steps x, size_t j)
{
    return _mm256_dpbusd_avx_epi32(total, codes, x_step(x, j));
}

static inline sums acc_sums(acc total) { return total; }

#include "linear_body.h"

MQ_KERNELS(avxvnni)

#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
typedef int mq_avxvnni_is_for_x86; /* ISO C wants a declaration in every file */
#endif
