/* state.c: a session's cache as bytes and back. Bytes that come back are trusted less than a model file: the header names the
 * model they belong to, a checksum covers them, and every value is checked before the session changes.
 *
 * header, then for positions 0..position-1: bits asked for f32 [position] (0: not routed), depths uint8 [position][block][7],
 * keys f16 [block][kv head][position][head_dim], values alike: rows without the padding and the order they have in the cache.
 * Of a block with a sliding window only the positions from header.first on: the window, and one more where it was held.
 */
#include "device.h"
#include "error.h"
#include "session.h"

#include <inttypes.h>
#include <stdbool.h>
#include <string.h>

typedef struct state_header {
    uint8_t magic[8];
    uint32_t version, position;
    uint64_t model;    /* fingerprint */
    uint64_t size;     /* of header and body */
    uint64_t checksum; /* of the body */
    uint32_t first;    /* position that windowed blocks begin with */
    uint16_t key_type, value_type; /* mq_cache_type */
} state_header;

static const uint8_t MAGIC[8] = {'M', 'Q', 'S', 'T', 'A', 'T', 'E', '\n'};
enum { VERSION = 2, F16_EXPONENT = 0x7c00 };

/* FNV-1a over 8 bytes at a time, the rest one by one. */
static uint64_t hash(uint64_t value, const void *data, size_t size)
{
    const uint8_t *bytes = data;
    for (; size >= sizeof(uint64_t); size -= sizeof(uint64_t), bytes += sizeof(uint64_t)) {
        uint64_t word;
        memcpy(&word, bytes, sizeof word);
        value = (value ^ word) * 0x100000001b3u;
        value ^= value >> 32; /* a multiplication alone carries nothing downwards */
    }
    for (; size > 0; size--, bytes++) {
        value = (value ^ *bytes) * 0x100000001b3u;
    }
    return value;
}

enum { SAMPLE = 64 };
static const uint64_t HASH_START = 0xcbf29ce484222325u;

/* Sizes, norms, routers and the first bytes of every base plane: they tell calibrations of one model apart, and reading them
 * brings little of the file into memory. */
static uint64_t fingerprint(const mq_model *model)
{
    const mq_hparams *hp = &model->hparams;
    const uint32_t shape[] = {hp->vocab_size, hp->context_length, hp->embedding_length, hp->block_count, hp->feed_forward_length,
                              hp->head_count, hp->head_count_kv, hp->head_dim, hp->embedding_depth, hp->router_hidden};
    const size_t width = hp->embedding_length * sizeof(float);
    uint64_t value = hash(HASH_START, shape, sizeof shape);
    value = hash(value, model->inv_freq, hp->head_dim / 2 * sizeof(float));
    value = hash(value, model->output_norm, width);
    value = hash(value, model->embedding.plane[0], SAMPLE);
    for (uint32_t i = 0; i < hp->block_count; i++) {
        const mq_block *block = &model->blocks[i];
        value = hash(value, block->attn_norm, width);
        value = hash(value, block->ffn_norm, width);
        value = hash(value, &block->window, sizeof block->window);
        for (size_t j = 0; j < MQ_ROUTERS; j++) {
            value = hash(value, block->router[j].hidden_scale, hp->router_hidden * sizeof(float));
        }
        for (size_t j = 0; j < MQ_LINEARS; j++) {
            value = hash(value, block->linear[j].plane[0], SAMPLE);
            value = hash(value, block->linear[j].scale_offset, SAMPLE);
        }
    }
    return value;
}

static size_t depths_size(const mq_session *session, uint32_t position)
{
    return (size_t)position * session->model->hparams.block_count * MQ_LINEARS;
}

static size_t asked_size(uint32_t position)
{
    return position * sizeof(float);
}

/* Windowed blocks begin with the window before `position`, or one earlier: then the last token can be taken back. */
static uint32_t first_saved(const mq_session *session)
{
    const uint32_t window = session->model->hparams.sliding_window;
    const uint32_t first = window != 0 && session->position > window ? session->position - window : 0;
    return first > session->oldest ? first : session->oldest;
}

/* A session of this context was allocated, so no product here overflows. */
static size_t state_size(const mq_session *session, uint32_t position, uint32_t first)
{
    const mq_hparams *hp = &session->model->hparams;
    size_t rows = 0;
    for (uint32_t i = 0; i < hp->block_count; i++) {
        rows += (size_t)hp->head_count_kv * (position - (session->model->blocks[i].window != 0 ? first : 0));
    }
    const size_t row = mq_cache_row_bytes(session->key_type, hp->head_dim) + mq_cache_row_bytes(session->value_type, hp->head_dim);
    return sizeof(state_header) + asked_size(position) + depths_size(session, position) + rows * row;
}

size_t mq_session_state_size(const mq_session *session)
{
    return state_size(session, session->position, first_saved(session));
}

/* Keys, then values, of the positions before `position`: from the cache to `out`, or, when it is NULL, from `in` to the cache. */
static void copy_cache(mq_session *session, uint32_t position, uint32_t first, uint8_t *out, const uint8_t *in)
{
    const mq_hparams *hp = &session->model->hparams;
    size_t at = 0;
    for (int32_t value = 0; value < 2; value++) {
        const size_t size = mq_cache_row_bytes(value ? session->value_type : session->key_type, hp->head_dim);
        for (size_t i = 0; i < (size_t)hp->block_count * hp->head_count_kv; i++) {
            const size_t block = i / hp->head_count_kv, head = i % hp->head_count_kv;
            const mq_cache *cache = &session->caches[block];
            for (size_t p = session->model->blocks[block].window != 0 ? first : 0; p < position; p++, at += size) {
                if (out != NULL) {
                    mq_cache_copy_out(cache, value, head, p, out + at);
                } else {
                    mq_cache_copy_in(cache, value, head, p, in + at);
                }
            }
        }
    }
}

mq_status mq_session_state_get(mq_session *session, uint8_t *data, size_t size, mq_error *error)
{
    const mq_status status = mq_session_acquire(session, error);
    if (status != MQ_OK) {
        return status;
    }
    const size_t needed = mq_session_state_size(session);
    if (size < needed) {
        mq_session_release(session);
        return mq_fail(error, MQ_ERR_ARGUMENT, "state: expected room for %zu bytes, found %zu", needed, size);
    }
    uint8_t *at = data + sizeof(state_header);
    memcpy(at, session->asked_at, asked_size(session->position));
    at += asked_size(session->position);
    memcpy(at, session->depths, depths_size(session, session->position));
    at += depths_size(session, session->position);
    if (session->device != NULL) {
        const mq_status copied = mq_device_copy_cache(session, session->position, at, NULL, error);
        if (copied != MQ_OK) {
            mq_session_release(session);
            return copied;
        }
    } else {
        copy_cache(session, session->position, first_saved(session), at, NULL);
    }
    state_header header = {.version = VERSION, .position = session->position, .model = fingerprint(session->model), .size = needed,
                           .first = first_saved(session), .key_type = (uint16_t)session->key_type,
                           .value_type = (uint16_t)session->value_type, .checksum = hash(HASH_START, data + sizeof header, needed - sizeof header)};
    memcpy(header.magic, MAGIC, sizeof MAGIC);
    memcpy(data, &header, sizeof header);
    mq_session_release(session);
    return MQ_OK;
}

static const char *type_name(uint32_t type)
{
    return type == MQ_CACHE_F16 ? "f16" : type == MQ_CACHE_Q8_0 ? "q8_0" : "none that is known";
}

static mq_status check_header(const mq_session *session, const uint8_t *data, size_t size, state_header *header, mq_error *error)
{
    if (size < sizeof *header) {
        return mq_fail(error, MQ_ERR_FORMAT, "state: expected at least %zu bytes, found %zu", sizeof *header, size);
    }
    memcpy(header, data, sizeof *header);
    if (memcmp(header->magic, MAGIC, sizeof MAGIC) != 0) {
        return mq_fail(error, MQ_ERR_FORMAT, "state: expected the bytes of a saved session, found something else");
    }
    if (header->version != VERSION) {
        return mq_fail(error, MQ_ERR_FORMAT, "state: expected version %d, found %" PRIu32, VERSION, header->version);
    }
    if (header->model != fingerprint(session->model)) {
        return mq_fail(error, MQ_ERR_ARGUMENT, "state: expected one saved with %s, found another model's", session->model->path);
    }
    if (header->key_type != (uint16_t)session->key_type || header->value_type != (uint16_t)session->value_type) {
        return mq_fail(error, MQ_ERR_ARGUMENT, "state: expected keys of cache type %s and values of %s, found %s and %s",
                       type_name(session->key_type), type_name(session->value_type), type_name(header->key_type),
                       type_name(header->value_type));
    }
    if (header->position > session->n_ctx) {
        return mq_fail(error, MQ_ERR_CONTEXT_FULL, "state: expected at most %" PRIu32 " positions, the context, found %" PRIu32,
                       session->n_ctx, header->position);
    }
    const uint32_t window = session->model->hparams.sliding_window, position = header->position;
    const uint32_t needed = window != 0 && position >= window ? position - window + 1 : 0; /* by the next token */
    if (header->first > needed || header->first + 1 < needed) {
        return mq_fail(error, MQ_ERR_FORMAT, "state: expected the sliding window from position %" PRIu32 " on, found it from %" PRIu32,
                       needed, header->first);
    }
    if (header->size != size || size != state_size(session, position, header->first)) {
        return mq_fail(error, MQ_ERR_FORMAT, "state: expected %zu bytes for %" PRIu32 " positions, found %zu",
                       state_size(session, position, header->first), position, size);
    }
    if (header->checksum != hash(HASH_START, data + sizeof *header, size - sizeof *header)) {
        return mq_fail(error, MQ_ERR_FORMAT, "state: the bytes were altered: their checksum is another");
    }
    return MQ_OK;
}

/* Keys and values: the numbers of f16, the scales of int8, whose codes may be any. */
static mq_status check_rows(const mq_session *session, const uint8_t *rows, size_t size, mq_error *error)
{
    const size_t dim = session->model->hparams.head_dim;
    const size_t key = mq_cache_row_bytes(session->key_type, dim), value = mq_cache_row_bytes(session->value_type, dim);
    const size_t keys = size / (key + value) * key; /* bytes of them */
    for (size_t at = 0; at < size;) {
        const bool int8 = (at < keys ? session->key_type : session->value_type) == MQ_CACHE_Q8_0;
        const size_t end = at + (at < keys ? key : value);
        for (at += int8 ? dim : 0; at < end; at += sizeof(uint16_t)) {
            uint16_t half;
            memcpy(&half, rows + at, sizeof half);
            if ((half & F16_EXPONENT) == F16_EXPONENT) {
                return mq_fail(error, MQ_ERR_FORMAT, "state: expected finite keys and values, found one that is not");
            }
        }
    }
    return MQ_OK;
}

/* The values of a state whose header holds: a forged one may carry any checksum. */
static mq_status check_body(const mq_session *session, const uint8_t *data, size_t size, uint32_t position, mq_error *error)
{
    size_t at = sizeof(state_header);
    for (const size_t end = at + asked_size(position); at < end; at += sizeof(float)) {
        float bits;
        memcpy(&bits, data + at, sizeof bits);
        if (!(bits == 0.0f || (bits >= (float)MQ_SLICE_BITS && bits <= (float)(MQ_SLICE_BITS * MQ_SLICE_COUNT)))) {
            return mq_fail(error, MQ_ERR_FORMAT, "state: expected average bits of 0 or from 2 to 8, found %g", (double)bits);
        }
    }
    const size_t cache = at + depths_size(session, position);
    for (; at < cache; at++) {
        if (data[at] < 1 || data[at] > MQ_SLICE_COUNT) {
            return mq_fail(error, MQ_ERR_FORMAT, "state: expected depths from 1 to %d, found %d", MQ_SLICE_COUNT, data[at]);
        }
    }
    return check_rows(session, data + at, size - at, error);
}

mq_status mq_session_state_set(mq_session *session, const uint8_t *data, size_t size, mq_error *error)
{
    state_header header;
    mq_status status = check_header(session, data, size, &header, error);
    if (status == MQ_OK) {
        status = check_body(session, data, size, header.position, error);
    }
    if (status == MQ_OK) {
        status = mq_session_acquire(session, error);
    }
    if (status != MQ_OK) {
        return status;
    }
    const uint8_t *at = data + sizeof header;
    const uint8_t *cache = at + asked_size(header.position) + depths_size(session, header.position);
    if (session->device != NULL) {
        status = mq_device_copy_cache(session, header.position, NULL, cache, error);
        if (status != MQ_OK) {
            mq_session_release(session);
            return status;
        }
    } else {
        copy_cache(session, header.position, header.first, NULL, cache);
    }
    memcpy(session->asked_at, at, asked_size(header.position));
    at += asked_size(header.position);
    memcpy(session->depths, at, depths_size(session, header.position));
    at += depths_size(session, header.position);
    session->position = header.position;
    session->oldest = header.first;
    session->stretch_end = 0; /* thresholds are found anew */
    mq_session_release(session);
    return MQ_OK;
}
