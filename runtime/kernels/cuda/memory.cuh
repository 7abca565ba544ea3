// memory.cuh: what lies in the memory of the GPU: the tensors of the file as they are, and one piece for a session. Nothing is
// allocated after a session is open.
#ifndef MQ_CUDA_MEMORY_H
#define MQ_CUDA_MEMORY_H

#include "attention.cuh"
#include "control.cuh"
#include "cuda.h"
#include "hparams.h"
#include "launch.cuh"
#include "matmat.cuh"

#include <new>
#include <stdio.h>

struct mq_cuda_model {
    const mq_model *host;
    uint32_t multiprocessors;
    bool staged;         // a chunk of keys and values fits in a block's shared memory
    bool pdl;            // this GPU starts kernels before the one before them has ended
    uint8_t *weights;    // the file from its first tensor on
    size_t bytes;
    void *registered;    // host memory that the GPU reads in place; NULL: weights is a copy
    mq_block *blocks;    // [block_count], pointers into `weights`
    mq_matrix embedding, output;
    const float *output_norm;
};

enum { LOGIT_ROWS = 8, MAX_COLUMNS = 65536 };

// Buffers of one session, see `plan_session`. B n_batch, E embedding length, Q heads·head_dim, KV kv heads·head_dim, F feed-forward.
struct session_buffers {
    uint16_t *keys, *values;      // the cache of every block of the model
    control *state;               // and the tokens of the pass
    float *x, *q, *k, *v, *attended, *gate, *up, *hidden; // [B][E], [B][Q], [B][KV] twice, [B][Q], [B][F] twice, [B][E]
    int8_t *activations;          // [B][widest groups·128]
    float *scale, *sum;           // [B][widest groups]
    float *parts;                 // [heads][chunks][part]
    uint8_t *codes;               // workspace of matmat.cuh
    int *sums;                    // [B][widest groups][n_hidden + 1]
    uint32_t *arrived_tokens, *arrived_heads; // [B], [heads]
    float *cosine, *sine;         // [n_ctx][rope_dim / 2]
    uint8_t *depths;              // [n_ctx][block][7]
    float *thresholds;            // [block][7][3]
    uint8_t *table;               // [block][7]
    float *logits;                // [LOGIT_ROWS][vocab]
    int32_t *chosen;              // [n_ctx]
};

enum { GRAPH_KINDS = 3, GRAPH_SIZES = 16 };

struct mq_cuda_session {
    mq_cuda_model *model;
    uint32_t n_ctx, n_batch, chunks; // chunks of positions in n_ctx
    size_t positions;                // of the cache, a multiple of 16
    float attention_scale;
    bool routed;
    cudaStream_t stream;
    cudaEvent_t begin, end;
    cudaGraphExec_t graph[GRAPH_KINDS][GRAPH_SIZES];
    uint32_t graph_depth[GRAPH_KINDS][GRAPH_SIZES]; // of the output head, as recorded
    uint8_t *memory;
    size_t cache_bytes, workspace_bytes, codes_bytes;
    session_buffers on;
    uint8_t *pinned; // host memory that copies can run beside: control, then logits
    size_t pinned_control;
};

static int32_t fail(mq_cuda_message *message, const char *what, cudaError_t error)
{
    (void)snprintf(message->text, sizeof message->text, "%s: %s", what, cudaGetErrorString(error));
    return 1;
}

// Addresses in one piece of memory, each array on a boundary of 256 bytes. With no memory it only counts.
struct arena {
    uint8_t *memory;
    size_t used;

    template <typename T>
    void take(T *&array, size_t a, size_t b = 1, size_t c = 1)
    {
        array = memory == nullptr ? nullptr : reinterpret_cast<T *>(memory + used);
        used += (a * b * c * sizeof(T) + 255) / 256 * 256;
    }
};

static inline uint32_t groups_of(uint32_t columns)
{
    return (columns + MQ_GROUP_SIZE - 1) / MQ_GROUP_SIZE;
}

static size_t control_bytes(uint32_t n_batch)
{
    return sizeof(control) + n_batch * sizeof(int32_t);
}

// The workspace with which every group of linears that read one input is one launch.
static size_t most_codes(const mq_hparams &hp, uint32_t n_batch)
{
    const size_t width = hp.embedding_length, ff = hp.feed_forward_length, q_width = static_cast<size_t>(hp.head_count) * hp.head_dim;
    const size_t rows[MQ_ROUTERS] = {q_width + 2 * static_cast<size_t>(hp.head_count_kv) * hp.head_dim, width, 2 * ff, width};
    const size_t columns[MQ_ROUTERS] = {width, q_width, width, ff};
    size_t most = 0;
    for (size_t i = 0; i < MQ_ROUTERS; i++) {
        const size_t bytes = mq_cuda_matmat_workspace(n_batch, rows[i], groups_of(static_cast<uint32_t>(columns[i])));
        most = bytes > most ? bytes : most;
    }
    return most;
}

// Sizes were checked by the host library, whose own buffers of a session are larger.
static void plan_session(const mq_cuda_session *s, arena *memory, session_buffers *on, size_t *cache_bytes)
{
    const mq_hparams &hp = s->model->host->hparams;
    const size_t n = s->n_batch, width = hp.embedding_length, ff = hp.feed_forward_length;
    const size_t q_width = static_cast<size_t>(hp.head_count) * hp.head_dim, kv_width = static_cast<size_t>(hp.head_count_kv) * hp.head_dim;
    const size_t rows = static_cast<size_t>(hp.block_count) * hp.head_count_kv * s->positions;
    size_t widest = width > ff ? width : ff;
    widest = q_width > widest ? q_width : widest;
    const size_t groups = groups_of(static_cast<uint32_t>(widest));
    memory->take(on->keys, rows, hp.head_dim);
    memory->take(on->values, rows, padded_dim(hp.head_dim));
    *cache_bytes = memory->used;
    uint8_t *state = nullptr;
    memory->take(state, control_bytes(s->n_batch));
    on->state = reinterpret_cast<control *>(state);
    memory->take(on->x, n, width);
    memory->take(on->q, n, q_width);
    memory->take(on->k, n, kv_width);
    memory->take(on->v, n, kv_width);
    memory->take(on->attended, n, q_width);
    memory->take(on->gate, n, ff);
    memory->take(on->up, n, ff);
    memory->take(on->hidden, n, width);
    memory->take(on->activations, n, groups, MQ_GROUP_SIZE);
    memory->take(on->scale, n, groups);
    memory->take(on->sum, n, groups);
    memory->take(on->codes, s->codes_bytes);
    memory->take(on->sums, n, groups, hp.router_hidden + 1);
    memory->take(on->arrived_tokens, n);
    memory->take(on->arrived_heads, hp.head_count);
    memory->take(on->parts, hp.head_count, s->chunks, part_floats(hp.head_dim));
    memory->take(on->cosine, s->n_ctx, hp.rope_dim / 2);
    memory->take(on->sine, s->n_ctx, hp.rope_dim / 2);
    memory->take(on->depths, s->n_ctx, hp.block_count, MQ_LINEARS);
    memory->take(on->thresholds, hp.block_count, MQ_LINEARS, MQ_SLICE_COUNT - 1);
    memory->take(on->table, hp.block_count, MQ_LINEARS);
    memory->take(on->logits, LOGIT_ROWS, hp.vocab_size);
    memory->take(on->chosen, s->n_ctx);
}

// A pointer into the file as one into its copy.
template <typename T>
static void moved(T *&pointer, const mq_cuda_model *model, const uint8_t *first)
{
    if (pointer != nullptr) {
        pointer = reinterpret_cast<T *>(model->weights + (reinterpret_cast<const uint8_t *>(pointer) - first));
    }
}

static void move_matrix(mq_matrix *matrix, const mq_cuda_model *model, const uint8_t *first)
{
    for (size_t e = 0; e < MQ_SLICE_COUNT; e++) {
        moved(matrix->plane[e], model, first);
    }
    moved(matrix->scale_offset, model, first);
}

static void move_block(mq_block *block, const mq_cuda_model *model, const uint8_t *first)
{
    moved(block->attn_norm, model, first);
    moved(block->ffn_norm, model, first);
    moved(block->q_norm, model, first);
    moved(block->k_norm, model, first);
    for (size_t i = 0; i < MQ_BIASES; i++) {
        moved(block->bias[i], model, first);
    }
    for (size_t i = 0; i < MQ_LINEARS; i++) {
        move_matrix(&block->linear[i], model, first);
    }
    for (size_t i = 0; i < MQ_ROUTERS; i++) {
        mq_router *router = &block->router[i];
        moved(router->hidden, model, first);
        moved(router->hidden_scale, model, first);
        moved(router->hidden_bias, model, first);
        moved(router->head, model, first);
        moved(router->head_bias, model, first);
        moved(router->threshold, model, first);
    }
}

// On a GPU that shares the host's memory it reads the file where it lies; elsewhere, or where the system does not allow that, a copy.
static int32_t place_weights(mq_cuda_model *model, const uint8_t *first, bool integrated, mq_cuda_message *message)
{
    const mq_mapping *mapping = &model->host->mapping;
    if (integrated) {
        void *memory = const_cast<uint8_t *>(mapping->data), *seen = nullptr;
        if (cudaHostRegister(memory, mapping->size, cudaHostRegisterMapped | cudaHostRegisterReadOnly) == cudaSuccess) {
            model->registered = memory;
            if (cudaHostGetDevicePointer(&seen, memory, 0) == cudaSuccess) {
                model->weights = static_cast<uint8_t *>(seen) + (first - mapping->data);
                return 0;
            }
            (void)cudaHostUnregister(memory);
            model->registered = nullptr;
        }
        (void)cudaGetLastError();
    }
    cudaError_t error = cudaMalloc(&model->weights, model->bytes);
    if (error != cudaSuccess) {
        model->weights = nullptr;
        (void)snprintf(message->text, sizeof message->text, "cannot allocate %zu bytes for the file's tensors: %s", model->bytes,
                       cudaGetErrorString(error));
        (void)cudaGetLastError();
        return 1;
    }
    error = cudaMemcpy(model->weights, first, model->bytes, cudaMemcpyHostToDevice);
    return error == cudaSuccess ? 0 : fail(message, "copying the file's tensors", error);
}

static void close_model(mq_cuda_model *model)
{
    if (model == nullptr) {
        return;
    }
    if (model->registered != nullptr) {
        (void)cudaHostUnregister(model->registered);
    } else if (model->weights != nullptr) {
        (void)cudaFree(model->weights);
    }
    delete[] model->blocks;
    delete model;
}

static int32_t open_model(const mq_model *host, mq_cuda_model **out, mq_cuda_message *message)
{
    *out = nullptr;
    cudaDeviceProp properties;
    const cudaError_t error = cudaGetDeviceProperties(&properties, 0);
    if (error != cudaSuccess) {
        return fail(message, "asking for the GPU", error);
    }
    mq_cuda_model *model = new (std::nothrow) mq_cuda_model();
    if (model == nullptr) {
        return fail(message, "a model", cudaErrorMemoryAllocation);
    }
    const uint8_t *first = host->mapping.data + host->mapping.size;
    for (size_t i = 0; i < host->file.tensor_count; i++) {
        const uint8_t *at = host->mapping.data + host->file.tensors[i].offset;
        first = host->file.tensors[i].present && at < first ? at : first;
    }
    model->host = host;
    model->multiprocessors = static_cast<uint32_t>(properties.multiProcessorCount);
    model->staged = attend_bytes(MOST_HEADS, host->hparams.head_dim, true) <= properties.sharedMemPerBlockOptin;
    model->pdl = properties.major >= 9;
    model->bytes = static_cast<size_t>(host->mapping.data + host->mapping.size - first);
    if (place_weights(model, first, properties.integrated != 0, message) != 0) {
        close_model(model);
        return 1;
    }
    model->blocks = new (std::nothrow) mq_block[host->hparams.block_count];
    if (model->blocks == nullptr) {
        close_model(model);
        return fail(message, "a model's blocks", cudaErrorMemoryAllocation);
    }
    for (size_t i = 0; i < host->hparams.block_count; i++) {
        model->blocks[i] = host->blocks[i];
        move_block(&model->blocks[i], model, first);
    }
    model->embedding = host->embedding;
    model->output = host->output;
    model->output_norm = host->output_norm;
    move_matrix(&model->embedding, model, first);
    move_matrix(&model->output, model, first);
    moved(model->output_norm, model, first);
    *out = model;
    return 0;
}

static void close_session(mq_cuda_session *s)
{
    if (s == nullptr) {
        return;
    }
    for (size_t kind = 0; kind < GRAPH_KINDS; kind++) {
        for (size_t size = 0; size < GRAPH_SIZES; size++) {
            if (s->graph[kind][size] != nullptr) {
                (void)cudaGraphExecDestroy(s->graph[kind][size]);
            }
        }
    }
    if (s->begin != nullptr) {
        (void)cudaEventDestroy(s->begin);
    }
    if (s->end != nullptr) {
        (void)cudaEventDestroy(s->end);
    }
    if (s->stream != nullptr) {
        (void)cudaStreamDestroy(s->stream);
    }
    (void)cudaFree(s->memory);
    (void)cudaFreeHost(s->pinned);
    delete s;
}

static int32_t open_session(mq_cuda_model *model, const mq_cuda_session_options *options, mq_cuda_session **out,
                            mq_cuda_message *message)
{
    *out = nullptr;
    const mq_hparams &hp = model->host->hparams;
    mq_cuda_session *s = new (std::nothrow) mq_cuda_session();
    if (s == nullptr) {
        return fail(message, "a session", cudaErrorMemoryAllocation);
    }
    s->model = model;
    s->n_ctx = options->n_ctx;
    s->n_batch = options->n_batch;
    s->chunks = (options->n_ctx + MQ_ATTENTION_CHUNK - 1) / MQ_ATTENTION_CHUNK;
    s->positions = (static_cast<size_t>(options->n_ctx) + KEY_POSITIONS - 1) / KEY_POSITIONS * KEY_POSITIONS;
    s->attention_scale = options->attention_scale;
    s->codes_bytes = most_codes(hp, s->n_batch);
    arena counted = {nullptr, 0};
    plan_session(s, &counted, &s->on, &s->cache_bytes);
    s->workspace_bytes = counted.used - s->cache_bytes;
    s->pinned_control = (control_bytes(s->n_batch) + 255) / 256 * 256;
    cudaError_t error = cudaMalloc(&s->memory, counted.used);
    if (error != cudaSuccess) {
        s->memory = nullptr;
        (void)snprintf(message->text, sizeof message->text, "cannot allocate %zu bytes for a cache of %u positions and its buffers: %s",
                       counted.used, s->n_ctx, cudaGetErrorString(error));
        (void)cudaGetLastError();
        close_session(s);
        return 1;
    }
    arena memory = {s->memory, 0};
    plan_session(s, &memory, &s->on, &s->cache_bytes);
    const size_t angles = options->cosine == nullptr ? 0 : static_cast<size_t>(s->n_ctx) * (hp.rope_dim / 2) * sizeof(float);
    const size_t logits = LOGIT_ROWS * static_cast<size_t>(hp.vocab_size) * sizeof(float);
    error = cudaMallocHost(&s->pinned, s->pinned_control + logits);
    error = error == cudaSuccess ? cudaMemset(s->memory, 0, counted.used) : error;
    error = error == cudaSuccess ? cudaMemcpy(s->on.cosine, options->cosine, angles, cudaMemcpyHostToDevice) : error;
    error = error == cudaSuccess ? cudaMemcpy(s->on.sine, options->sine, angles, cudaMemcpyHostToDevice) : error;
    error = error == cudaSuccess ? cudaStreamCreateWithFlags(&s->stream, cudaStreamNonBlocking) : error;
    error = error == cudaSuccess ? cudaEventCreate(&s->begin) : error;
    error = error == cudaSuccess ? cudaEventCreate(&s->end) : error;
    error = error == cudaSuccess ? cudaDeviceSynchronize() : error;
    if (error != cudaSuccess) {
        close_session(s);
        return fail(message, "opening a session", error);
    }
    *out = s;
    return 0;
}

#endif
