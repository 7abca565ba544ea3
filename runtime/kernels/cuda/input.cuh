// input.cuh: the input of one token's linears, made ready by every block of threads that multiplies with it: norm, quantisation,
// and the depths that the router gives. That takes less time than a kernel of its own would. What does not depend on the token is
// brought while the kernels before still run.
#ifndef MQ_CUDA_INPUT_H
#define MQ_CUDA_INPUT_H

#include "control.cuh"
#include "quantize.cuh"
#include "routing.cuh"
#include "tensor.cuh"

enum { HELD_GROUPS = 2 }; // of a warp, whose norm and hidden rows it holds in registers

// x: the input itself, to be made ready here; NULL: another kernel has quantised it.
struct input_job {
    const float *x, *norm;    // [columns]; norm: NULL for none
    uint32_t columns, groups;
    float eps;
    const int8_t *q;          // without x: [groups·128]
    const float *scale, *sum; // without x: [groups]
    const int *sums;          // without x, routed: [groups][n_hidden + 1]
    mq_router router;         // linears 0: not routed
    const float *thresholds;  // [gates]
    uint32_t n_hidden, max_depth;
    uint8_t *depths;          // [positions][depth_stride], of the first linear
    uint32_t depth_stride;
    const control *state;
};

// Where things lie in a block's shared memory, in bytes; each place begins at a multiple of 16.
struct input_places {
    uint32_t q, scale, sum, sums, constants, end;
};

__host__ __device__ inline uint32_t routing_floats(const mq_router &router, uint32_t n_hidden)
{
    return 2 * n_hidden + router.linears * MQ_GATES * (n_hidden + 3);
}

__host__ __device__ inline input_places places_of(const input_job &job)
{
    const uint32_t routed = job.router.linears > 0, of_groups = (job.groups * 4 + 15) / 16 * 16;
    input_places at = {};
    at.scale = at.q + job.groups * MQ_GROUP_SIZE;
    at.sum = at.scale + of_groups;
    at.sums = at.sum + of_groups;
    at.constants = at.sums + routed * ((job.groups * (job.n_hidden + 1) * 4 + 15) / 16 * 16);
    at.end = at.constants + routed * ((routing_floats(job.router, job.n_hidden) * 4 + 15) / 16 * 16);
    return at;
}

// Before the kernels before have ended: what the router decides with, to shared memory; it is there after a wait for the copies and a
// barrier.
__device__ inline void bring_router(const input_job &job, const input_places &at, uint8_t *memory)
{
    if (job.router.linears == 0) {
        return;
    }
    const uint32_t n = job.n_hidden, gates = job.router.linears * MQ_GATES;
    float *to = reinterpret_cast<float *>(memory + at.constants);
    const auto bring = [&](const float *from, uint32_t count) {
        for (uint32_t i = threadIdx.x; i < count; i += blockDim.x) {
            copy_async<4>(to + i, from + i, true);
        }
        to += count;
    };
    bring(job.router.hidden_scale, n);
    bring(job.router.hidden_bias, n);
    bring(job.router.head, gates * (n + 1));
    bring(job.router.head_bias, gates);
    bring(job.thresholds, gates);
    copy_commit();
}

// What a warp makes its first groups ready with.
struct held_input {
    float norm[HELD_GROUPS][4];
    hidden_words hidden[HELD_GROUPS];
};

__device__ inline const uint32_t *hidden_of(const input_job &job, uint32_t group)
{
    return reinterpret_cast<const uint32_t *>(job.router.hidden) + group * (MQ_GROUP_SIZE / 4) + threadIdx.x % WARP;
}

// Before the kernels before have ended.
template <uint32_t WARPS>
__device__ inline void hold_input(const input_job &job, held_input &held)
{
#pragma unroll
    for (uint32_t u = 0; u < HELD_GROUPS; u++) {
        const uint32_t group = u * WARPS + threadIdx.x / WARP;
        if (job.x != nullptr && group < job.groups) {
            if (job.norm != nullptr) {
                load_four(job.norm, group * MQ_GROUP_SIZE + threadIdx.x % WARP * 4, job.columns, held.norm[u]);
            }
            if (job.router.linears > 0) {
                load_hidden(hidden_of(job, group), static_cast<size_t>(job.groups) * (MQ_GROUP_SIZE / 4), job.n_hidden, held.hidden[u]);
            }
        }
    }
}

// One warp: norm, quantisation and the router's sums of a group, whose numbers are at x.
__device__ inline void ready_group(const input_job &job, uint32_t group, const float *x, float factor, const float (&norm)[4],
                                   const hidden_words &hidden, const input_places &at, uint8_t *memory)
{
    const uint32_t lane = threadIdx.x % WARP, first = group * MQ_GROUP_SIZE + lane * 4;
    float v[4], scale;
    int total, squares;
    load_four(x, first, job.columns, v);
    if (job.norm != nullptr) {
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) {
            v[i] = first + i < job.columns ? v[i] * factor * norm[i] : 0.0f;
        }
    }
    const uint32_t packed = quantize_warp(v, scale, total, squares);
    reinterpret_cast<uint32_t *>(memory + at.q)[group * (MQ_GROUP_SIZE / 4) + lane] = packed;
    if (lane == 0) {
        reinterpret_cast<float *>(memory + at.scale)[group] = scale;
        reinterpret_cast<float *>(memory + at.sum)[group] = scale * static_cast<float>(total);
    }
    if (job.router.linears > 0) {
        group_sums(hidden, job.n_hidden, packed, squares, reinterpret_cast<int *>(memory + at.sums) + group * (job.n_hidden + 1));
    }
}

// The whole input, in the block's shared memory after the next barrier. piece: room for PIECE numbers, in use until then.
template <uint32_t WARPS, uint32_t PIECE>
__device__ inline void ready_input(const input_job &job, const held_input &held, const input_places &at, uint8_t *memory, float *piece)
{
    const uint32_t warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (job.x == nullptr) { // quantised by another kernel
        for (uint32_t i = threadIdx.x; i < job.groups * (MQ_GROUP_SIZE / 16); i += WARPS * WARP) {
            reinterpret_cast<uint4 *>(memory + at.q)[i] = __ldcg(reinterpret_cast<const uint4 *>(job.q) + i);
        }
        for (uint32_t i = threadIdx.x; i < job.groups; i += WARPS * WARP) {
            reinterpret_cast<float *>(memory + at.scale)[i] = __ldcg(job.scale + i);
            reinterpret_cast<float *>(memory + at.sum)[i] = __ldcg(job.sum + i);
        }
        const uint32_t sums = job.router.linears > 0 ? job.groups * (job.n_hidden + 1) : 0;
#pragma unroll 4
        for (uint32_t i = threadIdx.x; i < sums; i += WARPS * WARP) {
            reinterpret_cast<int *>(memory + at.sums)[i] = __ldcg(job.sums + i);
        }
        return;
    }
    const bool kept = job.norm != nullptr && job.columns <= PIECE;
    const float factor = job.norm == nullptr ? 1.0f : norm_factor<PIECE>(job.x, job.columns, job.eps, piece);
    const float *x = kept ? piece : job.x;
#pragma unroll
    for (uint32_t u = 0; u < HELD_GROUPS; u++) {
        if (u * WARPS + warp < job.groups) {
            ready_group(job, u * WARPS + warp, x, factor, held.norm[u], held.hidden[u], at, memory);
        }
    }
    for (uint32_t group = HELD_GROUPS * WARPS + warp; group < job.groups; group += WARPS) {
        float norm[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        hidden_words hidden;
        if (job.norm != nullptr) {
            load_four(job.norm, group * MQ_GROUP_SIZE + lane * 4, job.columns, norm);
        }
        if (job.router.linears > 0) {
            load_hidden(hidden_of(job, group), static_cast<size_t>(job.groups) * (MQ_GROUP_SIZE / 4), job.n_hidden, hidden);
        }
        ready_group(job, group, x, factor, norm, hidden, at, memory);
    }
}

// After a barrier: the router's depths of the linears, to `depth` in shared memory, and by the first block to where the host finds
// them.
__device__ inline void route_input(const input_job &job, const input_places &at, uint8_t *memory, uint8_t *depth)
{
    const uint32_t n = job.n_hidden, gates = job.router.linears * MQ_GATES;
    const float *scales = reinterpret_cast<const float *>(memory + at.scale);
    const int *sums = reinterpret_cast<const int *>(memory + at.sums);
    if (threadIdx.x < WARP) {
        const float *constants = reinterpret_cast<const float *>(memory + at.constants), *head = constants + 2 * n;
        const float *bias = head + gates * (n + 1);
        decide({constants, constants + n, head, bias, bias + gates, job.router.linears, n, job.max_depth, job.columns, job.groups},
               scales, sums, depth);
    }
    __syncthreads();
    if (blockIdx.x == 0 && threadIdx.x < job.router.linears) {
        job.depths[static_cast<size_t>(job.state->position) * job.depth_stride + threadIdx.x] = depth[threadIdx.x];
    }
}

#endif
