/* api.c: a fuzz target that calls the C API in odd orders with odd arguments. An input is a list of calls on two models, one of
 * them cut after its base slices, and four sessions. Every error has a message and leaves the position as it was. */
#include "base.h"

#include <math.h>
#include <stdbool.h>
#include <string.h>

enum { MODELS = 2, SESSIONS = 4, MAX_CALLS = 48, MAX_TOKENS = 24, MAX_VOCAB = 1024, MAX_STATE = 1 << 16 };

enum call {
    CALL_OPEN, CALL_CLOSE, CALL_DEPTH, CALL_AVERAGE, CALL_STATIC, CALL_OUTPUT_DEPTH, CALL_EVAL, CALL_HIDDEN, CALL_REWIND, CALL_DEPTHS,
    CALL_STATS, CALL_GREEDY, CALL_SAVE, CALL_RESTORE, CALL_QUERY, CALL_CHECK, CALLS
};

static mq_model *models[MODELS];
static mq_session *sessions[SESSIONS];
static uint8_t saved[MAX_STATE];
static size_t saved_size;

int LLVMFuzzerInitialize(int *count, char ***arguments);
int LLVMFuzzerInitialize(int *count, char ***arguments)
{
    (void)count;
    (void)arguments;
    const size_t size = (size_t)(fuzz_base_end - fuzz_base);
    REQUIRE(open_bytes(fuzz_base, size, NULL, &models[0]) == MQ_OK);
    const mq_model_options partial = {.allow_partial = 1};
    size_t cut = size;
    mq_model_info info = {.max_depth = 4};
    while (info.max_depth > 2) { /* until two slices are left */
        mq_model_close(models[1]);
        cut -= 64;
        REQUIRE(open_bytes(fuzz_base, cut, &partial, &models[1]) == MQ_OK);
        mq_model_get_info(models[1], &info);
    }
    REQUIRE(info.vocab_size <= MAX_VOCAB);
    return 0;
}

static float take_bits(fuzz_input *in)
{
    static const float odd[] = {0.0f, -1.0f, 1.9f, 2.0f, 4.0f, 8.0f, 8.1f, 1e30f, INFINITY, -INFINITY, NAN};
    const uint64_t kind = fuzz_take(in, 1);
    return kind < 128 ? 2.0f + (float)kind / 21.0f : odd[kind % (sizeof odd / sizeof odd[0])];
}

static uint32_t take_number(fuzz_input *in, uint32_t usual)
{
    const uint64_t kind = fuzz_take(in, 1);
    return kind < 240 ? (uint32_t)(kind % (usual + 2)) : (uint32_t)fuzz_take_edge(in);
}

static void open_session(mq_session **session, fuzz_input *in)
{
    static const char *const kernels[] = {NULL, "scalar", "", "no such kernel"};
    const mq_model *model = models[fuzz_take(in, 1) % MODELS];
    mq_session_options options = {.n_ctx = take_number(in, 32), .n_batch = take_number(in, 8)};
    const uint64_t how = fuzz_take(in, 1);
    options.kernel = how % 16 < 4 ? kernels[how % 4] : mq_kernel_name(how % 8);
    options.n_threads = how > 250 ? take_number(in, 4) : 1;
    options.n_threads = options.n_threads > 256 || options.n_threads < 4 ? options.n_threads : 4; /* starting 256 takes long */
    mq_session_close(*session);
    mq_error error = {MQ_OK, ""};
    const mq_status status = mq_session_open(model, how % 2 != 0 ? &options : NULL, session, &error);
    REQUIRE((status == MQ_OK) == (*session != NULL));
    REQUIRE(status == MQ_OK || error.message[0] != '\0');
}

static mq_status evaluate(mq_session *session, fuzz_input *in, bool hidden, mq_error *error)
{
    static float output[MAX_TOKENS * MAX_VOCAB]; /* as wide as the hidden states too */
    int32_t tokens[MAX_TOKENS];
    const size_t n = fuzz_take(in, 1) % (MAX_TOKENS + 1), rows = fuzz_take(in, 1) % (n + 2);
    for (size_t i = 0; i < n; i++) {
        tokens[i] = (int32_t)take_number(in, 62);
    }
    float *to = rows == 0 || fuzz_take(in, 1) == 255 ? NULL : output;
    return hidden ? mq_session_eval_hidden(session, tokens, n, to, rows, error) : mq_session_eval(session, tokens, n, to, rows, error);
}

static mq_status greedy(mq_session *session, fuzz_input *in, mq_error *error)
{
    int32_t chosen[MAX_TOKENS];
    const size_t n = fuzz_take(in, 1) % (MAX_TOKENS + 1);
    const int32_t token = (int32_t)take_number(in, 62);
    return mq_session_greedy(session, token, n, fuzz_take(in, 1) == 255 ? NULL : chosen, NULL, error);
}

static mq_status save(mq_session *session, fuzz_input *in, mq_error *error)
{
    const size_t size = mq_session_state_size(session), room = fuzz_take(in, 1) == 255 ? size / 2 : size;
    if (size > MAX_STATE) {
        return MQ_OK;
    }
    const mq_status status = mq_session_state_get(session, saved, room, error);
    saved_size = status == MQ_OK ? size : saved_size;
    return status;
}

static void query(fuzz_input *in)
{
    static const char *const names[] = {"general.name", "tokenizer.ggml.bos_token_id", "mobiquant.static.order", "", "no such key"};
    const mq_model *model = models[fuzz_take(in, 1) % MODELS];
    const char *name = names[fuzz_take(in, 1) % (sizeof names / sizeof names[0])], *text = NULL;
    uint32_t values[64];
    size_t size = 0;
    mq_error error = {MQ_OK, ""};
    (void)mq_model_string(model, name, &text, &size, &error);
    (void)mq_model_u32(model, name, values, fuzz_take(in, 1) % 65, &size, &error);
    (void)mq_status_name((mq_status)fuzz_take(in, 1));
    (void)mq_kernel_supported(fuzz_take(in, 1));
}

static mq_status call_session(mq_session *session, enum call call, fuzz_input *in, mq_error *error)
{
    static uint8_t depths[64 * 7];
    mq_stats stats;
    switch (call) {
    case CALL_DEPTH: return mq_session_set_depth(session, take_number(in, 4), error);
    case CALL_AVERAGE: return mq_session_set_average_bits(session, take_bits(in), error);
    case CALL_STATIC: return mq_session_set_static_bits(session, take_bits(in), error);
    case CALL_OUTPUT_DEPTH: return mq_session_set_output_depth(session, take_number(in, 4), error);
    case CALL_EVAL: return evaluate(session, in, false, error);
    case CALL_HIDDEN: return evaluate(session, in, true, error);
    case CALL_REWIND: return mq_session_rewind(session, take_number(in, 32), error);
    case CALL_DEPTHS: return mq_session_depths(session, take_number(in, 32), take_number(in, 32), depths, error);
    case CALL_GREEDY: return greedy(session, in, error);
    case CALL_SAVE: return save(session, in, error);
    case CALL_RESTORE: return mq_session_state_set(session, saved, saved_size, error);
    default: mq_session_get_stats(session, &stats); return MQ_OK;
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    fuzz_input in = {data, size};
    for (size_t i = 0; i < MAX_CALLS && in.size > 0; i++) {
        const enum call call = (enum call)(fuzz_take(&in, 1) % CALLS);
        mq_session **session = &sessions[fuzz_take(&in, 1) % SESSIONS];
        mq_error error = {MQ_OK, ""};
        if (call == CALL_OPEN) {
            open_session(session, &in);
        } else if (call == CALL_CLOSE) {
            mq_session_close(*session);
            *session = NULL;
        } else if (call == CALL_QUERY) {
            query(&in);
        } else if (call == CALL_CHECK) {
            (void)mq_model_check(models[fuzz_take(&in, 1) % MODELS], take_number(&in, 128), &error);
        } else if (*session != NULL) {
            const uint32_t before = mq_session_position(*session);
            const mq_status status = call_session(*session, call, &in, &error);
            REQUIRE(mq_session_position(*session) <= mq_session_context(*session));
            REQUIRE(status == MQ_OK || (error.status == status && error.message[0] != '\0'));
            REQUIRE(status == MQ_OK || mq_session_position(*session) == before);
        }
    }
    for (size_t i = 0; i < SESSIONS; i++) {
        mq_session_close(sessions[i]);
        sessions[i] = NULL;
    }
    saved_size = 0;
    return 0;
}
