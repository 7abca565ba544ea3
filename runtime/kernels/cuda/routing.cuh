// routing.cuh: the depths of the linears that a router serves, with the bits of kernels/scalar.c and src/router.c.
#ifndef MQ_CUDA_ROUTING_H
#define MQ_CUDA_ROUTING_H

#include "arithmetic.cuh"
#include "model.h"
#include "router.h"

enum { MAX_SUMS = MQ_MAX_ROUTER_HIDDEN + 1 };

// Everything that a router decides with but its hidden rows.
struct decision {
    const float *hidden_scale, *hidden_bias; // [n_hidden]
    const float *head;                       // [gates][n_hidden + 1]
    const float *head_bias, *thresholds;     // [gates]
    uint32_t linears, n_hidden, max_depth, columns, groups;
};

__host__ __device__ inline decision decision_of(const mq_router &router, const float *thresholds, uint32_t n_hidden, uint32_t max_depth)
{
    return {router.hidden_scale, router.hidden_bias, router.head,    router.head_bias, thresholds, router.linears, n_hidden,
            max_depth,           router.columns,     router.groups};
}

// A lane's four columns of every hidden row. hidden: those of row 0; row: words from one row to the next.
struct hidden_words {
    uint32_t word[MQ_MAX_ROUTER_HIDDEN];
};

__device__ inline void load_hidden(const uint32_t *hidden, size_t row, uint32_t n_hidden, hidden_words &to)
{
#pragma unroll
    for (uint32_t h = 0; h < MQ_MAX_ROUTER_HIDDEN; h++) {
        to.word[h] = h < n_hidden ? hidden[h * row] : 0;
    }
}

// One warp and its group: exact products of the hidden rows with the lane's four codes, and the sum of squares, to sums
// [n_hidden + 1].
__device__ inline void group_sums(const hidden_words &hidden, uint32_t n_hidden, uint32_t packed, int squares, int *sums)
{
    const uint32_t lane = threadIdx.x % WARP;
    int mine = squares; // the sum that lane h keeps
#pragma unroll
    for (uint32_t h = 0; h < MQ_MAX_ROUTER_HIDDEN; h++) {
        const int dot = sum_warp(__dp4a(static_cast<int>(hidden.word[h]), static_cast<int>(packed), 0));
        mine = lane == h && h < n_hidden ? dot : mine;
    }
    if (lane <= n_hidden) {
        sums[lane] = mine;
    }
}

// The first warp: depths of the linears from scales [groups] and sums [groups][n_hidden + 1]. Lane h < n_hidden adds up hidden unit h,
// the next lane the squares.
__device__ inline void decide(const decision &d, const float *scales, const int *sums, uint8_t *depths)
{
    __shared__ float features[MAX_SUMS];
    const uint32_t lane = threadIdx.x, hidden = d.n_hidden;
    float total = 0.0f;
    if (lane <= hidden) {
#pragma unroll 8
        for (uint32_t g = 0; g < d.groups; g++) {
            const float scale = scales[g];
            total = fmaf(lane == hidden ? scale * scale : scale, static_cast<float>(sums[g * (hidden + 1) + lane]), total);
        }
    }
    const float mean = __shfl_sync(ALL_LANES, total, static_cast<int>(hidden)) / static_cast<float>(d.columns);
    const float rms = sqrtf(mean + 1e-12f);
    if (lane < hidden) {
        const float v = total * d.hidden_scale[lane] / rms + d.hidden_bias[lane];
        features[lane] = v > 0.0f ? v : 0.0f;
    } else if (lane == hidden) {
        features[hidden] = static_cast<float>(log2(static_cast<double>(rms))); // rounded once, as on the CPU
    }
    __syncwarp();
    int passes = 0;
    if (lane < d.linears * MQ_GATES) {
        const float *head = d.head + lane * (hidden + 1);
        float score = 0.0f;
#pragma unroll 4
        for (uint32_t h = 0; h <= hidden; h++) {
            score += head[h] * features[h];
        }
        passes = score + d.head_bias[lane] > d.thresholds[lane];
    }
    const unsigned open = __ballot_sync(ALL_LANES, passes);
    if (lane < d.linears) {
        uint32_t depth = 1;
        while (depth < d.max_depth && (open >> (lane * MQ_GATES + depth - 1) & 1u)) {
            depth++;
        }
        depths[lane] = static_cast<uint8_t>(depth);
    }
}

#endif
