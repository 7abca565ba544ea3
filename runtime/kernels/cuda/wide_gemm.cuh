// wide_gemm.cuh: the product of gemm.cuh for compute capability 9.0a, whose tensor cores take 128 threads' operands at once. The same
// sums and float steps; what differs is who does what: one warpgroup copies, the others multiply and add, each 64 rows of the
// block, some tokens at a time: while the tensor cores have these, the float steps of those before.
#ifndef MQ_CUDA_WIDE_GEMM_H
#define MQ_CUDA_WIDE_GEMM_H

#include "arithmetic.cuh"
#include "batch.cuh"
#include "tensor.cuh"

namespace mq {

constexpr uint32_t GROUP_THREADS = 128, GROUP_ROWS = 64;

// One group of a block of rows and tokens in shared memory.
template <uint32_t ROWS, uint32_t TOKENS>
struct alignas(1024) wide_stage {
    int8_t q[TOKENS][MQ_GROUP_SIZE]; // 16-byte pieces in the order piece ^ token % 8
    uint8_t codes[ROWS / MQ_TILE_ROWS][CODE_BYTES];
    uint16_t scale_offset[ROWS / MQ_TILE_ROWS][2][MQ_TILE_ROWS];
    float4 factors[TOKENS / 2]; // of two tokens: scale and sum, scale and sum
};

// GROUPS warpgroups multiply blocks of GROUPS·64 rows and PIECES·PIECE tokens, PIECE at a time.
template <uint32_t GROUPS_, uint32_t PIECES_, uint32_t PIECE_, uint32_t STAGES_>
struct wide_shape {
    static constexpr uint32_t GROUPS = GROUPS_, PIECES = PIECES_, PIECE = PIECE_, STAGES = STAGES_;
    static constexpr uint32_t ROWS = GROUPS * GROUP_ROWS, TOKENS = PIECES * PIECE, THREADS = (GROUPS + 1) * GROUP_THREADS;
    // Registers of a thread that multiplies and of one that copies; a multiprocessor has 512 for each place in a warpgroup.
    static constexpr uint32_t MANY = GROUPS == 2 ? 232 : 160, FEW = GROUPS == 2 ? 40 : 32;
    using stage = wide_stage<ROWS, TOKENS>;
    static constexpr size_t SHARED = STAGES * sizeof(stage) + 1024;
};

struct wide_barriers {
    uint64_t full, empty;
};

#ifdef MQ_WARPGROUPS

// The copying warpgroup: stage after stage, as soon as the others are done with it. Rows and tokens past the end are copies of the
// last and not stored.
template <typename S>
__device__ inline void wide_copy(const batch &b, row_block rows, token_block tokens, typename S::stage *stages, wide_barriers *barriers)
{
    constexpr uint32_t TILES = S::ROWS / MQ_TILE_ROWS, AT_ONCE = GROUP_THREADS / 8;
    const uint32_t thread = threadIdx.x % GROUP_THREADS, piece = thread % 8, groups = b.groups;
    const uint32_t *order = b.tokens[rows.job].order + tokens.begin;
    const auto token = [&](uint32_t slot) { return order[slot < tokens.count ? slot : tokens.count - 1]; };
    uint32_t from[S::TOKENS / AT_ONCE]; // in pieces of 16 bytes, of the activations that this thread copies
#pragma unroll
    for (uint32_t i = 0; i < S::TOKENS / AT_ONCE; i++) {
        from[i] = token(thread / 8 + i * AT_ONCE) * groups * (MQ_GROUP_SIZE / 16) + piece;
    }
    const float2 *factors = b.factors[rows.job] + tokens.begin + factor_shift(b.tokens[rows.job].first, tokens.depth);
    const uint32_t places = factor_places(b.n);
    const uint32_t last = b.tiles[rows.job] - 1 - rows.tile, tile = thread < last ? thread : last;
    const uint8_t *codes = b.codes[rows.job] + (size_t)(rows.tile + tile) * groups * CODE_BYTES;
    const uint16_t *pairs = b.job[rows.job].matrix.scale_offset +
                            ((size_t)b.tile_begin[rows.job] + rows.tile + tile) * groups * 2 * MQ_TILE_ROWS;
    for (uint32_t g = 0; g < groups; g++) {
        const uint32_t at = g % S::STAGES;
        typename S::stage &to = stages[at];
        if (g >= S::STAGES) {
            barrier_wait(&barriers[at].empty, (g / S::STAGES - 1) % 2);
        }
        if (thread == 0) {
            barrier_expect(&barriers[at].full, TILES * (CODE_BYTES + sizeof to.scale_offset[0]) + sizeof to.factors);
            copy_bulk(to.factors, factors + (size_t)g * places, sizeof to.factors, &barriers[at].full);
        }
        __syncwarp();
        if (thread < TILES) {
            copy_bulk(to.codes[thread], codes + (size_t)g * CODE_BYTES, CODE_BYTES, &barriers[at].full);
            copy_bulk(to.scale_offset[thread], pairs + g * 2 * MQ_TILE_ROWS, sizeof to.scale_offset[0], &barriers[at].full);
        }
        const int8_t *q = b.x.q + (size_t)g * MQ_GROUP_SIZE;
#pragma unroll
        for (uint32_t i = 0; i < S::TOKENS / AT_ONCE; i++) { // a step of AT_ONCE, 16 tokens, keeps token % 8
            const uint32_t slot = thread / 8 + i * AT_ONCE;
            copy_async<16>(to.q[slot] + (piece ^ thread / 8 % 8) * 16, q + (size_t)from[i] * 16, true);
        }
        barrier_arrive_copied(&barriers[at].full);
    }
}

// A lane's codes of a stage, as deep as the tokens of the block want them.
template <bool DROP, typename S>
__device__ inline void load_codes(uint32_t (&a)[4][4], const typename S::stage &s, uint32_t drop, uint32_t mask)
{
    const uint32_t lane = threadIdx.x % 32, tile = threadIdx.x / 32 - 4; // the first warpgroup copies
#pragma unroll
    for (uint32_t f = 0; f < 4; f++) {
        const uint4 four = *reinterpret_cast<const uint4 *>(s.codes[tile] + f * FRAGMENT + lane * 16);
        a[f][0] = four.x, a[f][1] = four.y, a[f][2] = four.z, a[f][3] = four.w;
        if constexpr (DROP) {
#pragma unroll
            for (uint32_t i = 0; i < 4; i++) {
                a[f][i] = a[f][i] >> drop & mask;
            }
        }
    }
}

template <typename S>
__device__ inline void send_piece(int32_t (&dot)[S::PIECE / 2], const uint32_t (&a)[4][4], const typename S::stage &s, uint32_t piece)
{
    warpgroup_begin();
#pragma unroll
    for (uint32_t f = 0; f < 4; f++) {
        warpgroup_multiply(dot, a[f], warpgroup_matrix(s.q[piece * S::PIECE], f), f > 0);
    }
    warpgroup_send();
}

// One group: while the tensor cores have one piece of the tokens, the float steps of the piece before it; with the last piece the first of
// the next group is sent. dot[0] is on its way.
template <bool DROP, bool LAST, typename S>
__device__ inline void wide_group(float (&y)[S::PIECES][S::PIECE / 2], int32_t (&dot)[2][S::PIECE / 2], uint32_t (&a)[4][4], uint32_t g,
                                  const typename S::stage *stages, wide_barriers *barriers, uint32_t drop, uint32_t mask, float factor)
{
    static_assert(S::PIECES % 2 == 0, "pieces take turns in two sets of sums");
    const uint32_t lane = threadIdx.x % 32, tile = threadIdx.x / 32 - 4, at = g % S::STAGES, next = (g + 1) % S::STAGES;
    const typename S::stage &s = stages[at];
    float step[2], base[2];
#pragma unroll
    for (uint32_t half = 0; half < 2; half++) {
        const uint16_t *pair = s.scale_offset[tile][0] + lane / 4 + half * 8;
        step[half] = f16_to_f32(pair[0]) * factor;
        base[half] = fmaf(step[half], 0.5f, -f16_to_f32(pair[MQ_TILE_ROWS]));
    }
#pragma unroll
    for (uint32_t piece = 0; piece < S::PIECES; piece++) {
        warpgroup_receive(dot[piece % 2]);
        if (piece + 1 < S::PIECES) {
            send_piece<S>(dot[(piece + 1) % 2], a, s, piece + 1);
        } else if constexpr (!LAST) {
            barrier_wait(&barriers[next].full, (g + 1) / S::STAGES % 2);
            fence_tensor_reads();
            load_codes<DROP, S>(a, stages[next], drop, mask);
            send_piece<S>(dot[0], a, stages[next], 0);
        }
#pragma unroll
        for (uint32_t n = 0; n < S::PIECE / 8; n++) {
            const float4 factors = s.factors[piece * S::PIECE / 2 + n * 4 + lane % 4];
#pragma unroll
            for (uint32_t k = 0; k < 4; k++) {
                const float exact = (float)dot[piece % 2][4 * n + k];
                float &out = y[piece][4 * n + k];
                out = fmaf(step[k / 2] * (k % 2 ? factors.z : factors.x), exact, out);
                out = fmaf(base[k / 2], k % 2 ? factors.w : factors.y, out);
            }
        }
    }
    barrier_arrive(&barriers[at].empty);
}

template <bool DROP, typename S>
__device__ inline void wide_multiply(float (&y)[S::PIECES][S::PIECE / 2], uint32_t groups, const typename S::stage *stages,
                                     wide_barriers *barriers, uint32_t drop, uint32_t mask, float factor)
{
    uint32_t a[4][4];
    int32_t dot[2][S::PIECE / 2];
    barrier_wait(&barriers[0].full, 0);
    fence_tensor_reads();
    load_codes<DROP, S>(a, stages[0], drop, mask);
    send_piece<S>(dot[0], a, stages[0], 0);
    for (uint32_t g = 0; g + 1 < groups; g++) {
        wide_group<DROP, false, S>(y, dot, a, g, stages, barriers, drop, mask, factor);
    }
    wide_group<DROP, true, S>(y, dot, a, groups - 1, stages, barriers, drop, mask, factor);
}

#endif

// grid: as gemm
template <typename S>
static __global__ void __launch_bounds__(S::THREADS, 1) wide_gemm(const __grid_constant__ batch b, uint32_t token_blocks)
{
#ifdef MQ_WARPGROUPS
    __shared__ wide_barriers barriers[S::STAGES];
    typename S::stage *stages = align_stages<typename S::stage>(dynamic_shared<uint8_t>());
    const row_block rows = find_rows<S::ROWS>(b, blockIdx.x / token_blocks);
    const mq_cuda_job &job = b.job[rows.job];
    const uint32_t *first = b.tokens[rows.job].first;
    const token_block tokens = find_tokens(first, blockIdx.x % token_blocks, S::TOKENS);
    if (tokens.count == 0) {
        return;
    }
    if (threadIdx.x < S::STAGES) {
        barrier_set(&barriers[threadIdx.x].full, GROUP_THREADS + 1); // and the one that expects bytes
        barrier_set(&barriers[threadIdx.x].empty, S::GROUPS * GROUP_THREADS);
    }
    __syncthreads();
    if (threadIdx.x < GROUP_THREADS) {
        registers_lower<S::FEW>();
        wide_copy<S>(b, rows, tokens, stages, barriers);
    } else {
        registers_raise<S::MANY>();
        float y[S::PIECES][S::PIECE / 2] = {};
        const uint32_t drop = 2 * (deepest(first) - tokens.depth), mask = (1u << 2 * tokens.depth) - 1;
        if (drop == 0) {
            wide_multiply<false, S>(y, b.groups, stages, barriers, 0, 0, depth_factor(tokens.depth));
        } else {
            wide_multiply<true, S>(y, b.groups, stages, barriers, drop, mask * 0x01010101u, depth_factor(tokens.depth));
        }
        const uint32_t lane = threadIdx.x % 32, tile = rows.tile + threadIdx.x / 32 - 4;
        const uint32_t row = (b.tile_begin[rows.job] + tile) * MQ_TILE_ROWS + lane / 4;
        const uint32_t *order = b.tokens[rows.job].order + tokens.begin;
        constexpr uint32_t AT_ONCE = 8; // tokens of a lane whose sums so far are loaded together
#pragma unroll
        for (uint32_t begin = 0; begin < S::PIECES * S::PIECE / 4; begin += AT_ONCE) {
            float *out[AT_ONCE], before[AT_ONCE][2] = {};
#pragma unroll
            for (uint32_t i = 0; i < AT_ONCE; i++) {
                const uint32_t slot = (begin + i) / 2 * 8 + lane % 4 * 2 + i % 2;
                const bool valid = slot < tokens.count && tile < b.tiles[rows.job];
                out[i] = valid ? job.y + (size_t)order[slot] * job.y_stride + row : nullptr;
                if (valid && job.add) {
                    before[i][0] = row < job.matrix.rows ? out[i][0] : 0.0f;
                    before[i][1] = row + 8 < job.matrix.rows ? out[i][8] : 0.0f;
                }
            }
#pragma unroll
            for (uint32_t i = 0; i < AT_ONCE; i++) {
                const uint32_t piece = (begin + i) / (S::PIECE / 4), n = (begin + i) / 2 % (S::PIECE / 8), k = i % 2;
#pragma unroll
                for (uint32_t half = 0; half < 2; half++) {
                    if (out[i] != nullptr && row + half * 8 < job.matrix.rows) {
                        const float sum = y[piece][4 * n + k + 2 * half];
                        const float product = job.bias != nullptr ? sum + job.bias[row + half * 8] : sum;
                        out[i][half * 8] = job.add ? before[i][half] + product : product;
                    }
                }
            }
        }
    }
#endif
}

template <uint32_t GROUPS, uint32_t PIECES, uint32_t PIECE, uint32_t STAGES>
inline cudaError_t launch_wide(const batch &b, cudaStream_t stream)
{
    using shape = wide_shape<GROUPS, PIECES, PIECE, STAGES>;
    const uint32_t token_blocks = (b.n + shape::TOKENS - 1) / shape::TOKENS + MQ_SLICE_COUNT - 1;
    const uint32_t blocks = count_row_blocks(b, shape::ROWS) * token_blocks;
    const cudaError_t status = allow_shared(wide_gemm<shape>, shape::SHARED);
    return status != cudaSuccess
               ? status
               : launch({blocks, shape::THREADS, shape::SHARED, stream, false}, wide_gemm<shape>, b, token_blocks);
}

} // namespace mq

#endif
