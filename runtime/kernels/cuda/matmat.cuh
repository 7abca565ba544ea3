// matmat.cuh: slice linears over the tokens of a batch, on tensor cores, with the bits of kernels/scalar.c.
//
// More than SMALL tokens: `combine` turns the planes, up to the deepest depth that any token has, into 8-bit codes once, in the
// order in which a warp's lanes multiply them; `gemm` multiplies a block of rows with a block of tokens of one depth, dropping
// the low bits that this depth does not have. Per group of 128 the sum of products is an exact int32, and the float steps are
// those of row_product in scalar.c, groups ascending. Few tokens: `small` reads the planes themselves, as deep as needed.
//
// Nothing here depends on the host knowing the depths: a grid has a block for every place that the tokens may need, and those
// without tokens end at once.
#ifndef MQ_CUDA_MATMAT_CUH
#define MQ_CUDA_MATMAT_CUH

#include "arithmetic.cuh"
#include "kernels.h"
#include "keys.h"
#include "launch.cuh"
#include "tensor.cuh"

// One linear of a batch. Pointers are the device's, also those in `matrix`.
struct mq_cuda_job {
    mq_matrix matrix;
    const uint8_t *depths; // of token t: depths[t · depth_stride]
    size_t depth_stride;
    float *y; // [n][y_stride]
    size_t y_stride;
};

namespace mq {

constexpr uint32_t MAX_JOBS = 3, SMALL = 16;
constexpr uint32_t LEAST_TILES = 8; // that a launch has room for, unless it ends a job
constexpr uint32_t CODE_BYTES = MQ_TILE_ROWS * MQ_GROUP_SIZE; // of a tile as 8-bit codes
constexpr uint32_t FRAGMENT = 512;                            // bytes of 16 rows x 32 codes: [lane][4 words]

// A job's tokens by depth: those of depth d are order[first[d] .. first[d + 1] − 1].
struct sorted {
    uint32_t *order; // [n]
    uint32_t *first; // [6]
};

// What a launch works on: `tiles` row tiles of each job from tile_begin on.
struct batch {
    mq_cuda_job job[MAX_JOBS];
    sorted tokens[MAX_JOBS];  // more than SMALL tokens have them
    uint8_t *codes[MAX_JOBS]; // [tiles][groups][CODE_BYTES]
    uint32_t tile_begin[MAX_JOBS], tiles[MAX_JOBS];
    uint32_t count, n, groups;
    mq_activations x;
};

// --- sort: tokens by depth ---------------------------------------------------------------------------------------------

constexpr uint32_t SORT_THREADS = 256, MAX_TOKENS = 65535;

// A thread counts the depths of some neighbouring tokens, 16 bits a depth; the sums over all threads before it are where its
// tokens go. grid: jobs
static __global__ void __launch_bounds__(SORT_THREADS) sort(const __grid_constant__ batch b)
{
    __shared__ unsigned long long warp_total[SORT_THREADS / 32];
    const mq_cuda_job &job = b.job[blockIdx.x];
    const sorted &to = b.tokens[blockIdx.x];
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint32_t each = (b.n + SORT_THREADS - 1) / SORT_THREADS, begin = threadIdx.x * each;
    const uint32_t end = begin + each < b.n ? begin + each : b.n;
    unsigned long long mine = 0;
    for (uint32_t t = begin; t < end; t++) {
        mine += 1ull << 16 * (job.depths[t * job.depth_stride] - 1);
    }
    unsigned long long before = mine;
    for (uint32_t distance = 1; distance < 32; distance *= 2) {
        const unsigned long long other = __shfl_up_sync(0xffffffffu, before, distance);
        before += lane >= distance ? other : 0;
    }
    if (lane == 31) {
        warp_total[warp] = before;
    }
    __syncthreads();
    unsigned long long total = 0;
    before -= mine;
    for (uint32_t w = 0; w < SORT_THREADS / 32; w++) {
        before += w < warp ? warp_total[w] : 0;
        total += warp_total[w];
    }
    uint32_t next[MQ_SLICE_COUNT], first = 0;
    for (uint32_t d = 0; d < MQ_SLICE_COUNT; d++) {
        next[d] = first + (uint32_t)(before >> 16 * d & 0xffffu);
        if (threadIdx.x == 0) {
            to.first[d + 1] = first;
        }
        first += (uint32_t)(total >> 16 * d & 0xffffu);
    }
    if (threadIdx.x == 0) {
        to.first[0] = 0;
        to.first[MQ_SLICE_COUNT + 1] = first;
    }
    for (uint32_t t = begin; t < end; t++) {
        const uint32_t depth = job.depths[t * job.depth_stride] - 1;
#pragma unroll
        for (uint32_t d = 0; d < MQ_SLICE_COUNT; d++) {
            if (d == depth) {
                to.order[next[d]++] = t;
            }
        }
    }
}

// The deepest depth that a token has, 0 without tokens.
__device__ inline uint32_t deepest(const uint32_t *first)
{
    uint32_t depth = MQ_SLICE_COUNT;
    while (depth > 0 && first[depth + 1] == first[depth]) {
        depth--;
    }
    return depth;
}

// --- combine: planes to codes ------------------------------------------------------------------------------------------

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

// --- gemm: codes times activations -------------------------------------------------------------------------------------

// Adding 1.5·2^23 to an integer below 2^22 as bits of a float and then subtracting it is an exact conversion. A group's sum is
// at most 128·255·127 < 2^22, and the first product of a group adds the constant for nothing.
constexpr int32_t MAGIC_BITS = 0x4b400000;
constexpr float MAGIC = 12582912.0f;

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

// Tokens of one depth, order[begin .. begin + count − 1].
struct token_block {
    uint32_t depth, begin, count;
};

// The index-th block of at most `size` tokens of one depth; count 0 past the last.
__device__ inline token_block find_tokens(const uint32_t *first, uint32_t index, uint32_t size)
{
    for (uint32_t depth = 1; depth <= MQ_SLICE_COUNT; depth++) {
        const uint32_t tokens = first[depth + 1] - first[depth], blocks = (tokens + size - 1) / size;
        if (index < blocks) {
            const uint32_t left = tokens - index * size;
            return {depth, first[depth] + index * size, left < size ? left : size};
        }
        index -= blocks;
    }
    return {0, 0, 0};
}

template <uint32_t WARPS_M, uint32_t WARPS_N, uint32_t STAGES>
struct gemm_shape {
    static constexpr uint32_t ROWS = WARPS_M * WARP_ROWS, TOKENS = WARPS_N * WARP_TOKENS, THREADS = WARPS_M * WARPS_N * 32;
    static constexpr size_t SHARED = STAGES * sizeof(stage<ROWS, TOKENS>);
};

// The rows of a block, in a job.
struct row_block {
    uint32_t job, tile; // tile: within the launch's tiles of the job
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

// grid: token blocks (fastest, so that a block of codes is read once from memory) x row blocks of all jobs
template <uint32_t WARPS_M, uint32_t WARPS_N, uint32_t STAGES, uint32_t BLOCKS_PER_SM>
static __global__ void __launch_bounds__(WARPS_M *WARPS_N * 32, BLOCKS_PER_SM) gemm(const __grid_constant__ batch b, uint32_t token_blocks)
{
    using shape = gemm_shape<WARPS_M, WARPS_N, STAGES>;
    using group = stage<shape::ROWS, shape::TOKENS>;
    group *stages = dynamic_shared<group>();
    row_block rows = {0, blockIdx.x / token_blocks * (shape::ROWS / MQ_TILE_ROWS)};
    while (rows.tile >= (b.tiles[rows.job] + shape::ROWS / 16 - 1) / (shape::ROWS / 16) * (shape::ROWS / 16)) {
        rows.tile -= (b.tiles[rows.job] + shape::ROWS / 16 - 1) / (shape::ROWS / 16) * (shape::ROWS / 16);
        rows.job++;
    }
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
                        out[row] = y[m][n][k];
                    }
                    if (tile < b.tiles[rows.job] && row + 8 < job.matrix.rows) {
                        out[row + 8] = y[m][n][k + 2];
                    }
                }
            }
        }
    }
}

// --- small: few tokens, planes read as deep as needed ------------------------------------------------------------------

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
    float y[EACH] = {};
    for (uint32_t g0 = 0, turn = 0; g0 < groups; g0 += SMALL_WARPS, turn ^= 1) {
        const uint32_t g = g0 + warp;
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
        for (uint32_t i = 0; i < EACH; i++) {
            const uint32_t output = threadIdx.x + i * SMALL_WARPS * 32, r = output % ROWS, t = output / ROWS;
            if (t < b.n && tile + r / 16 < b.tiles[at]) {
                const float factor = depth_factor(depths[t]);
                const size_t place = ((size_t)b.tile_begin[at] + tile + r / 16) * groups + g0;
                for (uint32_t k = 0; k < SMALL_WARPS && g0 + k < groups; k++) {
                    const uint16_t *pair = w.scale_offset + (place + k) * 2 * MQ_TILE_ROWS + r % 16;
                    const float step = f16_to_f32(pair[0]) * factor;
                    const float base = fmaf(step, 0.5f, -f16_to_f32(pair[MQ_TILE_ROWS]));
                    const size_t scale_at = (size_t)t * groups + g0 + k;
                    y[i] = fmaf(step * b.x.scale[scale_at], (float)dots[turn][k][r * PAD + t], y[i]);
                    y[i] = fmaf(base, b.x.sum[scale_at], y[i]);
                }
            }
        }
    }
#pragma unroll
    for (uint32_t i = 0; i < EACH; i++) {
        const uint32_t output = threadIdx.x + i * SMALL_WARPS * 32, r = output % ROWS, t = output / ROWS;
        const uint32_t row = (b.tile_begin[at] + tile) * MQ_TILE_ROWS + r;
        if (t < b.n && tile + r / 16 < b.tiles[at] && row < w.rows) {
            job.y[(size_t)t * job.y_stride + row] = y[i];
        }
    }
}

// --- launches ----------------------------------------------------------------------------------------------------------

template <uint32_t RT, uint32_t NT>
inline cudaError_t launch_small(const batch &b, cudaStream_t stream)
{
    uint32_t blocks = 0;
    for (uint32_t i = 0; i < b.count; i++) {
        blocks += (b.tiles[i] + RT - 1) / RT;
    }
    return launch({blocks, SMALL_WARPS * 32, 0, stream, false}, small<RT, NT>, b);
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

template <uint32_t WARPS_M, uint32_t WARPS_N, uint32_t STAGES, uint32_t BLOCKS_PER_SM>
inline cudaError_t launch_gemm(const batch &b, cudaStream_t stream)
{
    using shape = gemm_shape<WARPS_M, WARPS_N, STAGES>;
    const uint32_t tiles_each = shape::ROWS / MQ_TILE_ROWS;
    uint32_t rows = 0;
    for (uint32_t i = 0; i < b.count; i++) {
        rows += (b.tiles[i] + tiles_each - 1) / tiles_each;
    }
    const uint32_t token_blocks = (b.n + shape::TOKENS - 1) / shape::TOKENS + MQ_SLICE_COUNT - 1;
    auto kernel = gemm<WARPS_M, WARPS_N, STAGES, BLOCKS_PER_SM>;
    const cudaError_t status = allow_shared(kernel, shape::SHARED);
    return status != cudaSuccess
               ? status
               : launch({rows * token_blocks, shape::THREADS, shape::SHARED, stream, false}, kernel, b, token_blocks);
}

// Bytes of one job's sorted tokens, rounded up so that what follows stays aligned.
inline size_t sorted_bytes(uint32_t n)
{
    return ((size_t)n + 8 + 63) / 64 * 64 * sizeof(uint32_t);
}

// Combines and multiplies a piece of the jobs.
inline cudaError_t run_piece(const batch &b, cudaStream_t stream)
{
    const cudaError_t status = launch_combine(b, stream);
    return status != cudaSuccess ? status : launch_gemm<4, 2, 4, 1>(b, stream);
}

} // namespace mq

// Bytes with which linears of `rows` rows together and `groups` groups run as one launch, at most n tokens at once.
inline size_t mq_cuda_matmat_workspace(uint32_t n, size_t rows, size_t groups)
{
    return mq::MAX_JOBS * mq::sorted_bytes(n) + (rows / MQ_TILE_ROWS + mq::LEAST_TILES) * groups * mq::CODE_BYTES;
}

// y = W·x of up to three linears that read the same x, for n >= 1 tokens. A workspace with less room than the linears want makes
// it go in several launches; least: 8 row tiles.
inline cudaError_t mq_cuda_matmat(const mq_cuda_job *jobs, uint32_t count, const mq_activations &x, uint32_t n, void *workspace,
                                  size_t workspace_bytes, cudaStream_t stream)
{
    using namespace mq;
    if (count == 0 || count > MAX_JOBS || n == 0 || n > MAX_TOKENS) {
        return cudaErrorInvalidValue;
    }
    batch b = {};
    b.count = count, b.n = n, b.groups = x.groups, b.x = x;
    for (uint32_t i = 0; i < count; i++) {
        b.job[i] = jobs[i];
        b.tiles[i] = jobs[i].matrix.tiles;
    }
    if (n <= SMALL) {
        return n <= 8 ? launch_small<1, 1>(b, stream) : launch_small<2, 2>(b, stream);
    }
    const size_t tile_bytes = (size_t)x.groups * CODE_BYTES, lists = count * sorted_bytes(n);
    if (workspace_bytes < lists + LEAST_TILES * tile_bytes) {
        return cudaErrorInvalidValue;
    }
    uint8_t *at = static_cast<uint8_t *>(workspace);
    for (uint32_t i = 0; i < count; i++, at += sorted_bytes(n)) {
        b.tokens[i].first = reinterpret_cast<uint32_t *>(at);
        b.tokens[i].order = b.tokens[i].first + 8;
    }
    cudaError_t status = launch({count, SORT_THREADS, 0, stream, false}, sort, b);
    // Tiles in the order of the jobs, as many at once as there is room for.
    const size_t room = (workspace_bytes - lists) / tile_bytes;
    uint32_t job = 0, tile = 0;
    while (job < count && status == cudaSuccess) {
        batch piece = b;
        piece.count = 0;
        for (size_t left = room; left > 0 && job < count;) {
            const uint32_t rest = jobs[job].matrix.tiles - tile, tiles = rest < left ? rest : (uint32_t)left / LEAST_TILES * LEAST_TILES;
            if (tiles == 0) {
                break;
            }
            const uint32_t to = piece.count++;
            piece.job[to] = jobs[job], piece.tokens[to] = b.tokens[job];
            piece.codes[to] = at + (room - left) * tile_bytes;
            piece.tile_begin[to] = tile, piece.tiles[to] = tiles;
            left -= tiles;
            tile += tiles;
            if (tile == jobs[job].matrix.tiles) {
                job++, tile = 0;
            }
        }
        status = run_piece(piece, stream);
    }
    return status;
}

#endif
