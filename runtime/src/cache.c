/* cache.c: where a position's key and value lie, and how they are rounded to f16 or to int8. */
#include "cache.h"

#include "f16.h"

#include <math.h>
#include <string.h>

size_t mq_cache_slots(uint32_t window, uint32_t n_ctx, uint32_t n_batch)
{
    const size_t all = ((size_t)n_ctx + MQ_KEY_POSITIONS - 1) / MQ_KEY_POSITIONS * MQ_KEY_POSITIONS;
    if (window == 0 || window >= all || n_batch >= all - window) {
        return all;
    }
    const size_t ring = ((size_t)window + n_batch + MQ_ATTENTION_CHUNK - 1) / MQ_ATTENTION_CHUNK * MQ_ATTENTION_CHUNK;
    return ring < all ? ring : all;
}

size_t mq_cache_number_bytes(mq_cache_type type)
{
    return type == MQ_CACHE_Q8_0 ? sizeof(int8_t) : sizeof(uint16_t);
}

size_t mq_cache_row_bytes(mq_cache_type type, size_t head_dim)
{
    const size_t scales = type == MQ_CACHE_Q8_0 ? mq_cache_groups(head_dim) : 0;
    return head_dim * mq_cache_number_bytes(type) + scales * sizeof(uint16_t);
}

/* Numbers and scales of one position's row: the first of each, and how far apart they lie. */
typedef struct row {
    uint8_t *numbers;
    uint16_t *scales; /* NULL: f16 */
    size_t step, bytes, count, groups;
} row;

static row row_at(const mq_cache *cache, bool value, size_t head, size_t position)
{
    const mq_side *side = value ? &cache->values : &cache->keys;
    const size_t dim = cache->head_dim, groups = mq_cache_groups(dim), slot = head * cache->slots + position % cache->slots;
    const size_t width = value ? mq_padded_dim(dim) : dim, step = value ? 1 : MQ_KEY_POSITIONS;
    /* A key's first number is that of its block of positions, and its place there. */
    const size_t lane = slot % step, number = (slot - lane) * width + lane, scale = (slot - lane) * groups + lane;
    const size_t bytes = mq_cache_number_bytes(side->scales != NULL ? MQ_CACHE_Q8_0 : MQ_CACHE_F16);
    return (row){.numbers = (uint8_t *)side->numbers + number * bytes, .scales = side->scales != NULL ? side->scales + scale : NULL,
                 .step = step, .bytes = bytes, .count = dim, .groups = groups};
}

mq_stored mq_cache_at(const mq_cache *cache, size_t head, size_t position)
{
    const row key = row_at(cache, false, head, position), value = row_at(cache, true, head, position);
    return (mq_stored){.key = key.numbers, .value = value.numbers, .key_scale = key.scales, .value_scale = value.scales};
}

/* Codes of one group of numbers, and its scale in f16: largest / 127, codes rounded half to even. What is no finite number
 * makes the whole group none, so that it stays visible. */
static uint16_t quantize_group(const float *x, size_t count, int8_t *codes)
{
    float largest = 0.0f;
    bool finite = true;
    for (size_t i = 0; i < count; i++) {
        const float size = fabsf(x[i]);
        finite = finite && size < INFINITY;
        largest = size > largest ? size : largest;
    }
    const float inverse = finite && largest >= MQ_QUANTIZE_MIN ? MQ_QUANTIZE_MAX / largest : 0.0f;
    for (size_t i = 0; i < count; i++) {
        codes[i] = finite ? (int8_t)rintf(x[i] * inverse) : 1;
    }
    return finite ? mq_f32_to_f16(inverse > 0.0f ? largest / MQ_QUANTIZE_MAX : 0.0f) : mq_f32_to_f16(NAN);
}

static void put_row(const row *to, const mq_kernels *kernels, const float *x)
{
    if (to->scales == NULL) {
        uint16_t half[MQ_MAX_HEAD_DIM];
        kernels->to_f16(x, half, to->count);
        for (size_t i = 0; i < to->count; i++) {
            memcpy(to->numbers + i * to->step * sizeof *half, &half[i], sizeof *half);
        }
        return;
    }
    for (size_t g = 0; g < to->groups; g++) {
        const size_t first = g * MQ_CACHE_GROUP, left = to->count - first, count = left < MQ_CACHE_GROUP ? left : MQ_CACHE_GROUP;
        int8_t codes[MQ_CACHE_GROUP];
        to->scales[g * to->step] = quantize_group(x + first, count, codes);
        for (size_t i = 0; i < count; i++) {
            memcpy(to->numbers + (first + i) * to->step, &codes[i], 1);
        }
    }
}

void mq_cache_put(const mq_cache *cache, const mq_kernels *kernels, size_t head, size_t position, const float *key,
                  const float *value)
{
    const row keys = row_at(cache, false, head, position), values = row_at(cache, true, head, position);
    put_row(&keys, kernels, key);
    put_row(&values, kernels, value);
}

void mq_cache_copy_out(const mq_cache *cache, bool value, size_t head, size_t position, uint8_t *bytes)
{
    const row from = row_at(cache, value, head, position);
    for (size_t i = 0; i < from.count; i++) {
        memcpy(bytes + i * from.bytes, from.numbers + i * from.step * from.bytes, from.bytes);
    }
    for (size_t g = 0; g < from.groups && from.scales != NULL; g++) {
        memcpy(bytes + from.count * from.bytes + g * sizeof *from.scales, from.scales + g * from.step, sizeof *from.scales);
    }
}

void mq_cache_copy_in(const mq_cache *cache, bool value, size_t head, size_t position, const uint8_t *bytes)
{
    const row to = row_at(cache, value, head, position);
    for (size_t i = 0; i < to.count; i++) {
        memcpy(to.numbers + i * to.step * to.bytes, bytes + i * to.bytes, to.bytes);
    }
    for (size_t g = 0; g < to.groups && to.scales != NULL; g++) {
        memcpy(to.scales + g * to.step, bytes + to.count * to.bytes + g * sizeof *to.scales, sizeof *to.scales);
    }
}
