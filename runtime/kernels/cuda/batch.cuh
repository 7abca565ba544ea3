// batch.cuh: linears over a batch of tokens that differ in depth, as the kernels take them, and how their work is cut into
// blocks. The host never knows the depths: a grid has a block for every place that the tokens may need, and those without tokens
// end at once.
#ifndef MQ_CUDA_BATCH_H
#define MQ_CUDA_BATCH_H

#include "kernels.h"
#include "keys.h"
#include "launch.cuh"

// One linear of a batch. Pointers are the device's, also those in `matrix`.
struct mq_cuda_job {
    mq_matrix matrix;
    const uint8_t *depths; // of token t: depths[t · depth_stride]
    size_t depth_stride;
    float *y; // [n][y_stride]
    size_t y_stride;
    bool add; // y += product
    const float *bias; // [rows] joins the product, NULL: none
};


namespace mq {

constexpr uint32_t MAX_JOBS = 3;
constexpr uint32_t LEAST_TILES = 8; // that a launch has room for, unless it ends a job
constexpr uint32_t CODE_BYTES = MQ_TILE_ROWS * MQ_GROUP_SIZE; // of a tile as 8-bit codes
constexpr uint32_t FRAGMENT = 512;                            // bytes of 16 rows x 32 codes: [lane][4 words]

// Adding 1.5·2^23 to an integer below 2^22 as bits of a float and then subtracting it is an exact conversion. A group's sum is
// at most 128·255·127 < 2^22, and the first product of a group adds the constant for nothing.
constexpr int32_t MAGIC_BITS = 0x4b400000;
constexpr float MAGIC = 12582912.0f;

// A job's tokens by depth: those of depth d are order[first[d] .. first[d + 1] − 1].
struct sorted {
    uint32_t *order; // [n]
    uint32_t *first; // [6]
};

// What a launch works on: `tiles` row tiles of each job from tile_begin on.
struct batch {
    mq_cuda_job job[MAX_JOBS];
    sorted tokens[MAX_JOBS];
    uint8_t *codes[MAX_JOBS]; // [tiles][groups][CODE_BYTES]
    float2 *factors[MAX_JOBS]; // [groups][factor_places(n)]: scale and sum of the sorted tokens, see gather
    uint32_t tile_begin[MAX_JOBS], tiles[MAX_JOBS];
    uint32_t count, n, groups;
    mq_activations x;
};

// The deepest depth that a token has, 0 without tokens.
__device__ inline uint32_t deepest(const uint32_t *first)
{
    uint32_t depth = MQ_SLICE_COUNT;
    while (depth > 0 && first[depth + 1] == first[depth]) {
        depth--;
    }
    return depth;
}

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

// The rows of a block, in a job.
struct row_block {
    uint32_t job, tile; // tile: within the launch's tiles of the job
};

// The index-th block of ROWS rows of all jobs.
template <uint32_t ROWS>
__device__ inline row_block find_rows(const batch &b, uint32_t index)
{
    constexpr uint32_t TILES = ROWS / MQ_TILE_ROWS;
    uint32_t job = 0, blocks = (b.tiles[0] + TILES - 1) / TILES;
    while (index >= blocks) {
        index -= blocks;
        job++;
        blocks = (b.tiles[job] + TILES - 1) / TILES;
    }
    return {job, index * TILES};
}

inline uint32_t count_row_blocks(const batch &b, uint32_t rows)
{
    uint32_t blocks = 0;
    for (uint32_t i = 0; i < b.count; i++) {
        blocks += (b.tiles[i] + rows / MQ_TILE_ROWS - 1) / (rows / MQ_TILE_ROWS);
    }
    return blocks;
}

// --- gather: scales and sums in the order of the sorted tokens -------------------------------------------------------------

constexpr uint32_t GATHER_THREADS = 256, MOST_TOGETHER = 256; // MOST_TOGETHER: tokens of a block of gemms

// The tokens of a depth begin at an even place, so that they can be copied 16 bytes at a time: how far they are moved for that.
__device__ inline uint32_t factor_shift(const uint32_t *first, uint32_t depth)
{
    uint32_t shift = 0;
    for (uint32_t d = 1; d <= depth; d++) {
        shift += (first[d] + shift) % 2;
    }
    return shift;
}

// Of n tokens, with room for whole blocks of them.
__host__ __device__ inline uint32_t factor_places(uint32_t n)
{
    return (n + MQ_SLICE_COUNT + MOST_TOGETHER + 1) / 2 * 2;
}

// grid: (groups, jobs)
static __global__ void __launch_bounds__(GATHER_THREADS) gather(const __grid_constant__ batch b)
{
    const sorted &tokens = b.tokens[blockIdx.y];
    float2 *to = b.factors[blockIdx.y] + (size_t)blockIdx.x * factor_places(b.n);
    for (uint32_t depth = 1; depth <= MQ_SLICE_COUNT; depth++) {
        const uint32_t shift = factor_shift(tokens.first, depth);
        for (uint32_t i = tokens.first[depth] + threadIdx.x; i < tokens.first[depth + 1]; i += GATHER_THREADS) {
            const size_t from = (size_t)tokens.order[i] * b.groups + blockIdx.x;
            to[i + shift] = {b.x.scale[from], b.x.sum[from]};
        }
    }
}

// Bytes of one job's sorted tokens, rounded up so that what follows stays aligned.
inline size_t sorted_bytes(uint32_t n)
{
    return ((size_t)n + 8 + 63) / 64 * 64 * sizeof(uint32_t);
}

inline size_t factor_bytes(uint32_t n, size_t groups)
{
    return (groups * factor_places(n) * sizeof(float2) + 255) / 256 * 256;
}

} // namespace mq

#endif
