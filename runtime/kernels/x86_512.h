/* x86_512.h: 16 floats, 64 bytes of codes and 16 sums in AVX-512's registers (F, BW, VL, DQ), for the instruction sets that
 * differ in how they multiply bytes: avx512bw.c and avx512vnni.c. Included after the target is set.
 */
#include "kernels.h"
#include "keys.h"

#include <immintrin.h>

typedef __m512 v16;

static inline v16 v_zero(void) { return _mm512_setzero_ps(); }
static inline v16 v_set(float x) { return _mm512_set1_ps(x); }
static inline v16 v_load(const float *x) { return _mm512_loadu_ps(x); }
static inline void v_store(float *x, v16 v) { _mm512_storeu_ps(x, v); }
static inline v16 v_add(v16 a, v16 b) { return _mm512_add_ps(a, b); }
static inline v16 v_sub(v16 a, v16 b) { return _mm512_sub_ps(a, b); }
static inline v16 v_mul(v16 a, v16 b) { return _mm512_mul_ps(a, b); }
static inline v16 v_div(v16 a, v16 b) { return _mm512_div_ps(a, b); }
static inline v16 v_max(v16 a, v16 b) { return _mm512_max_ps(a, b); }
static inline v16 v_min(v16 a, v16 b) { return _mm512_min_ps(a, b); }
static inline v16 v_fma(v16 a, v16 b, v16 c) { return _mm512_fmadd_ps(a, b, c); }
static inline v16 v_abs(v16 a) { return _mm512_abs_ps(a); }
static inline v16 v_round(v16 a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

static inline v16 v_power2(v16 n)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
}

static inline float v_fold(v16 v)
{
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

static inline float v_max_fold(v16 v) { return _mm512_reduce_max_ps(v); }

static inline v16 v_load_f16(const uint16_t *x)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)x));
}

static inline v16 v_load_i8(const int8_t *x)
{
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(const void *)x)));
}

static inline void v_store_f16(uint16_t *x, v16 v)
{
    _mm256_storeu_si256((__m256i *)(void *)x, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

static inline void v_store_i8(int8_t *q, v16 v)
{
    _mm_storeu_si128((__m128i *)(void *)q, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
}

#include "vector_body.h"

enum { SCORES = 8, VALUES = 4 };

#include "attention_body.h"

enum { WIDTH = 64, PARTS = 1 };

typedef __m512i reg;

static inline reg r_zero(void) { return _mm512_setzero_si512(); }
static inline reg r_set(int byte) { return _mm512_set1_epi8((char)byte); }
static inline reg r_load(const uint8_t *p) { return _mm512_loadu_si512(p); }
static inline void r_store(uint8_t *p, reg a) { _mm512_storeu_si512(p, a); }
static inline reg r_and(reg a, reg b) { return _mm512_and_si512(a, b); }
static inline reg r_xor(reg a, reg b) { return _mm512_xor_si512(a, b); }
#define r_left(a, bits) _mm512_slli_epi16(a, bits) /* a macro: compilers disagree on the type of bits */
#define r_right(a, bits) _mm512_srli_epi16(a, bits)
static inline reg r_select(reg mask, reg a, reg b) { return _mm512_ternarylogic_epi32(a, b, mask, 0xe4); }
static inline reg r_low_nibbles(reg upper, reg lower) { return r_select(r_set(0xf0), r_left(upper, 4), lower); }
static inline reg r_high_nibbles(reg upper, reg lower) { return r_select(r_set(0xf0), upper, r_right(lower, 4)); }

/* x86 repeats four bytes from memory at no cost, so they stay there. */
typedef const int8_t *steps;

static inline steps x_load(const int8_t *q) { return q; }

static inline reg x_step(steps x, size_t j)
{
    int32_t four;
    memcpy(&four, x + 4 * j, sizeof four);
    return _mm512_set1_epi32(four);
}

typedef __m512i sums;

static inline sums s_zero(void) { return _mm512_setzero_si512(); }
static inline sums s_set(int32_t x) { return _mm512_set1_epi32(x); }
static inline sums s_add(sums a, sums b) { return _mm512_add_epi32(a, b); }
static inline sums s_left(sums a, uint32_t bits) { return _mm512_slli_epi32(a, bits); }
static inline sums s_right(sums a, uint32_t bits) { return _mm512_srai_epi32(a, bits); }
static inline v16 v_from_sums(const sums dot[PARTS]) { return _mm512_cvtepi32_ps(dot[0]); }

static inline int32_t dot_bytes(const int8_t *a, const int8_t *b)
{
    __m512i dot = _mm512_setzero_si512();
    for (int c = 0; c < MQ_GROUP_SIZE; c += 2 * LANES) {
        const __m512i wide_a = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)(const void *)(a + c)));
        const __m512i wide_b = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)(const void *)(b + c)));
        dot = _mm512_add_epi32(dot, _mm512_madd_epi16(wide_a, wide_b));
    }
    return _mm512_reduce_add_epi32(dot);
}
