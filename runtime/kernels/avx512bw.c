/* avx512bw.c: kernels for AVX-512 without VNNI (Skylake-X, Cascade Lake's elder siblings).
 *
 * maddubs as in avx2.c, over a whole vector of a tile at once.
 */
#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif

#include "x86_512.h"

enum { SLICES_PER_CODE = 2, CODE_BIAS = 0, CHUNK = 8, BLOCK = 8, UNROLL = 8, TILES_AHEAD = 12 };

typedef __m512i acc;

static inline acc acc_zero(void) { return _mm512_setzero_si512(); }

static inline acc acc_step(acc products, reg codes, steps x, size_t j)
{
    return _mm512_adds_epi16(products, _mm512_maddubs_epi16(codes, x_step(x, j)));
}

static inline sums acc_sums(acc products) { return _mm512_madd_epi16(products, _mm512_set1_epi16(1)); }

#include "linear_body.h"

MQ_KERNELS(avx512bw)

#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
typedef int mq_avx512bw_is_for_x86; /* ISO C wants a declaration in every file */
#endif
