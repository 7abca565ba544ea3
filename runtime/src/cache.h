/* cache.h: keys and values of past positions in the order in which attention reads them (mq_stored in kernels.h).
 *
 * Every block has a cache of its own, for its kv heads: keys [head][slots / 16][head_dim][16], values [head][slots][head_dim
 * padded to 16], each f16, or int8 with scales [head][slots / 16][groups][16] and [head][slots][groups]. The first 16·k slots
 * of a head are one piece of memory.
 *
 * Position p lies in slot p % slots. A block that sees everything has a slot for each position of the context. One with a
 * sliding window has a ring: room for the window and a batch, in whole chunks of attention, so that no chunk lies across
 * the ring's end.
 */
#ifndef MQ_CACHE_H
#define MQ_CACHE_H

#include "definition.h"
#include "kernels.h"
#include "mobiquant.h"

#include <stdbool.h>

enum { MQ_KEY_POSITIONS = 16 };

/* One of the two things that a position has: its keys or its values. */
typedef struct mq_side {
    void *numbers;    /* f16 or int8, zero where nothing was put */
    uint16_t *scales; /* of int8; NULL: f16 */
} mq_side;

typedef struct mq_cache {
    mq_side keys, values;
    size_t slots; /* a multiple of MQ_KEY_POSITIONS */
    size_t head_dim;
} mq_cache;

/* Slots of a block. window: positions that a token sees, its own counted; 0: all. */
size_t mq_cache_slots(uint32_t window, uint32_t n_ctx, uint32_t n_batch);

/* Bytes of one number, and of one row without padding: its numbers, then the scales if there are any. */
size_t mq_cache_number_bytes(mq_cache_type type);
size_t mq_cache_row_bytes(mq_cache_type type, size_t head_dim);

/* From a position that is a multiple of MQ_KEY_POSITIONS on. */
mq_stored mq_cache_at(const mq_cache *cache, size_t head, size_t position);

/* Key and value [head_dim] of one position. */
void mq_cache_put(const mq_cache *cache, const mq_kernels *kernels, size_t head, size_t position, const float *key,
                  const float *value);

/* One row of a position, of its value or of its key, as bytes without padding. */
void mq_cache_copy_out(const mq_cache *cache, bool value, size_t head, size_t position, uint8_t *row);
void mq_cache_copy_in(const mq_cache *cache, bool value, size_t head, size_t position, const uint8_t *row);

#endif
