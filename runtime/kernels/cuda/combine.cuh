// combine.cuh: planes, up to the deepest depth that a token of the batch has, to 8-bit codes in the order in which the lanes of a
// warp multiply them. Once per linear and batch: the multiplication then costs the same at every depth.
#ifndef MQ_CUDA_COMBINE_H
#define MQ_CUDA_COMBINE_H

#include "batch.cuh"

namespace mq {

constexpr uint32_t COMBINE_WARPS = 8;

// A fragment's lanes are stored so that the words of a plane, which spread over all of them, meet different banks.
__device__ inline uint32_t bank_lane(uint32_t fragment, uint32_t lane)
{
    return lane ^ fragment ^ ((lane >> 4 & 1u) << 2);
}

// One tile and group by one warp. A lane reads 4 neighbouring rows' words of a plane: columns 16·v + 4·j + c, v = lane / 4.
template <uint32_t DEPTH>
__device__ inline void combine_tile(const mq_matrix &w, size_t place, uint32_t lane, uint32_t *staged, uint8_t *codes)
{
    uint32_t words[DEPTH][4];
#pragma unroll
    for (uint32_t e = 0; e < DEPTH; e++) {
        const uint4 four = *reinterpret_cast<const uint4 *>(w.plane[e] + place * MQ_TILE_BYTES + lane * 16);
        words[e][0] = four.x, words[e][1] = four.y, words[e][2] = four.z, words[e][3] = four.w;
    }
    const uint32_t v = lane / 4, fragment = v / 2;
#pragma unroll
    for (uint32_t i = 0; i < 4; i++) {
        const uint32_t row = lane % 4 * 4 + i;
#pragma unroll
        for (uint32_t j = 0; j < 4; j++) {
            uint32_t code = 0;
#pragma unroll
            for (uint32_t e = 0; e < DEPTH; e++) {
                const uint32_t up = 2 * (DEPTH - 1 - e), field = 2 * j; // where the bits go, where they are
                code |= (up > field ? words[e][i] << (up - field) : words[e][i] >> (field - up)) & (0x03030303u << up);
            }
            staged[fragment * 128 + bank_lane(fragment, row % 8 * 4 + j) * 4 + v % 2 * 2 + row / 8] = code;
        }
    }
    __syncwarp();
#pragma unroll
    for (uint32_t f = 0; f < 4; f++) {
        const uint4 four = *reinterpret_cast<const uint4 *>(staged + f * 128 + bank_lane(f, lane) * 4);
        *reinterpret_cast<uint4 *>(codes + f * FRAGMENT + lane * 16) = four;
    }
}

// grid: (items / COMBINE_WARPS, jobs)
static __global__ void __launch_bounds__(COMBINE_WARPS * 32) combine(const __grid_constant__ batch b)
{
    __shared__ __align__(16) uint32_t staged[COMBINE_WARPS][CODE_BYTES / 4];
    const uint32_t at = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const mq_cuda_job &job = b.job[at];
    const uint32_t depth = deepest(b.tokens[at].first);
    const size_t item = (size_t)blockIdx.x * COMBINE_WARPS + warp;
    if (depth == 0 || item >= (size_t)b.tiles[at] * b.groups) {
        return;
    }
    const size_t place = (size_t)b.tile_begin[at] * b.groups + item;
    uint8_t *codes = b.codes[at] + item * CODE_BYTES;
    switch (depth) {
    case 1: combine_tile<1>(job.matrix, place, lane, staged[warp], codes); break;
    case 2: combine_tile<2>(job.matrix, place, lane, staged[warp], codes); break;
    case 3: combine_tile<3>(job.matrix, place, lane, staged[warp], codes); break;
    default: combine_tile<4>(job.matrix, place, lane, staged[warp], codes); break;
    }
}

inline cudaError_t launch_combine(const batch &b, cudaStream_t stream)
{
    uint32_t tiles = 0;
    for (uint32_t i = 0; i < b.count; i++) {
        tiles = b.tiles[i] > tiles ? b.tiles[i] : tiles;
    }
    const size_t items = (size_t)tiles * b.groups;
    const dim3 grid((uint32_t)((items + COMBINE_WARPS - 1) / COMBINE_WARPS), b.count);
    return launch({grid, COMBINE_WARPS * 32, 0, stream, false}, combine, b);
}

} // namespace mq

#endif
