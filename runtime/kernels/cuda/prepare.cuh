// prepare.cuh: what the input of a group of linears goes through, one block of threads per token: norm or SwiGLU, quantisation to
// int8, and the depth of each linear, from its router or from the table of an unrouted budget. No depth leaves the device.
#ifndef MQ_CUDA_PREPARE_H
#define MQ_CUDA_PREPARE_H

#include "arithmetic.cuh"
#include "control.cuh"
#include "model.h"
#include "router.h"

enum { PREPARE_THREADS = 256, NORM_PIECE = 4096 };

struct prepare_job {
    const float *x, *up; // [n][stride]; up: of SwiGLU, whose gate is x, else NULL
    uint32_t stride, columns, groups;
    const float *norm;   // [columns]; NULL: none
    float eps;
    float *normed;       // [n][columns] the input itself; NULL: not wanted
    int8_t *q;           // [n][groups·128]
    float *scale, *sum;  // [n][groups]
    mq_router router;    // linears 0: nothing to route
    uint32_t n_hidden, max_depth;
    const float *thresholds; // [linears][3]
    const uint8_t *table;    // [linears] of an unrouted budget
    uint8_t *depths;         // [positions][depth_stride], from the first of the linears on
    uint32_t depth_stride;
    const control *state;
};

static inline size_t prepare_shared(uint32_t groups, uint32_t n_hidden)
{
    return NORM_PIECE * sizeof(float) + static_cast<size_t>(groups) * (MQ_GROUP_SIZE + sizeof(float) * (n_hidden + 2));
}

// 1 / sqrt(mean of squares + eps), the same in every thread.
__device__ inline float norm_factor(const float *x, uint32_t columns, float eps, float *piece)
{
    __shared__ float factor;
    float lane = 0.0f;
    for (uint32_t first = 0; first < columns; first += NORM_PIECE) {
        const uint32_t count = columns - first < NORM_PIECE ? columns - first : NORM_PIECE;
        for (uint32_t i = threadIdx.x; i < count; i += blockDim.x) {
            piece[i] = x[first + i];
        }
        __syncthreads();
        if (threadIdx.x < LANES) {
#pragma unroll 16
            for (uint32_t i = threadIdx.x; i < count; i += LANES) {
                lane = fmaf(piece[i], piece[i], lane);
            }
        }
        __syncthreads();
    }
    if (threadIdx.x < WARP) {
        const float total = fold_lanes(lane);
        if (threadIdx.x == 0) {
            factor = 1.0f / sqrtf(total / static_cast<float>(columns) + eps);
        }
    }
    __syncthreads();
    return factor;
}

// One warp: four columns a lane.
__device__ inline void quantize_group(const prepare_job &job, uint32_t token, uint32_t group, float factor, uint32_t *q_shared,
                                      float *scale_shared, int *squares_shared)
{
    const uint32_t lane = threadIdx.x % WARP, first = group * MQ_GROUP_SIZE + lane * 4;
    const size_t row = static_cast<size_t>(token) * job.stride;
    float v[4];
    float largest = 0.0f;
    for (uint32_t i = 0; i < 4; i++) {
        const uint32_t c = first + i;
        v[i] = 0.0f;
        if (c < job.columns) {
            v[i] = job.x[row + c];
            if (job.norm != nullptr) {
                v[i] = v[i] * factor * job.norm[c];
            } else if (job.up != nullptr) {
                v[i] = swiglu(v[i], job.up[row + c]);
            }
            if (job.normed != nullptr) {
                job.normed[static_cast<size_t>(token) * job.columns + c] = v[i];
            }
        }
        largest = fmaxf(largest, fabsf(v[i]));
    }
    largest = largest_of_warp(largest);
    uint32_t packed = 0;
    int total = 0, squares = 0;
    float scale = 0.0f;
    if (largest >= MQ_QUANTIZE_MIN) {
        const float inverse = MQ_QUANTIZE_MAX / largest;
        for (uint32_t i = 0; i < 4; i++) {
            float x = v[i] * inverse;
            x = x < MQ_QUANTIZE_MAX ? x : MQ_QUANTIZE_MAX; // a NaN becomes 127
            x = x > -MQ_QUANTIZE_MAX ? x : -MQ_QUANTIZE_MAX;
            const int code = first + i < job.columns ? static_cast<int>(rintf(x)) : 0;
            packed |= (static_cast<uint32_t>(code) & 255u) << (8 * i);
            total += code;
            squares += code * code;
        }
        scale = largest / MQ_QUANTIZE_MAX;
    }
    total = sum_warp(total);
    squares = sum_warp(squares);
    const size_t at = static_cast<size_t>(token) * job.groups + group;
    reinterpret_cast<uint32_t *>(job.q)[at * (MQ_GROUP_SIZE / 4) + lane] = packed;
    q_shared[group * (MQ_GROUP_SIZE / 4) + lane] = packed;
    if (lane == 0) {
        job.scale[at] = scale;
        job.sum[at] = scale * static_cast<float>(total);
        scale_shared[group] = scale;
        squares_shared[group] = squares;
    }
}

// Exact products of the router's hidden rows with every group: dots [groups][n_hidden]. Eight lanes a product.
__device__ inline void hidden_dots(const prepare_job &job, const uint32_t *q_shared, int *dots)
{
    enum { SHARE = 8 };
    const uint32_t part = threadIdx.x % SHARE, count = job.groups * job.n_hidden;
    for (uint32_t first = 0; first < count; first += PREPARE_THREADS / SHARE) {
        const uint32_t item = first + threadIdx.x / SHARE;
        int dot = 0;
        if (item < count) {
            const uint32_t h = item / job.groups, g = item % job.groups;
            const size_t row = (static_cast<size_t>(h) * job.groups + g) * MQ_GROUP_SIZE;
            const int4 w = *reinterpret_cast<const int4 *>(job.router.hidden + row + part * 16);
            const int4 x = *reinterpret_cast<const int4 *>(q_shared + g * (MQ_GROUP_SIZE / 4) + part * 4);
            dot = __dp4a(w.x, x.x, __dp4a(w.y, x.y, __dp4a(w.z, x.z, __dp4a(w.w, x.w, 0))));
        }
        for (int step = SHARE / 2; step >= 1; step /= 2) {
            dot += __shfl_xor_sync(ALL_LANES, dot, step);
        }
        if (item < count && part == 0) {
            dots[item % job.groups * job.n_hidden + item / job.groups] = dot;
        }
    }
}

// One warp: depths of the linears from the products. Lane h < 16 adds up hidden unit h, lane 16 the squares.
__device__ inline void decide(const prepare_job &job, const float *scales, const int *squares, const int *dots, uint8_t *depths)
{
    enum { SQUARES = LANES };
    __shared__ float features[MQ_MAX_ROUTER_HIDDEN + 1];
    const uint32_t lane = threadIdx.x, hidden = job.n_hidden;
    float total = 0.0f;
    if (lane < hidden || lane == SQUARES) {
#pragma unroll 8
        for (uint32_t g = 0; g < job.groups; g++) {
            const float scale = scales[g];
            const int dot = lane == SQUARES ? squares[g] : dots[g * hidden + lane];
            total = fmaf(lane == SQUARES ? scale * scale : scale, static_cast<float>(dot), total);
        }
    }
    const float mean = __shfl_sync(ALL_LANES, total, SQUARES) / static_cast<float>(job.columns);
    const float rms = sqrtf(mean + 1e-12f);
    if (lane < hidden) {
        const float v = total * job.router.hidden_scale[lane] / rms + job.router.hidden_bias[lane];
        features[lane] = v > 0.0f ? v : 0.0f;
    } else if (lane == SQUARES) {
        features[hidden] = static_cast<float>(log2(static_cast<double>(rms))); // rounded once, as on the CPU
    }
    __syncwarp();
    const uint32_t gates = job.router.linears * MQ_GATES;
    int passes = 0;
    if (lane < gates) {
        const float *head = job.router.head + lane * (hidden + 1);
        float score = 0.0f;
        for (uint32_t h = 0; h <= hidden; h++) {
            score += head[h] * features[h];
        }
        passes = score + job.router.head_bias[lane] > job.thresholds[lane];
    }
    const unsigned open = __ballot_sync(ALL_LANES, passes);
    if (lane < job.router.linears) {
        uint32_t depth = 1;
        while (depth < job.max_depth && (open >> (lane * MQ_GATES + depth - 1) & 1u)) {
            depth++;
        }
        depths[lane] = static_cast<uint8_t>(depth);
    }
}

static __global__ void __launch_bounds__(PREPARE_THREADS) prepare(const __grid_constant__ prepare_job job)
{
    float *piece = dynamic_shared<float>(); // NORM_PIECE
    uint32_t *q_shared = reinterpret_cast<uint32_t *>(piece + NORM_PIECE);
    float *scales = reinterpret_cast<float *>(q_shared + static_cast<size_t>(job.groups) * (MQ_GROUP_SIZE / 4));
    int *squares = reinterpret_cast<int *>(scales + job.groups), *dots = squares + job.groups;
    const uint32_t token = blockIdx.x, warp = threadIdx.x / WARP;
    pdl_launch();
    pdl_wait();
    float factor = 1.0f;
    if (job.norm != nullptr) {
        factor = norm_factor(job.x + static_cast<size_t>(token) * job.stride, job.columns, job.eps, piece);
    }
    for (uint32_t group = warp; group < job.groups; group += PREPARE_THREADS / WARP) {
        quantize_group(job, token, group, factor, q_shared, scales, squares);
    }
    if (job.router.linears == 0) {
        return;
    }
    uint8_t *depths = job.depths + static_cast<size_t>(job.state->position + token) * job.depth_stride;
    if (!job.state->routed) {
        if (threadIdx.x < job.router.linears) {
            depths[threadIdx.x] = job.table[threadIdx.x];
        }
        return;
    }
    __syncthreads();
    hidden_dots(job, q_shared, dots);
    __syncthreads();
    if (warp == 0) {
        decide(job, scales, squares, dots, depths);
    }
}

#endif
