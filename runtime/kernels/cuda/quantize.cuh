// quantize.cuh: the norm's factor by a block of threads, and the quantisation of a group of 128 columns by a warp, with the bits of
// kernels/scalar.c.
#ifndef MQ_CUDA_QUANTIZE_H
#define MQ_CUDA_QUANTIZE_H

#include "arithmetic.cuh"
#include "keys.h"

enum { NORM_PIECE = 4096 };

// Elements first .. first + 3, 0 past the end. first: a multiple of 4.
__device__ inline void load_four(const float *from, uint32_t first, uint32_t columns, float (&to)[4])
{
    if (columns % 4 == 0 && first < columns) { // every row is aligned
        const float4 four = *reinterpret_cast<const float4 *>(from + first);
        to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
        return;
    }
#pragma unroll
    for (uint32_t i = 0; i < 4; i++) {
        to[i] = first + i < columns ? from[first + i] : 0.0f;
    }
}

// 1 / sqrt(mean of squares + eps), the same in every thread. piece: room for PIECE numbers; it ends with the last of x.
template <uint32_t PIECE>
__device__ inline float norm_factor(const float *x, uint32_t columns, float eps, float *piece)
{
    enum { AT_ONCE = 4 };
    __shared__ float factor;
    float lane = 0.0f;
    for (uint32_t first = 0; first < columns; first += PIECE) {
        const uint32_t count = columns - first < PIECE ? columns - first : PIECE;
        for (uint32_t begin = 0; begin < count; begin += AT_ONCE * 4 * blockDim.x) { // every load on its way before the first is kept
            float four[AT_ONCE][4];
#pragma unroll
            for (uint32_t u = 0; u < AT_ONCE; u++) {
                const uint32_t i = begin + (u * blockDim.x + threadIdx.x) * 4;
                if (i < count) {
                    load_four(x, first + i, columns, four[u]);
                }
            }
#pragma unroll
            for (uint32_t u = 0; u < AT_ONCE; u++) {
                const uint32_t i = begin + (u * blockDim.x + threadIdx.x) * 4;
                if (i < count) {
                    *reinterpret_cast<float4 *>(piece + i) = make_float4(four[u][0], four[u][1], four[u][2], four[u][3]);
                }
            }
        }
        __syncthreads();
        if (threadIdx.x < LANES) {
#pragma unroll 32
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

// Four columns a lane, those past the end 0. Returns the lane's four codes; scale, total and squares are of the group.
__device__ inline uint32_t quantize_warp(const float (&v)[4], float &scale, int &total, int &squares)
{
    float largest = 0.0f;
#pragma unroll
    for (uint32_t i = 0; i < 4; i++) {
        largest = fmaxf(largest, fabsf(v[i]));
    }
    largest = largest_of_warp(largest);
    uint32_t packed = 0;
    total = 0;
    squares = 0;
    scale = 0.0f;
    if (largest >= MQ_QUANTIZE_MIN) {
        const float inverse = MQ_QUANTIZE_MAX / largest;
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) {
            float scaled = v[i] * inverse;
            scaled = scaled < MQ_QUANTIZE_MAX ? scaled : MQ_QUANTIZE_MAX; // a NaN becomes 127
            scaled = scaled > -MQ_QUANTIZE_MAX ? scaled : -MQ_QUANTIZE_MAX;
            const int code = static_cast<int>(rintf(scaled));
            packed |= (static_cast<uint32_t>(code) & 255u) << (8 * i);
            total += code;
            squares += code * code;
        }
        scale = largest / MQ_QUANTIZE_MAX;
    }
    total = sum_warp(total);
    squares = sum_warp(squares);
    return packed;
}

#endif
