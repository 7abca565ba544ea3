// measure.cuh: the speed of single linears on the GPU, for `tests/benchmarks/cuda_speed.py`.
#ifndef MQ_CUDA_MEASURE_H
#define MQ_CUDA_MEASURE_H

#include "forward.cuh"

// Random bytes; as scales and offsets, f16 that are finite.
static __global__ void fill_random(uint32_t *words, size_t count, uint32_t keep, uint32_t seed)
{
    for (size_t i = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += static_cast<size_t>(gridDim.x) * blockDim.x) {
        uint32_t x = static_cast<uint32_t>(i) * 2654435761u + seed;
        x ^= x >> 15;
        x *= 2246822519u;
        x ^= x >> 13;
        words[i] = (x * 3266489917u) & keep;
    }
}

struct measured_linear {
    uint8_t *memory;
    cudaStream_t stream;
    cudaEvent_t begin, end;
    cudaGraph_t recorded;
    cudaGraphExec_t graph;
};

static void free_measured(measured_linear *m)
{
    if (m->graph != nullptr) {
        (void)cudaGraphExecDestroy(m->graph);
    }
    if (m->recorded != nullptr) {
        (void)cudaGraphDestroy(m->recorded);
    }
    if (m->begin != nullptr) {
        (void)cudaEventDestroy(m->begin);
    }
    if (m->end != nullptr) {
        (void)cudaEventDestroy(m->end);
    }
    if (m->stream != nullptr) {
        (void)cudaStreamDestroy(m->stream);
    }
    (void)cudaFree(m->memory);
}

static int32_t measure_matvec(uint32_t rows, uint32_t columns, uint32_t depth, uint32_t repeats, double *microseconds, size_t *bytes,
                              mq_cuda_message *message)
{
    enum { CACHES = 12 }; // the copies are so many times as large as the second-level cache
    cudaDeviceProp properties;
    cudaError_t error = cudaGetDeviceProperties(&properties, 0);
    if (error != cudaSuccess) {
        return fail(message, "asking for the GPU", error);
    }
    const uint32_t tiles = (rows + MQ_TILE_ROWS - 1) / MQ_TILE_ROWS, groups = groups_of(columns);
    const size_t plane = static_cast<size_t>(tiles) * groups * MQ_TILE_BYTES, scales = static_cast<size_t>(tiles) * groups * 64;
    *bytes = plane * depth + scales;
    const uint32_t copies = static_cast<uint32_t>(CACHES * static_cast<size_t>(properties.l2CacheSize) / *bytes + 2);
    const size_t weights = copies * *bytes, x_bytes = static_cast<size_t>(groups) * (MQ_GROUP_SIZE + 2 * sizeof(float));
    const size_t total = weights + x_bytes + 256 + rows * sizeof(float);
    measured_linear m = {};
    error = cudaMalloc(&m.memory, total);
    error = error == cudaSuccess ? cudaStreamCreateWithFlags(&m.stream, cudaStreamNonBlocking) : error;
    error = error == cudaSuccess ? cudaEventCreate(&m.begin) : error;
    error = error == cudaSuccess ? cudaEventCreate(&m.end) : error;
    mq_cuda_model model = {};
    model.multiprocessors = static_cast<uint32_t>(properties.multiProcessorCount);
    model.pdl = properties.major >= 9;
    mq_cuda_session s = {};
    s.model = &model;
    s.stream = m.stream;
    uint8_t *const x = m.memory + weights;
    s.on.activations = reinterpret_cast<int8_t *>(x);
    s.on.scale = reinterpret_cast<float *>(x + static_cast<size_t>(groups) * MQ_GROUP_SIZE);
    s.on.sum = s.on.scale + groups;
    pass p = {&s, 1, 0, 0, error};
    const auto fill = [&](uint8_t *at, size_t size, uint32_t keep) {
        start(&p, dim3(1024), 256, 0, fill_random, reinterpret_cast<uint32_t *>(at), size / sizeof(uint32_t), keep, 7u);
    };
    fill(m.memory, copies * plane * depth, 0xffffffffu);
    fill(m.memory + copies * plane * depth, copies * scales, 0x27ff27ffu);
    fill(x, static_cast<size_t>(groups) * MQ_GROUP_SIZE, 0xffffffffu);
    fill(reinterpret_cast<uint8_t *>(s.on.scale), 2 * groups * sizeof(float), 0x3effffffu);
    p.error = p.error == cudaSuccess ? allow_shared(matvec_one<SOME_WARPS>, sizeof(one_shared<SOME_WARPS>)) : p.error;
    p.error = p.error == cudaSuccess ? allow_shared(matvec_one<MANY_WARPS>, sizeof(one_shared<MANY_WARPS>)) : p.error;
    p.error = p.error == cudaSuccess ? cudaStreamBeginCapture(m.stream, cudaStreamCaptureModeThreadLocal) : p.error;
    for (uint32_t i = 0; i < copies && p.error == cudaSuccess; i++) {
        matvec_job job = {};
        job.count = 1;
        job.fixed_depth = depth;
        job.y[0] = reinterpret_cast<float *>(m.memory + total - rows * sizeof(float) - (total - rows * sizeof(float)) % 256);
        job.matrix[0].rows = rows;
        job.matrix[0].columns = columns;
        job.matrix[0].tiles = tiles;
        job.matrix[0].groups = groups;
        for (uint32_t e = 0; e < depth; e++) {
            job.matrix[0].plane[e] = m.memory + (static_cast<size_t>(e) * copies + i) * plane; // a slice of all copies together
        }
        job.matrix[0].scale_offset = reinterpret_cast<uint16_t *>(m.memory + copies * plane * depth + i * scales);
        start_linears(&p, job, 1);
    }
    if (p.error == cudaSuccess) {
        p.error = cudaStreamEndCapture(m.stream, &m.recorded);
    }
    p.error = p.error == cudaSuccess ? cudaGraphInstantiate(&m.graph, m.recorded, 0) : p.error;
    for (uint32_t i = 0; i < repeats + 1 && p.error == cudaSuccess; i++) { // the first pass warms up
        float milliseconds = 0.0f;
        (void)cudaEventRecord(m.begin, m.stream);
        p.error = cudaGraphLaunch(m.graph, m.stream);
        (void)cudaEventRecord(m.end, m.stream);
        p.error = p.error == cudaSuccess ? cudaEventSynchronize(m.end) : p.error;
        p.error = p.error == cudaSuccess ? cudaEventElapsedTime(&milliseconds, m.begin, m.end) : p.error;
        microseconds[i == 0 ? 0 : i - 1] = static_cast<double>(milliseconds) * 1e3 / copies;
    }
    free_measured(&m);
    return p.error == cudaSuccess ? 0 : fail(message, "measuring a linear", p.error);
}

#endif
