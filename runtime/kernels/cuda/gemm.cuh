// gemm.cuh: combined codes times the activations of tokens of one depth, whose codes are the upper bits. Per group of 128 the sum
// of products is an exact int32, and the float steps are those of row_product in scalar.c, groups ascending.
#ifndef MQ_CUDA_GEMM_H
#define MQ_CUDA_GEMM_H

#include "arithmetic.cuh"
#include "batch.cuh"
#include "tensor.cuh"

namespace mq {

// A warp's part of the block: 32 rows x 64 tokens.
constexpr uint32_t WARP_ROWS = 32, WARP_TOKENS = 64;

// One group of a block of rows and tokens in shared memory.
template <uint32_t ROWS, uint32_t TOKENS>
struct alignas(128) stage {
    uint8_t codes[ROWS / MQ_TILE_ROWS][CODE_BYTES];
    int8_t q[TOKENS][MQ_GROUP_SIZE]; // a token's 16-byte pieces in the order piece ^ token % 8
    uint16_t scale_offset[ROWS / MQ_TILE_ROWS][2][MQ_TILE_ROWS];
    float scale[TOKENS], sum[TOKENS];
};

template <uint32_t WARPS_M, uint32_t WARPS_N, uint32_t STAGES>
struct gemm_shape {
    static constexpr uint32_t ROWS = WARPS_M * WARP_ROWS, TOKENS = WARPS_N * WARP_TOKENS, THREADS = WARPS_M * WARPS_N * 32;
    static constexpr size_t SHARED = STAGES * sizeof(stage<ROWS, TOKENS>);
};

template <uint32_t WARPS_M, uint32_t WARPS_N, uint32_t STAGES>
struct gemm_loader {
    using shape = gemm_shape<WARPS_M, WARPS_N, STAGES>;
    static constexpr uint32_t PIECES = shape::TOKENS * 8 / shape::THREADS;
    const batch &b;
    const row_block rows;
    const token_block tokens;
    uint32_t token[PIECES]; // whose pieces this thread copies

    __device__ gemm_loader(const batch &b_, row_block rows_, token_block tokens_) : b(b_), rows(rows_), tokens(tokens_)
    {
        const uint32_t *order = b.tokens[rows.job].order + tokens.begin;
#pragma unroll
        for (uint32_t i = 0; i < PIECES; i++) {
            const uint32_t slot = (threadIdx.x + i * shape::THREADS) / 8;
            token[i] = slot < tokens.count ? order[slot] : UINT32_MAX;
        }
    }

    // Starts the copies of group g.
    __device__ void load(stage<shape::ROWS, shape::TOKENS> &to, uint32_t g) const
    {
        constexpr uint32_t CODE_PIECES = CODE_BYTES / 16, TILES = shape::ROWS / MQ_TILE_ROWS;
        const uint32_t tiles = b.tiles[rows.job];
#pragma unroll
        for (uint32_t i = threadIdx.x; i < TILES * CODE_PIECES; i += shape::THREADS) {
            const uint32_t tile = i / CODE_PIECES, piece = i % CODE_PIECES;
            const uint32_t from = rows.tile + tile < tiles ? rows.tile + tile : tiles - 1; // rows past the end are not stored
            copy_async<16>(to.codes[tile] + piece * 16,
                           b.codes[rows.job] + ((size_t)from * b.groups + g) * CODE_BYTES + piece * 16, true);
        }
#pragma unroll
        for (uint32_t i = 0; i < PIECES; i++) {
            const uint32_t slot = (threadIdx.x + i * shape::THREADS) / 8, piece = threadIdx.x % 8;
            const bool valid = token[i] != UINT32_MAX;
            const size_t at = ((size_t)(valid ? token[i] : 0) * b.groups + g) * MQ_GROUP_SIZE;
            copy_async<16>(to.q[slot] + (piece ^ slot % 8) * 16, b.x.q + at + piece * 16, valid);
        }
        for (uint32_t i = threadIdx.x; i < TILES * 4; i += shape::THREADS) {
            const uint32_t tile = i / 4, piece = i % 4, last = tiles - 1;
            const size_t from = b.tile_begin[rows.job] + (rows.tile + tile < last ? rows.tile + tile : last);
            copy_async<16>(reinterpret_cast<uint8_t *>(to.scale_offset[tile]) + piece * 16,
                           reinterpret_cast<const uint8_t *>(b.job[rows.job].matrix.scale_offset) +
                               (from * b.groups + g) * 64 + piece * 16,
                           true);
        }
        const uint32_t *order = b.tokens[rows.job].order + tokens.begin;
        for (uint32_t i = threadIdx.x; i < shape::TOKENS * 2; i += shape::THREADS) {
            const uint32_t slot = i % shape::TOKENS;
            const bool valid = slot < tokens.count;
            const size_t at = (size_t)(valid ? order[slot] : 0) * b.groups + g;
            if (i < shape::TOKENS) {
                copy_async<4>(to.scale + slot, b.x.scale + at, valid);
            } else {
                copy_async<4>(to.sum + slot, b.x.sum + at, valid);
            }
        }
    }
};

// Of the warp's 32 rows and 64 tokens y[m][n] holds rows 16·m + lane / 4 (+ 8), tokens 8·n + lane % 4 · 2 (+ 1):
// (row, token), (row, token + 1), (row + 8, token), (row + 8, token + 1).
typedef float warp_output[WARP_ROWS / 16][WARP_TOKENS / 8][4];

// Adds one group. drop: low bits of the codes that this depth does not have.
template <bool DROP, uint32_t ROWS, uint32_t TOKENS>
__device__ inline void add_group(warp_output &y, const stage<ROWS, TOKENS> &s, uint32_t warp_row, uint32_t warp_token, uint32_t lane,
                                 uint32_t drop, uint32_t mask, float factor)
{
    constexpr uint32_t M = WARP_ROWS / 16, N = WARP_TOKENS / 8, AT_ONCE = 2;
    uint32_t a[M][4][4];
    float step[M][2], base[M][2];
#pragma unroll
    for (uint32_t m = 0; m < M; m++) {
        const uint32_t tile = warp_row / 16 + m;
#pragma unroll
        for (uint32_t f = 0; f < 4; f++) {
            const uint4 four = *reinterpret_cast<const uint4 *>(s.codes[tile] + f * FRAGMENT + lane * 16);
            a[m][f][0] = four.x, a[m][f][1] = four.y, a[m][f][2] = four.z, a[m][f][3] = four.w;
            if constexpr (DROP) {
#pragma unroll
                for (uint32_t i = 0; i < 4; i++) {
                    a[m][f][i] = a[m][f][i] >> drop & mask;
                }
            }
        }
#pragma unroll
        for (uint32_t half = 0; half < 2; half++) {
            const uint16_t *pair = s.scale_offset[tile][0] + lane / 4 + half * 8;
            step[m][half] = f16_to_f32(pair[0]) * factor;
            base[m][half] = fmaf(step[m][half], 0.5f, -f16_to_f32(pair[MQ_TILE_ROWS]));
        }
    }
#pragma unroll
    for (uint32_t n0 = 0; n0 < N; n0 += AT_ONCE) {
        int32_t dot[AT_ONCE][M][4];
        uint32_t q[AT_ONCE][2][4];
#pragma unroll
        for (uint32_t i = 0; i < AT_ONCE; i++) {
            const uint32_t slot = warp_token + (n0 + i) * 8 + lane % 8;
            load_matrices(q[i][0], s.q[slot] + ((lane / 8) ^ slot % 8) * 16);
            load_matrices(q[i][1], s.q[slot] + ((4 + lane / 8) ^ slot % 8) * 16);
        }
#pragma unroll
        for (uint32_t f = 0; f < 4; f++) {
#pragma unroll
            for (uint32_t i = 0; i < AT_ONCE; i++) {
#pragma unroll
                for (uint32_t m = 0; m < M; m++) {
                    const uint32_t b0 = q[i][f / 2][f % 2 * 2], b1 = q[i][f / 2][f % 2 * 2 + 1];
                    if (f == 0) {
                        multiply(dot[i][m], a[m][f], b0, b1, {MAGIC_BITS, MAGIC_BITS, MAGIC_BITS, MAGIC_BITS});
                    } else {
                        multiply(dot[i][m], a[m][f], b0, b1, dot[i][m]);
                    }
                }
            }
        }
#pragma unroll
        for (uint32_t i = 0; i < AT_ONCE; i++) {
            const uint32_t slot = warp_token + (n0 + i) * 8 + lane % 4 * 2;
            const float2 scale = *reinterpret_cast<const float2 *>(s.scale + slot);
            const float2 sum = *reinterpret_cast<const float2 *>(s.sum + slot);
#pragma unroll
            for (uint32_t m = 0; m < M; m++) {
#pragma unroll
                for (uint32_t k = 0; k < 4; k++) {
                    const float exact = __int_as_float(dot[i][m][k]) - MAGIC;
                    float &out = y[m][n0 + i][k];
                    out = fmaf(step[m][k / 2] * (k % 2 ? scale.y : scale.x), exact, out);
                    out = fmaf(base[m][k / 2], k % 2 ? sum.y : sum.x, out);
                }
            }
        }
    }
}

__device__ inline void put_product(const mq_cuda_job &job, uint32_t row, float sum, float *out)
{
    const float product = job.bias != nullptr ? sum + job.bias[row] : sum;
    out[row] = job.add ? out[row] + product : product;
}

// grid: token blocks (fastest, so that a block of codes is read once from memory) x row blocks of all jobs
template <uint32_t WARPS_M, uint32_t WARPS_N, uint32_t STAGES, uint32_t BLOCKS_PER_SM>
static __global__ void __launch_bounds__(WARPS_M *WARPS_N * 32, BLOCKS_PER_SM) gemm(const __grid_constant__ batch b, uint32_t token_blocks)
{
    using shape = gemm_shape<WARPS_M, WARPS_N, STAGES>;
    using group = stage<shape::ROWS, shape::TOKENS>;
    group *stages = dynamic_shared<group>();
    const row_block rows = find_rows<shape::ROWS>(b, blockIdx.x / token_blocks);
    const mq_cuda_job &job = b.job[rows.job];
    const uint32_t *first = b.tokens[rows.job].first;
    const token_block tokens = find_tokens(first, blockIdx.x % token_blocks, shape::TOKENS);
    if (tokens.count == 0) {
        return;
    }
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, groups = b.groups;
    const uint32_t warp_row = warp / WARPS_N * WARP_ROWS, warp_token = warp % WARPS_N * WARP_TOKENS;
    const gemm_loader<WARPS_M, WARPS_N, STAGES> loader(b, rows, tokens);
    warp_output y = {};
#pragma unroll
    for (uint32_t g = 0; g + 1 < STAGES; g++) {
        if (g < groups) {
            loader.load(stages[g], g);
        }
        copy_commit();
    }
    const uint32_t drop = 2 * (deepest(first) - tokens.depth), mask = (0x100u >> (8 - 2 * tokens.depth)) - 1;
    const uint32_t mask4 = mask * 0x01010101u;
    const float factor = depth_factor(tokens.depth);
    for (uint32_t g = 0, at = 0; g < groups; g++) {
        copy_wait<STAGES - 2>();
        __syncthreads();
        if (g + STAGES - 1 < groups) {
            loader.load(stages[at == 0 ? STAGES - 1 : at - 1], g + STAGES - 1);
        }
        copy_commit();
        if (warp_token < tokens.count) {
            if (drop == 0) {
                add_group<false>(y, stages[at], warp_row, warp_token, lane, 0, 0, factor);
            } else {
                add_group<true>(y, stages[at], warp_row, warp_token, lane, drop, mask4, factor);
            }
        }
        at = at + 1 == STAGES ? 0 : at + 1;
    }
    const uint32_t *order = b.tokens[rows.job].order + tokens.begin;
#pragma unroll
    for (uint32_t n = 0; n < WARP_TOKENS / 8; n++) {
#pragma unroll
        for (uint32_t k = 0; k < 2; k++) {
            const uint32_t slot = warp_token + n * 8 + lane % 4 * 2 + k;
            if (slot < tokens.count) {
                float *out = job.y + (size_t)order[slot] * job.y_stride;
#pragma unroll
                for (uint32_t m = 0; m < WARP_ROWS / 16; m++) {
                    const uint32_t tile = rows.tile + warp_row / 16 + m;
                    const uint32_t row = (b.tile_begin[rows.job] + tile) * MQ_TILE_ROWS + lane / 4;
                    if (tile < b.tiles[rows.job] && row < job.matrix.rows) {
                        put_product(job, row, y[m][n][k], out);
                    }
                    if (tile < b.tiles[rows.job] && row + 8 < job.matrix.rows) {
                        put_product(job, row + 8, y[m][n][k + 2], out);
                    }
                }
            }
        }
    }
}

template <uint32_t WARPS_M, uint32_t WARPS_N, uint32_t STAGES, uint32_t BLOCKS_PER_SM>
inline cudaError_t launch_gemm(const batch &b, cudaStream_t stream)
{
    using shape = gemm_shape<WARPS_M, WARPS_N, STAGES>;
    const uint32_t token_blocks = (b.n + shape::TOKENS - 1) / shape::TOKENS + MQ_SLICE_COUNT - 1;
    auto kernel = gemm<WARPS_M, WARPS_N, STAGES, BLOCKS_PER_SM>;
    const cudaError_t status = allow_shared(kernel, shape::SHARED);
    return status != cudaSuccess
               ? status
               : launch({count_row_blocks(b, shape::ROWS) * token_blocks, shape::THREADS, shape::SHARED, stream, false}, kernel, b, token_blocks);
}

} // namespace mq

#endif
