// prefill_attention.cuh: softmax attention of a batch of tokens over the f16 KV cache, with the bits of kernels/scalar.c (attend,
// join) and src/attention.c: every score and every sum of values is one chain of fused multiply-adds in float32, so tensor
// cores are no help. Blocked instead like a float32 matrix product: ROWS queries that share a kv head stay in shared memory,
// and keys and values stream past them a chunk at a time, each as many positions and dimensions as a thread block has outputs.
//
// A row is a query: token row / shared, head row % shared of the kv head's `shared` query heads.
#ifndef MQ_CUDA_PREFILL_ATTENTION_CUH
#define MQ_CUDA_PREFILL_ATTENTION_CUH

#include "arithmetic.cuh"
#include "launch.cuh"

struct mq_cuda_attention {
    const float *query;     // [n][heads][head_dim], rotated
    const uint16_t *keys;   // of the block's first kv head, as in src/cache.h
    const uint16_t *values; // likewise
    size_t cache_positions; // of the cache, a multiple of 16
    uint32_t heads, heads_kv, head_dim;
    uint32_t position, n;   // of the first token; tokens
    float scale;            // of the scores
    float *out;             // [n][heads][head_dim]
};

namespace mq {

constexpr uint32_t MAX_HEAD_DIM = 256;
constexpr uint32_t WIDE = 128; // positions of a block of scores
constexpr uint32_t DEEP = 16;  // dimensions (or positions) that are in shared memory at once
constexpr uint32_t CHUNK = MQ_ATTENTION_CHUNK, LANES = 16;

template <uint32_t ROWS>
struct attend_shared {
    float weight[CHUNK][ROWS]; // scores, then exp(score − largest)
    float panel[2][DEEP][WIDE];       // keys [dimension][position] or values [position][dimension], as float
    float exchange[2][ROWS];
    float mine[ROWS], theirs[ROWS]; // factors of join
};
// then query [head_dim][ROWS]

// exponential() of what is not above 0. Adding 1.5·2^23 rounds as rintf does, and leaves the integer in the low bits.
__device__ inline float decay(float x)
{
    x = x < MQ_EXP_LOW ? MQ_EXP_LOW : x; // a NaN stays one
    const float shifted = x * MQ_LOG2_E + 12582912.0f, n = shifted - 12582912.0f;
    float r = fmaf(n, -MQ_LN2_HIGH, x);
    r = fmaf(n, -MQ_LN2_LOW, r);
    float p = fmaf(MQ_EXP_C7, r, MQ_EXP_C6);
    p = fmaf(p, r, MQ_EXP_C5);
    p = fmaf(p, r, MQ_EXP_C4);
    p = fmaf(p, r, MQ_EXP_C3);
    p = fmaf(p, r, MQ_EXP_C2);
    p = fmaf(p, r, 1.0f);
    p = fmaf(p, r, 1.0f);
    return p * __int_as_float((__float_as_int(shifted) + 127) << 23);
}

// The next panel while this one is used: a thread brings pieces of 8 columns, 16 to a line.
template <uint32_t THREADS>
struct panel_loader {
    static constexpr uint32_t PIECES = DEEP * WIDE / 8 / THREADS, LINES = THREADS / 16; // of a thread; at once
    uint4 next[PIECES];

    static __device__ uint32_t column()
    {
        return threadIdx.x % 16 * 8;
    }

    // line(k): where the thread's columns of line k are, NULL for zeros
    template <typename Line>
    __device__ void fetch_next(uint32_t first, const Line &line)
    {
#pragma unroll
        for (uint32_t i = 0; i < PIECES; i++) {
            const uint16_t *from = line(first + i * LINES + threadIdx.x / 16);
            next[i] = from == nullptr ? uint4{0, 0, 0, 0} : *reinterpret_cast<const uint4 *>(from);
        }
    }

    // Half of the lanes begin with their second four columns, so that they meet other banks.
    __device__ void put_into(float (&panel)[DEEP][WIDE]) const
    {
        const bool swap = threadIdx.x / 4 % 2 == 1;
#pragma unroll
        for (uint32_t i = 0; i < PIECES; i++) {
            float *to = panel[i * LINES + threadIdx.x / 16] + column();
            const uint4 h = next[i];
            const float4 low = widen(swap ? h.z : h.x, swap ? h.w : h.y), high = widen(swap ? h.x : h.z, swap ? h.y : h.w);
            *reinterpret_cast<float4 *>(to + (swap ? 4 : 0)) = low;
            *reinterpret_cast<float4 *>(to + (swap ? 0 : 4)) = high;
        }
    }

    static __device__ float4 widen(uint32_t first, uint32_t second)
    {
        return {f16_to_f32((uint16_t)(first & 0xffffu)), f16_to_f32((uint16_t)(first >> 16)), f16_to_f32((uint16_t)(second & 0xffffu)),
                f16_to_f32((uint16_t)(second >> 16))};
    }
};

__device__ inline void take(float (&to)[4], const float *from)
{
    const float4 four = *reinterpret_cast<const float4 *>(from);
    to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
}

// A thread's outputs: rows 4·across + i and ROWS / 2 + 4·across + i, columns 4·down + i (and 64 + 4·down + i).
template <uint32_t COLUMNS>
struct outputs {
    float at[8][COLUMNS];
};

// out += rows[k] · panel[k] for k ascending.
template <uint32_t ROWS, uint32_t COLUMNS>
__device__ inline void accumulate(outputs<COLUMNS> &out, const float (*rows)[ROWS], const float (*panel)[WIDE], uint32_t deep,
                                  uint32_t across, uint32_t down)
{
#pragma unroll 4
    for (uint32_t k = 0; k < deep; k++) {
        float r[2][4], c[COLUMNS / 4][4];
        take(r[0], rows[k] + 4 * across);
        take(r[1], rows[k] + ROWS / 2 + 4 * across);
#pragma unroll
        for (uint32_t half = 0; half < COLUMNS / 4; half++) {
            take(c[half], panel[k] + half * 64 + 4 * down);
        }
#pragma unroll
        for (uint32_t i = 0; i < 8; i++) {
#pragma unroll
            for (uint32_t j = 0; j < COLUMNS; j++) {
                out.at[i][j] = fmaf(r[i / 4][i % 4], c[j / 4][j % 4], out.at[i][j]);
            }
        }
    }
}

// As accumulate, for rows that do not see every position: row i of the thread sees those below seen[i].
template <uint32_t ROWS, uint32_t COLUMNS>
__device__ inline void accumulate_seen(outputs<COLUMNS> &out, const float (*rows)[ROWS], const float (*panel)[WIDE],
                                       uint32_t deep, uint32_t across, uint32_t down, uint32_t first, const uint32_t (&seen)[8])
{
    for (uint32_t k = 0; k < deep; k++) {
#pragma unroll
        for (uint32_t i = 0; i < 8; i++) {
            if (first + k < seen[i]) {
                const float r = rows[k][i / 4 * (ROWS / 2) + 4 * across + i % 4];
#pragma unroll
                for (uint32_t j = 0; j < COLUMNS; j++) {
                    out.at[i][j] = fmaf(r, panel[k][j / 4 * 64 + 4 * down + j % 4], out.at[i][j]);
                }
            }
        }
    }
}

// Scores of 16·COLUMNS positions of a chunk from `wide` on, of which `left` exist; a panel is DEEP dimensions.
template <uint32_t ROWS, uint32_t COLUMNS>
__device__ inline void score_block(attend_shared<ROWS> &s, const float (*query)[ROWS], const uint16_t *keys, uint32_t dim,
                                   uint32_t left, float scale, uint32_t wide, uint32_t across, uint32_t down)
{
    outputs<COLUMNS> score = {};
    panel_loader<ROWS * 2> loader;
    const uint32_t at = loader.column();
    keys += (size_t)(at / 16 * 16) * dim + at % 16;
    const auto key = [&](uint32_t deep) { return at < 16 * COLUMNS && at < left && deep < dim ? keys + deep * 16 : nullptr; };
    loader.fetch_next(0, key);
    for (uint32_t first = 0, turn = 0; first < dim; first += DEEP, turn ^= 1) {
        loader.put_into(s.panel[turn]);
        __syncthreads(); // and the panel before this one is done with
        if (first + DEEP < dim) {
            loader.fetch_next(first + DEEP, key);
        }
        accumulate(score, query + first, s.panel[turn], first + DEEP < dim ? DEEP : dim - first, across, down);
    }
#pragma unroll
    for (uint32_t j = 0; j < COLUMNS; j++) {
        float *to = s.weight[wide + j / 4 * 64 + 4 * down + j % 4] + 4 * across;
#pragma unroll
        for (uint32_t half = 0; half < 2; half++) {
            float4 four;
            four.x = score.at[half * 4][j] * scale;
            four.y = score.at[half * 4 + 1][j] * scale;
            four.z = score.at[half * 4 + 2][j] * scale;
            four.w = score.at[half * 4 + 3][j] * scale;
            *reinterpret_cast<float4 *>(to + half * (ROWS / 2)) = four;
        }
    }
    __syncthreads(); // scores are written, panels read
}

// grid: (blocks of rows, kv heads, blocks of 16·COLUMNS dimensions of the values)
template <uint32_t ROWS, uint32_t COLUMNS>
static __global__ void __launch_bounds__(ROWS * 2, 128 / ROWS) prefill_attention(const mq_cuda_attention a)
{
    uint8_t *memory = dynamic_shared<uint8_t>();
    constexpr uint32_t THREADS = ROWS * 2, ACROSS = ROWS / 8;
    attend_shared<ROWS> &s = *reinterpret_cast<attend_shared<ROWS> *>(memory);
    float(*query)[ROWS] = reinterpret_cast<float(*)[ROWS]>(memory + sizeof(attend_shared<ROWS>));
    const uint32_t dim = a.head_dim, padded = (dim + 15) / 16 * 16, shared = a.heads / a.heads_kv, rows = a.n * shared;
    // The last rows see most: begin with them.
    const uint32_t first_row = (gridDim.x - 1 - blockIdx.x) * ROWS, head = blockIdx.y;
    const uint32_t first_dim = blockIdx.z * 16 * COLUMNS;
    const uint32_t thread = threadIdx.x, across = thread % ACROSS, down = thread / ACROSS;
    const uint16_t *keys = a.keys + (size_t)head * a.cache_positions * dim;
    const uint16_t *values = a.values + (size_t)head * a.cache_positions * padded + first_dim;
    const uint32_t last_row = first_row + ROWS < rows ? first_row + ROWS - 1 : rows - 1;
    const uint32_t end = a.position + last_row / shared + 1;        // positions that the last row sees
    const uint32_t all_see = a.position + first_row / shared + 1;   // that every row sees
    // Rows past the end are copies of the last.
    const auto row_at = [&](uint32_t r) { return first_row + r < rows ? first_row + r : rows - 1; };
    const auto query_at = [&](uint32_t row) {
        return ((size_t)(row / shared) * a.heads + head * shared + row % shared) * dim;
    };
    {
        const float *from = a.query + query_at(row_at(thread % ROWS));
        for (uint32_t i = thread / ROWS; i < dim; i += THREADS / ROWS) {
            query[i][thread % ROWS] = from[i];
        }
    }
    uint32_t sees[8]; // positions that the rows of this thread's outputs see
#pragma unroll
    for (uint32_t i = 0; i < 8; i++) {
        sees[i] = a.position + row_at(i / 4 * (ROWS / 2) + 4 * across + i % 4) / shared + 1;
    }
    const uint32_t my_row = thread % ROWS, my_half = thread / ROWS; // in the softmax: 8 of the 16 lanes each
    const uint32_t my_sees = a.position + row_at(my_row) / shared + 1;
    float total = 0.0f, largest = 0.0f; // of the row's part so far, kept by the threads of half 0
    outputs<COLUMNS> part = {};
    for (uint32_t begin = 0; begin < end; begin += CHUNK) {
        const uint32_t length = end - begin < CHUNK ? end - begin : CHUNK; // of the chunk, as far as any row sees
        for (uint32_t wide = 0; wide < length; wide += WIDE) {
            const uint16_t *from = keys + (size_t)(begin + wide) * dim;
            if (length - wide > WIDE / 2) {
                score_block<ROWS, 8>(s, query, from, dim, length - wide, a.scale, wide, across, down);
            } else {
                score_block<ROWS, 4>(s, query, from, dim, length - wide, a.scale, wide, across, down);
            }
        }
        // Weights: positions that a row does not see get 0.
        const uint32_t seen = my_sees <= begin ? 0 : my_sees - begin < length ? my_sees - begin : length;
        float most = -INFINITY;
#pragma unroll 16
        for (uint32_t p = my_half * (CHUNK / 2); p < (my_half + 1) * (CHUNK / 2); p++) {
            const float score = s.weight[p][my_row];
            most = p < seen && score > most ? score : most;
        }
        s.exchange[my_half][my_row] = most;
        __syncthreads();
        most = s.exchange[0][my_row] > s.exchange[1][my_row] ? s.exchange[0][my_row] : s.exchange[1][my_row];
        float lanes[8] = {};
        const uint32_t whole = (length + DEEP - 1) / DEEP * DEEP;
        for (uint32_t first = my_half * 8; first < whole; first += LANES) {
            float weight[8];
#pragma unroll
            for (uint32_t i = 0; i < 8; i++) {
                weight[i] = s.weight[first + i][my_row] - most;
            }
#pragma unroll
            for (uint32_t i = 0; i < 8; i++) {
                weight[i] = first + i < seen ? decay(weight[i]) : 0.0f;
                lanes[i] += weight[i];
                s.weight[first + i][my_row] = weight[i];
            }
        }
        // fold: lanes i and i + 8 are of different threads, the rest of one
        if (my_half == 1) {
#pragma unroll
            for (uint32_t i = 0; i < 8; i++) {
                s.panel[0][i][my_row] = lanes[i];
            }
        }
        __syncthreads();
        if (my_half == 0) {
#pragma unroll
            for (uint32_t i = 0; i < 8; i++) {
                lanes[i] += s.panel[0][i][my_row];
            }
#pragma unroll
            for (uint32_t half = 4; half >= 1; half /= 2) {
#pragma unroll
                for (uint32_t i = 0; i < half; i++) {
                    lanes[i] += lanes[i + half];
                }
            }
            if (begin == 0) {
                total = lanes[0], largest = most;
            } else if (seen > 0) { // join
                const float both = most > largest ? most : largest;
                const float mine = exponential(largest - both), theirs = exponential(most - both);
                total = fmaf(total, mine, lanes[0] * theirs);
                largest = both;
                s.mine[my_row] = mine, s.theirs[my_row] = theirs;
            }
        }
        // Values: a panel is DEEP positions of 16·COLUMNS dimensions.
        outputs<COLUMNS> sum = {};
        panel_loader<THREADS> loader;
        const uint32_t column = loader.column();
        const uint16_t *from = values + (size_t)begin * padded + column;
        const bool used = column < 16 * COLUMNS && first_dim + column < padded;
        const auto value = [&](uint32_t deep) { return used && deep < length ? from + (size_t)deep * padded : nullptr; };
        loader.fetch_next(0, value);
        __syncthreads(); // the panel's use for the fold is over
        for (uint32_t first = 0, turn = 0; first < length; first += DEEP, turn ^= 1) {
            loader.put_into(s.panel[turn]);
            __syncthreads();
            if (first + DEEP < length) {
                loader.fetch_next(first + DEEP, value);
            }
            if (begin + first + DEEP <= all_see) {
                accumulate(sum, s.weight + first, s.panel[turn], DEEP, across, down);
            } else {
                accumulate_seen(sum, s.weight + first, s.panel[turn], length - first < DEEP ? length - first : DEEP, across, down,
                                begin + first, sees);
            }
        }
#pragma unroll
        for (uint32_t i = 0; i < 8; i++) {
            const uint32_t r = i / 4 * (ROWS / 2) + 4 * across + i % 4;
#pragma unroll
            for (uint32_t j = 0; j < COLUMNS; j++) {
                if (begin == 0) {
                    part.at[i][j] = sum.at[i][j];
                } else if (begin < sees[i]) {
                    part.at[i][j] = fmaf(part.at[i][j], s.mine[r], sum.at[i][j] * s.theirs[r]);
                }
            }
        }
        __syncthreads(); // before the next chunk's keys and weights
    }
    if (my_half == 0) {
        s.mine[my_row] = 1.0f / total;
    }
    __syncthreads();
#pragma unroll
    for (uint32_t i = 0; i < 8; i++) {
        const uint32_t r = i / 4 * (ROWS / 2) + 4 * across + i % 4;
        if (first_row + r < rows) {
            float *out = a.out + query_at(first_row + r);
#pragma unroll
            for (uint32_t j = 0; j < COLUMNS; j++) {
                const uint32_t d = first_dim + j / 4 * 64 + 4 * down + j % 4;
                if (d < dim) {
                    out[d] = part.at[i][j] * s.mine[r];
                }
            }
        }
    }
}

template <uint32_t ROWS>
inline size_t attention_shared_bytes(uint32_t head_dim)
{
    return sizeof(attend_shared<ROWS>) + (size_t)head_dim * ROWS * sizeof(float);
}

template <uint32_t ROWS, uint32_t COLUMNS>
inline cudaError_t launch_attention(const mq_cuda_attention &a, cudaStream_t stream)
{
    const uint32_t rows = a.n * (a.heads / a.heads_kv), wide = 16 * COLUMNS;
    const dim3 grid((rows + ROWS - 1) / ROWS, a.heads_kv, (a.head_dim + wide - 1) / wide);
    const size_t bytes = attention_shared_bytes<ROWS>(a.head_dim);
    const cudaError_t status = allow_shared(prefill_attention<ROWS, COLUMNS>, bytes);
    return status != cudaSuccess ? status : launch({grid, ROWS * 2, bytes, stream, false}, prefill_attention<ROWS, COLUMNS>, a);
}

template <uint32_t ROWS>
inline cudaError_t launch_attention(const mq_cuda_attention &a, cudaStream_t stream)
{
    return a.head_dim <= 64 ? launch_attention<ROWS, 4>(a, stream) : launch_attention<ROWS, 8>(a, stream);
}

} // namespace mq

inline cudaError_t mq_cuda_prefill_attention(const mq_cuda_attention *a, cudaStream_t stream)
{
    if (a->head_dim == 0 || a->head_dim > mq::MAX_HEAD_DIM || a->n == 0) {
        return cudaErrorInvalidValue;
    }
    int device = 0, most = 0; // shared memory
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    const bool roomy = mq::attention_shared_bytes<64>(a->head_dim) <= (size_t)most;
    return roomy ? mq::launch_attention<64>(*a, stream) : mq::launch_attention<32>(*a, stream);
}

#endif
