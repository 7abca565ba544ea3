// prepare.cuh: what the input of a group of linears goes through: norm or gate, quantisation to int8, and the depth of each linear,
// from its router or from the table of an unrouted budget. No depth leaves the device.
//
// A block of threads has 32 groups of 128 columns, a warp one of them, or four where many tokens wait: then the sums of one token's norm,
// which take long and few threads, run beside those of others. A wider input has several blocks, of which the one that ends last
// adds up the groups' sums for the router.
#ifndef MQ_CUDA_PREPARE_H
#define MQ_CUDA_PREPARE_H

#include "arithmetic.cuh"
#include "control.cuh"
#include "quantize.cuh"
#include "routing.cuh"

enum { PREPARE_GROUPS = 32, ALONE_WARPS = 32, TOGETHER_WARPS = 8 };

struct prepare_job {
    const float *x, *up; // [n][columns]; up: x is its gate; NULL: x is the input itself
    bool gelu;           // the gate's activation, else SiLU
    uint32_t columns, groups;
    const float *norm;   // [columns]; NULL: none
    float eps;
    float *normed;       // [n][columns] the input itself; NULL: not wanted
    int8_t *q;           // [n][groups·128]
    float *scale, *sum;  // [n][groups]
    mq_router router;    // linears 0: nothing to route
    uint32_t n_hidden, max_depth;
    int *sums;               // [n][groups][n_hidden + 1]: exact sums of a group, for the hidden units and of squares
    uint32_t *arrived;       // [n] blocks of threads that have written theirs
    const float *thresholds; // [linears][3]
    const uint8_t *table;    // [linears] of an unrouted budget
    uint8_t *depths;         // [positions][depth_stride], from the first of the linears on
    uint32_t depth_stride;
    const control *state;
};

__host__ __device__ inline uint32_t prepare_blocks(uint32_t groups)
{
    return (groups + PREPARE_GROUPS - 1) / PREPARE_GROUPS;
}

// Shared memory: the input on its way through the norm, then scales and sums of every group of a token.
static inline size_t prepare_shared(uint32_t groups, uint32_t n_hidden)
{
    return NORM_PIECE * sizeof(float) + groups * (sizeof(float) + sizeof(int) * (n_hidden + 1));
}

// One warp: four columns a lane. Returns the lane's four codes; the scale and the sum of squares are of the group.
__device__ inline uint32_t quantize_group(const prepare_job &job, uint32_t token, uint32_t group, float factor,
                                          const float (&x)[4], const float (&other)[4], float &scale, int &squares)
{
    const uint32_t lane = threadIdx.x % WARP, first = group * MQ_GROUP_SIZE + lane * 4;
    const size_t row = static_cast<size_t>(token) * job.columns, at = static_cast<size_t>(token) * job.groups + group;
    float v[4];
#pragma unroll
    for (uint32_t i = 0; i < 4; i++) {
        const bool inside = first + i < job.columns;
        v[i] = !inside ? 0.0f : job.norm != nullptr ? x[i] * factor * other[i] : job.up != nullptr ? activated(job.gelu, x[i], other[i]) : x[i];
        if (inside && job.normed != nullptr) {
            job.normed[row + first + i] = v[i];
        }
    }
    int total;
    const uint32_t packed = quantize_warp(v, scale, total, squares);
    reinterpret_cast<uint32_t *>(job.q)[at * (MQ_GROUP_SIZE / 4) + lane] = packed;
    if (lane == 0) {
        job.scale[at] = scale;
        job.sum[at] = scale * static_cast<float>(total);
    }
    return packed;
}

// Grid (prepare_blocks, n).
template <uint32_t WARPS>
static __global__ void __launch_bounds__(WARPS * WARP, WARPS == ALONE_WARPS ? 1 : 4) prepare(const __grid_constant__ prepare_job job)
{
    constexpr uint32_t EACH = PREPARE_GROUPS / WARPS;
    float *piece = dynamic_shared<float>(), *scales = piece + NORM_PIECE;
    const uint32_t token = blockIdx.y, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const bool routed = job.router.linears > 0 && job.state->routed; // neither changes during a pass
    const size_t row = static_cast<size_t>(token) * job.columns;
    const auto group_at = [&](uint32_t u) { return blockIdx.x * PREPARE_GROUPS + u * WARPS + warp; };
    const auto column_at = [&](uint32_t u) { return group_at(u) * MQ_GROUP_SIZE + lane * 4; };
    float other[EACH][4] = {}; // the norm's weights, or up
    pdl_launch();
#pragma unroll
    for (uint32_t u = 0; u < EACH; u++) {
        if (job.norm != nullptr) {
            load_four(job.norm, column_at(u), job.columns, other[u]);
        }
        if (routed && lane < job.n_hidden && group_at(u) < job.groups) {
            prefetch_l2(job.router.hidden + (static_cast<size_t>(lane) * job.groups + group_at(u)) * MQ_GROUP_SIZE);
        }
    }
    pdl_wait();
    float x[EACH][4];
    const bool kept = EACH > 1 && job.norm != nullptr && job.columns <= NORM_PIECE; // then x comes with the norm, and not twice
    if (!kept) {
#pragma unroll
        for (uint32_t u = 0; u < EACH; u++) {
            load_four(job.x + row, column_at(u), job.columns, x[u]);
            if (job.up != nullptr) {
                load_four(job.up + row, column_at(u), job.columns, other[u]);
            }
        }
    }
    const float factor = job.norm == nullptr ? 1.0f : norm_factor<NORM_PIECE>(job.x + row, job.columns, job.eps, piece);
    int *sums = reinterpret_cast<int *>(scales) + job.groups, *mine = job.sums;
    const bool alone = gridDim.x == 1;
    mine = alone ? sums : mine + static_cast<size_t>(token) * job.groups * (job.n_hidden + 1);
#pragma unroll
    for (uint32_t u = 0; u < EACH; u++) {
        const uint32_t group = group_at(u);
        if (group < job.groups) {
            float scale;
            int squares;
            if (kept) {
                load_four(piece, column_at(u), job.columns, x[u]);
            }
            const uint32_t packed = quantize_group(job, token, group, factor, x[u], other[u], scale, squares);
            if (routed) {
                const size_t words = static_cast<size_t>(job.groups) * (MQ_GROUP_SIZE / 4);
                const uint32_t *hidden = reinterpret_cast<const uint32_t *>(job.router.hidden) + group * (MQ_GROUP_SIZE / 4) + lane;
                hidden_words of_lane;
                load_hidden(hidden, words, job.n_hidden, of_lane);
                group_sums(of_lane, job.n_hidden, packed, squares, mine + group * (job.n_hidden + 1));
                if (alone && lane == 0) {
                    scales[group] = scale;
                }
            }
        }
    }
    uint8_t *depths = job.depths + static_cast<size_t>(job.state->position + token) * job.depth_stride;
    if (!routed) {
        if (blockIdx.x == 0 && threadIdx.x < job.router.linears) {
            depths[threadIdx.x] = job.table[threadIdx.x];
        }
        return;
    }
    if (!alone) {
        if (!arrives_last(job.arrived + token, gridDim.x)) {
            return;
        }
        for (uint32_t i = threadIdx.x; i < job.groups; i += WARPS * WARP) {
            scales[i] = __ldcg(job.scale + static_cast<size_t>(token) * job.groups + i);
        }
#pragma unroll 4
        for (uint32_t i = threadIdx.x; i < job.groups * (job.n_hidden + 1); i += WARPS * WARP) {
            sums[i] = __ldcg(mine + i);
        }
    }
    __syncthreads();
    if (warp == 0) {
        decide(decision_of(job.router, job.thresholds, job.n_hidden, job.max_depth), scales, sums, depths);
    }
}

#endif
