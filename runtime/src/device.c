/* device.c: finding and opening the CUDA library, and a session's passes through it. The library is never linked: it lies beside
 * this one, or where MOBIQUANT_CUDA_LIBRARY says. It stays open for the life of the process, as the driver's own threads do.
 */
#include "device.h"

#include "error.h"
#include "memory.h"

#include <dlfcn.h>
#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define LIBRARY "libmobiquant_cuda.so"
enum { MAX_PATH = 4096 };

/* Beside the library that this code is in. */
static void library_path(char path[MAX_PATH])
{
    const char *asked = getenv("MOBIQUANT_CUDA_LIBRARY");
    Dl_info self;
    if (asked != NULL && asked[0] != '\0') {
        (void)snprintf(path, MAX_PATH, "%s", asked);
    } else if (dladdr((void *)(uintptr_t)&mq_version, &self) != 0 && self.dli_fname != NULL) {
        const char *slash = strrchr(self.dli_fname, '/');
        const int folder = slash == NULL ? 0 : (int)(slash - self.dli_fname) + 1;
        (void)snprintf(path, MAX_PATH, "%.*s" LIBRARY, folder, self.dli_fname);
    } else {
        (void)snprintf(path, MAX_PATH, LIBRARY);
    }
}

/* The library's functions when it, a driver and a fitting GPU are there; else NULL and why not. */
static const mq_cuda_api *open_library(mq_cuda_device *device, mq_cuda_message *message)
{
    char path[MAX_PATH];
    library_path(path);
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    if (library == NULL) {
        FILE *file = fopen(path, "rb"); /* tells a missing library from a broken one */
        if (file == NULL) {
            (void)snprintf(message->text, sizeof message->text, "the CUDA library %.200s is not there (make cuda builds it)", path);
        } else {
            (void)fclose(file);
            const char *why = dlerror();
            (void)snprintf(message->text, sizeof message->text, "%.300s", why == NULL ? "the CUDA library cannot be opened" : why);
        }
        return NULL;
    }
    mq_cuda_open_function *open_table;
    void *symbol = dlsym(library, MQ_CUDA_SYMBOL);
    memcpy(&open_table, &symbol, sizeof open_table); /* C has no conversion from an object to a function */
    const mq_cuda_api *api = symbol == NULL ? NULL : open_table(MQ_CUDA_ABI, sizeof(mq_model));
    if (api == NULL) {
        (void)snprintf(message->text, sizeof message->text, "%.200s belongs to another version; build it again with make cuda", path);
        return NULL;
    }
    return api->describe(device, message) == 0 ? api : NULL;
}

void mq_device_describe(mq_device_info *info)
{
    mq_cuda_device device;
    mq_cuda_message message = {{0}};
    *info = (mq_device_info){0};
    info->usable = open_library(&device, &message) != NULL;
    if (info->usable) {
        (void)snprintf(info->text, sizeof info->text, "%.200s, compute capability %" PRId32 ".%" PRId32 ", %.1f of %.1f GB free%s",
                       device.name, device.major, device.minor, (double)device.available / 1e9, (double)device.memory / 1e9,
                       device.integrated ? ", shared with the CPU" : "");
    } else {
        (void)snprintf(info->text, sizeof info->text, "%s", message.text);
    }
}

mq_status mq_device_measure_matvec(uint32_t rows, uint32_t columns, uint32_t depth, uint32_t repeats, double *microseconds,
                                   size_t *bytes, mq_error *error)
{
    mq_cuda_device device;
    mq_cuda_message message = {{0}};
    if (rows < 1 || columns < 1 || depth < 1 || depth > MQ_SLICE_COUNT || repeats < 1) {
        return mq_fail(error, MQ_ERR_ARGUMENT, "shape %" PRIu32 " x %" PRIu32 ", depth %" PRIu32 ": expected positive sizes and a depth "
                       "of 1 to %d", rows, columns, depth, MQ_SLICE_COUNT);
    }
    const mq_cuda_api *api = open_library(&device, &message);
    if (api == NULL || api->measure_matvec(rows, columns, depth, repeats, microseconds, bytes, &message) != 0) {
        return mq_fail(error, MQ_ERR_DEVICE, "%s", message.text);
    }
    return MQ_OK;
}

/* The first thing that a model has and the CUDA library does not compute; NULL: nothing. */
static const char *missing_there(const mq_model *model)
{
    const mq_hparams *hp = &model->hparams;
    const mq_block *block = &model->blocks[0]; /* a vector is in every block or in none */
    bool local = false;
    for (uint32_t i = 0; i < hp->block_count; i++) {
        local = local || model->blocks[i].rope == MQ_ROPE_LOCAL;
    }
    const struct { bool has; const char *what; } beyond[] = {
        {hp->sliding_window != 0, "sliding windows"},
        {block->attn_post_norm != NULL || block->ffn_post_norm != NULL, "norms after attention and feed-forward"},
        {local, "heads that are rotated by two tables"},
        {hp->attention_softcap != 0.0f || hp->output_softcap != 0.0f, "soft-capped scores or logits"},
    };
    for (size_t i = 0; i < sizeof beyond / sizeof beyond[0]; i++) {
        if (beyond[i].has) {
            return beyond[i].what;
        }
    }
    return NULL;
}

/* Why this model does not run on the GPU, in `message`; 0 when it does. */
static int32_t try_device(mq_model *model, mq_cuda_message *message)
{
    mq_device *device = mq_alloc(1, sizeof *device);
    if (device == NULL) {
        (void)snprintf(message->text, sizeof message->text, "no memory for a device");
        return 1;
    }
    device->api = open_library(&device->facts, message);
    const char *missing = missing_there(model), *refused = NULL;
    if (missing != NULL) {
        (void)snprintf(message->text, sizeof message->text, "the model has %s, which the CUDA library does not compute", missing);
        refused = missing;
    } else if (device->api != NULL) {
        refused = device->api->refuses(model);
        if (refused != NULL) {
            (void)snprintf(message->text, sizeof message->text, "%s", refused);
        }
    }
    if (device->api == NULL || refused != NULL || device->api->model_open(model, &device->model, message) != 0) {
        free(device);
        return 1;
    }
    model->device = device;
    return 0;
}

mq_status mq_device_open(mq_model *model, const char *asked, mq_error *error)
{
    if (asked == NULL || strcmp(asked, "cpu") == 0) {
        return MQ_OK;
    }
    if (strcmp(asked, "cuda") != 0 && strcmp(asked, "auto") != 0) {
        return mq_fail(error, MQ_ERR_ARGUMENT, "device: expected cpu, cuda or auto, found '%s'", asked);
    }
    mq_cuda_message message = {{0}};
    if (try_device(model, &message) != 0) {
        if (strcmp(asked, "cuda") == 0) {
            return mq_fail(error, MQ_ERR_DEVICE, "%s: cannot run on a GPU: %s", model->path, message.text);
        }
        memcpy(model->device_note, message.text, sizeof message.text);
    }
    return MQ_OK;
}

void mq_device_close(mq_model *model)
{
    if (model->device != NULL) {
        model->device->api->model_close(model->device->model);
        free(model->device);
        model->device = NULL;
    }
}

const char *mq_model_device(const mq_model *model)
{
    return model->device == NULL ? "cpu" : "cuda";
}

const char *mq_model_device_note(const mq_model *model)
{
    return model->device == NULL ? model->device_note : model->device->facts.name;
}

static mq_status device_error(const mq_session *session, mq_error *error, const mq_cuda_message *message)
{
    return mq_fail(error, MQ_ERR_DEVICE, "%s: %s", session->model->device->facts.name, message->text);
}

mq_status mq_device_session_open(mq_session *session, mq_error *error)
{
    const mq_device *device = session->model->device;
    const mq_cuda_session_options options = {.n_ctx = session->n_ctx, .n_batch = session->n_batch,
                                             .attention_scale = session->model->hparams.attention_scale,
                                             .cosine = session->cosine[0], .sine = session->sine[0]};
    mq_cuda_message message = {{0}};
    if (session->key_type != MQ_CACHE_F16 || session->value_type != MQ_CACHE_F16) {
        return mq_fail(error, MQ_ERR_UNSUPPORTED, "cache type: expected f16 on a GPU, found q8_0");
    }
    if (device->api->session_open(device->model, &options, &session->device, &message) != 0) {
        return device_error(session, error, &message);
    }
    mq_cuda_memory memory;
    device->api->memory(session->device, &memory);
    session->cache_bytes = memory.cache;
    return MQ_OK;
}

void mq_device_session_close(mq_session *session)
{
    if (session->device != NULL) {
        session->model->device->api->session_close(session->device);
        session->device = NULL;
    }
}

void mq_session_device_bytes(const mq_session *session, uint64_t *weights, uint64_t *cache, uint64_t *workspace)
{
    mq_cuda_memory memory = {0};
    if (session->device != NULL) {
        session->model->device->api->memory(session->device, &memory);
    }
    *weights = memory.weights;
    *cache = memory.cache;
    *workspace = memory.workspace;
}

/* What src/forward.c counts as it goes, from the depths that the pass wrote. */
static void count_pass(mq_session *s, uint32_t position, uint32_t n, uint32_t n_logits)
{
    const mq_model *model = s->model;
    const mq_hparams *hp = &model->hparams;
    mq_stats *stats = &s->stats;
    stats->tokens += n;
    stats->bytes_read += n * ((uint64_t)mq_matrix_bytes(&model->embedding, hp->embedding_depth) / hp->vocab_size);
    const uint8_t *depth = s->depths + (size_t)position * hp->block_count * MQ_LINEARS;
    for (size_t i = 0; i < (size_t)n * hp->block_count; i++) {
        const mq_block *block = &model->blocks[i % hp->block_count];
        for (size_t j = 0; j < MQ_LINEARS; j++, depth++) {
            const uint64_t weights = (uint64_t)block->linear[j].rows * block->linear[j].columns;
            stats->routed_bits += (uint64_t)MQ_SLICE_BITS * *depth * weights;
            stats->routed_weights += weights;
            stats->bytes_read += mq_matrix_bytes(&block->linear[j], *depth);
        }
        for (size_t j = 0; j < MQ_ROUTERS && s->asked_bits != 0.0f; j++) {
            stats->bytes_read += mq_router_bytes(&block->router[j], hp);
        }
        stats->bytes_read += block->vector_bytes;
    }
    stats->bytes_read += n_logits * ((uint64_t)mq_matrix_bytes(&model->output, s->output_depth) + hp->embedding_length * sizeof(float));
}

static mq_status bring_budget(mq_session *session, mq_error *error)
{
    mq_cuda_message message = {{0}};
    if (!session->budget_changed) {
        return MQ_OK;
    }
    const float *thresholds = session->asked_bits != 0.0f ? session->thresholds : NULL;
    if (session->model->device->api->set_budget(session->device, thresholds, session->table, &message) != 0) {
        return device_error(session, error, &message);
    }
    session->budget_changed = false;
    return MQ_OK;
}

static uint8_t *depths_from(mq_session *session)
{
    return session->depths + (size_t)session->position * session->model->hparams.block_count * MQ_LINEARS;
}

mq_status mq_device_forward(mq_session *session, const int32_t *tokens, uint32_t n, float *logits, uint32_t n_logits,
                            float *hidden, uint32_t n_hidden, mq_error *error)
{
    mq_cuda_message message = {{0}};
    const mq_cuda_output output = {.logits = logits, .n_logits = n_logits, .output_depth = session->output_depth, .hidden = hidden,
                                   .n_hidden = n_hidden, .depths = depths_from(session)};
    const mq_status status = bring_budget(session, error);
    if (status != MQ_OK) {
        return status;
    }
    if (session->model->device->api->forward(session->device, tokens, n, session->position, &output, &message) != 0) {
        return device_error(session, error, &message);
    }
    count_pass(session, session->position, n, n_logits);
    return MQ_OK;
}

mq_status mq_device_greedy(mq_session *session, int32_t token, uint32_t n, int32_t *chosen, float *milliseconds, mq_error *error)
{
    mq_cuda_message message = {{0}};
    const mq_status status = bring_budget(session, error);
    if (status != MQ_OK) {
        return status;
    }
    if (session->model->device->api->greedy(session->device, token, n, session->position, session->output_depth, chosen,
                                            depths_from(session), milliseconds, &message) != 0) {
        return device_error(session, error, &message);
    }
    count_pass(session, session->position, n, n);
    return MQ_OK;
}

mq_status mq_device_copy_cache(mq_session *session, uint32_t position, uint8_t *out, const uint8_t *in, mq_error *error)
{
    mq_cuda_message message = {{0}};
    if (session->model->device->api->copy_cache(session->device, position, out, in, &message) != 0) {
        return device_error(session, error, &message);
    }
    return MQ_OK;
}
