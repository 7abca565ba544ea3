/* linear_body.h: quantisation, the products with a slice matrix and the table, written once over registers of codes and of
 * sums that each instruction set defines before it includes this file (after vector_body.h). Integers are exact and
 * groups are added in ascending order, so every instruction set gives the bits of scalar.c.
 *
 * A tile's 64-byte vector v is 16 rows × 4 columns, four 2-bit fields a byte: field j belongs to columns 16v + 4j .. + 3,
 * "step" 4v + j of the activations.
 *
 * Expected besides vector_body.h's list:
 *   v_abs, v_max_fold, v_store_i8 (round half to even), v_from_sums (PARTS registers to 16 floats)
 *   reg      bytes, WIDTH of them, PARTS = 64 / WIDTH: r_zero, r_set, r_load, r_store, r_and, r_xor, r_select (mask ? a : b
 *            by bit), r_left and r_right (by bits that the caller masks away when they cross a byte), r_low_nibbles and
 *            r_high_nibbles (low or high halves of `lower`'s bytes below those of `upper`'s)
 *   sums     int32, one a row, WIDTH / 4 of them: s_zero, s_set, s_add, s_left, s_right
 *   steps    the 16 activations of a vector, four steps: x_load
 *   acc      dot products in progress: acc_zero, acc_step (codes times the four activations of step j), acc_sums
 *   dot_bytes (int8 times int8 over one group)
 *   SLICES_PER_CODE  slices that one byte of codes may join: 4 for 32-bit products, 2 (4-bit codes) for 16-bit ones
 *   CODE_BIAS        128 where acc_step takes signed codes, else 0
 *   CHUNK            steps of 4-bit codes whose products an acc holds exactly; STEPS where there is no limit
 *   BLOCK            tokens multiplied together
 *   UNROLL           vectors of a tile in straight code
 *   TILES_AHEAD      512-byte tiles in flight over all planes: the hardware prefetcher stops at every page, so they are asked
 *                    for early
 */
#include "kernels.h"
#include "keys.h"

enum { STEP = 4, STEPS = MQ_GROUP_SIZE / STEP, VECTOR = 64, VECTORS = MQ_TILE_BYTES / VECTOR };

static inline size_t smaller(size_t a, size_t b) { return a < b ? a : b; }

static const int8_t ONES[MQ_GROUP_SIZE] = {
#define ONES_16 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1
    ONES_16, ONES_16, ONES_16, ONES_16, ONES_16, ONES_16, ONES_16, ONES_16
#undef ONES_16
};

static float quantize(const float *x, size_t columns, int8_t *q, float *scale, float *sum)
{
    const v16 top = v_set(MQ_QUANTIZE_MAX), bottom = v_set(-MQ_QUANTIZE_MAX);
    float squares = 0.0f, part[MQ_GROUP_SIZE];
    for (size_t first = 0, g = 0; first < columns; first += MQ_GROUP_SIZE, g++) {
        const float *group = x + first;
        int8_t *codes = q + first;
        if (columns - first < MQ_GROUP_SIZE) {
            memset(part, 0, sizeof part);
            memcpy(part, group, (columns - first) * sizeof *part);
            group = part;
        }
        v16 magnitudes = v_zero();
        for (size_t i = 0; i < MQ_GROUP_SIZE; i += LANES) {
            magnitudes = v_max(v_abs(v_load(group + i)), magnitudes);
        }
        const float largest = v_max_fold(magnitudes);
        scale[g] = 0.0f;
        sum[g] = 0.0f;
        if (!(largest >= MQ_QUANTIZE_MIN)) {
            memset(codes, 0, MQ_GROUP_SIZE);
            continue;
        }
        const v16 inverse = v_set(MQ_QUANTIZE_MAX / largest);
        for (size_t i = 0; i < MQ_GROUP_SIZE; i += LANES) {
            v_store_i8(codes + i, v_max(v_min(v_mul(v_load(group + i), inverse), top), bottom));
        }
        scale[g] = largest / MQ_QUANTIZE_MAX;
        sum[g] = scale[g] * (float)dot_bytes(codes, ONES);
        squares = fmaf(scale[g] * scale[g], (float)dot_bytes(codes, codes), squares);
    }
    return squares;
}

/* The register at byte `at` of `slices` planes as four registers of codes, one for each step. Some stand shifted in their
 * byte, which saves instructions: of 1 slice the codes [1] and [3] times 4, of 3 slices all of them times 4. */
INLINE void codes_of(const uint8_t *const *plane, uint32_t slices, size_t at, reg codes[STEP])
{
    const reg a = r_load(plane[0] + at);
    if (slices == 1) {
        const reg first = r_set(0x03), second = r_set(0x0c), upper = r_right(a, 4);
        codes[0] = r_and(a, first);
        codes[1] = r_and(a, second);
        codes[2] = r_and(upper, first);
        codes[3] = r_and(upper, second);
        return;
    }
    const reg odd_fields = r_set(0xcc), low = r_set(0x0f);
    const reg b = r_load(plane[1] + at);
    const reg top = slices > 2 && CODE_BIAS != 0 ? r_xor(a, r_set(0xaa)) : a; /* minus 128: the highest bit of each code */
    const reg even = r_select(odd_fields, r_left(top, 2), b), odd = r_select(odd_fields, top, r_right(b, 2));
    if (slices == 2) {
        codes[0] = r_and(even, low);
        codes[1] = r_and(odd, low);
        codes[2] = r_and(r_right(even, 4), low);
        codes[3] = r_and(r_right(odd, 4), low);
        return;
    }
    const reg c = r_load(plane[2] + at), d = slices == 3 ? r_zero() : r_load(plane[3] + at);
    const reg low_even = r_select(odd_fields, r_left(c, 2), d), low_odd = r_select(odd_fields, c, r_right(d, 2));
    codes[0] = r_low_nibbles(even, low_even);
    codes[1] = r_low_nibbles(odd, low_odd);
    codes[2] = r_high_nibbles(even, low_even);
    codes[3] = r_high_nibbles(odd, low_odd);
}

/* total = 4^slices·total + codes·q, from the sums of products with codes as codes_of places and biases them. */
INLINE void add_slices(sums total[PARTS], uint32_t slices, sums part[PARTS], const int8_t *q)
{
    const sums bias = slices > 2 && CODE_BIAS != 0 ? s_set(CODE_BIAS * dot_bytes(q, ONES)) : s_zero();
    for (size_t p = 0; p < PARTS; p++) {
        part[p] = s_add(part[p], bias);
        part[p] = slices == 3 ? s_right(part[p], 2) : part[p];
        total[p] = s_add(s_left(total[p], 2 * slices), part[p]);
    }
}

/* Q_D·q of the 16 rows of a tile over one group; `place` is the tile's byte in every plane, `ahead` the distance at which
 * bytes are asked for early. */
INLINE void dot_tile(const mq_matrix *w, uint32_t depth, size_t place, size_t ahead, const int8_t *q, sums total[PARTS])
{
    for (size_t p = 0; p < PARTS; p++) {
        total[p] = s_zero();
    }
    for (uint32_t e = 0; e < depth; e += SLICES_PER_CODE) {
        const uint32_t slices = (uint32_t)smaller(depth - e, SLICES_PER_CODE);
        const size_t chunk = smaller(CHUNK / 2, VECTORS); /* vectors: each gives 2 steps to each acc */
        sums part[PARTS];
        for (size_t p = 0; p < PARTS; p++) {
            part[p] = s_zero();
        }
        for (size_t begin = 0; begin < VECTORS; begin += chunk) {
            acc even[PARTS], odd[PARTS];
            for (size_t p = 0; p < PARTS; p++) {
                even[p] = odd[p] = acc_zero();
            }
#pragma GCC unroll UNROLL
            for (size_t v = begin; v < begin + chunk; v++) {
                for (uint32_t s = 0; s < slices; s++) {
                    __builtin_prefetch(w->plane[e + s] + place + VECTOR * v + ahead);
                }
                const steps x = x_load(q + LANES * v);
                for (size_t p = 0; p < PARTS; p++) {
                    reg codes[STEP];
                    codes_of(w->plane + e, slices, place + VECTOR * v + WIDTH * p, codes);
                    even[p] = acc_step(acc_step(even[p], codes[0], x, 0), codes[2], x, 2);
                    odd[p] = acc_step(acc_step(odd[p], codes[1], x, 1), codes[3], x, 3);
                }
            }
            for (size_t p = 0; p < PARTS; p++) {
                const sums odd_sums = acc_sums(odd[p]);
                part[p] = s_add(part[p], s_add(acc_sums(even[p]), slices == 1 ? s_right(odd_sums, 2) : odd_sums));
            }
        }
        add_slices(total, slices, part, q);
    }
}

/* One group's share of 16 rows: y = fma(s_D·scale, dot, y), then fma(½·s_D − o, sum, y). */
INLINE v16 add_group(v16 y, const uint16_t *scale_offset, float factor, float scale, float sum, const sums dot[PARTS])
{
    const v16 step = v_mul(v_load_f16(scale_offset), v_set(factor));
    const v16 base = v_fma(step, v_set(0.5f), v_sub(v_zero(), v_load_f16(scale_offset + MQ_TILE_ROWS)));
    y = v_fma(v_mul(step, v_set(scale)), v_from_sums(dot), y);
    return v_fma(base, v_set(sum), y);
}

static inline size_t rows_of(const mq_matrix *w, size_t tile)
{
    return smaller(w->rows - tile * MQ_TILE_ROWS, MQ_TILE_ROWS);
}

INLINE void matvec_depth(const mq_matrix *w, uint32_t depth, const int8_t *q, const float *scale, const float *sum,
                                size_t tile_begin, size_t tile_end, float *y)
{
    const size_t tiles_ahead = TILES_AHEAD / depth;
    const float factor = mq_depth_factor(depth);
    for (size_t tile = tile_begin; tile < tile_end; tile++) {
        v16 rows = v_zero();
        for (size_t g = 0; g < w->groups; g++) {
            const size_t at = tile * w->groups + g;
            const uint16_t *scale_offset = w->scale_offset + at * 2 * MQ_TILE_ROWS;
            sums dot[PARTS];
            __builtin_prefetch(scale_offset + tiles_ahead * 2 * MQ_TILE_ROWS);
            dot_tile(w, depth, at * MQ_TILE_BYTES, tiles_ahead * MQ_TILE_BYTES, q + g * MQ_GROUP_SIZE, dot);
            rows = add_group(rows, scale_offset, factor, scale[g], sum[g], dot);
        }
        v_store_part(y + tile * MQ_TILE_ROWS, rows_of(w, tile), rows);
    }
}

static void matvec(const mq_matrix *w, uint32_t depth, const int8_t *q, const float *scale, const float *sum,
                   size_t tile_begin, size_t tile_end, float *y)
{
    switch (depth) { /* a constant depth unrolls codes_of */
    case 1: matvec_depth(w, 1, q, scale, sum, tile_begin, tile_end, y); break;
    case 2: matvec_depth(w, 2, q, scale, sum, tile_begin, tile_end, y); break;
    case 3: matvec_depth(w, 3, q, scale, sum, tile_begin, tile_end, y); break;
    default: matvec_depth(w, 4, q, scale, sum, tile_begin, tile_end, y); break;
    }
}

/* PANEL: groups expanded together: a tile's codes are made once and stay in the cache for all tokens.
 * CODES: bytes of codes that one weight takes. */
enum { PANEL = 16, CODES = 4 / SLICES_PER_CODE, EXPANDED = STEPS * VECTOR };

/* One group of a tile as codes in the order of the activations, [steps][16 rows][4 columns]. */
INLINE void expand(const uint8_t *const *plane, uint32_t slices, size_t place, uint8_t out[EXPANDED])
{
    for (size_t i = 0; i < MQ_TILE_BYTES; i += WIDTH) {
        reg codes[STEP];
        codes_of(plane, slices, place + i, codes);
        if (slices == 1) {
            codes[1] = r_right(codes[1], 2);
            codes[3] = r_right(codes[3], 2);
        }
        for (size_t j = 0; j < STEP; j++) {
            r_store(out + (i / VECTOR * STEP + j) * VECTOR + i % VECTOR, codes[j]);
        }
    }
}

/* total[b] = 4^slices·total[b] + codes·q[b] over one group. */
INLINE void dot_block(const uint8_t codes[EXPANDED], uint32_t slices, const int8_t *const q[BLOCK],
                      sums total[BLOCK][PARTS])
{
    sums part[BLOCK][PARTS];
    for (size_t b = 0; b < BLOCK; b++) {
        for (size_t p = 0; p < PARTS; p++) {
            part[b][p] = s_zero();
        }
    }
    for (size_t begin = 0; begin < VECTORS; begin += CHUNK / STEP) {
        acc products[BLOCK][PARTS];
        for (size_t b = 0; b < BLOCK; b++) {
            for (size_t p = 0; p < PARTS; p++) {
                products[b][p] = acc_zero();
            }
        }
#pragma GCC unroll 1 /* in longer straight code gcc spills the products */
        for (size_t v = begin; v < begin + CHUNK / STEP; v++) {
            steps x[BLOCK];
            for (size_t b = 0; b < BLOCK; b++) {
                x[b] = x_load(q[b] + LANES * v);
            }
#pragma GCC unroll 4
            for (size_t j = 0; j < STEP; j++) {
                reg c[PARTS];
                for (size_t p = 0; p < PARTS; p++) {
                    c[p] = r_load(codes + (STEP * v + j) * VECTOR + WIDTH * p);
                }
                for (size_t b = 0; b < BLOCK; b++) {
                    for (size_t p = 0; p < PARTS; p++) {
                        products[b][p] = acc_step(products[b][p], c[p], x[b], j);
                    }
                }
            }
        }
        for (size_t b = 0; b < BLOCK; b++) {
            for (size_t p = 0; p < PARTS; p++) {
                part[b][p] = s_add(part[b][p], acc_sums(products[b][p]));
            }
        }
    }
    for (size_t b = 0; b < BLOCK; b++) {
        add_slices(total[b], slices, part[b], q[b]);
    }
}

/* Groups first..last-1 of a tile for BLOCK tokens t: added to rows. */
INLINE void add_panel(const mq_matrix *w, uint32_t depth, size_t tile, size_t first, size_t last,
                      uint8_t codes[PANEL][CODES][EXPANDED], const mq_activations *x, const size_t t[BLOCK],
                      v16 rows[BLOCK])
{
    const float factor = mq_depth_factor(depth);
    for (size_t g = first; g < last; g++) {
        const uint16_t *scale_offset = w->scale_offset + (tile * w->groups + g) * 2 * MQ_TILE_ROWS;
        const int8_t *q[BLOCK];
        sums dot[BLOCK][PARTS];
        for (size_t b = 0; b < BLOCK; b++) {
            q[b] = x->q + (t[b] * x->groups + g) * MQ_GROUP_SIZE;
            for (size_t p = 0; p < PARTS; p++) {
                dot[b][p] = s_zero();
            }
        }
        for (uint32_t e = 0; e < depth; e += SLICES_PER_CODE) {
            dot_block(codes[g - first][e / SLICES_PER_CODE], (uint32_t)smaller(depth - e, SLICES_PER_CODE), q, dot);
        }
        for (size_t b = 0; b < BLOCK; b++) {
            const size_t at = t[b] * x->groups + g;
            rows[b] = add_group(rows[b], scale_offset, factor, x->scale[at], x->sum[at], dot[b]);
        }
    }
}

static void matmat(const mq_matrix *w, uint32_t depth, const mq_activations *x, const uint32_t *token, size_t n,
                   size_t tile_begin, size_t tile_end, float *y, size_t y_stride)
{
    _Alignas(VECTOR) uint8_t codes[PANEL][CODES][EXPANDED];
    for (size_t tile = tile_begin; tile < tile_end; tile++) {
        const size_t count = rows_of(w, tile);
        for (size_t first = 0; first < w->groups; first += PANEL) {
            const size_t last = smaller(first + PANEL, w->groups);
            for (size_t g = first; g < last; g++) {
                const size_t place = (tile * w->groups + g) * MQ_TILE_BYTES;
                for (uint32_t e = 0; e < depth; e += SLICES_PER_CODE) {
                    const uint32_t slices = (uint32_t)smaller(depth - e, SLICES_PER_CODE);
                    expand(w->plane + e, slices, place, codes[g - first][e / SLICES_PER_CODE]);
                }
            }
            for (size_t i = 0; i < n; i += BLOCK) {
                v16 rows[BLOCK];
                size_t t[BLOCK];
                for (size_t b = 0; b < BLOCK; b++) { /* past the end the last token is computed again */
                    t[b] = token[smaller(i + b, n - 1)];
                    rows[b] = first == 0 ? v_zero() : v_load_part(y + t[b] * y_stride + tile * MQ_TILE_ROWS, count);
                }
                add_panel(w, depth, tile, first, last, codes, x, t, rows);
                for (size_t b = 0; b < BLOCK && i + b < n; b++) {
                    v_store_part(y + t[b] * y_stride + tile * MQ_TILE_ROWS, count, rows[b]);
                }
            }
        }
    }
}

static void router_hidden(const int8_t *hidden, size_t n_hidden, const int8_t *q, const float *scale, size_t groups,
                          float *out)
{
    for (size_t h = 0; h < n_hidden; h++) {
        float total = 0.0f;
        for (size_t g = 0; g < groups; g++) {
            const float dot = (float)dot_bytes(hidden + (h * groups + g) * MQ_GROUP_SIZE, q + g * MQ_GROUP_SIZE);
            total = fmaf(scale[g], dot, total);
        }
        out[h] = total;
    }
}

/* The file's one public name. */
#define MQ_KERNELS(isa)                   \
    const mq_kernels mq_kernels_##isa = { \
        .name = #isa,                     \
        .quantize = quantize,             \
        .matvec = matvec,                 \
        .matmat = matmat,                 \
        .router_hidden = router_hidden,   \
        .rmsnorm = rmsnorm,               \
        .rope = rope,                     \
        .attend = attend,                 \
        .join = join,                     \
        .swiglu = swiglu,                 \
        .geglu = geglu,                   \
        .softcap = softcap,               \
        .add = add,                       \
        .to_f16 = to_f16,                 \
    };
