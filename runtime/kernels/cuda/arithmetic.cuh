// arithmetic.cuh: the float operations of kernels/scalar.c in the same steps and the same order, so the same bits. The library
// is compiled without contraction: a fused multiply-add stands only where fmaf is written.
#ifndef MQ_CUDA_ARITHMETIC_H
#define MQ_CUDA_ARITHMETIC_H

#include "definition.h"
#include "intrinsics.cuh"

enum { WARP = 32, LANES = 16 };
static constexpr unsigned ALL_LANES = 0xffffffffu;

__host__ __device__ inline float depth_factor(unsigned depth)
{
    return depth <= 1 ? 1.0f : depth == 2 ? 0.25f : depth == 3 ? 0.0625f : 0.015625f;
}

__device__ inline float exponential(float x)
{
    if (x != x) {
        return x;
    }
    x = x < MQ_EXP_HIGH ? x : MQ_EXP_HIGH;
    x = x > MQ_EXP_LOW ? x : MQ_EXP_LOW;
    const float n = rintf(x * MQ_LOG2_E);
    float r = fmaf(n, -MQ_LN2_HIGH, x);
    r = fmaf(n, -MQ_LN2_LOW, r);
    float p = fmaf(MQ_EXP_C7, r, MQ_EXP_C6);
    p = fmaf(p, r, MQ_EXP_C5);
    p = fmaf(p, r, MQ_EXP_C4);
    p = fmaf(p, r, MQ_EXP_C3);
    p = fmaf(p, r, MQ_EXP_C2);
    p = fmaf(p, r, 1.0f);
    p = fmaf(p, r, 1.0f);
    return p * __uint_as_float(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23);
}

// Lane i < 16 brings the i-th partial sum; the fold 8, 4, 2, 1 is in lane 0. All lanes of the warp call it.
__device__ inline float fold_lanes(float value)
{
    for (int half = LANES / 2; half >= 1; half /= 2) {
        value += __shfl_down_sync(ALL_LANES, value, half);
    }
    return value;
}

__device__ inline float largest_of_warp(float value)
{
    for (int step = WARP / 2; step >= 1; step /= 2) {
        value = fmaxf(value, __shfl_xor_sync(ALL_LANES, value, step));
    }
    return value;
}

// The gate's activation, SiLU or GELU in its tanh form, times up.
__device__ inline float activated(bool gelu, float gate, float up)
{
    const float z = gelu ? gate * fmaf(gate * gate, MQ_GELU_CUBIC, MQ_GELU_LINEAR) : gate;
    return gate / (1.0f + exponential(-z)) * up;
}

#endif
