/* neon.h: 16 floats, 16 bytes of codes and 4 sums in Arm's NEON registers (ARMv8.0, 64 bit), for the instruction sets
 * that differ in how they multiply bytes: neon.c and neon_dotprod.c. Included after the target is set.
 */
#include "kernels.h"
#include "keys.h"

#include <arm_neon.h>

enum { QUARTERS = 4 };

typedef struct v16 {
    float32x4_t quarter[QUARTERS];
} v16;

#define EACH(expression)                                \
    v16 result;                                         \
    for (int i = 0; i < QUARTERS; i++) {                \
        result.quarter[i] = (expression);               \
    }                                                   \
    return result

static inline v16 v_set(float x) { EACH(vdupq_n_f32(x)); }
static inline v16 v_zero(void) { return v_set(0.0f); }
static inline v16 v_load(const float *x) { EACH(vld1q_f32(x + 4 * i)); }
static inline v16 v_add(v16 a, v16 b) { EACH(vaddq_f32(a.quarter[i], b.quarter[i])); }
static inline v16 v_sub(v16 a, v16 b) { EACH(vsubq_f32(a.quarter[i], b.quarter[i])); }
static inline v16 v_mul(v16 a, v16 b) { EACH(vmulq_f32(a.quarter[i], b.quarter[i])); }
static inline v16 v_div(v16 a, v16 b) { EACH(vdivq_f32(a.quarter[i], b.quarter[i])); }
static inline v16 v_fma(v16 a, v16 b, v16 c) { EACH(vfmaq_f32(c.quarter[i], a.quarter[i], b.quarter[i])); }
static inline v16 v_abs(v16 a) { EACH(vabsq_f32(a.quarter[i])); }
static inline v16 v_round(v16 a) { EACH(vrndnq_f32(a.quarter[i])); }

/* vmaxq would return a NaN of either operand. */
static inline float32x4_t larger4(float32x4_t a, float32x4_t b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
static inline float32x4_t smaller4(float32x4_t a, float32x4_t b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
static inline v16 v_max(v16 a, v16 b) { EACH(larger4(a.quarter[i], b.quarter[i])); }
static inline v16 v_min(v16 a, v16 b) { EACH(smaller4(a.quarter[i], b.quarter[i])); }

static inline float32x4_t power2_quarter(float32x4_t n)
{
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), 23));
}

static inline v16 v_power2(v16 n) { EACH(power2_quarter(n.quarter[i])); }

static inline v16 v_load_f16(const uint16_t *x) { EACH(vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(x + 4 * i)))); }

#undef EACH

static inline v16 v_load_i8(const int8_t *x)
{
    const int8x16_t bytes = vld1q_s8(x);
    const int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_s8(vget_high_s8(bytes));
    return (v16){{vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(low))),
                  vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(high)))}};
}

static inline void v_store(float *x, v16 v)
{
    for (int i = 0; i < QUARTERS; i++) {
        vst1q_f32(x + 4 * i, v.quarter[i]);
    }
}

static inline void v_store_f16(uint16_t *x, v16 v)
{
    for (int i = 0; i < QUARTERS; i++) {
        vst1_u16(x + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(v.quarter[i])));
    }
}

static inline void v_store_i8(int8_t *q, v16 v)
{
    int16x4_t words[QUARTERS];
    for (int i = 0; i < QUARTERS; i++) {
        words[i] = vqmovn_s32(vcvtnq_s32_f32(v.quarter[i]));
    }
    vst1q_s8(q, vcombine_s8(vqmovn_s16(vcombine_s16(words[0], words[1])), vqmovn_s16(vcombine_s16(words[2], words[3]))));
}

static inline float v_fold(v16 v)
{
    const float32x4_t four = vaddq_f32(vaddq_f32(v.quarter[0], v.quarter[2]), vaddq_f32(v.quarter[1], v.quarter[3]));
    const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
    return vget_lane_f32(vpadd_f32(two, two), 0);
}

static inline float v_max_fold(v16 v)
{
    return vmaxvq_f32(vmaxq_f32(vmaxq_f32(v.quarter[0], v.quarter[2]), vmaxq_f32(v.quarter[1], v.quarter[3])));
}

#include "vector_body.h"

enum { SCORES = 4, VALUES = 1 };

#include "attention_body.h"

enum { WIDTH = 16, PARTS = 4 };

typedef uint8x16_t reg;

static inline reg r_set(int byte) { return vdupq_n_u8((uint8_t)byte); }
static inline reg r_zero(void) { return r_set(0); }
static inline reg r_load(const uint8_t *p) { return vld1q_u8(p); }
static inline void r_store(uint8_t *p, reg a) { vst1q_u8(p, a); }
static inline reg r_and(reg a, reg b) { return vandq_u8(a, b); }
static inline reg r_xor(reg a, reg b) { return veorq_u8(a, b); }
static inline reg r_select(reg mask, reg a, reg b) { return vbslq_u8(mask, a, b); }
#define r_left(a, bits) vshlq_n_u8(a, bits) /* a macro: the instruction wants a constant */
#define r_right(a, bits) vshrq_n_u8(a, bits)
static inline reg r_low_nibbles(reg upper, reg lower) { return vsliq_n_u8(lower, upper, 4); }
static inline reg r_high_nibbles(reg upper, reg lower) { return vsriq_n_u8(upper, lower, 4); }

typedef int8x16_t steps;

static inline steps x_load(const int8_t *q) { return vld1q_s8(q); }

typedef int32x4_t sums;

static inline sums s_set(int32_t x) { return vdupq_n_s32(x); }
static inline sums s_zero(void) { return s_set(0); }
static inline sums s_add(sums a, sums b) { return vaddq_s32(a, b); }
static inline sums s_left(sums a, uint32_t bits) { return vshlq_s32(a, s_set((int32_t)bits)); }
static inline sums s_right(sums a, uint32_t bits) { return vshlq_s32(a, s_set(-(int32_t)bits)); }

static inline v16 v_from_sums(const sums dot[PARTS])
{
    return (v16){{vcvtq_f32_s32(dot[0]), vcvtq_f32_s32(dot[1]), vcvtq_f32_s32(dot[2]), vcvtq_f32_s32(dot[3])}};
}
