// few_tokens.cuh: linears over at most SMALL tokens, bound by memory: planes are read once, as deep as the deepest token needs, and
// every token takes from them what its own depth has.
#ifndef MQ_CUDA_FEW_TOKENS_H
#define MQ_CUDA_FEW_TOKENS_H

#include "arithmetic.cuh"
#include "batch.cuh"
#include "tensor.cuh"

namespace mq {

constexpr uint32_t SMALL_WARPS = 8;

// A warp multiplies every SMALL_WARPS-th group; then a thread adds the groups of one row and token in their order.
// grid: row tiles of all jobs, RT at a time; NT: eights of tokens.
template <uint32_t RT, uint32_t NT>
static __global__ void __launch_bounds__(SMALL_WARPS * 32) small(const __grid_constant__ batch b)
{
    constexpr uint32_t TOKENS = NT * 8, ROWS = RT * MQ_TILE_ROWS, OUTPUTS = ROWS * TOKENS / (SMALL_WARPS * 32);
    static_assert(OUTPUTS * SMALL_WARPS * 32 == ROWS * TOKENS || OUTPUTS == 0, "outputs spread evenly over the threads");
    constexpr uint32_t EACH = OUTPUTS == 0 ? 1 : OUTPUTS, PAD = TOKENS + 1;
    __shared__ int32_t dots[2][SMALL_WARPS][ROWS * PAD];
    __shared__ uint32_t depths[SMALL];
    uint32_t at = 0, tile = blockIdx.x * RT;
    while (tile >= (b.tiles[at] + RT - 1) / RT * RT) {
        tile -= (b.tiles[at] + RT - 1) / RT * RT;
        at++;
    }
    const mq_cuda_job &job = b.job[at];
    const mq_matrix &w = job.matrix;
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = lane % 4, eighth = lane / 4, groups = b.groups;
    if (threadIdx.x < SMALL) {
        depths[threadIdx.x] = threadIdx.x < b.n ? job.depths[threadIdx.x * job.depth_stride] : 0;
    }
    __syncthreads();
    uint32_t present = 0, most = 0; // bit d: a token has depth d
    for (uint32_t t = 0; t < b.n; t++) {
        present |= 1u << depths[t];
        most = depths[t] > most ? depths[t] : most;
    }
    uint32_t column_depth[NT];
#pragma unroll
    for (uint32_t n = 0; n < NT; n++) {
        column_depth[n] = depths[n * 8 + eighth];
    }
    // The outputs of this thread are of one row; rows and tokens past the end are computed as others and not stored.
    static_assert(SMALL_WARPS * 32 % ROWS == 0, "a thread keeps its row");
    const uint32_t my_row = threadIdx.x % ROWS, my_tile = tile + my_row / 16 < b.tiles[at] ? tile + my_row / 16 : tile;
    const uint16_t *pairs = w.scale_offset + ((size_t)b.tile_begin[at] + my_tile) * groups * 2 * MQ_TILE_ROWS + my_row % 16;
    const bool adds = threadIdx.x < ROWS * TOKENS;
    float y[EACH] = {}, factor[EACH];
    size_t token_at[EACH];
#pragma unroll
    for (uint32_t i = 0; i < EACH; i++) {
        const uint32_t t = (threadIdx.x + i * SMALL_WARPS * 32) / ROWS;
        token_at[i] = (size_t)(t < b.n ? t : 0) * groups;
        factor[i] = depth_factor(t < b.n ? depths[t] : 1);
    }
    for (uint32_t g0 = 0, turn = 0; g0 < groups; g0 += SMALL_WARPS, turn ^= 1) {
        const uint32_t g = g0 + warp;
        // What the float steps of this turn need is asked for now and used after the products.
        uint16_t scales[SMALL_WARPS], offsets[SMALL_WARPS];
        float x_scale[EACH][SMALL_WARPS], x_sum[EACH][SMALL_WARPS];
#pragma unroll
        for (uint32_t k = 0; k < SMALL_WARPS; k++) {
            const bool valid = adds && g0 + k < groups;
            scales[k] = valid ? pairs[(g0 + k) * 2 * MQ_TILE_ROWS] : 0;
            offsets[k] = valid ? pairs[(g0 + k) * 2 * MQ_TILE_ROWS + MQ_TILE_ROWS] : 0;
#pragma unroll
            for (uint32_t i = 0; i < EACH; i++) {
                x_scale[i][k] = valid ? b.x.scale[token_at[i] + g0 + k] : 0.0f;
                x_sum[i][k] = valid ? b.x.sum[token_at[i] + g0 + k] : 0.0f;
            }
        }
        if (g < groups) {
            uint32_t q[NT][2][4];
#pragma unroll
            for (uint32_t n = 0; n < NT; n++) {
                const uint32_t t = n * 8 + eighth;
#pragma unroll
                for (uint32_t half = 0; half < 2; half++) {
                    uint4 four = {0, 0, 0, 0};
                    if (t < b.n) {
                        four = *reinterpret_cast<const uint4 *>(b.x.q + ((size_t)t * groups + g) * MQ_GROUP_SIZE + half * 64 + quad * 16);
                    }
                    q[n][half][0] = four.x, q[n][half][1] = four.y, q[n][half][2] = four.z, q[n][half][3] = four.w;
                }
            }
#pragma unroll
            for (uint32_t r = 0; r < RT; r++) {
                if (tile + r >= b.tiles[at]) {
                    break;
                }
                const size_t place = (((size_t)b.tile_begin[at] + tile + r) * groups + g) * MQ_TILE_BYTES + quad * 64 + eighth * 4;
                uint32_t words[MQ_SLICE_COUNT][4];
#pragma unroll
                for (uint32_t e = 0; e < MQ_SLICE_COUNT; e++) {
#pragma unroll
                    for (uint32_t i = 0; i < 4; i++) { // rows eighth and + 8, then the same of v + 4
                        words[e][i] = e < most ? *reinterpret_cast<const uint32_t *>(w.plane[e] + place + i / 2 * 256 + i % 2 * 32) : 0;
                    }
                }
                int32_t dot[NT][4] = {};
                uint32_t code[4][4] = {}; // [j][word]: columns 16·v + 4·j + c, whose activations are word j of 16 bytes
#pragma unroll
                for (uint32_t e = 0; e < MQ_SLICE_COUNT; e++) {
                    if (e < most) {
#pragma unroll
                        for (uint32_t j = 0; j < 4; j++) {
#pragma unroll
                            for (uint32_t i = 0; i < 4; i++) {
                                code[j][i] = code[j][i] << 2 | (words[e][i] >> (2 * j) & 0x03030303u);
                            }
                        }
                        if (present >> (e + 1) & 1u) {
#pragma unroll
                            for (uint32_t n = 0; n < NT; n++) {
                                const uint32_t mine = column_depth[n] == e + 1 ? 0xffffffffu : 0;
#pragma unroll
                                for (uint32_t j = 0; j < 4; j++) {
                                    multiply(dot[n], code[j], q[n][0][j] & mine, q[n][1][j] & mine, dot[n]);
                                }
                            }
                        }
                    }
                }
#pragma unroll
                for (uint32_t n = 0; n < NT; n++) {
#pragma unroll
                    for (uint32_t k = 0; k < 4; k++) {
                        dots[turn][warp][(r * 16 + eighth + k / 2 * 8) * PAD + n * 8 + quad * 2 + k % 2] = dot[n][k];
                    }
                }
            }
        }
        __syncthreads(); // the dots of the turn before last are read by now, so one barrier a turn is enough
#pragma unroll
        for (uint32_t k = 0; k < SMALL_WARPS; k++) {
            if (adds && g0 + k < groups) {
                const float scale = f16_to_f32(scales[k]), offset = f16_to_f32(offsets[k]);
#pragma unroll
                for (uint32_t i = 0; i < EACH; i++) {
                    const float step = scale * factor[i], base = fmaf(step, 0.5f, -offset);
                    const int32_t dot = dots[turn][k][my_row * PAD + (threadIdx.x + i * SMALL_WARPS * 32) / ROWS];
                    y[i] = fmaf(step * x_scale[i][k], (float)dot, y[i]);
                    y[i] = fmaf(base, x_sum[i][k], y[i]);
                }
            }
        }
    }
#pragma unroll
    for (uint32_t i = 0; i < EACH; i++) {
        const uint32_t output = threadIdx.x + i * SMALL_WARPS * 32, r = output % ROWS, t = output / ROWS;
        const uint32_t row = (b.tile_begin[at] + tile) * MQ_TILE_ROWS + r;
        if (adds && t < b.n && tile + r / 16 < b.tiles[at] && row < w.rows) {
            job.y[(size_t)t * job.y_stride + row] = y[i];
        }
    }
}

template <uint32_t RT, uint32_t NT>
inline cudaError_t launch_small(const batch &b, cudaStream_t stream)
{
    uint32_t blocks = 0;
    for (uint32_t i = 0; i < b.count; i++) {
        blocks += (b.tiles[i] + RT - 1) / RT;
    }
    return launch({blocks, SMALL_WARPS * 32, 0, stream, false}, small<RT, NT>, b);
}

} // namespace mq

#endif
