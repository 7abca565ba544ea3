/* scalar.c: the definition of every kernel in plain C (src/kernels.h says what each does). Clear before fast. */
#include "definition.h"
#include "f16.h"
#include "kernels.h"
#include "keys.h"

#include <math.h>
#include <string.h>

enum { LANES = 16, STEP = 4 };

/* Fold 16 partial sums 8, 4, 2, 1: the order that vector registers give. */
static float fold(float lanes[LANES])
{
    for (size_t half = LANES / 2; half >= 1; half /= 2) {
        for (size_t i = 0; i < half; i++) {
            lanes[i] += lanes[i + half];
        }
    }
    return lanes[0];
}

static float exponential(float x)
{
    if (x != x) {
        return x;
    }
    x = x < MQ_EXP_HIGH ? x : MQ_EXP_HIGH;
    x = x > MQ_EXP_LOW ? x : MQ_EXP_LOW;
    const float n = rintf(x * MQ_LOG2_E);
    float r = fmaf(n, -MQ_LN2_HIGH, x);
    r = fmaf(n, -MQ_LN2_LOW, r);
    float p = fmaf(MQ_EXP_C7, r, MQ_EXP_C6);
    p = fmaf(p, r, MQ_EXP_C5);
    p = fmaf(p, r, MQ_EXP_C4);
    p = fmaf(p, r, MQ_EXP_C3);
    p = fmaf(p, r, MQ_EXP_C2);
    p = fmaf(p, r, 1.0f);
    p = fmaf(p, r, 1.0f);
    const uint32_t bits = (uint32_t)((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return p * power;
}

static float quantize(const float *x, size_t columns, int8_t *q, float *scale, float *sum)
{
    float squares = 0.0f;
    for (size_t first = 0, g = 0; first < columns; first += MQ_GROUP_SIZE, g++) {
        const size_t count = columns - first < MQ_GROUP_SIZE ? columns - first : MQ_GROUP_SIZE;
        float largest = 0.0f;
        for (size_t i = 0; i < count; i++) {
            largest = fabsf(x[first + i]) > largest ? fabsf(x[first + i]) : largest;
        }
        memset(q + first, 0, MQ_GROUP_SIZE);
        scale[g] = 0.0f;
        sum[g] = 0.0f;
        if (largest >= MQ_QUANTIZE_MIN) {
            const float inverse = MQ_QUANTIZE_MAX / largest;
            int32_t total = 0, total_squares = 0;
            for (size_t i = 0; i < count; i++) {
                float v = x[first + i] * inverse;
                v = v < MQ_QUANTIZE_MAX ? v : MQ_QUANTIZE_MAX; /* a NaN becomes 127, as in the vector kernels */
                v = v > -MQ_QUANTIZE_MAX ? v : -MQ_QUANTIZE_MAX;
                const int32_t code = (int32_t)rintf(v);
                q[first + i] = (int8_t)code;
                total += code;
                total_squares += code * code;
            }
            scale[g] = largest / MQ_QUANTIZE_MAX;
            sum[g] = scale[g] * (float)total;
            squares = fmaf(scale[g] * scale[g], (float)total_squares, squares);
        }
    }
    return squares;
}

/* Q_D of row r (0..15), column c (0..127) of one tile of one group. */
static int32_t code_at(const mq_matrix *w, uint32_t depth, size_t tile, size_t group, size_t r, size_t c)
{
    const size_t place = (tile * w->groups + group) * MQ_TILE_BYTES;
    const size_t byte = place + c / LANES * (LANES * STEP) + r * STEP + c % STEP;
    const uint32_t shift = (uint32_t)(c / STEP % STEP) * MQ_SLICE_BITS;
    uint32_t code = 0;
    for (uint32_t e = 0; e < depth; e++) {
        code = code << MQ_SLICE_BITS | ((uint32_t)(w->plane[e][byte] >> shift) & 3u);
    }
    return (int32_t)code;
}

/* y = sum over groups of fma(s_D·scale, Q·q, ·) and then fma(½·s_D − o, sum, ·) */
static float row_product(const mq_matrix *w, uint32_t depth, size_t tile, size_t r, const int8_t *q, const float *scale,
                         const float *sum)
{
    float y = 0.0f;
    for (size_t g = 0; g < w->groups; g++) {
        int32_t dot = 0;
        for (size_t c = 0; c < MQ_GROUP_SIZE; c++) {
            dot += code_at(w, depth, tile, g, r, c) * q[g * MQ_GROUP_SIZE + c];
        }
        const uint16_t *pair = w->scale_offset + (tile * w->groups + g) * 2 * MQ_TILE_ROWS;
        const float step = mq_f16_to_f32(pair[r]) * mq_depth_factor(depth);
        const float base = fmaf(step, 0.5f, -mq_f16_to_f32(pair[MQ_TILE_ROWS + r]));
        y = fmaf(step * scale[g], (float)dot, y);
        y = fmaf(base, sum[g], y);
    }
    return y;
}

static void matvec(const mq_matrix *w, uint32_t depth, const int8_t *q, const float *scale, const float *sum,
                   size_t tile_begin, size_t tile_end, float *y)
{
    for (size_t tile = tile_begin; tile < tile_end; tile++) {
        for (size_t r = 0; r < MQ_TILE_ROWS && tile * MQ_TILE_ROWS + r < w->rows; r++) {
            y[tile * MQ_TILE_ROWS + r] = row_product(w, depth, tile, r, q, scale, sum);
        }
    }
}

static void matmat(const mq_matrix *w, uint32_t depth, const mq_activations *x, const uint32_t *token, size_t n,
                   size_t tile_begin, size_t tile_end, float *y, size_t y_stride)
{
    for (size_t i = 0; i < n; i++) {
        const size_t t = token[i];
        matvec(w, depth, x->q + t * x->groups * MQ_GROUP_SIZE, x->scale + t * x->groups, x->sum + t * x->groups, tile_begin,
               tile_end, y + t * y_stride);
    }
}

static void router_hidden(const int8_t *hidden, size_t n_hidden, const int8_t *q, const float *scale, size_t groups, float *out)
{
    for (size_t h = 0; h < n_hidden; h++) {
        float total = 0.0f;
        for (size_t g = 0; g < groups; g++) {
            int32_t dot = 0;
            for (size_t c = 0; c < MQ_GROUP_SIZE; c++) {
                dot += hidden[(h * groups + g) * MQ_GROUP_SIZE + c] * q[g * MQ_GROUP_SIZE + c];
            }
            total = fmaf(scale[g], (float)dot, total);
        }
        out[h] = total;
    }
}

static void rmsnorm(const float *x, const float *weight, size_t n, float eps, float *y)
{
    float lanes[LANES] = {0};
    for (size_t i = 0; i < n; i++) {
        lanes[i % LANES] = fmaf(x[i], x[i], lanes[i % LANES]);
    }
    const float factor = 1.0f / sqrtf(fold(lanes) / (float)n + eps);
    for (size_t i = 0; i < n; i++) {
        y[i] = x[i] * factor * weight[i];
    }
}

static void rope(float *head, const float *cosine, const float *sine, size_t head_dim)
{
    const size_t half = head_dim / 2;
    for (size_t i = 0; i < half; i++) {
        const float a = head[i], b = head[half + i];
        head[i] = fmaf(a, cosine[i], -(b * sine[i]));
        head[half + i] = fmaf(b, cosine[i], a * sine[i]);
    }
}

/* Dimension i of a stored position. */
static float key_at(const mq_stored *stored, size_t dim, size_t position, size_t i)
{
    const size_t block = position / LANES, at = (block * dim + i) * LANES + position % LANES;
    if (stored->key_scale == NULL) {
        return mq_f16_to_f32(((const uint16_t *)stored->key)[at]);
    }
    const uint16_t *scale = stored->key_scale + (block * mq_cache_groups(dim) + i / MQ_CACHE_GROUP) * LANES;
    return (float)((const int8_t *)stored->key)[at] * mq_f16_to_f32(scale[position % LANES]);
}

static float value_at(const mq_stored *stored, size_t dim, size_t position, size_t i)
{
    const size_t at = position * mq_padded_dim(dim) + i;
    if (stored->value_scale == NULL) {
        return mq_f16_to_f32(((const uint16_t *)stored->value)[at]);
    }
    const uint16_t *scale = stored->value_scale + position * mq_cache_groups(dim);
    return (float)((const int8_t *)stored->value)[at] * mq_f16_to_f32(scale[i / MQ_CACHE_GROUP]);
}

/* Over positions from .. seen − 1 of the chunk. */
static void attend_one(const mq_queries *queries, const float *query, size_t from, size_t seen, const mq_stored *stored,
                       float *part)
{
    const size_t dim = queries->head_dim, padded = mq_padded_dim(dim);
    float weight[MQ_ATTENTION_CHUNK], lanes[LANES] = {0}, largest = -INFINITY;
    for (size_t p = from; p < seen; p++) {
        float dot = 0.0f;
        for (size_t i = 0; i < dim; i++) {
            dot = fmaf(query[i], key_at(stored, dim, p, i), dot);
        }
        weight[p] = dot * queries->scale;
        largest = weight[p] > largest ? weight[p] : largest;
    }
    for (size_t p = from; p < seen; p++) {
        weight[p] = exponential(weight[p] - largest);
        lanes[p % LANES] += weight[p];
    }
    for (size_t i = 0; i < padded; i++) {
        float sum = 0.0f;
        for (size_t p = from; p < seen; p++) {
            sum = fmaf(weight[p], value_at(stored, dim, p, i), sum);
        }
        part[i] = sum;
    }
    part[padded + MQ_PART_TOTAL] = fold(lanes);
    part[padded + MQ_PART_LARGEST] = largest;
}

static void attend(const mq_queries *queries, size_t seen, const mq_stored *stored, float *part)
{
    for (size_t t = 0; t < queries->tokens; t++) {
        const size_t from = mq_seen_from(queries, seen + t), positions = mq_seen_to(seen + t);
        for (size_t h = 0; h < queries->heads; h++) {
            const float *query = queries->query + t * queries->token_stride + h * queries->head_dim;
            attend_one(queries, query, from, positions, stored, part);
            part += mq_part_floats(queries->head_dim);
        }
    }
}

static void join(float *part, const float *next, size_t head_dim)
{
    const size_t padded = mq_padded_dim(head_dim), total = padded + MQ_PART_TOTAL, largest = padded + MQ_PART_LARGEST;
    const float most = next[largest] > part[largest] ? next[largest] : part[largest];
    const float mine = exponential(part[largest] - most), theirs = exponential(next[largest] - most);
    for (size_t i = 0; i < padded; i++) {
        part[i] = fmaf(part[i], mine, next[i] * theirs);
    }
    part[total] = fmaf(part[total], mine, next[total] * theirs);
    part[largest] = most;
}

static void swiglu(float *gate, const float *up, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        gate[i] = gate[i] / (1.0f + exponential(-gate[i])) * up[i];
    }
}

static void add(float *x, const float *y, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        x[i] += y[i];
    }
}

static void to_f16(const float *x, uint16_t *y, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        y[i] = mq_f32_to_f16(x[i]);
    }
}

const mq_kernels mq_kernels_scalar = {
    .name = "scalar",
    .quantize = quantize,
    .matvec = matvec,
    .matmat = matmat,
    .router_hidden = router_hidden,
    .rmsnorm = rmsnorm,
    .rope = rope,
    .attend = attend,
    .join = join,
    .swiglu = swiglu,
    .add = add,
    .to_f16 = to_f16,
};
