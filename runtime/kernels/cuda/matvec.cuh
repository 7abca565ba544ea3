// matvec.cuh: slice linears of one token, and of a few that may differ in depth. Reads the planes that the depths ask for and no
// others.
//
// A block of threads computes 32 rows (two tiles). A warp takes whole groups: 512 bytes a slice, 16 a lane, which hold four rows
// times 16 columns twice over. The four 2-bit fields of a byte become codes of their own, bytes of a matrix instruction whose
// other operand is the activations: exact sums over the group, without exchanges between lanes. Then one thread per row adds up
// the groups in ascending order, as kernels/scalar.c does, while the other warps have the next groups' loads in flight.
#ifndef MQ_CUDA_MATVEC_H
#define MQ_CUDA_MATVEC_H

#include "arithmetic.cuh"
#include "control.cuh"
#include "kernels.h"
#include "keys.h"

enum { BLOCK_ROWS = 32, FEW_WARPS = 8, FEW_THREADS = FEW_WARPS * WARP, FEW_TOKENS = 8, MATVEC_MOST = 16, MATVEC_JOBS = 3 };

// Up to three linears that read the same activations.
struct matvec_job {
    mq_matrix matrix[MATVEC_JOBS];
    float *y[MATVEC_JOBS];               // [n][rows]
    uint32_t first_block[MATVEC_JOBS + 1];
    uint32_t count, n;
    const int8_t *q;                     // [n][groups·128]
    const float *scale, *sum;            // [n][groups]
    const uint8_t *depths;               // [positions][depth_stride], of the first linear; NULL: fixed_depth
    uint32_t depth_stride, fixed_depth;
    const float *bias;                   // [rows] joins the product, NULL: none
    bool add;                            // y += product
    const control *state;
};

__host__ __device__ inline uint32_t matvec_blocks(const mq_matrix &w)
{
    return (w.rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
}

__device__ inline uint32_t depth_of_token(const matvec_job &job, uint32_t linear, uint32_t token)
{
    return job.depths == nullptr ? job.fixed_depth
                                 : job.depths[static_cast<size_t>(job.state->position + token) * job.depth_stride + linear];
}

// Words of slices 1..D, 4 rows × 4 columns of fields each, to codes Q_D: byte c of out[j] is that of column 4·j + c.
template <int D>
__device__ inline void codes(const uint32_t (&w)[D], uint32_t (&out)[4])
{
    constexpr uint32_t FIELD = 0x03030303u, NIBBLE = 0x0f0f0f0fu, EVEN = 0x33333333u;
    if constexpr (D == 1) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            out[j] = w[0] >> (2 * j) & FIELD;
        }
    } else { // fields 0 and 2, 1 and 3 of two slices side by side in nibbles
        const uint32_t even = (w[0] << 2 & ~EVEN) | (w[1] & EVEN), odd = (w[0] & ~EVEN) | (w[1] >> 2 & EVEN);
        if constexpr (D == 2) {
            out[0] = even & NIBBLE;
            out[1] = odd & NIBBLE;
            out[2] = even >> 4 & NIBBLE;
            out[3] = odd >> 4 & NIBBLE;
        } else if constexpr (D == 3) {
            constexpr uint32_t HIGH = 0x3c3c3c3cu;
            out[0] = (even << 2 & HIGH) | (w[2] & FIELD);
            out[1] = (odd << 2 & HIGH) | (w[2] >> 2 & FIELD);
            out[2] = (even >> 2 & HIGH) | (w[2] >> 4 & FIELD);
            out[3] = (odd >> 2 & HIGH) | (w[2] >> 6 & FIELD);
        } else {
            const uint32_t low_even = (w[2] << 2 & ~EVEN) | (w[3] & EVEN), low_odd = (w[2] & ~EVEN) | (w[3] >> 2 & EVEN);
            out[0] = (even << 4 & ~NIBBLE) | (low_even & NIBBLE);
            out[1] = (odd << 4 & ~NIBBLE) | (low_odd & NIBBLE);
            out[2] = (even & ~NIBBLE) | (low_even >> 4 & NIBBLE);
            out[3] = (odd & ~NIBBLE) | (low_odd >> 4 & NIBBLE);
        }
    }
}

__device__ inline uint32_t word_of(const uint4 &v, int i)
{
    return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// One group of D slices times the activations of up to 8 tokens: low holds rows 4·(lane / 4) and + 1, high + 2 and + 3, as
// mma_u8s8 lays them out. plane[e][half]: 16 bytes of slice e.
template <int D>
__device__ inline void group_product(const uint4 (&plane)[D][2], const uint4 (&x)[2], int (&low)[4], int (&high)[4])
{
    uint32_t code[4][2][4]; // [row][half][field]
#pragma unroll
    for (int row = 0; row < 4; row++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            uint32_t w[D];
#pragma unroll
            for (int e = 0; e < D; e++) {
                w[e] = word_of(plane[e][half], row);
            }
            codes<D>(w, code[row][half]);
        }
    }
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const uint32_t b0 = word_of(x[0], j), b1 = word_of(x[1], j);
        mma_u8s8(low, code[0][0][j], code[1][0][j], code[0][1][j], code[1][1][j], b0, b1);
        mma_u8s8(high, code[2][0][j], code[3][0][j], code[2][1][j], code[3][1][j], b0, b1);
    }
}

// Where a lane reads in the first group of its tile; half 1 is 256 bytes on, the next group 512.
__device__ inline size_t lane_offset(const mq_matrix &w, uint32_t block)
{
    const uint32_t lane = threadIdx.x % WARP, quarter = lane / 4;
    uint32_t tile = block * 2 + quarter / 4;
    tile = tile < w.tiles ? tile : w.tiles - 1; // an odd last tile is read twice
    return static_cast<size_t>(tile) * w.groups * MQ_TILE_BYTES + lane % 4 * 64 + quarter % 4 * 16;
}

// Scales of the lane's row in the first group; the offset is 16 further, the next group 32.
__device__ inline const uint16_t *lane_scales(const mq_matrix &w, uint32_t block)
{
    const uint32_t lane = threadIdx.x % WARP;
    uint32_t tile = block * 2 + lane / MQ_TILE_ROWS;
    tile = tile < w.tiles ? tile : w.tiles - 1;
    return w.scale_offset + static_cast<size_t>(tile) * w.groups * 2 * MQ_TILE_ROWS + lane % MQ_TILE_ROWS;
}

// The activations that a lane brings: those of 16 columns in each half of a group.
__device__ inline void load_activations(const int8_t *q, uint32_t group, uint4 (&x)[2])
{
    const uint4 *at = reinterpret_cast<const uint4 *>(q + static_cast<size_t>(group) * MQ_GROUP_SIZE) + threadIdx.x % 4;
    x[0] = at[0];
    x[1] = at[4];
}

__device__ inline uint32_t linear_of_block(const matvec_job &job, uint32_t block)
{
    uint32_t linear = 0;
    while (linear + 1 < job.count && block >= job.first_block[linear + 1]) {
        linear++;
    }
    return linear;
}

__device__ inline void write_row(const matvec_job &job, uint32_t linear, uint32_t token, uint32_t row, float value)
{
    const uint32_t rows = job.matrix[linear].rows;
    if (row < rows) {
        float *y = job.y[linear] + static_cast<size_t>(token) * rows + row;
        value = job.bias != nullptr ? value + job.bias[row] : value;
        *y = job.add ? *y + value : value;
    }
}

// --- one token ----------------------------------------------------------------------------------------------------------

// Warps of a block of threads: MANY where there are few rows, one such block a multiprocessor; SOME otherwise, two.
enum { SOME_WARPS = 8, MANY_WARPS = 16 };

// Of the base slice, the first EARLY groups of a warp are asked for before the depth is known.
enum { EARLY = 2, MOST_UNROLL = 4 };

// Groups of a warp whose loads are in flight at once, for D slices: what the registers hold.
__host__ __device__ constexpr uint32_t unroll_of(int depth)
{
    return depth == 1 ? MOST_UNROLL : 2;
}

template <uint32_t WARPS>
struct one_shared {
    float4 term[2][MOST_UNROLL * WARPS][BLOCK_ROWS]; // of a row and group: scale · scale of x, base, product, sum of x
    float y[BLOCK_ROWS];
};

// One group on its way to a warp.
template <int D>
struct group_loads {
    uint4 plane[D][2], x[2];
    float scale, sum;
    uint16_t step, offset;
};

// Row blocks begin, begin + stride, ... of a linear: the loads of the next groups, of the next rows when these have no more, are in
// flight while these are multiplied and added up.
template <int D, uint32_t WARPS>
__device__ inline void one_product(const matvec_job &job, uint32_t linear, uint32_t begin, uint32_t stride,
                                   const uint4 (&early)[EARLY][2], one_shared<WARPS> &s)
{
    constexpr uint32_t UNROLL = unroll_of(D), GROUPS = UNROLL * WARPS;
    const mq_matrix &w = job.matrix[linear];
    const uint32_t lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, groups = w.groups, blocks = matvec_blocks(w);
    const bool same_x = groups <= GROUPS; // one round of groups: the activations stay
    group_loads<D> in[UNROLL];
    const auto load_x = [&](uint32_t first) {
#pragma unroll
        for (uint32_t u = 0; u < UNROLL; u++) {
            const uint32_t g = first + u * WARPS + warp;
            if (g < groups) {
                load_activations(job.q, g, in[u].x);
                in[u].scale = job.scale[g];
                in[u].sum = job.sum[g];
            }
        }
    };
    const auto load_planes = [&](uint32_t block, uint32_t first, bool but_early) {
        const size_t offset = lane_offset(w, block);
        const uint16_t *scales = lane_scales(w, block);
#pragma unroll
        for (uint32_t u = 0; u < UNROLL; u++) {
            const uint32_t g = first + u * WARPS + warp;
            if (g < groups) {
#pragma unroll
                for (int e = 0; e < D; e++) {
                    const uint8_t *at = w.plane[e] + offset + static_cast<size_t>(g) * MQ_TILE_BYTES;
                    if (e > 0 || u >= EARLY || !but_early) {
                        in[u].plane[e][0] = load_stream(at);
                        in[u].plane[e][1] = load_stream(at + MQ_TILE_BYTES / 2);
                    }
                }
                in[u].step = scales[static_cast<size_t>(g) * 2 * MQ_TILE_ROWS];
                in[u].offset = scales[static_cast<size_t>(g) * 2 * MQ_TILE_ROWS + MQ_TILE_ROWS];
            }
        }
    };
#pragma unroll
    for (uint32_t u = 0; u < EARLY; u++) {
        in[u].plane[0][0] = early[u][0];
        in[u].plane[0][1] = early[u][1];
    }
    load_x(0);
    load_planes(begin, 0, true);
    for (uint32_t block = begin, first = 0, turn = 0; block < blocks; turn++) {
#pragma unroll
        for (uint32_t u = 0; u < UNROLL; u++) {
            const uint32_t g = first + u * WARPS + warp;
            if (g < groups) {
                int low[4] = {0, 0, 0, 0}, high[4] = {0, 0, 0, 0};
                group_product<D>(in[u].plane, in[u].x, low, high);
                const uint32_t own = lane % 4; // all four lanes of a quarter have its rows: each keeps one
                const int dot = own == 0 ? low[0] : own == 1 ? low[2] : own == 2 ? high[0] : high[2];
                const float step = f16_to_f32(in[u].step) * depth_factor(D);
                s.term[turn % 2][g - first][lane] = make_float4(
                    step * in[u].scale, fmaf(step, 0.5f, -f16_to_f32(in[u].offset)), static_cast<float>(dot), in[u].sum);
            }
        }
        const bool rows_end = first + GROUPS >= groups;
        const uint32_t next_block = rows_end ? block + stride : block, next_first = rows_end ? 0 : first + GROUPS;
        if (next_block < blocks) {
            load_planes(next_block, next_first, false);
            if (!same_x) {
                load_x(next_first);
            }
        }
        __syncthreads();
        if (warp == turn % WARPS) { // the others go on: the terms of the turn after next wait for the next barrier
            float y = first == 0 ? 0.0f : s.y[lane];
            const uint32_t count = rows_end ? groups - first : GROUPS;
#pragma unroll 8
            for (uint32_t i = 0; i < count; i++) {
                const float4 term = s.term[turn % 2][i][lane];
                y = fmaf(term.x, term.z, y);
                y = fmaf(term.y, term.w, y);
            }
            if (rows_end) {
                write_row(job, linear, 0, block * BLOCK_ROWS + lane, y);
            } else {
                s.y[lane] = y;
            }
        }
        block = next_block;
        first = next_first;
    }
}

// job.first_block counts blocks of threads, among which the row blocks of a linear are dealt out.
template <uint32_t WARPS>
static __global__ void __launch_bounds__(WARPS * WARP, WARPS == SOME_WARPS ? 2 : 1) matvec_one(const __grid_constant__ matvec_job job)
{
    one_shared<WARPS> &shared = *dynamic_shared<one_shared<WARPS>>();
    const uint32_t linear = linear_of_block(job, blockIdx.x), begin = blockIdx.x - job.first_block[linear];
    const uint32_t stride = job.first_block[linear + 1] - job.first_block[linear];
    const mq_matrix &w = job.matrix[linear];
    const size_t offset = lane_offset(w, begin);
    uint4 early[EARLY][2];
    pdl_launch();
#pragma unroll
    for (uint32_t u = 0; u < EARLY; u++) {
        const uint32_t g = u * WARPS + threadIdx.x / WARP;
        if (g < w.groups) {
            const uint8_t *at = w.plane[0] + offset + static_cast<size_t>(g) * MQ_TILE_BYTES;
            early[u][0] = load_stream(at);
            early[u][1] = load_stream(at + MQ_TILE_BYTES / 2);
        }
    }
    pdl_wait();
    switch (depth_of_token(job, linear, 0)) {
    case 1: one_product<1>(job, linear, begin, stride, early, shared); break;
    case 2: one_product<2>(job, linear, begin, stride, early, shared); break;
    case 3: one_product<3>(job, linear, begin, stride, early, shared); break;
    default: one_product<4>(job, linear, begin, stride, early, shared); break;
    }
}

// --- a few tokens -------------------------------------------------------------------------------------------------------

enum { FEW_UNROLL = 2, FEW_GROUPS = FEW_UNROLL * FEW_WARPS };

struct few_shared {
    float scale[2][FEW_GROUPS][BLOCK_ROWS], offset[2][FEW_GROUPS][BLOCK_ROWS];
    float product[2][FEW_GROUPS][FEW_TOKENS][BLOCK_ROWS];
    float y[FEW_TOKENS][BLOCK_ROWS];
};

// Q_D · x for every token at its own depth: the sums of a slice join those of the slices before, four times as heavy.
__device__ inline void few_group(const mq_matrix &w, size_t at, uint32_t deepest, const uint32_t (&depth)[2], const uint4 (&x)[2],
                                 int (&low)[4], int (&high)[4])
{
    for (uint32_t e = 0; e < deepest; e++) {
        uint4 plane[1][2];
        plane[0][0] = load_stream(w.plane[e] + at);
        plane[0][1] = load_stream(w.plane[e] + at + MQ_TILE_BYTES / 2);
        int a[4] = {0, 0, 0, 0}, b[4] = {0, 0, 0, 0};
        group_product<1>(plane, x, a, b);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (e < depth[i % 2]) {
                low[i] = 4 * low[i] + a[i];
                high[i] = 4 * high[i] + b[i];
            }
        }
    }
}

// Tokens 8·blockIdx.y and on.
static __global__ void __launch_bounds__(FEW_THREADS) matvec_few(const __grid_constant__ matvec_job job)
{
    __shared__ few_shared s;
    const uint32_t linear = linear_of_block(job, blockIdx.x), block = blockIdx.x - job.first_block[linear];
    const mq_matrix &w = job.matrix[linear];
    const uint32_t lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, groups = w.groups;
    const uint32_t begin = blockIdx.y * FEW_TOKENS, left = job.n - begin, tokens = left < FEW_TOKENS ? left : FEW_TOKENS;
    const size_t offset = lane_offset(w, block);
    const uint16_t *scales = lane_scales(w, block);
    pdl_launch();
    pdl_wait();
    uint32_t deepest = 0, depth[2] = {0, 0}; // of the tokens whose sums this lane holds
    for (uint32_t t = 0; t < tokens; t++) {
        const uint32_t d = depth_of_token(job, linear, begin + t);
        deepest = d > deepest ? d : deepest;
        if (t / 2 == lane % 4) {
            depth[t % 2] = d;
        }
    }
    const uint32_t own = lane / 4 < tokens ? lane / 4 : 0; // the token whose activations this lane brings
    const int8_t *q = job.q + static_cast<size_t>(begin + own) * groups * MQ_GROUP_SIZE;
    const uint32_t mine = warp < tokens ? depth_of_token(job, linear, begin + warp) : 1;
    for (uint32_t first = 0, chunk = 0; first < groups; first += FEW_GROUPS, chunk++) {
        const uint32_t half = chunk % 2;
#pragma unroll
        for (uint32_t u = 0; u < FEW_UNROLL; u++) {
            const uint32_t g = first + u * FEW_WARPS + warp;
            if (g < groups) {
                uint4 x[2];
                int low[4] = {0, 0, 0, 0}, high[4] = {0, 0, 0, 0};
                load_activations(q, g, x);
                few_group(w, offset + static_cast<size_t>(g) * MQ_TILE_BYTES, deepest, depth, x, low, high);
                const uint32_t i = g - first, row = lane / 4 * 4, token = lane % 4 * 2;
                for (uint32_t t = 0; t < 2; t++) {
                    s.product[half][i][token + t][row] = static_cast<float>(low[t]);
                    s.product[half][i][token + t][row + 1] = static_cast<float>(low[2 + t]);
                    s.product[half][i][token + t][row + 2] = static_cast<float>(high[t]);
                    s.product[half][i][token + t][row + 3] = static_cast<float>(high[2 + t]);
                }
                s.scale[half][i][lane] = f16_to_f32(scales[static_cast<size_t>(g) * 2 * MQ_TILE_ROWS]);
                s.offset[half][i][lane] = f16_to_f32(scales[static_cast<size_t>(g) * 2 * MQ_TILE_ROWS + MQ_TILE_ROWS]);
            }
        }
        __syncthreads();
        if (warp < tokens) { // this warp adds up the groups of token `warp`
            const size_t at = static_cast<size_t>(begin + warp) * groups + first;
            const uint32_t count = groups - first < FEW_GROUPS ? groups - first : FEW_GROUPS;
            const float factor = depth_factor(mine);
            float y = chunk == 0 ? 0.0f : s.y[warp][lane];
            for (uint32_t i = 0; i < count; i++) {
                const float step = s.scale[half][i][lane] * factor;
                y = fmaf(step * job.scale[at + i], s.product[half][i][warp][lane], y);
                y = fmaf(fmaf(step, 0.5f, -s.offset[half][i][lane]), job.sum[at + i], y);
            }
            s.y[warp][lane] = y;
        }
    }
    if (warp < tokens) {
        write_row(job, linear, begin + warp, block * BLOCK_ROWS + lane, s.y[warp][lane]);
    }
}

#endif
