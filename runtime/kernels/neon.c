/* neon.c: kernels for NEON as every 64-bit Arm has it (ARMv8.0: Cortex-A53 and A72, Raspberry Pi 3 and 4).
 *
 * smlal adds a product to 16 bits: 16 steps of 4-bit codes give at most 16·15·127 = 30480, and a whole group of 2-bit codes
 * less.
 */
#if defined(__aarch64__)

#include "neon.h"

enum { SLICES_PER_CODE = 2, CODE_BIAS = 0, CHUNK = 16, BLOCK = 2, UNROLL = 1, TILES_AHEAD = 20 };

typedef struct acc {
    int16x8_t low, high; /* a product each; four neighbours are one row */
} acc;

static inline acc acc_zero(void) { return (acc){vdupq_n_s16(0), vdupq_n_s16(0)}; }

static inline acc acc_step(acc products, reg codes, steps x, size_t j)
{
    const int32x4_t four = vreinterpretq_s32_s8(x);
    const int8x16_t a = vreinterpretq_s8_u8(codes), b = vreinterpretq_s8_s32(vdupq_n_s32(four[j]));
    return (acc){vmlal_s8(products.low, vget_low_s8(a), vget_low_s8(b)), vmlal_high_s8(products.high, a, b)};
}

static inline sums acc_sums(acc products) { return vpaddq_s32(vpaddlq_s16(products.low), vpaddlq_s16(products.high)); }

static inline int32_t dot_bytes(const int8_t *a, const int8_t *b)
{
    int32x4_t total = vdupq_n_s32(0);
    for (int c = 0; c < MQ_GROUP_SIZE; c += 8) {
        total = vpadalq_s16(total, vmull_s8(vld1_s8(a + c), vld1_s8(b + c)));
    }
    return vaddvq_s32(total);
}

#include "linear_body.h"

MQ_KERNELS(neon)

#else
typedef int mq_neon_is_for_arm; /* ISO C wants a declaration in every file */
#endif
