/* harness.c: see harness.h. */
#include "harness.h"

#include <string.h>

uint8_t *read_file(const char *path, size_t *size)
{
    FILE *file = fopen(path, "rb");
    REQUIRE(file != NULL);
    REQUIRE(fseek(file, 0, SEEK_END) == 0);
    const long end = ftell(file);
    REQUIRE(end >= 0 && fseek(file, 0, SEEK_SET) == 0);
    *size = (size_t)end;
    uint8_t *data = malloc(*size + 1);
    REQUIRE(data != NULL);
    REQUIRE(fread(data, 1, *size, file) == *size);
    REQUIRE(fclose(file) == 0);
    return data;
}

mq_status open_bytes(const uint8_t *data, size_t size, const mq_model_options *options, mq_model **model)
{
    void *copy = NULL;
    REQUIRE(posix_memalign(&copy, 64, size) == 0 && copy != NULL);
    memcpy(copy, data, size);
    const mq_mapping mapping = {.data = copy, .size = size};
    const mq_model_options plain = {0};
    mq_error error = {MQ_OK, ""};
    const mq_status status = mq_model_open_mapping("memory", mapping, options == NULL ? &plain : options, model, &error);
    REQUIRE((status == MQ_OK) == (*model != NULL));
    if (status != MQ_OK) {
        REQUIRE(error.status == status && strncmp(error.message, "memory: ", 8) == 0 && strlen(error.message) > 16);
        REQUIRE(strcmp(mq_status_name(status), "unknown status") != 0);
    }
    return status;
}

void evaluate_briefly(const mq_model *model)
{
    mq_model_info info;
    mq_model_get_info(model, &info);
    const mq_session_options options = {.n_ctx = info.context_length < 4 ? info.context_length : 4, .n_batch = 2};
    mq_session *session = NULL;
    mq_error error = {MQ_OK, ""};
    REQUIRE(mq_session_open(model, &options, &session, &error) == MQ_OK);
    const uint32_t n = options.n_ctx < 3 ? options.n_ctx : 3;
    const int32_t tokens[3] = {0, (int32_t)(info.vocab_size - 1), (int32_t)(info.vocab_size / 2)};
    float *logits = malloc(info.vocab_size * sizeof *logits);
    REQUIRE(logits != NULL);
    REQUIRE(mq_session_set_average_bits(session, 1.25f + 0.75f * (float)info.max_depth, &error) == MQ_OK);
    REQUIRE(mq_session_eval(session, tokens, n, logits, 1, &error) == MQ_OK);
    REQUIRE(mq_session_rewind(session, 0, &error) == MQ_OK);
    const mq_status with_order = mq_session_set_static_bits(session, 2.0f, &error);
    REQUIRE(with_order == MQ_OK || with_order == MQ_ERR_ARGUMENT);
    REQUIRE(mq_session_set_depth(session, info.max_depth, &error) == MQ_OK);
    REQUIRE(mq_session_eval(session, tokens, 1, logits, 1, &error) == MQ_OK);
    free(logits);
    mq_session_close(session);
}
