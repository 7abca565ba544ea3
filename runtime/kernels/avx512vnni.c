/* avx512vnni.c: kernels for AVX-512 with VNNI (Ice Lake, Zen 4 and later).
 *
 * vpdpbusd adds four u8·s8 products to a 32-bit lane without saturation, so a code may have all 8 bits.
 */
#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512vnni,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512vnni,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif

#include "x86_512.h"

enum { SLICES_PER_CODE = 4, CODE_BIAS = 0, CHUNK = MQ_GROUP_SIZE / 4, BLOCK = 8, UNROLL = 8, TILES_AHEAD = 12 };

typedef __m512i acc;

static inline acc acc_zero(void) { return _mm512_setzero_si512(); }

static inline acc acc_step(acc products, reg codes, steps x, size_t j)
{
    return _mm512_dpbusd_epi32(products, codes, x_step(x, j));
}

static inline sums acc_sums(acc products) { return products; }

#include "linear_body.h"

MQ_KERNELS(avx512vnni)

#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
typedef int mq_avx512vnni_is_for_x86; /* ISO C wants a declaration in every file */
#endif
