/* vector_body.h: the float operations written once over a register of 16 floats, `v16`, which each instruction set
 * defines before it includes this file. Same steps and same order as scalar.c, so the same bits.
 *
 * Expected: v16, v_zero, v_set, v_load, v_store, v_add, v_sub, v_mul, v_div, v_fma (a·b + c), v_max, v_min
 * (second operand when one is a NaN), v_round (half to even), v_power2 (2^n of whole n), v_fold, v_load_f16, v_store_f16.
 */
#include "definition.h"

#include <math.h>
#include <string.h>

enum { LANES = 16 };

/* Constant depths, counts and arrays of registers become straight code only when everything is inlined. */
#define INLINE static inline __attribute__((always_inline))

static inline v16 v_load_part(const float *x, size_t count)
{
    float part[LANES] = {0};
    memcpy(part, x, count * sizeof *x);
    return v_load(part);
}

static inline void v_store_part(float *x, size_t count, v16 v)
{
    float part[LANES];
    v_store(part, v);
    memcpy(x, part, count * sizeof *x);
}

static inline v16 v_exponential(v16 x)
{
    x = v_max(v_set(MQ_EXP_LOW), v_min(v_set(MQ_EXP_HIGH), x)); /* in this order a NaN stays one */
    const v16 n = v_round(v_mul(x, v_set(MQ_LOG2_E)));
    v16 r = v_fma(n, v_set(-MQ_LN2_HIGH), x);
    r = v_fma(n, v_set(-MQ_LN2_LOW), r);
    v16 p = v_fma(v_set(MQ_EXP_C7), r, v_set(MQ_EXP_C6));
    p = v_fma(p, r, v_set(MQ_EXP_C5));
    p = v_fma(p, r, v_set(MQ_EXP_C4));
    p = v_fma(p, r, v_set(MQ_EXP_C3));
    p = v_fma(p, r, v_set(MQ_EXP_C2));
    p = v_fma(p, r, v_set(1.0f));
    p = v_fma(p, r, v_set(1.0f));
    return v_mul(p, v_power2(n));
}

static void rmsnorm(const float *x, const float *weight, size_t n, float eps, float *y)
{
    const size_t whole = n - n % LANES;
    v16 squares = v_zero();
    for (size_t i = 0; i < whole; i += LANES) {
        const v16 v = v_load(x + i);
        squares = v_fma(v, v, squares);
    }
    if (whole < n) {
        const v16 v = v_load_part(x + whole, n - whole);
        squares = v_fma(v, v, squares);
    }
    const v16 factor = v_set(1.0f / sqrtf(v_fold(squares) / (float)n + eps));
    for (size_t i = 0; i < whole; i += LANES) {
        v_store(y + i, v_mul(v_mul(v_load(x + i), factor), v_load(weight + i)));
    }
    if (whole < n) {
        const v16 v = v_mul(v_load_part(x + whole, n - whole), factor);
        v_store_part(y + whole, n - whole, v_mul(v, v_load_part(weight + whole, n - whole)));
    }
}

static void rope(float *head, const float *cosine, const float *sine, size_t head_dim)
{
    const size_t half = head_dim / 2, whole = half - half % LANES;
    for (size_t i = 0; i < whole; i += LANES) {
        const v16 a = v_load(head + i), b = v_load(head + half + i), c = v_load(cosine + i), s = v_load(sine + i);
        v_store(head + i, v_fma(a, c, v_sub(v_zero(), v_mul(b, s))));
        v_store(head + half + i, v_fma(b, c, v_mul(a, s)));
    }
    if (whole < half) {
        const size_t i = whole, count = half - whole;
        const v16 a = v_load_part(head + i, count), b = v_load_part(head + half + i, count);
        const v16 c = v_load_part(cosine + i, count), s = v_load_part(sine + i, count);
        v_store_part(head + i, count, v_fma(a, c, v_sub(v_zero(), v_mul(b, s))));
        v_store_part(head + half + i, count, v_fma(b, c, v_mul(a, s)));
    }
}

static inline v16 v_silu_times(v16 gate, v16 up)
{
    const v16 e = v_exponential(v_sub(v_zero(), gate));
    return v_mul(v_div(gate, v_add(v_set(1.0f), e)), up);
}

static void swiglu(float *gate, const float *up, size_t n)
{
    const size_t whole = n - n % LANES;
    for (size_t i = 0; i < whole; i += LANES) {
        v_store(gate + i, v_silu_times(v_load(gate + i), v_load(up + i)));
    }
    if (whole < n) {
        const v16 y = v_silu_times(v_load_part(gate + whole, n - whole), v_load_part(up + whole, n - whole));
        v_store_part(gate + whole, n - whole, y);
    }
}

static inline v16 v_gelu_times(v16 gate, v16 up)
{
    const v16 z = v_mul(gate, v_fma(v_mul(gate, gate), v_set(MQ_GELU_CUBIC), v_set(MQ_GELU_LINEAR)));
    const v16 e = v_exponential(v_sub(v_zero(), z));
    return v_mul(v_div(gate, v_add(v_set(1.0f), e)), up);
}

static void geglu(float *gate, const float *up, size_t n)
{
    const size_t whole = n - n % LANES;
    for (size_t i = 0; i < whole; i += LANES) {
        v_store(gate + i, v_gelu_times(v_load(gate + i), v_load(up + i)));
    }
    if (whole < n) {
        const v16 y = v_gelu_times(v_load_part(gate + whole, n - whole), v_load_part(up + whole, n - whole));
        v_store_part(gate + whole, n - whole, y);
    }
}

static inline v16 v_soft_cap(v16 x, float cap)
{
    const v16 e = v_exponential(v_mul(x, v_set(2.0f / cap)));
    return v_sub(v_set(cap), v_div(v_set(2.0f * cap), v_add(v_set(1.0f), e)));
}

static void softcap(float *x, size_t n, float cap)
{
    const size_t whole = n - n % LANES;
    for (size_t i = 0; i < whole; i += LANES) {
        v_store(x + i, v_soft_cap(v_load(x + i), cap));
    }
    if (whole < n) {
        v_store_part(x + whole, n - whole, v_soft_cap(v_load_part(x + whole, n - whole), cap));
    }
}

static void add(float *x, const float *y, size_t n)
{
    const size_t whole = n - n % LANES;
    for (size_t i = 0; i < whole; i += LANES) {
        v_store(x + i, v_add(v_load(x + i), v_load(y + i)));
    }
    if (whole < n) {
        v_store_part(x + whole, n - whole, v_add(v_load_part(x + whole, n - whole), v_load_part(y + whole, n - whole)));
    }
}

static void to_f16(const float *x, uint16_t *y, size_t n)
{
    const size_t whole = n - n % LANES;
    for (size_t i = 0; i < whole; i += LANES) {
        v_store_f16(y + i, v_load(x + i));
    }
    if (whole < n) {
        uint16_t part[LANES];
        v_store_f16(part, v_load_part(x + whole, n - whole));
        memcpy(y + whole, part, (n - whole) * sizeof *y);
    }
}
