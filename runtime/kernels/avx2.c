/* avx2.c: kernels for AVX2 + FMA + F16C (Haswell, Zen and later).
 *
 * A 2-bit field times an int8 in maddubs gives at most 3·127·2 = 762 in 16 bits, so one group of 32 steps never
 * saturates; two slices joined to a 4-bit code give 3810, so those are widened to 32 bits every 8 steps.
 */
#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

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

static inline v16 v_load_f16(const uint16_t *x)
{
    return (v16){_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)x)),
                 _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)(x + 8)))};
}

static inline void v_store_f16(uint16_t *x, v16 v)
{
    _mm_storeu_si128((__m128i *)(void *)x, _mm256_cvtps_ph(v.low, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128((__m128i *)(void *)(x + 8), _mm256_cvtps_ph(v.high, _MM_FROUND_TO_NEAREST_INT));
}

#include "vector_body.h"

enum { STEP = 4, STEPS = MQ_GROUP_SIZE / STEP, VECTOR = 64, VECTORS = MQ_TILE_BYTES / VECTOR, HALF = 32 };

static inline __m256i load(const void *p) { return _mm256_loadu_si256(p); }
static inline __m256i field(__m256i bytes, int shift, __m256i mask)
{
    return _mm256_and_si256(_mm256_srli_epi16(bytes, shift), mask);
}

static inline int32_t sum_i32(__m256i v)
{
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    s = _mm_add_epi32(s, _mm_unpackhi_epi64(s, s));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 1)));
}

/* 32 floats to int8 codes at `q`; adds to the sums of codes and of squares. */
static inline void quantize_32(const float *x, __m256 inverse, int8_t *q, __m256i *total, __m256i *squares)
{
    const __m256 top = _mm256_set1_ps(MQ_QUANTIZE_MAX), bottom = _mm256_set1_ps(-MQ_QUANTIZE_MAX);
    __m256i words[4];
    for (int i = 0; i < 4; i++) {
        __m256 v = _mm256_mul_ps(_mm256_loadu_ps(x + 8 * i), inverse);
        v = _mm256_max_ps(_mm256_min_ps(v, top), bottom);
        words[i] = _mm256_cvtps_epi32(v);
        *total = _mm256_add_epi32(*total, words[i]);
        *squares = _mm256_add_epi32(*squares, _mm256_mullo_epi32(words[i], words[i]));
    }
    const __m256i low = _mm256_packs_epi32(words[0], words[1]), high = _mm256_packs_epi32(words[2], words[3]);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7); /* packs work within 128-bit halves */
    _mm256_storeu_si256((__m256i *)(void *)q, _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order));
}

static float quantize(const float *x, size_t columns, int8_t *q, float *scale, float *sum)
{
    const __m256 sign = _mm256_set1_ps(-0.0f);
    float squares = 0.0f, part[MQ_GROUP_SIZE];
    for (size_t first = 0, g = 0; first < columns; first += MQ_GROUP_SIZE, g++) {
        const float *group = x + first;
        if (columns - first < MQ_GROUP_SIZE) {
            memset(part, 0, sizeof part);
            memcpy(part, group, (columns - first) * sizeof *part);
            group = part;
        }
        __m256 largest8 = _mm256_setzero_ps();
        for (int i = 0; i < MQ_GROUP_SIZE; i += 8) {
            largest8 = _mm256_max_ps(_mm256_andnot_ps(sign, _mm256_loadu_ps(group + i)), largest8);
        }
        __m128 largest4 = _mm_max_ps(_mm256_castps256_ps128(largest8), _mm256_extractf128_ps(largest8, 1));
        largest4 = _mm_max_ps(largest4, _mm_movehl_ps(largest4, largest4));
        const float largest = _mm_cvtss_f32(_mm_max_ss(largest4, _mm_movehdup_ps(largest4)));
        scale[g] = 0.0f;
        sum[g] = 0.0f;
        if (!(largest >= MQ_QUANTIZE_MIN)) {
            memset(q + first, 0, MQ_GROUP_SIZE);
            continue;
        }
        const __m256 inverse = _mm256_set1_ps(MQ_QUANTIZE_MAX / largest);
        __m256i total = _mm256_setzero_si256(), total_squares = _mm256_setzero_si256();
        for (int i = 0; i < MQ_GROUP_SIZE; i += HALF) {
            quantize_32(group + i, inverse, q + first + i, &total, &total_squares);
        }
        scale[g] = largest / MQ_QUANTIZE_MAX;
        sum[g] = scale[g] * (float)sum_i32(total);
        squares = fmaf(scale[g] * scale[g], (float)sum_i32(total_squares), squares);
    }
    return squares;
}

static inline __m256i broadcast_step(const int8_t *q)
{
    int32_t four;
    memcpy(&four, q, sizeof four);
    return _mm256_set1_epi32(four);
}

/* dot[0], dot[1]: rows 0-7 and 8-15 of (one slice)·q over one group. */
static inline void dot_single(const uint8_t *plane, const int8_t *q, __m256i dot[2])
{
    const __m256i three = _mm256_set1_epi8(3), ones = _mm256_set1_epi16(1);
    __m256i low = _mm256_setzero_si256(), high = low;
    for (int v = 0; v < VECTORS; v++) {
        const __m256i a = load(plane + VECTOR * v), b = load(plane + VECTOR * v + HALF);
#pragma GCC unroll 4
        for (int j = 0; j < STEP; j++) {
            const __m256i x = broadcast_step(q + LANES * v + STEP * j);
            low = _mm256_add_epi16(low, _mm256_maddubs_epi16(field(a, 2 * j, three), x));
            high = _mm256_add_epi16(high, _mm256_maddubs_epi16(field(b, 2 * j, three), x));
        }
    }
    dot[0] = _mm256_madd_epi16(low, ones);
    dot[1] = _mm256_madd_epi16(high, ones);
}

/* Two slices of the same weights joined to 4-bit codes: fields 0 and 2 in *even, 1 and 3 in *odd. */
static inline void join(__m256i upper, __m256i lower, __m256i *even, __m256i *odd)
{
    const __m256i even_fields = _mm256_set1_epi8(0x33);
    *even = _mm256_or_si256(_mm256_slli_epi16(_mm256_and_si256(upper, even_fields), 2), _mm256_and_si256(lower, even_fields));
    *odd = _mm256_or_si256(_mm256_andnot_si256(even_fields, upper),
                           _mm256_srli_epi16(_mm256_andnot_si256(even_fields, lower), 2));
}

/* The same for two slices: dot of the 4-bit codes. */
static inline void dot_pair(const uint8_t *upper, const uint8_t *lower, const int8_t *q, __m256i dot[2])
{
    const __m256i fifteen = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    dot[0] = dot[1] = _mm256_setzero_si256();
    for (int v = 0; v < VECTORS; v += 2) {
        __m256i words[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
        for (int u = v; u < v + 2; u++) {
            const int8_t *x = q + LANES * u;
            for (int half = 0; half < 2; half++) {
                __m256i even, odd;
                join(load(upper + VECTOR * u + HALF * half), load(lower + VECTOR * u + HALF * half), &even, &odd);
                const __m256i first = _mm256_maddubs_epi16(field(even, 0, fifteen), broadcast_step(x));
                const __m256i second = _mm256_maddubs_epi16(field(odd, 0, fifteen), broadcast_step(x + STEP));
                const __m256i third = _mm256_maddubs_epi16(field(even, 4, fifteen), broadcast_step(x + 2 * STEP));
                const __m256i fourth = _mm256_maddubs_epi16(field(odd, 4, fifteen), broadcast_step(x + 3 * STEP));
                words[half] = _mm256_add_epi16(words[half], _mm256_add_epi16(_mm256_add_epi16(first, second),
                                                                             _mm256_add_epi16(third, fourth)));
            }
        }
        dot[0] = _mm256_add_epi32(dot[0], _mm256_madd_epi16(words[0], ones));
        dot[1] = _mm256_add_epi32(dot[1], _mm256_madd_epi16(words[1], ones));
    }
}

/* Q_D·q of the 16 rows of a tile over one group; `place` is the tile's byte in every plane. */
static inline void dot_tile(const mq_matrix *w, uint32_t depth, size_t place, const int8_t *q, __m256i dot[2])
{
    if (depth == 1) {
        dot_single(w->plane[0] + place, q, dot);
        return;
    }
    dot_pair(w->plane[0] + place, w->plane[1] + place, q, dot);
    if (depth > 2) {
        __m256i lower[2];
        if (depth == 3) {
            dot_single(w->plane[2] + place, q, lower);
        } else {
            dot_pair(w->plane[2] + place, w->plane[3] + place, q, lower);
        }
        const int shift = depth == 3 ? 2 : 4;
        dot[0] = _mm256_add_epi32(_mm256_slli_epi32(dot[0], shift), lower[0]);
        dot[1] = _mm256_add_epi32(_mm256_slli_epi32(dot[1], shift), lower[1]);
    }
}

/* One group's share of 16 rows: y = fma(s_D·scale, dot, y), then fma(½·s_D − o, sum, y). */
static inline v16 add_group(v16 y, const uint16_t *scale_offset, float factor, float scale, float sum, const __m256i dot[2])
{
    const v16 step = v_mul(v_load_f16(scale_offset), v_set(factor));
    const v16 base = v_fma(step, v_set(0.5f), v_sub(v_zero(), v_load_f16(scale_offset + MQ_TILE_ROWS)));
    const v16 dots = {_mm256_cvtepi32_ps(dot[0]), _mm256_cvtepi32_ps(dot[1])};
    y = v_fma(v_mul(step, v_set(scale)), dots, y);
    return v_fma(base, v_set(sum), y);
}

static inline void store_rows(const mq_matrix *w, size_t tile, float *y, v16 rows)
{
    const size_t first = tile * MQ_TILE_ROWS;
    if (first + MQ_TILE_ROWS <= w->rows) {
        v_store(y + first, rows);
    } else {
        v_store_part(y + first, w->rows - first, rows);
    }
}

static void matvec(const mq_matrix *w, uint32_t depth, const int8_t *q, const float *scale, const float *sum,
                   size_t tile_begin, size_t tile_end, float *y)
{
    const float factor = mq_depth_factor(depth);
    for (size_t tile = tile_begin; tile < tile_end; tile++) {
        v16 rows = v_zero();
        for (size_t g = 0; g < w->groups; g++) {
            const size_t at = tile * w->groups + g;
            __m256i dot[2];
            dot_tile(w, depth, at * MQ_TILE_BYTES, q + g * MQ_GROUP_SIZE, dot);
            rows = add_group(rows, w->scale_offset + at * 2 * MQ_TILE_ROWS, factor, scale[g], sum[g], dot);
        }
        store_rows(w, tile, y, rows);
    }
}

/* One group of a tile as bytes in the order of the activations, [steps][16 rows][4 columns]: slice 1 alone or slices 1, 2
 * joined in `upper`; slice 3 alone or 3, 4 joined in `lower`. So every product stays within 16 bits for 8 steps. */
static void expand(const uint8_t *const *plane, uint32_t slices, size_t place, uint8_t *out)
{
    const __m256i mask = _mm256_set1_epi8(slices == 2 ? 15 : 3);
    for (int i = 0; i < MQ_TILE_BYTES; i += HALF) {
        const int v = i / VECTOR, half = i % VECTOR;
        const __m256i a = load(plane[0] + place + i);
        __m256i fields[STEP];
        if (slices == 2) {
            __m256i even, odd;
            join(a, load(plane[1] + place + i), &even, &odd);
            fields[0] = field(even, 0, mask);
            fields[1] = field(odd, 0, mask);
            fields[2] = field(even, 4, mask);
            fields[3] = field(odd, 4, mask);
        } else {
            for (int j = 0; j < STEP; j++) {
                fields[j] = _mm256_and_si256(_mm256_srl_epi16(a, _mm_cvtsi32_si128(2 * j)), mask);
            }
        }
        for (int j = 0; j < STEP; j++) {
            _mm256_store_si256((__m256i *)(void *)(out + (STEP * v + j) * VECTOR + half), fields[j]);
        }
    }
}

enum { BLOCK = 4, EXPANDED = STEPS * VECTOR };

/* dots[t]: rows of the expanded codes times BLOCK tokens over one group, added to 4^shift-scaled earlier dots. */
static inline void dot_block(const uint8_t *codes, const int8_t *const q[BLOCK], int shift, __m256i dots[BLOCK][2])
{
    const __m256i ones = _mm256_set1_epi16(1);
    for (int t = 0; t < BLOCK; t++) {
        dots[t][0] = _mm256_slli_epi32(dots[t][0], shift);
        dots[t][1] = _mm256_slli_epi32(dots[t][1], shift);
    }
    for (int s = 0; s < STEPS; s += 8) {
        __m256i words[BLOCK][2];
        for (int t = 0; t < BLOCK; t++) {
            words[t][0] = words[t][1] = _mm256_setzero_si256();
        }
#pragma GCC unroll 8
        for (int u = s; u < s + 8; u++) {
            const __m256i a = load(codes + VECTOR * u), b = load(codes + VECTOR * u + HALF);
#pragma GCC unroll 4
            for (int t = 0; t < BLOCK; t++) {
                const __m256i x = broadcast_step(q[t] + STEP * u);
                words[t][0] = _mm256_add_epi16(words[t][0], _mm256_maddubs_epi16(a, x));
                words[t][1] = _mm256_add_epi16(words[t][1], _mm256_maddubs_epi16(b, x));
            }
        }
#pragma GCC unroll 4
        for (int t = 0; t < BLOCK; t++) {
            dots[t][0] = _mm256_add_epi32(dots[t][0], _mm256_madd_epi16(words[t][0], ones));
            dots[t][1] = _mm256_add_epi32(dots[t][1], _mm256_madd_epi16(words[t][1], ones));
        }
    }
}

/* Groups expanded together, so that a tile's codes are made once and stay in the L1 or L2 cache for all tokens. */
enum { PANEL = 16 };

static void matmat(const mq_matrix *w, uint32_t depth, const mq_activations *x, const uint32_t *token, size_t n,
                   size_t tile_begin, size_t tile_end, float *y, size_t y_stride)
{
    _Alignas(64) uint8_t codes[PANEL][2][EXPANDED];
    const float factor = mq_depth_factor(depth);
    const uint32_t upper = depth < 2 ? 1 : 2, lower = depth - upper;
    for (size_t tile = tile_begin; tile < tile_end; tile++) {
        for (size_t first = 0; first < w->groups; first += PANEL) {
            const size_t last = first + PANEL < w->groups ? first + PANEL : w->groups;
            for (size_t g = first; g < last; g++) {
                const size_t place = (tile * w->groups + g) * MQ_TILE_BYTES;
                expand(w->plane, upper, place, codes[g - first][0]);
                if (lower > 0) {
                    expand(w->plane + 2, lower, place, codes[g - first][1]);
                }
            }
            for (size_t i = 0; i < n; i += BLOCK) {
                v16 rows[BLOCK];
                size_t t[BLOCK];
                for (size_t b = 0; b < BLOCK; b++) { /* past the end the last token is computed again */
                    t[b] = token[i + b < n ? i + b : n - 1];
                    float *at = y + t[b] * y_stride + tile * MQ_TILE_ROWS;
                    const size_t count = w->rows - tile * MQ_TILE_ROWS < LANES ? w->rows - tile * MQ_TILE_ROWS : LANES;
                    rows[b] = first == 0 ? v_zero() : v_load_part(at, count);
                }
                for (size_t g = first; g < last; g++) {
                    const int8_t *q[BLOCK];
                    __m256i dots[BLOCK][2];
                    for (size_t b = 0; b < BLOCK; b++) {
                        q[b] = x->q + (t[b] * x->groups + g) * MQ_GROUP_SIZE;
                        dots[b][0] = dots[b][1] = _mm256_setzero_si256();
                    }
                    dot_block(codes[g - first][0], q, 0, dots);
                    if (lower > 0) {
                        dot_block(codes[g - first][1], q, lower == 1 ? 2 : 4, dots);
                    }
                    const uint16_t *scale_offset = w->scale_offset + (tile * w->groups + g) * 2 * MQ_TILE_ROWS;
                    for (size_t b = 0; b < BLOCK; b++) {
                        rows[b] = add_group(rows[b], scale_offset, factor, x->scale[t[b] * x->groups + g],
                                            x->sum[t[b] * x->groups + g], dots[b]);
                    }
                }
                for (size_t b = 0; b < BLOCK && i + b < n; b++) {
                    store_rows(w, tile, y + t[b] * y_stride, rows[b]);
                }
            }
        }
    }
}

static void router_hidden(const int8_t *hidden, size_t n_hidden, const int8_t *q, const float *scale, size_t groups, float *out)
{
    for (size_t h = 0; h < n_hidden; h++) {
        float total = 0.0f;
        for (size_t g = 0; g < groups; g++) {
            __m256i dot = _mm256_setzero_si256();
            for (int c = 0; c < MQ_GROUP_SIZE; c += LANES) {
                const void *a = hidden + (h * groups + g) * MQ_GROUP_SIZE + c, *b = q + g * MQ_GROUP_SIZE + c;
                const __m256i wide_a = _mm256_cvtepi8_epi16(_mm_loadu_si128(a)), wide_b = _mm256_cvtepi8_epi16(_mm_loadu_si128(b));
                dot = _mm256_add_epi32(dot, _mm256_madd_epi16(wide_a, wide_b));
            }
            total = fmaf(scale[g], (float)sum_i32(dot), total);
        }
        out[h] = total;
    }
}

const mq_kernels mq_kernels_avx2 = {
    .name = "avx2",
    .quantize = quantize,
    .matvec = matvec,
    .matmat = matmat,
    .router_hidden = router_hidden,
    .rmsnorm = rmsnorm,
    .rope = rope,
    .attention = attention,
    .swiglu = swiglu,
    .add = add,
    .to_f16 = to_f16,
};

#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
typedef int mq_avx2_is_for_x86; /* ISO C wants a declaration in every file */
#endif
