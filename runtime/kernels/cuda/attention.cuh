// attention.cuh: rotation of queries and keys, the KV cache, and attention of one token in the chunks and the order of
// kernels/scalar.c. A block of threads has one chunk and one, two or four query heads that share a kv head: as many as leave no
// multiprocessor idle, since every key and value is read once for them. The block of a head that ends last joins the chunks.
//
// Cache of one block of the model: keys f16 [kv head][positions / 16][head_dim][16], values f16 [kv head][positions][head_dim
// padded to 16].
#ifndef MQ_CUDA_ATTENTION_H
#define MQ_CUDA_ATTENTION_H

#include "arithmetic.cuh"
#include "control.cuh"
#include "kernels.h"
#include "tensor.cuh"

enum { ATTEND_THREADS = MQ_ATTENTION_CHUNK, MOST_HEADS = 4, STORE_THREADS = 256, KEY_POSITIONS = 16 };

struct attention_job {
    float *q, *k;            // [n][heads·dim], [n][heads_kv·dim] before rotation
    const float *v;          // [n][heads_kv·dim]
    uint16_t *keys, *values; // of the block of the model
    size_t positions;        // of the cache, a multiple of 16
    const float *cosine, *sine; // [n_ctx][pairs]
    uint32_t pairs;             // of a head's dimensions that are rotated, i and pairs + i; 0: none
    const float *bias[3];       // of queries, keys and values: [heads·dim], [heads_kv·dim]; NULL: none
    const float *norm[2];       // of every head of queries and of keys, before the rotation: [dim]; NULL: none
    float eps;
    uint32_t heads, heads_kv, dim;
    float scale;
    float *parts;            // of one token: [head][chunks][mq_part_floats(dim)]
    uint32_t *arrived;       // [heads]
    uint32_t chunks;         // that `parts` has room for
    float *out;              // [n][heads·dim]
    const control *state;
};

__host__ __device__ inline uint32_t padded_dim(uint32_t dim)
{
    return (dim + LANES - 1) / LANES * LANES;
}

__host__ __device__ inline uint32_t part_floats(uint32_t dim)
{
    return padded_dim(dim) + MQ_PART_TAIL;
}

// One warp: a head with its bias and its norm, if any.
__device__ inline void finish_head(const float *x, const float *bias, const float *norm, float eps, uint32_t dim, float *to)
{
    const uint32_t lane = threadIdx.x % WARP;
    for (uint32_t i = lane; i < dim; i += WARP) {
        to[i] = bias != nullptr ? x[i] + bias[i] : x[i];
    }
    if (norm == nullptr) {
        return;
    }
    __syncwarp();
    float sum = 0.0f;
    for (uint32_t i = lane; lane < LANES && i < dim; i += LANES) {
        sum = fmaf(to[i], to[i], sum);
    }
    const float total = __shfl_sync(ALL_LANES, fold_lanes(sum), 0), factor = 1.0f / sqrtf(total / static_cast<float>(dim) + eps);
    for (uint32_t i = lane; i < dim; i += WARP) {
        to[i] = to[i] * factor * norm[i];
    }
}

// Elements i and pairs + i of a head, rotated.
__device__ inline float2 rotated(const float *head, const float *cosine, const float *sine, uint32_t pairs, uint32_t i)
{
    const float a = head[i], b = head[pairs + i];
    return make_float2(fmaf(a, cosine[i], -(b * sine[i])), fmaf(b, cosine[i], a * sine[i]));
}

// Calls put(i, element i) for every element of a rotated head, `step` threads beside one another, of which this is `thread`.
template <typename Put>
__device__ inline void turn_head(const attention_job &job, const float *head, size_t position, uint32_t thread, uint32_t step, const Put &put)
{
    const float *cosine = job.cosine + position * job.pairs, *sine = job.sine + position * job.pairs;
    for (uint32_t i = thread; i < job.pairs; i += step) {
        const float2 pair = rotated(head, cosine, sine, job.pairs, i);
        put(i, pair.x);
        put(job.pairs + i, pair.y);
    }
    for (uint32_t i = 2 * job.pairs + thread; i < job.dim; i += step) {
        put(i, head[i]);
    }
}

// The key and value of one kv head at one position, from one token's finished key (before rotation) and v, to the cache if `cached`;
// with `column_too`, there too.
__device__ inline void store_position(const attention_job &job, uint32_t head, size_t position, const float *k, const float *v,
                                      bool cached, uint16_t *column_too, uint16_t *row_too)
{
    const uint32_t padded = padded_dim(job.dim);
    uint16_t *column = job.keys + (head * job.positions + position / KEY_POSITIONS * KEY_POSITIONS) * job.dim
                       + position % KEY_POSITIONS;
    uint16_t *row = job.values + (head * job.positions + position) * padded;
    turn_head(job, k, position, threadIdx.x, blockDim.x, [&](uint32_t i, float element) {
        const uint16_t number = f32_to_f16(element);
        if (cached) {
            column[i * KEY_POSITIONS] = number;
        }
        if (column_too != nullptr) {
            column_too[i * KEY_POSITIONS] = number;
        }
    });
    const float *bias = job.bias[2] == nullptr ? nullptr : job.bias[2] + head * job.dim;
    for (uint32_t i = threadIdx.x; i < padded; i += blockDim.x) {
        const uint16_t number = i >= job.dim ? 0 : f32_to_f16(bias != nullptr ? v[i] + bias[i] : v[i]);
        if (cached) {
            row[i] = number;
        }
        if (row_too != nullptr) {
            row_too[i] = number;
        }
    }
}

enum { STORE_TOKENS = KEY_POSITIONS, MOST_DIM = 256 };

// Of n tokens, grid (heads + heads_kv, sixteens of tokens): queries are rotated in place, keys and values go to the cache, keys by way of
// shared memory, so that neighbouring threads write neighbouring positions.
static __global__ void __launch_bounds__(STORE_THREADS) rotate_and_store(const __grid_constant__ attention_job job, uint32_t n)
{
    __shared__ uint16_t key[STORE_TOKENS][MOST_DIM + 2];
    __shared__ float finished[STORE_TOKENS][MOST_DIM];
    const uint32_t first = blockIdx.y * STORE_TOKENS, tokens = n - first < STORE_TOKENS ? n - first : STORE_TOKENS;
    const bool query = blockIdx.x < job.heads;
    const uint32_t dim = job.dim, padded = padded_dim(dim), head = query ? blockIdx.x : blockIdx.x - job.heads;
    const uint32_t heads = query ? job.heads : job.heads_kv;
    float *x = query ? job.q : job.k;
    const float *bias = query ? job.bias[0] : job.bias[1], *norm = query ? job.norm[0] : job.norm[1];
    const bool finish = bias != nullptr || norm != nullptr;
    pdl_launch();
    pdl_wait();
    const size_t position = job.state->position + first;
    const auto row = [&](uint32_t t) { return x + (static_cast<size_t>(first + t) * heads + head) * dim; };
    if (finish) {
        for (uint32_t t = threadIdx.x / WARP; t < tokens; t += STORE_THREADS / WARP) {
            finish_head(row(t), bias == nullptr ? nullptr : bias + head * dim, norm, job.eps, dim, finished[t]);
        }
        __syncthreads();
    }
    constexpr uint32_t EACH = STORE_THREADS / STORE_TOKENS; // threads of a token
    const uint32_t token = threadIdx.x / EACH;
    if (token < tokens) {
        turn_head(job, finish ? finished[token] : row(token), position + token, threadIdx.x % EACH, EACH, [&](uint32_t i, float element) {
            if (query) {
                row(token)[i] = element;
            } else {
                key[token][i] = f32_to_f16(element);
            }
        });
    }
    if (query) {
        return;
    }
    for (uint32_t i = threadIdx.x; i < tokens * padded; i += STORE_THREADS) {
        const uint32_t t = i / padded, at = i % padded;
        const float *v = job.v + (static_cast<size_t>(first + t) * job.heads_kv + head) * dim;
        const float bias_at = job.bias[2] != nullptr && at < dim ? job.bias[2][head * dim + at] : 0.0f;
        const float number = at >= dim ? 0.0f : job.bias[2] != nullptr ? v[at] + bias_at : v[at];
        job.values[(head * job.positions + position + t) * padded + at] = f32_to_f16(number);
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < STORE_TOKENS * dim; i += STORE_THREADS) {
        const uint32_t t = i % STORE_TOKENS, at = i / STORE_TOKENS;
        if (t < tokens) {
            const size_t p = position + t, block = p / KEY_POSITIONS * KEY_POSITIONS;
            job.keys[(head * job.positions + block) * dim + at * KEY_POSITIONS + p % KEY_POSITIONS] = key[t][at];
        }
    }
}

// Shared memory of attend_one: queries [dim][HEADS], weights [chunk][HEADS], parts [HEADS][part], and when they are staged the keys
// and values of the chunk.
struct attend_shared {
    float *query, *weight, *part;
    uint16_t *keys, *values;
};

// Numbers from one key block of 16 positions to the next; staged ones lie apart so that two of them share no bank.
__host__ __device__ inline uint32_t key_stride(uint32_t dim, bool staged)
{
    return KEY_POSITIONS * dim + (staged ? KEY_POSITIONS : 0);
}

// Floats of the queries; what follows them begins at a multiple of 16 bytes.
__host__ __device__ inline uint32_t query_floats(uint32_t heads, uint32_t dim)
{
    return (heads * dim + 3) / 4 * 4;
}

__host__ __device__ inline size_t attend_bytes(uint32_t heads, uint32_t dim, bool staged)
{
    const size_t floats = query_floats(heads, dim) + static_cast<size_t>(heads) * (MQ_ATTENTION_CHUNK + part_floats(dim));
    const size_t halves = static_cast<size_t>(MQ_ATTENTION_CHUNK / KEY_POSITIONS) * key_stride(dim, true)
                          + static_cast<size_t>(MQ_ATTENTION_CHUNK) * padded_dim(dim);
    return sizeof(float) * floats + (staged ? sizeof(uint16_t) * halves : 0);
}

// Copies the first `count` positions of a chunk to shared memory; they are there after copy_wait<0>() and a barrier.
__device__ inline void stage(const attention_job &job, const attend_shared &s, uint32_t count, const uint16_t *key, const uint16_t *value)
{
    enum { PIECE = 8 }; // numbers copied at once
    const uint32_t dim = job.dim, of_block = KEY_POSITIONS * dim / PIECE, blocks = (count + KEY_POSITIONS - 1) / KEY_POSITIONS;
    for (uint32_t i = threadIdx.x; i < blocks * of_block; i += ATTEND_THREADS) {
        copy_async<16>(s.keys + i / of_block * key_stride(dim, true) + i % of_block * PIECE, key + static_cast<size_t>(i) * PIECE, true);
    }
    for (uint32_t i = threadIdx.x; i < count * padded_dim(dim) / PIECE; i += ATTEND_THREADS) {
        copy_async<16>(s.values + i * PIECE, value + static_cast<size_t>(i) * PIECE, true);
    }
    copy_commit();
}

// `COUNT` neighbouring floats of shared memory.
template <uint32_t COUNT>
__device__ inline void load_floats(const float *from, float (&to)[COUNT])
{
    if constexpr (COUNT == 4) {
        const float4 four = *reinterpret_cast<const float4 *>(from);
        to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
    } else if constexpr (COUNT == 2) {
        const float2 two = *reinterpret_cast<const float2 *>(from);
        to[0] = two.x, to[1] = two.y;
    } else {
        to[0] = *from;
    }
}

// Thread p scores position p for every query, then the block turns scores into weights: exp(score − largest).
template <uint32_t HEADS>
__device__ inline void weigh_positions(const attention_job &job, const attend_shared &s, uint32_t seen, const uint16_t *key, uint32_t stride)
{
    __shared__ float of_warp[ATTEND_THREADS / WARP][HEADS];
    constexpr uint32_t AT_ONCE = 32, WIDE = MOST_HEADS / HEADS; // dimensions whose keys are loaded together; of one load of queries
    const uint32_t dim = job.dim, p = threadIdx.x, padded = padded_dim(dim);
    float score[HEADS], largest[HEADS];
#pragma unroll
    for (uint32_t h = 0; h < HEADS; h++) {
        score[h] = 0.0f;
    }
    if (p < seen) {
        const uint16_t *k = key + static_cast<size_t>(p / KEY_POSITIONS) * stride + p % KEY_POSITIONS;
        uint32_t begin = 0;
        for (; begin + AT_ONCE <= dim; begin += AT_ONCE) {
            uint16_t element[AT_ONCE];
#pragma unroll
            for (uint32_t i = 0; i < AT_ONCE; i++) {
                element[i] = k[(begin + i) * KEY_POSITIONS];
            }
#pragma unroll
            for (uint32_t i = 0; i < AT_ONCE; i += WIDE) {
                float query[MOST_HEADS];
                load_floats(s.query + (begin + i) * HEADS, query);
#pragma unroll
                for (uint32_t t = 0; t < WIDE; t++) {
#pragma unroll
                    for (uint32_t h = 0; h < HEADS; h++) {
                        score[h] = fmaf(query[t * HEADS + h], f16_to_f32(element[i + t]), score[h]);
                    }
                }
            }
        }
        for (uint32_t i = begin; i < dim; i++) {
            const float element = f16_to_f32(k[i * KEY_POSITIONS]);
#pragma unroll
            for (uint32_t h = 0; h < HEADS; h++) {
                score[h] = fmaf(s.query[i * HEADS + h], element, score[h]);
            }
        }
    }
#pragma unroll
    for (uint32_t h = 0; h < HEADS; h++) {
        score[h] = p < seen ? score[h] * job.scale : -INFINITY;
        largest[h] = largest_of_warp(score[h]);
        if (p % WARP == 0) {
            of_warp[p / WARP][h] = largest[h];
        }
    }
    __syncthreads();
#pragma unroll
    for (uint32_t h = 0; h < HEADS; h++) {
#pragma unroll
        for (uint32_t w = 0; w < ATTEND_THREADS / WARP; w++) {
            largest[h] = fmaxf(largest[h], of_warp[w][h]);
        }
        if (p < seen) {
            s.weight[p * HEADS + h] = exponential(score[h] - largest[h]);
        }
        if (p == 0) {
            s.part[h * part_floats(dim) + padded + MQ_PART_LARGEST] = largest[h];
        }
    }
    __syncthreads();
}

// Items (one or two of the queries, one dimension): the weighted sum of values. Then the sums of the weights, in 16 lanes each.
template <uint32_t HEADS>
__device__ inline void sum_values(const attention_job &job, const attend_shared &s, uint32_t seen, const uint16_t *value)
{
    constexpr uint32_t AT_ONCE = 16, PAIR = HEADS == 1 ? 1 : 2, WIDE = HEADS == 1 ? 4 : 1; // WIDE: positions of one load of weights
    const uint32_t dim = job.dim, padded = padded_dim(dim), floats = part_floats(dim);
    for (uint32_t item = threadIdx.x; item < HEADS / PAIR * padded; item += ATTEND_THREADS) {
        const uint32_t i = item % padded, h = item / padded * PAIR;
        float sum[PAIR];
#pragma unroll
        for (uint32_t j = 0; j < PAIR; j++) {
            sum[j] = 0.0f;
        }
        for (uint32_t begin = 0; begin < seen; begin += AT_ONCE) { // the cache has room for whole sixteens of positions
            uint16_t element[AT_ONCE];
#pragma unroll
            for (uint32_t t = 0; t < AT_ONCE; t++) {
                element[t] = value[static_cast<size_t>(begin + t) * padded + i];
            }
#pragma unroll
            for (uint32_t t = 0; t < AT_ONCE; t += WIDE) {
                float weight[WIDE * PAIR];
                load_floats(s.weight + (begin + t) * HEADS + h, weight);
#pragma unroll
                for (uint32_t u = 0; u < WIDE; u++) {
                    const bool sees = begin + t + u < seen;
#pragma unroll
                    for (uint32_t j = 0; j < PAIR; j++) {
                        sum[j] = sees ? fmaf(weight[u * PAIR + j], f16_to_f32(element[t + u]), sum[j]) : sum[j];
                    }
                }
            }
        }
#pragma unroll
        for (uint32_t j = 0; j < PAIR; j++) {
            s.part[(h + j) * floats + i] = sum[j];
        }
    }
    const uint32_t warp = ATTEND_THREADS / WARP - 1 - threadIdx.x / WARP, lane = threadIdx.x % WARP; // the last warps, which have least to do
    if (warp < HEADS) {
        float total = 0.0f;
        for (uint32_t t = lane; lane < LANES && t < seen; t += LANES) {
            total += s.weight[t * HEADS + warp];
        }
        total = fold_lanes(total);
        if (lane == 0) {
            s.part[warp * floats + padded + MQ_PART_TOTAL] = total;
        }
    }
    __syncthreads();
}

// Dimension i of what a head saw: the parts of its chunks, joined in ascending order as `join` in kernels/scalar.c.
__device__ inline float joined(const float *parts, uint32_t chunks, uint32_t dim, uint32_t i)
{
    const uint32_t padded = padded_dim(dim), floats = part_floats(dim);
    float part = __ldcg(parts + i), total = __ldcg(parts + padded + MQ_PART_TOTAL), largest = __ldcg(parts + padded + MQ_PART_LARGEST);
#pragma unroll 4
    for (uint32_t chunk = 1; chunk < chunks; chunk++) {
        const float *next = parts + static_cast<size_t>(chunk) * floats;
        const float other = __ldcg(next + padded + MQ_PART_LARGEST), most = other > largest ? other : largest;
        const float mine = exponential(largest - most), theirs = exponential(other - most);
        part = fmaf(part, mine, __ldcg(next + i) * theirs);
        total = fmaf(total, mine, __ldcg(next + padded + MQ_PART_TOTAL) * theirs);
        largest = most;
    }
    return part * (1.0f / total);
}

// One token, grid (chunks, heads_kv, HEADS of the heads that share one): rotates, stores its key and value, attends. The positions
// of earlier passes are staged while the kernels before this one still run.
template <bool STAGED, uint32_t HEADS>
static __global__ void __launch_bounds__(ATTEND_THREADS) attend_one(const __grid_constant__ attention_job job)
{
    const uint32_t dim = job.dim, padded = padded_dim(dim), floats = part_floats(dim);
    const uint32_t shared_by = job.heads / job.heads_kv, kv = blockIdx.y, chunk = blockIdx.x;
    const uint32_t first = kv * shared_by + blockIdx.z * HEADS, left = shared_by - blockIdx.z * HEADS;
    const uint32_t heads = left < HEADS ? left : HEADS;
    float *memory = dynamic_shared<float>(), *weights = memory + query_floats(HEADS, dim), *parts_here = weights + HEADS * MQ_ATTENTION_CHUNK;
    uint16_t *staged = reinterpret_cast<uint16_t *>(parts_here + HEADS * floats);
    const attend_shared s = {memory, weights, parts_here, staged, staged + MQ_ATTENTION_CHUNK / KEY_POSITIONS * key_stride(dim, true)};
    const size_t position = job.state->position; // does not change during a pass
    const uint32_t chunks = static_cast<uint32_t>(position) / MQ_ATTENTION_CHUNK + 1;
    const size_t begin = static_cast<size_t>(chunk) * MQ_ATTENTION_CHUNK, from = kv * job.positions + begin;
    const uint16_t *key = job.keys + from * dim, *value = job.values + from * padded;
    const bool last = chunk == chunks - 1;
    const uint32_t before = last ? static_cast<uint32_t>(position - begin) : MQ_ATTENTION_CHUNK;
    const uint32_t seen = last ? before + 1 : MQ_ATTENTION_CHUNK;
    pdl_launch();
    if (STAGED && chunk < chunks) {
        stage(job, s, before, key, value);
    }
    pdl_wait();
    if (chunk >= chunks) {
        return;
    }
    if (STAGED) {
        copy_wait<0>();
        __syncthreads();
    }
    // Heads with their biases and norms lie where the parts and the weights will be.
    const bool finish_q = job.bias[0] != nullptr || job.norm[0] != nullptr, finish_k = job.bias[1] != nullptr || job.norm[1] != nullptr;
    if (finish_q || finish_k) {
        const uint32_t warp = threadIdx.x / WARP;
        if (warp < heads) {
            const size_t at = static_cast<size_t>(first + warp) * dim;
            finish_head(job.q + at, job.bias[0] == nullptr ? nullptr : job.bias[0] + at, job.norm[0], job.eps, dim, s.part + warp * dim);
        } else if (warp == MOST_HEADS) {
            const float *bias = job.bias[1] == nullptr ? nullptr : job.bias[1] + kv * dim;
            finish_head(job.k + kv * dim, bias, job.norm[1], job.eps, dim, s.weight);
        }
        __syncthreads();
    }
    if (last) {
        uint16_t *column = s.keys + before / KEY_POSITIONS * key_stride(dim, true) + before % KEY_POSITIONS;
        store_position(job, kv, position, finish_k ? s.weight : job.k + kv * dim, job.v + kv * dim, blockIdx.z == 0 || !STAGED,
                       STAGED ? column : nullptr, STAGED ? s.values + before * padded : nullptr);
    }
    constexpr uint32_t EACH = ATTEND_THREADS / HEADS; // threads of a query
    const uint32_t mine = threadIdx.x / EACH;
    if (mine < heads) {
        const float *head = finish_q ? s.part + mine * dim : job.q + static_cast<size_t>(first + mine) * dim;
        turn_head(job, head, position, threadIdx.x % EACH, EACH, [&](uint32_t i, float element) { s.query[i * HEADS + mine] = element; });
    } else {
        for (uint32_t i = threadIdx.x % EACH; i < dim; i += EACH) {
            s.query[i * HEADS + mine] = 0.0f;
        }
    }
    __syncthreads();
    weigh_positions<HEADS>(job, s, seen, STAGED ? s.keys : key, key_stride(dim, STAGED));
    sum_values<HEADS>(job, s, seen, STAGED ? s.values : value);
    float *out = job.out + static_cast<size_t>(first) * dim;
    if (chunks == 1) {
        for (uint32_t i = threadIdx.x; i < heads * dim; i += ATTEND_THREADS) {
            const float *part = s.part + i / dim * floats;
            out[i] = part[i % dim] * (1.0f / part[padded + MQ_PART_TOTAL]);
        }
        return;
    }
    float *parts = job.parts + static_cast<size_t>(first) * job.chunks * floats;
    for (uint32_t i = threadIdx.x; i < heads * floats; i += ATTEND_THREADS) {
        parts[(static_cast<size_t>(i / floats) * job.chunks + chunk) * floats + i % floats] = s.part[i];
    }
    if (arrives_last(job.arrived + first, chunks)) {
        for (uint32_t i = threadIdx.x; i < heads * dim; i += ATTEND_THREADS) {
            out[i] = joined(parts + static_cast<size_t>(i / dim) * job.chunks * floats, chunks, dim, i % dim);
        }
    }
}

#endif
