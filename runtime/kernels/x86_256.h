/* x86_256.h: 16 floats, 32 bytes of codes and 8 sums in AVX2's registers (with FMA and F16C), for the instruction sets
 * that differ in how they multiply bytes: avx2.c and avxvnni.c. Included after the target is set.
 */
#include "kernels.h"
#include "keys.h"

#include <immintrin.h>

typedef struct v16 {
    __m256 low, high;
} v16;

static inline v16 v_zero(void) { return (v16){_mm256_setzero_ps(), _mm256_setzero_ps()}; }
static inline v16 v_set(float x) { return (v16){_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
static inline v16 v_load(const float *x) { return (v16){_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8)}; }
static inline void v_store(float *x, v16 v) { _mm256_storeu_ps(x, v.low); _mm256_storeu_ps(x + 8, v.high); }

#define BINARY(name, op) \
    static inline v16 name(v16 a, v16 b) { return (v16){op(a.low, b.low), op(a.high, b.high)}; }
BINARY(v_add, _mm256_add_ps)
BINARY(v_sub, _mm256_sub_ps)
BINARY(v_mul, _mm256_mul_ps)
BINARY(v_div, _mm256_div_ps)
BINARY(v_max, _mm256_max_ps)
BINARY(v_min, _mm256_min_ps)
#undef BINARY

static inline v16 v_fma(v16 a, v16 b, v16 c)
{
    return (v16){_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}

static inline v16 v_abs(v16 a)
{
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return (v16){_mm256_andnot_ps(sign, a.low), _mm256_andnot_ps(sign, a.high)};
}

static inline v16 v_round(v16 a)
{
    enum { NEAREST = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC };
    return (v16){_mm256_round_ps(a.low, NEAREST), _mm256_round_ps(a.high, NEAREST)};
}

static inline __m256 power2_half(__m256 n)
{
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}

static inline v16 v_power2(v16 n) { return (v16){power2_half(n.low), power2_half(n.high)}; }

static inline float v_fold(v16 v)
{
    const __m256 eight = _mm256_add_ps(v.low, v.high);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

static inline float v_max_fold(v16 v)
{
    const __m256 eight = _mm256_max_ps(v.low, v.high);
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

static inline v16 v_load_f16(const uint16_t *x)
{
    return (v16){_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)x)),
                 _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)(x + 8)))};
}

static inline v16 v_load_i8(const int8_t *x)
{
    return (v16){_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)x))),
                 _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)(x + 8))))};
}

static inline void v_store_f16(uint16_t *x, v16 v)
{
    _mm_storeu_si128((__m128i *)(void *)x, _mm256_cvtps_ph(v.low, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128((__m128i *)(void *)(x + 8), _mm256_cvtps_ph(v.high, _MM_FROUND_TO_NEAREST_INT));
}

static inline void v_store_i8(int8_t *q, v16 v)
{
    const __m256i mixed = _mm256_packs_epi32(_mm256_cvtps_epi32(v.low), _mm256_cvtps_epi32(v.high));
    const __m256i words = _mm256_permute4x64_epi64(mixed, _MM_SHUFFLE(3, 1, 2, 0)); /* packs works in 128-bit halves */
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128((__m128i *)(void *)q, bytes);
}

#include "vector_body.h"

enum { SCORES = 4, VALUES = 1 };

#include "attention_body.h"

enum { WIDTH = 32, PARTS = 2 };

typedef __m256i reg;

static inline reg r_zero(void) { return _mm256_setzero_si256(); }
static inline reg r_set(int byte) { return _mm256_set1_epi8((char)byte); }
static inline reg r_load(const uint8_t *p) { return _mm256_loadu_si256((const __m256i *)(const void *)p); }
static inline void r_store(uint8_t *p, reg a) { _mm256_storeu_si256((__m256i *)(void *)p, a); }
static inline reg r_and(reg a, reg b) { return _mm256_and_si256(a, b); }
static inline reg r_xor(reg a, reg b) { return _mm256_xor_si256(a, b); }
static inline reg r_left(reg a, int bits) { return _mm256_slli_epi16(a, bits); }
static inline reg r_right(reg a, int bits) { return _mm256_srli_epi16(a, bits); }

static inline reg r_select(reg mask, reg a, reg b)
{
    return _mm256_or_si256(_mm256_and_si256(mask, a), _mm256_andnot_si256(mask, b));
}

static inline reg r_low_nibbles(reg upper, reg lower) { return r_select(r_set(0xf0), r_left(upper, 4), lower); }
static inline reg r_high_nibbles(reg upper, reg lower) { return r_select(r_set(0xf0), upper, r_right(lower, 4)); }

/* x86 repeats four bytes from memory at no cost, so they stay there. */
typedef const int8_t *steps;

static inline steps x_load(const int8_t *q) { return q; }

static inline reg x_step(steps x, size_t j)
{
    int32_t four;
    memcpy(&four, x + 4 * j, sizeof four);
    return _mm256_set1_epi32(four);
}

typedef __m256i sums;

static inline sums s_zero(void) { return _mm256_setzero_si256(); }
static inline sums s_set(int32_t x) { return _mm256_set1_epi32(x); }
static inline sums s_add(sums a, sums b) { return _mm256_add_epi32(a, b); }
static inline sums s_left(sums a, uint32_t bits) { return _mm256_slli_epi32(a, (int)bits); }
static inline sums s_right(sums a, uint32_t bits) { return _mm256_srai_epi32(a, (int)bits); }

static inline v16 v_from_sums(const sums dot[PARTS])
{
    return (v16){_mm256_cvtepi32_ps(dot[0]), _mm256_cvtepi32_ps(dot[1])};
}

static inline int32_t dot_bytes(const int8_t *a, const int8_t *b)
{
    __m256i dot = _mm256_setzero_si256();
    for (int c = 0; c < MQ_GROUP_SIZE; c += LANES) {
        const __m256i wide_a = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(const void *)(a + c)));
        const __m256i wide_b = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(const void *)(b + c)));
        dot = _mm256_add_epi32(dot, _mm256_madd_epi16(wide_a, wide_b));
    }
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(dot), _mm256_extracti128_si256(dot, 1));
    four = _mm_add_epi32(four, _mm_unpackhi_epi64(four, four));
    return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 1)));
}
