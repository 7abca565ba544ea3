/* state.c: a fuzz target that restores sessions. An input is a list of edits to a saved state, whose size and checksum then follow
 * unless it says otherwise, so that the checks behind the checksum are reached. What is accepted must come back as it went in. */
#include "base.h"

#include <string.h>

enum { SAVED = 5, CONTEXT = 12, MAX_EDITS = 16, SPARE_BYTES = 1024, SIZE_AT = 24, CHECKSUM_AT = 32, HEADER = 48 };

static mq_session *session;
static uint8_t *good, *state, *again;
static size_t good_size;

/* FNV-1a over words, as runtime/src/state.c has it; the start below proves that it still does. */
static uint64_t checksum(const uint8_t *bytes, size_t size)
{
    uint64_t value = 0xcbf29ce484222325u;
    for (; size >= sizeof value; size -= sizeof value, bytes += sizeof value) {
        uint64_t word;
        memcpy(&word, bytes, sizeof word);
        value = (value ^ word) * 0x100000001b3u;
        value ^= value >> 32;
    }
    for (; size > 0; size--, bytes++) {
        value = (value ^ *bytes) * 0x100000001b3u;
    }
    return value;
}

int LLVMFuzzerInitialize(int *count, char ***arguments);
int LLVMFuzzerInitialize(int *count, char ***arguments)
{
    (void)count;
    (void)arguments;
    mq_model *model = NULL;
    mq_error error;
    REQUIRE(open_bytes(fuzz_base, (size_t)(fuzz_base_end - fuzz_base), NULL, &model) == MQ_OK);
    const mq_session_options options = {.n_ctx = CONTEXT, .n_batch = 4};
    REQUIRE(mq_session_open(model, &options, &session, &error) == MQ_OK);
    const int32_t tokens[SAVED] = {1, 2, 3, 4, 5};
    REQUIRE(mq_session_set_average_bits(session, 4.0f, &error) == MQ_OK);
    REQUIRE(mq_session_eval(session, tokens, SAVED, NULL, 0, &error) == MQ_OK);
    good_size = mq_session_state_size(session);
    good = malloc(good_size);
    state = malloc(2 * good_size + SPARE_BYTES);
    again = malloc(2 * good_size + SPARE_BYTES);
    REQUIRE(good != NULL && state != NULL && again != NULL);
    REQUIRE(mq_session_state_get(session, good, good_size, &error) == MQ_OK);
    uint64_t stored;
    memcpy(&stored, good + CHECKSUM_AT, sizeof stored);
    REQUIRE(stored == checksum(good + HEADER, good_size - HEADER));
    return 0;
}

/* One edit: bytes changed anywhere, a shorter or longer state, or a number of the header. */
static size_t edit(fuzz_input *in, size_t size)
{
    const uint64_t kind = fuzz_take(in, 1) % 5;
    if (kind == 0) {
        return fuzz_take(in, 2) % (good_size + SPARE_BYTES);
    }
    if (kind == 1) { /* the position, and as many bytes as it then takes */
        const uint32_t position = (uint32_t)fuzz_take(in, 1) % (2 * SAVED);
        memcpy(state + 12, &position, sizeof position);
        return HEADER + (good_size - HEADER) / SAVED * position;
    }
    if (kind == 2) {
        const uint64_t value = fuzz_take_edge(in);
        memcpy(state + fuzz_take(in, 1) % HEADER, &value, sizeof value);
        return size;
    }
    const size_t at = kind == 3 ? fuzz_take(in, 2) : HEADER + fuzz_take(in, 1);
    const uint64_t value = fuzz_take(in, 4);
    memcpy(state + at % (good_size + SPARE_BYTES), &value, 1 + fuzz_take(in, 1) % sizeof(uint32_t));
    return size;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    fuzz_input in = {data, size};
    memset(state, 0, 2 * good_size + SPARE_BYTES);
    memcpy(state, good, good_size);
    size_t length = good_size;
    const uint64_t flags = fuzz_take(&in, 1);
    for (size_t i = 0; i < MAX_EDITS && in.size > 0; i++) {
        length = edit(&in, length);
    }
    if (length >= HEADER && (flags & 1) == 0) {
        const uint64_t whole = length, sum = checksum(state + HEADER, length - HEADER);
        memcpy(state + SIZE_AT, &whole, sizeof whole);
        memcpy(state + CHECKSUM_AT, &sum, sizeof sum);
    }
    uint8_t *exact = malloc(length == 0 ? 1 : length); /* of its size, so that a read past the end is seen */
    REQUIRE(exact != NULL);
    memcpy(exact, state, length);
    mq_error error = {MQ_OK, ""};
    const uint32_t before = mq_session_position(session);
    if (mq_session_state_set(session, exact, length, &error) == MQ_OK) {
        REQUIRE(mq_session_state_size(session) == length);
        REQUIRE(mq_session_state_get(session, again, length, &error) == MQ_OK);
        REQUIRE(memcmp(exact, again, length) == 0);
        if ((flags & 6) == 6 && mq_session_position(session) < CONTEXT) {
            const int32_t token = 7;
            static float logits[1024];
            REQUIRE(mq_session_eval(session, &token, 1, logits, 1, &error) == MQ_OK);
        }
    } else {
        REQUIRE(error.message[0] != '\0' && mq_session_position(session) == before);
    }
    free(exact);
    return 0;
}
