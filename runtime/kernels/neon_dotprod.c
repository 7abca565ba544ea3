/* neon_dotprod.c: kernels for NEON with the dot-product instructions (Cortex-A55, A75 and later, Apple silicon, Jetson
 * Orin, Raspberry Pi 5).
 *
 * sdot adds four s8·s8 products to a 32-bit lane. An 8-bit code does not fit into s8, so 128 is taken from it and 128 times
 * the sum of the activations added to the result.
 */
#if defined(__aarch64__)

#if defined(__clang__)
#if !defined(__ARM_FEATURE_DOTPROD)
#define __ARM_FEATURE_DOTPROD 1 /* Clang before 17 declares the intrinsics only where this is set */
#endif
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif

#include "neon.h"

enum { SLICES_PER_CODE = 4, CODE_BIAS = 128, CHUNK = MQ_GROUP_SIZE / 4, BLOCK = 4, UNROLL = 1, TILES_AHEAD = 20 };

typedef int32x4_t acc;

static inline acc acc_zero(void) { return vdupq_n_s32(0); }

static inline acc acc_step(acc total, reg codes, steps x, size_t j)
{
    const int8x16_t a = vreinterpretq_s8_u8(codes);
    switch (j) { /* the instruction wants a constant; it is one once the loops are unrolled */
    case 0: return vdotq_laneq_s32(total, a, x, 0);
    case 1: return vdotq_laneq_s32(total, a, x, 1);
    case 2: return vdotq_laneq_s32(total, a, x, 2);
    default: return vdotq_laneq_s32(total, a, x, 3);
    }
}

static inline sums acc_sums(acc total) { return total; }

static inline int32_t dot_bytes(const int8_t *a, const int8_t *b)
{
    int32x4_t total = vdupq_n_s32(0);
    for (int c = 0; c < MQ_GROUP_SIZE; c += WIDTH) {
        total = vdotq_s32(total, vld1q_s8(a + c), vld1q_s8(b + c));
    }
    return vaddvq_s32(total);
}

#include "linear_body.h"

MQ_KERNELS(neon_dotprod)

#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
typedef int mq_neon_dotprod_is_for_arm; /* ISO C wants a declaration in every file */
#endif
