// cuda.cu: the optional CUDA library: its table of functions (src/cuda.h), what it says about the GPU, and copies of a cache.
// The kernels are in kernels/cuda. Built by `make cuda`, opened by src/device.c.
#include "cuda/forward.cuh"
#include "cuda/measure.cuh"

#include <stdlib.h>

static int32_t describe(mq_cuda_device *device, mq_cuda_message *message)
{
    int count = 0, driver = 0;
    cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess || count == 0) {
        (void)cudaDriverGetVersion(&driver);
        (void)snprintf(message->text, sizeof message->text, "%s", driver == 0 ? "no NVIDIA driver is installed"
                       : error == cudaSuccess ? "no NVIDIA GPU is present" : cudaGetErrorString(error));
        return 1;
    }
    cudaDeviceProp properties;
    size_t available = 0, total = 0;
    error = cudaGetDeviceProperties(&properties, 0);
    error = error == cudaSuccess ? cudaMemGetInfo(&available, &total) : error;
    if (error != cudaSuccess) {
        return fail(message, "asking for the GPU", error);
    }
    (void)snprintf(device->name, sizeof device->name, "%s", properties.name);
    device->major = properties.major;
    device->minor = properties.minor;
    device->memory = total;
    device->available = available;
    device->integrated = properties.integrated;
    if (properties.major < 8) {
        (void)snprintf(message->text, sizeof message->text, "%s has compute capability %d.%d, expected 8.0 or later", properties.name,
                       properties.major, properties.minor);
        return 1;
    }
    return 0;
}

static uint32_t widest_input(const mq_model *model)
{
    const mq_hparams &hp = model->hparams;
    const uint32_t q_width = hp.head_count * hp.head_dim;
    const uint32_t widest = hp.embedding_length > hp.feed_forward_length ? hp.embedding_length : hp.feed_forward_length;
    return q_width > widest ? q_width : widest;
}

static size_t most_shared(const mq_model *model)
{
    return prepare_shared(groups_of(widest_input(model)), model->hparams.router_hidden);
}

static const char *refuses(const mq_model *model)
{
    int most = 0;
    if (model->hparams.head_dim > mq::MAX_HEAD_DIM) {
        return "its heads have more than 256 dimensions";
    }
    if (cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0) != cudaSuccess
        || most_shared(model) > static_cast<size_t>(most)) {
        return "its linears are wider than this GPU's shared memory holds";
    }
    return nullptr;
}

static int32_t open_checked(const mq_model *model, mq_cuda_model **out, mq_cuda_message *message)
{
    const uint32_t dim = model->hparams.head_dim;
    int32_t failed = open_model(model, out, message);
    if (failed == 0) {
        cudaError_t error = allow_shared(prepare<ALONE_WARPS>, most_shared(model));
        error = error == cudaSuccess ? allow_shared(prepare<TOGETHER_WARPS>, most_shared(model)) : error;
        error = error == cudaSuccess ? allow_shared(matvec_one<SOME_WARPS>, sizeof(one_shared<SOME_WARPS>)) : error;
        error = error == cudaSuccess ? allow_shared(matvec_one<MANY_WARPS>, sizeof(one_shared<MANY_WARPS>)) : error;
        for (uint32_t heads = 1; heads <= MOST_HEADS && error == cudaSuccess; heads *= 2) {
            with_heads((*out)->staged, heads, [&](auto staged, auto several) {
                constexpr bool STAGED = decltype(staged)::value != 0;
                constexpr uint32_t HEADS = decltype(several)::value;
                error = allow_shared(attend_one<STAGED, HEADS>, attend_bytes(HEADS, dim, STAGED));
            });
        }
        if (error != cudaSuccess) {
            close_model(*out);
            *out = nullptr;
            failed = fail(message, "preparing kernels", error);
        }
    }
    return failed;
}

static void memory_of(const mq_cuda_session *s, mq_cuda_memory *memory)
{
    memory->weights = s->model->bytes;
    memory->cache = s->cache_bytes;
    memory->workspace = s->workspace_bytes;
}

static int32_t set_budget(mq_cuda_session *s, const float *thresholds, const uint8_t *table, mq_cuda_message *message)
{
    const size_t linears = static_cast<size_t>(s->model->host->hparams.block_count) * MQ_LINEARS;
    s->routed = thresholds != nullptr;
    const cudaError_t error =
        s->routed ? cudaMemcpy(s->on.thresholds, thresholds, linears * MQ_GATES * sizeof(float), cudaMemcpyHostToDevice)
                  : cudaMemcpy(s->on.table, table, linears, cudaMemcpyHostToDevice);
    return error == cudaSuccess ? 0 : fail(message, "setting a budget", error);
}

// One kv head of one block of the model: rows [position][dim] to or from the cache's order, by way of `keys` and `values`.
static cudaError_t copy_head(mq_cuda_session *s, size_t head, uint32_t position, uint16_t *keys, uint16_t *values, uint8_t *out_key,
                             uint8_t *out_value, const uint8_t *in_key, const uint8_t *in_value)
{
    const size_t dim = s->model->host->hparams.head_dim, padded = padded_dim(static_cast<uint32_t>(dim));
    const size_t tall = (position + KEY_POSITIONS - 1) / KEY_POSITIONS * static_cast<size_t>(KEY_POSITIONS), row = dim * sizeof(uint16_t);
    uint16_t *device_keys = s->on.keys + head * s->positions * dim, *device_values = s->on.values + head * s->positions * padded;
    cudaError_t error = cudaMemcpy(keys, device_keys, tall * dim * sizeof(uint16_t), cudaMemcpyDeviceToHost);
    error = error == cudaSuccess ? cudaMemcpy(values, device_values, position * padded * sizeof(uint16_t), cudaMemcpyDeviceToHost) : error;
    for (size_t p = 0; p < position && error == cudaSuccess; p++) {
        uint16_t *key = keys + p / KEY_POSITIONS * KEY_POSITIONS * dim + p % KEY_POSITIONS;
        for (size_t i = 0; i < dim; i++) {
            if (out_key != nullptr) {
                memcpy(out_key + p * row + i * sizeof(uint16_t), key + i * KEY_POSITIONS, sizeof(uint16_t));
            } else {
                memcpy(key + i * KEY_POSITIONS, in_key + p * row + i * sizeof(uint16_t), sizeof(uint16_t));
            }
        }
        if (out_value != nullptr) {
            memcpy(out_value + p * row, values + p * padded, row);
        } else {
            memcpy(values + p * padded, in_value + p * row, row);
        }
    }
    if (in_key != nullptr) {
        error = error == cudaSuccess ? cudaMemcpy(device_keys, keys, tall * dim * sizeof(uint16_t), cudaMemcpyHostToDevice) : error;
        error = error == cudaSuccess ? cudaMemcpy(device_values, values, position * padded * sizeof(uint16_t), cudaMemcpyHostToDevice) : error;
    }
    return error;
}

static int32_t copy_cache(mq_cuda_session *s, uint32_t position, uint8_t *out, const uint8_t *in, mq_cuda_message *message)
{
    const mq_hparams &hp = s->model->host->hparams;
    const size_t heads = static_cast<size_t>(hp.block_count) * hp.head_count_kv, of_head = position * static_cast<size_t>(hp.head_dim) * sizeof(uint16_t);
    const size_t room = s->positions * padded_dim(hp.head_dim);
    uint16_t *staging = static_cast<uint16_t *>(malloc(2 * room * sizeof(uint16_t)));
    cudaError_t error = staging == nullptr ? cudaErrorMemoryAllocation : cudaSuccess;
    for (size_t head = 0; head < heads && error == cudaSuccess && position > 0; head++) {
        const size_t key = head * of_head, value = (heads + head) * of_head;
        error = copy_head(s, head, position, staging, staging + room, out == nullptr ? nullptr : out + key,
                          out == nullptr ? nullptr : out + value, out == nullptr ? in + key : nullptr, out == nullptr ? in + value : nullptr);
    }
    free(staging);
    return error == cudaSuccess ? 0 : fail(message, "copying a cache", error);
}

static const mq_cuda_api API = {
    describe,   refuses, open_checked, close_model, open_session, close_session,
    memory_of, set_budget, forward,     greedy,      copy_cache,     measure_matvec,
};

extern "C" __attribute__((visibility("default"))) const mq_cuda_api *mq_cuda_open(uint32_t abi, size_t model_size)
{
    return abi == MQ_CUDA_ABI && model_size == sizeof(mq_model) ? &API : nullptr;
}
