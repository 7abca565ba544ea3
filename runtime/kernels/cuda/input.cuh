// input.cuh: the input of one token's linears, made ready by every block of threads that multiplies with it: norm, quantisation,
// and the depths that the router gives. That takes less time than a kernel of its own would. What does not depend on the token is
// brought while the kernels before still run.
#ifndef MQ_CUDA_INPUT_H
#define MQ_CUDA_INPUT_H

#include "control.cuh"
#include "quantize.cuh"
#include "routing.cuh"
#include "tensor.cuh"

enum { MOST_QUANTIZED = 64, HELD_GROUPS = 4 }; // groups of an input made ready here; of a warp, whose norm it holds in registers

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

// One token's activations, in global or in shared memory.
struct quantized {
    const int8_t *q;
    const float *scale, *sum;
};

// Where things lie in a block's shared memory, in bytes; each place begins at a multiple of 16.
struct input_places {
    uint32_t q, hidden, scale, sum, sums, constants, end;
};

__host__ __device__ inline uint32_t routing_floats(const mq_router &router, uint32_t n_hidden)
{
    return 2 * n_hidden + router.linears * MQ_GATES * (n_hidden + 3);
}

__host__ __device__ inline input_places places_of(const input_job &job)
{
    const uint32_t here = job.x != nullptr, routed = job.router.linears > 0, groups = job.groups;
    const uint32_t of_groups = (groups * 4 + 15) / 16 * 16;
    input_places at = {};
    at.hidden = at.q + here * groups * MQ_GROUP_SIZE;
    at.scale = at.hidden + here * routed * job.n_hidden * groups * MQ_GROUP_SIZE;
    at.sum = at.scale + (here | routed) * of_groups;
    at.sums = at.sum + here * of_groups;
    at.constants = at.sums + routed * ((groups * (job.n_hidden + 1) * 4 + 15) / 16 * 16);
    at.end = at.constants + routed * ((routing_floats(job.router, job.n_hidden) * 4 + 15) / 16 * 16);
    return at;
}

// Before the kernels before have ended: what the router decides with, to shared memory; it is there after copy_wait<0>() and a
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
    if (job.x != nullptr) {
        for (uint32_t i = threadIdx.x; i < n * job.groups * (MQ_GROUP_SIZE / 16); i += blockDim.x) {
            copy_async<16>(memory + at.hidden + i * 16, job.router.hidden + static_cast<size_t>(i) * 16, true);
        }
    }
    copy_commit();
}

// The norm's weights of the first groups that a warp makes ready.
struct held_norm {
    float weight[HELD_GROUPS][4];
};

template <uint32_t WARPS>
__device__ inline void hold_norm(const input_job &job, held_norm &held)
{
    if (job.x == nullptr || job.norm == nullptr) {
        return;
    }
#pragma unroll
    for (uint32_t u = 0; u < HELD_GROUPS; u++) {
        const uint32_t group = u * WARPS + threadIdx.x / WARP;
        if (group < job.groups) {
            load_four(job.norm, group * MQ_GROUP_SIZE + threadIdx.x % WARP * 4, job.columns, held.weight[u]);
        }
    }
}

// A warp makes ready the groups that it will multiply. piece: room for PIECE numbers, used until the block's next barrier.
template <uint32_t WARPS, uint32_t PIECE>
__device__ inline quantized quantize_input(const input_job &job, const held_norm &held, const input_places &at, uint8_t *memory,
                                           float *piece)
{
    const uint32_t lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, groups = job.groups;
    const bool normed = job.norm != nullptr, kept = normed && job.columns <= PIECE; // x stays in `piece`
    uint32_t *q = reinterpret_cast<uint32_t *>(memory + at.q);
    const uint32_t *hidden = reinterpret_cast<const uint32_t *>(memory + at.hidden) + lane;
    float *scales = reinterpret_cast<float *>(memory + at.scale), *totals = reinterpret_cast<float *>(memory + at.sum);
    int *sums = reinterpret_cast<int *>(memory + at.sums);
    if (job.router.linears > 0) { // the hidden rows that others copied are there after a barrier
        copy_wait<0>();
        if (!normed) {
            __syncthreads();
        }
    }
    const float factor = normed ? norm_factor<PIECE>(job.x, job.columns, job.eps, piece) : 1.0f;
#pragma unroll
    for (uint32_t u = 0; u < MOST_QUANTIZED / WARPS; u++) {
        const uint32_t group = u * WARPS + warp, first = group * MQ_GROUP_SIZE + lane * 4;
        if (group >= groups) {
            break;
        }
        float v[4], scale;
        int total, squares;
        load_four(kept ? piece : job.x, first, job.columns, v);
        if (normed) {
            float weight[4];
            if (u < HELD_GROUPS) {
#pragma unroll
                for (uint32_t i = 0; i < 4; i++) {
                    weight[i] = held.weight[u][i];
                }
            } else {
                load_four(job.norm, first, job.columns, weight);
            }
#pragma unroll
            for (uint32_t i = 0; i < 4; i++) {
                v[i] = first + i < job.columns ? v[i] * factor * weight[i] : 0.0f;
            }
        }
        const uint32_t packed = quantize_warp(v, scale, total, squares);
        q[group * (MQ_GROUP_SIZE / 4) + lane] = packed;
        if (lane == 0) {
            scales[group] = scale;
            totals[group] = scale * static_cast<float>(total);
        }
        if (job.router.linears > 0) {
            group_sums(hidden + group * (MQ_GROUP_SIZE / 4), static_cast<size_t>(groups) * (MQ_GROUP_SIZE / 4), job.n_hidden, packed,
                       squares, sums + group * (job.n_hidden + 1));
        }
    }
    __syncwarp();
    return {reinterpret_cast<const int8_t *>(q), scales, totals};
}

// The router's depths of the linears, to `depth` in shared memory, and by the first block to where the host finds them.
__device__ inline void route_input(const input_job &job, const input_places &at, uint8_t *memory, uint8_t *depth)
{
    const uint32_t n = job.n_hidden, gates = job.router.linears * MQ_GATES;
    float *scales = reinterpret_cast<float *>(memory + at.scale);
    int *sums = reinterpret_cast<int *>(memory + at.sums);
    copy_wait<0>();
    if (job.x == nullptr) {
        for (uint32_t i = threadIdx.x; i < job.groups; i += blockDim.x) {
            scales[i] = __ldcg(job.scale + i);
        }
#pragma unroll 8
        for (uint32_t i = threadIdx.x; i < job.groups * (n + 1); i += blockDim.x) {
            sums[i] = __ldcg(job.sums + i);
        }
    }
    __syncthreads();
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
