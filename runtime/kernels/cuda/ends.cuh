// ends.cuh: the two ends of a pass: rows of the embedding, and the most likely token without a way back to the host.
#ifndef MQ_CUDA_ENDS_H
#define MQ_CUDA_ENDS_H

#include "arithmetic.cuh"
#include "control.cuh"
#include "kernels.h"
#include "keys.h"

enum { END_THREADS = 256, BEST_BLOCKS = 64 };

// One block of threads per token: x [n][columns].
static __global__ void __launch_bounds__(END_THREADS) embed(const __grid_constant__ mq_matrix w, uint32_t depth, float scale, float *x,
                                                              const control *state)
{
    enum { STEP = 4 };
    pdl_launch();
    pdl_wait();
    const uint32_t row = static_cast<uint32_t>(state->tokens[blockIdx.x]), tile = row / MQ_TILE_ROWS, r = row % MQ_TILE_ROWS;
    for (uint32_t c = threadIdx.x; c < w.columns; c += END_THREADS) {
        const size_t at = static_cast<size_t>(tile) * w.groups + c / MQ_GROUP_SIZE;
        const uint32_t within = c % MQ_GROUP_SIZE;
        const size_t byte = at * MQ_TILE_BYTES + within / MQ_TILE_ROWS * (MQ_TILE_ROWS * STEP) + r * STEP + within % STEP;
        const uint32_t shift = within / STEP % STEP * MQ_SLICE_BITS;
        uint32_t code = 0;
        for (uint32_t e = 0; e < depth; e++) {
            code = code << MQ_SLICE_BITS | (static_cast<uint32_t>(w.plane[e][byte] >> shift) & 3u);
        }
        const uint16_t *pair = w.scale_offset + at * 2 * MQ_TILE_ROWS;
        const float step = f16_to_f32(pair[r]) * depth_factor(depth);
        const float number = fmaf(step, static_cast<float>(code) + 0.5f, -f16_to_f32(pair[MQ_TILE_ROWS + r]));
        x[static_cast<size_t>(blockIdx.x) * w.columns + c] = number * scale;
    }
}

// A logit and its token as one number that orders as they do: larger logits first, of equal ones the lower token.
__device__ inline unsigned long long rank(float logit, uint32_t token)
{
    const uint32_t bits = __float_as_uint(logit == logit ? logit + 0.0f : -INFINITY); // + 0: −0 and 0 are equal
    const uint32_t ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return static_cast<unsigned long long>(ordered) << 32 | ~token;
}

static __global__ void __launch_bounds__(END_THREADS) find_best(const float *logits, uint32_t vocab, control *state)
{
    unsigned long long best = 0;
    pdl_launch();
    pdl_wait();
    for (uint32_t i = blockIdx.x * END_THREADS + threadIdx.x; i < vocab; i += gridDim.x * END_THREADS) {
        const unsigned long long mine = rank(logits[i], i);
        best = mine > best ? mine : best;
    }
    for (int step = WARP / 2; step >= 1; step /= 2) {
        const unsigned long long other = __shfl_xor_sync(ALL_LANES, best, step);
        best = other > best ? other : best;
    }
    if (threadIdx.x % WARP == 0) {
        atomicMax(&state->best, best);
    }
}

// The best token becomes the next pass's, and is noted in `chosen`.
static __global__ void advance(control *state, int32_t *chosen)
{
    pdl_launch();
    pdl_wait();
    const int32_t token = static_cast<int32_t>(~static_cast<uint32_t>(state->best));
    chosen[state->generated] = token;
    state->tokens[0] = token;
    state->generated++;
    state->position++;
    state->best = 0;
}

#endif
