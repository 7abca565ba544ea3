/* avx512vnni.c: kernels for AVX-512 with VNNI (Ice Lake, Zen 4 and later).
 *
 * vpdpbusd adds four u8·s8 products to a 32-bit lane without saturation: a lane is a row, its four products are four
 * columns. So a masked field can stay where it is in its byte: its sums are exact multiples of 4^field.
 */
#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")
#endif

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

static inline v16 v_load_f16(const uint16_t *x)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)x));
}

static inline void v_store_f16(uint16_t *x, v16 v)
{
    _mm256_storeu_si256((__m256i *)(void *)x, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

#include "vector_body.h"

enum { STEP = 4, STEPS = MQ_GROUP_SIZE / STEP, VECTOR = 64, VECTORS = MQ_TILE_BYTES / VECTOR };

static inline __m512i load(const void *p) { return _mm512_loadu_si512(p); }

/* bits of a where mask is 1, of b elsewhere; the mask is the last operand, so that no copy of it is overwritten */
static inline __m512i blend(__m512i mask, __m512i a, __m512i b) { return _mm512_ternarylogic_epi32(a, b, mask, 0xe4); }

static inline __m512i broadcast_step(const int8_t *q)
{
    int32_t four;
    memcpy(&four, q, sizeof four);
    return _mm512_set1_epi32(four);
}

static float quantize(const float *x, size_t columns, int8_t *q, float *scale, float *sum)
{
    const __m512 top = v_set(MQ_QUANTIZE_MAX), bottom = v_set(-MQ_QUANTIZE_MAX);
    float squares = 0.0f, part[MQ_GROUP_SIZE];
    for (size_t first = 0, g = 0; first < columns; first += MQ_GROUP_SIZE, g++) {
        const float *group = x + first;
        if (columns - first < MQ_GROUP_SIZE) {
            memset(part, 0, sizeof part);
            memcpy(part, group, (columns - first) * sizeof *part);
            group = part;
        }
        v16 largest16 = v_zero();
        for (int i = 0; i < MQ_GROUP_SIZE; i += LANES) {
            largest16 = v_max(_mm512_abs_ps(v_load(group + i)), largest16);
        }
        const float largest = _mm512_reduce_max_ps(largest16);
        scale[g] = 0.0f;
        sum[g] = 0.0f;
        if (!(largest >= MQ_QUANTIZE_MIN)) {
            memset(q + first, 0, MQ_GROUP_SIZE);
            continue;
        }
        const v16 inverse = v_set(MQ_QUANTIZE_MAX / largest);
        __m512i total = _mm512_setzero_si512(), total_squares = total;
        for (int i = 0; i < MQ_GROUP_SIZE; i += LANES) {
            const v16 v = v_max(v_min(v_mul(v_load(group + i), inverse), top), bottom);
            const __m512i codes = _mm512_cvtps_epi32(v);
            total = _mm512_add_epi32(total, codes);
            total_squares = _mm512_add_epi32(total_squares, _mm512_mullo_epi32(codes, codes));
            _mm_storeu_si128((__m128i *)(void *)(q + first + i), _mm512_cvtepi32_epi8(codes));
        }
        scale[g] = largest / MQ_QUANTIZE_MAX;
        sum[g] = scale[g] * (float)_mm512_reduce_add_epi32(total);
        squares = fmaf(scale[g] * scale[g], (float)_mm512_reduce_add_epi32(total_squares), squares);
    }
    return squares;
}

/* Vector v of a tile at `depth` as four vectors of codes, field j in the byte order of activation step 4v + j, times
 * 4^scale_bits(depth, j): depth 1 and 2 leave the fields in place, depth 3 has an empty fourth slice. */
static inline void fields_of(const mq_matrix *w, uint32_t depth, size_t at, __m512i out[STEP])
{
    const __m512i a = load(w->plane[0] + at);
    if (depth == 1) {
        out[0] = _mm512_and_si512(a, _mm512_set1_epi8(0x03));
        out[1] = _mm512_and_si512(a, _mm512_set1_epi8(0x0c));
        out[2] = _mm512_and_si512(a, _mm512_set1_epi8(0x30));
        out[3] = _mm512_and_si512(a, _mm512_set1_epi8((char)0xc0));
        return;
    }
    const __m512i odd_fields = _mm512_set1_epi8((char)0xcc), high = _mm512_set1_epi8((char)0xf0);
    const __m512i b = load(w->plane[1] + at);
    const __m512i even = blend(odd_fields, _mm512_slli_epi16(a, 2), b), odd = blend(odd_fields, a, _mm512_srli_epi16(b, 2));
    if (depth == 2) {
        out[0] = _mm512_andnot_si512(high, even);
        out[1] = _mm512_andnot_si512(high, odd);
        out[2] = _mm512_and_si512(high, even);
        out[3] = _mm512_and_si512(high, odd);
        return;
    }
    const __m512i c = load(w->plane[2] + at), d = depth == 3 ? _mm512_setzero_si512() : load(w->plane[3] + at);
    const __m512i low_even = blend(odd_fields, _mm512_slli_epi16(c, 2), d), low_odd = blend(odd_fields, c, _mm512_srli_epi16(d, 2));
    out[0] = blend(high, _mm512_slli_epi16(even, 4), low_even);
    out[1] = blend(high, _mm512_slli_epi16(odd, 4), low_odd);
    out[2] = blend(high, even, _mm512_srli_epi16(low_even, 4));
    out[3] = blend(high, odd, _mm512_srli_epi16(low_odd, 4));
}

/* Q_D·q of 16 rows from the sums of the four fields: undo the place of each field, exactly. */
static inline __m512i join_fields(uint32_t depth, const __m512i sums[STEP])
{
    if (depth == 1) {
        return _mm512_add_epi32(_mm512_add_epi32(sums[0], _mm512_srai_epi32(sums[1], 2)),
                                _mm512_add_epi32(_mm512_srai_epi32(sums[2], 4), _mm512_srai_epi32(sums[3], 6)));
    }
    const __m512i low = _mm512_add_epi32(sums[0], sums[1]), high = _mm512_add_epi32(sums[2], sums[3]);
    if (depth == 2) {
        return _mm512_add_epi32(low, _mm512_srai_epi32(high, 4));
    }
    return _mm512_srai_epi32(_mm512_add_epi32(low, high), depth == 3 ? 2 : 0);
}

/* One group's share of 16 rows: y = fma(s_D·scale, dot, y), then fma(½·s_D − o, sum, y). */
static inline v16 add_group(v16 y, const uint16_t *scale_offset, float factor, float scale, float sum, __m512i dot)
{
    const v16 step = v_mul(v_load_f16(scale_offset), v_set(factor));
    const v16 base = _mm512_fmsub_ps(step, v_set(0.5f), v_load_f16(scale_offset + MQ_TILE_ROWS));
    y = v_fma(v_mul(step, v_set(scale)), _mm512_cvtepi32_ps(dot), y);
    return v_fma(base, v_set(sum), y);
}

static inline __mmask16 rows_of(const mq_matrix *w, size_t tile)
{
    const size_t left = w->rows - tile * MQ_TILE_ROWS;
    return left >= MQ_TILE_ROWS ? 0xffff : (__mmask16)((1u << left) - 1);
}

static inline void matvec_depth(const mq_matrix *w, uint32_t depth, const int8_t *q, const float *scale, const float *sum,
                                size_t tile_begin, size_t tile_end, float *y)
{
    /* The hardware prefetcher stops at every page, so tiles are asked for early: 6 kB in flight over all planes, which was
     * the fastest of 1 to 8 kB at depth 1 and within noise of the fastest at 2 to 4. */
    const size_t tiles_ahead = 12 / depth, ahead = tiles_ahead * MQ_TILE_BYTES;
    const float factor = mq_depth_factor(depth);
    for (size_t tile = tile_begin; tile < tile_end; tile++) {
        v16 rows = v_zero();
        for (size_t g = 0; g < w->groups; g++) {
            const size_t at = tile * w->groups + g, place = at * MQ_TILE_BYTES;
            const int8_t *x = q + g * MQ_GROUP_SIZE;
            __m512i sums[STEP] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
#pragma GCC unroll 8
            for (size_t v = 0; v < VECTORS; v++) {
                __m512i codes[STEP];
                for (uint32_t e = 0; e < depth; e++) {
                    _mm_prefetch((const char *)(w->plane[e] + place + VECTOR * v + ahead), _MM_HINT_T0);
                }
                fields_of(w, depth, place + VECTOR * v, codes);
                for (size_t j = 0; j < STEP; j++) {
                    sums[j] = _mm512_dpbusd_epi32(sums[j], codes[j], broadcast_step(x + LANES * v + STEP * j));
                }
            }
            _mm_prefetch((const char *)(w->scale_offset + (at + tiles_ahead) * 2 * MQ_TILE_ROWS), _MM_HINT_T0);
            rows = add_group(rows, w->scale_offset + at * 2 * MQ_TILE_ROWS, factor, scale[g], sum[g], join_fields(depth, sums));
        }
        _mm512_mask_storeu_ps(y + tile * MQ_TILE_ROWS, rows_of(w, tile), rows);
    }
}

static void matvec(const mq_matrix *w, uint32_t depth, const int8_t *q, const float *scale, const float *sum,
                   size_t tile_begin, size_t tile_end, float *y)
{
    switch (depth) { /* a constant depth unrolls fields_of */
    case 1: matvec_depth(w, 1, q, scale, sum, tile_begin, tile_end, y); break;
    case 2: matvec_depth(w, 2, q, scale, sum, tile_begin, tile_end, y); break;
    case 3: matvec_depth(w, 3, q, scale, sum, tile_begin, tile_end, y); break;
    default: matvec_depth(w, 4, q, scale, sum, tile_begin, tile_end, y); break;
    }
}

/* Tokens multiplied together, and groups expanded together: a tile's codes are made once per panel and stay in the cache. */
enum { BLOCK = 8, PANEL = 16 };

static inline void expand(const mq_matrix *w, uint32_t depth, size_t place, uint8_t *out)
{
    for (size_t v = 0; v < VECTORS; v++) {
        __m512i codes[STEP];
        fields_of(w, depth, place + VECTOR * v, codes);
        if (depth == 1) {
            codes[1] = _mm512_srli_epi16(codes[1], 2);
            codes[2] = _mm512_srli_epi16(codes[2], 4);
            codes[3] = _mm512_srli_epi16(codes[3], 6);
        } else if (depth == 2) {
            codes[2] = _mm512_srli_epi16(codes[2], 4);
            codes[3] = _mm512_srli_epi16(codes[3], 4);
        }
        for (size_t j = 0; j < STEP; j++) {
            _mm512_store_si512(out + (STEP * v + j) * VECTOR, codes[j]);
        }
    }
}

static void matmat(const mq_matrix *w, uint32_t depth, const mq_activations *x, const uint32_t *token, size_t n,
                   size_t tile_begin, size_t tile_end, float *y, size_t y_stride)
{
    _Alignas(64) uint8_t codes[PANEL][STEPS * VECTOR];
    const float factor = mq_depth_factor(depth);
    const int shift = depth == 3 ? 2 : 0;
    for (size_t tile = tile_begin; tile < tile_end; tile++) {
        const __mmask16 mask = rows_of(w, tile);
        for (size_t first = 0; first < w->groups; first += PANEL) {
            const size_t last = first + PANEL < w->groups ? first + PANEL : w->groups;
            for (size_t g = first; g < last; g++) {
                expand(w, depth, (tile * w->groups + g) * MQ_TILE_BYTES, codes[g - first]);
            }
            for (size_t i = 0; i < n; i += BLOCK) {
                v16 rows[BLOCK];
                size_t t[BLOCK];
                for (size_t b = 0; b < BLOCK; b++) { /* past the end the last token is computed again */
                    t[b] = token[i + b < n ? i + b : n - 1];
                    rows[b] = first == 0 ? v_zero() : _mm512_maskz_loadu_ps(mask, y + t[b] * y_stride + tile * MQ_TILE_ROWS);
                }
                for (size_t g = first; g < last; g++) {
                    const int8_t *q[BLOCK];
                    __m512i dots[BLOCK];
#pragma GCC unroll 8
                    for (size_t b = 0; b < BLOCK; b++) {
                        q[b] = x->q + (t[b] * x->groups + g) * MQ_GROUP_SIZE;
                        dots[b] = _mm512_setzero_si512();
                    }
#pragma GCC unroll 4
                    for (size_t s = 0; s < STEPS; s++) {
                        const __m512i a = _mm512_load_si512(codes[g - first] + VECTOR * s);
#pragma GCC unroll 8
                        for (size_t b = 0; b < BLOCK; b++) {
                            dots[b] = _mm512_dpbusd_epi32(dots[b], a, broadcast_step(q[b] + STEP * s));
                        }
                    }
                    const uint16_t *scale_offset = w->scale_offset + (tile * w->groups + g) * 2 * MQ_TILE_ROWS;
#pragma GCC unroll 8
                    for (size_t b = 0; b < BLOCK; b++) {
                        rows[b] = add_group(rows[b], scale_offset, factor, x->scale[t[b] * x->groups + g],
                                            x->sum[t[b] * x->groups + g], _mm512_srai_epi32(dots[b], (unsigned)shift));
                    }
                }
                for (size_t b = 0; b < BLOCK && i + b < n; b++) {
                    _mm512_mask_storeu_ps(y + t[b] * y_stride + tile * MQ_TILE_ROWS, mask, rows[b]);
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
            __m512i dot = _mm512_setzero_si512();
            for (int c = 0; c < MQ_GROUP_SIZE; c += 2 * LANES) {
                const void *a = hidden + (h * groups + g) * MQ_GROUP_SIZE + c, *b = q + g * MQ_GROUP_SIZE + c;
                dot = _mm512_add_epi32(dot, _mm512_madd_epi16(_mm512_cvtepi8_epi16(_mm256_loadu_si256(a)),
                                                              _mm512_cvtepi8_epi16(_mm256_loadu_si256(b))));
            }
            total = fmaf(scale[g], (float)_mm512_reduce_add_epi32(dot), total);
        }
        out[h] = total;
    }
}

const mq_kernels mq_kernels_avx512vnni = {
    .name = "avx512vnni",
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
typedef int mq_avx512vnni_is_for_x86; /* ISO C wants a declaration in every file */
#endif
