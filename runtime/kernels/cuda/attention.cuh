// attention.cuh: rotation of queries and keys, the KV cache, and attention in the chunks and the order of kernels/scalar.c. Of one
// token every chunk is a block of threads and the parts are joined after it; of more tokens a block walks the chunks of one head.
//
// Cache of one block of the model: keys f16 [kv head][positions / 16][head_dim][16], values f16 [kv head][positions][head_dim
// padded to 16].
#ifndef MQ_CUDA_ATTENTION_H
#define MQ_CUDA_ATTENTION_H

#include "arithmetic.cuh"
#include "control.cuh"
#include "kernels.h"

enum { ATTEND_THREADS = MQ_ATTENTION_CHUNK, STORE_THREADS = 256, KEY_POSITIONS = 16 };

struct attention_job {
    float *q;                // [n][heads·dim], rotated in place
    float *k;                // [n][heads_kv·dim], likewise
    const float *v;          // [n][heads_kv·dim]
    uint16_t *keys, *values; // of the block of the model
    size_t positions;        // of the cache, a multiple of 16
    const float *cosine, *sine; // [n_ctx][dim / 2]
    uint32_t heads, heads_kv, dim;
    float scale;
    float *parts;            // of one token: [head][chunks][mq_part_floats(dim)]
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

__device__ inline void rotate(float *head, const float *cosine, const float *sine, uint32_t half, uint32_t i)
{
    const float a = head[i], b = head[half + i];
    head[i] = fmaf(a, cosine[i], -(b * sine[i]));
    head[half + i] = fmaf(b, cosine[i], a * sine[i]);
}

// One block of threads per token.
static __global__ void __launch_bounds__(STORE_THREADS) rotate_and_store(const __grid_constant__ attention_job job)
{
    const uint32_t token = blockIdx.x, half = job.dim / 2, padded = padded_dim(job.dim);
    pdl_launch();
    pdl_wait();
    const size_t position = job.state->position + token;
    const float *cosine = job.cosine + position * half, *sine = job.sine + position * half;
    float *q = job.q + static_cast<size_t>(token) * job.heads * job.dim;
    float *k = job.k + static_cast<size_t>(token) * job.heads_kv * job.dim;
    const float *v = job.v + static_cast<size_t>(token) * job.heads_kv * job.dim;
    for (uint32_t i = threadIdx.x; i < job.heads * half; i += STORE_THREADS) {
        rotate(q + i / half * job.dim, cosine, sine, half, i % half);
    }
    for (uint32_t i = threadIdx.x; i < job.heads_kv * half; i += STORE_THREADS) {
        const uint32_t head = i / half, at = i % half;
        rotate(k + head * job.dim, cosine, sine, half, at);
        uint16_t *column = job.keys + (head * job.positions + position / KEY_POSITIONS * KEY_POSITIONS) * job.dim
                           + position % KEY_POSITIONS;
        column[at * KEY_POSITIONS] = f32_to_f16(k[head * job.dim + at]);
        column[(half + at) * KEY_POSITIONS] = f32_to_f16(k[head * job.dim + half + at]);
    }
    for (uint32_t i = threadIdx.x; i < job.heads_kv * job.dim; i += STORE_THREADS) {
        job.values[(i / job.dim * job.positions + position) * padded + i % job.dim] = f32_to_f16(v[i]);
    }
}

__device__ inline float largest_of_block(float value)
{
    __shared__ float of_warp[ATTEND_THREADS / WARP];
    value = largest_of_warp(value);
    if (threadIdx.x % WARP == 0) {
        of_warp[threadIdx.x / WARP] = value;
    }
    __syncthreads();
    for (uint32_t i = 0; i < ATTEND_THREADS / WARP; i++) {
        value = fmaxf(value, of_warp[i]);
    }
    return value;
}

// The part of one chunk, of whose positions `seen` are seen, for one query. Thread p scores position p, then thread i sums up
// dimension i. query, weight and part lie in shared memory.
__device__ inline void attend_chunk(const attention_job &job, const float *query, uint32_t seen, const uint16_t *key,
                                    const uint16_t *value, float *weight, float *part)
{
    const uint32_t dim = job.dim, padded = padded_dim(dim), p = threadIdx.x;
    float score = -INFINITY;
    if (p < seen) {
        const uint16_t *k = key + static_cast<size_t>(p / KEY_POSITIONS) * KEY_POSITIONS * dim + p % KEY_POSITIONS;
        float dot = 0.0f;
#pragma unroll 16
        for (uint32_t i = 0; i < dim; i++) {
            dot = fmaf(query[i], f16_to_f32(k[i * KEY_POSITIONS]), dot);
        }
        score = dot * job.scale;
    }
    const float largest = largest_of_block(score);
    if (p < seen) {
        weight[p] = exponential(score - largest);
    }
    __syncthreads();
    for (uint32_t i = p; i < padded; i += ATTEND_THREADS) {
        float sum = 0.0f;
#pragma unroll 16
        for (uint32_t t = 0; t < seen; t++) {
            sum = fmaf(weight[t], f16_to_f32(value[static_cast<size_t>(t) * padded + i]), sum);
        }
        part[i] = sum;
    }
    if (p >= ATTEND_THREADS - WARP) { // the last warp: the sum of the weights in 16 lanes
        const uint32_t lane = p % WARP;
        float total = 0.0f;
        for (uint32_t t = lane; lane < LANES && t < seen; t += LANES) {
            total += weight[t];
        }
        total = fold_lanes(total);
        if (lane == 0) {
            part[padded + MQ_PART_TOTAL] = total;
            part[padded + MQ_PART_LARGEST] = largest;
        }
    }
    __syncthreads();
}

// Thread i joins dimension i of the next chunk's part; the totals and maxima are in the tails, written by the last thread.
__device__ inline void join_part(float *part, const float *next, uint32_t dim)
{
    const uint32_t padded = padded_dim(dim);
    const float largest = part[padded + MQ_PART_LARGEST], other = next[padded + MQ_PART_LARGEST];
    const float most = other > largest ? other : largest;
    const float mine = exponential(largest - most), theirs = exponential(other - most);
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < padded; i += blockDim.x) {
        part[i] = fmaf(part[i], mine, next[i] * theirs);
    }
    if (threadIdx.x == blockDim.x - 1) {
        part[padded + MQ_PART_TOTAL] = fmaf(part[padded + MQ_PART_TOTAL], mine, next[padded + MQ_PART_TOTAL] * theirs);
        part[padded + MQ_PART_LARGEST] = most;
    }
    __syncthreads();
}

__device__ inline void finish_part(const float *part, uint32_t dim, float *out)
{
    const float inverse = 1.0f / part[padded_dim(dim) + MQ_PART_TOTAL];
    for (uint32_t i = threadIdx.x; i < dim; i += blockDim.x) {
        out[i] = part[i] * inverse;
    }
}

static inline size_t attend_shared(uint32_t dim)
{
    return sizeof(float) * (padded_dim(dim) + MQ_ATTENTION_CHUNK + 2 * part_floats(dim));
}

// Grid (chunks, heads, 1) for one token: a part each. Grid (1, heads, tokens) for several: all chunks, joined.
static __global__ void __launch_bounds__(ATTEND_THREADS) attend(const __grid_constant__ attention_job job, bool one)
{
    const uint32_t dim = job.dim, head = blockIdx.y, token = blockIdx.z, padded = padded_dim(dim);
    float *query = dynamic_shared<float>(), *weight = query + padded, *part = weight + MQ_ATTENTION_CHUNK;
    float *next = part + part_floats(dim);
    pdl_launch();
    pdl_wait();
    const uint32_t seen = job.state->position + token + 1, chunks = (seen + MQ_ATTENTION_CHUNK - 1) / MQ_ATTENTION_CHUNK;
    if (blockIdx.x >= chunks) {
        return;
    }
    const size_t row = (static_cast<size_t>(token) * job.heads + head) * dim;
    for (uint32_t i = threadIdx.x; i < dim; i += ATTEND_THREADS) {
        query[i] = job.q[row + i];
    }
    __syncthreads();
    const size_t from = static_cast<size_t>(head / (job.heads / job.heads_kv)) * job.positions;
    for (uint32_t chunk = blockIdx.x; chunk < chunks; chunk++) {
        const uint32_t begin = chunk * MQ_ATTENTION_CHUNK;
        const uint32_t here = seen - begin < MQ_ATTENTION_CHUNK ? seen - begin : MQ_ATTENTION_CHUNK;
        attend_chunk(job, query, here, job.keys + (from + begin) * dim, job.values + (from + begin) * padded, weight,
                     chunk == 0 || one ? part : next);
        if (one) {
            float *out = job.parts + (static_cast<size_t>(head) * job.chunks + chunk) * part_floats(dim);
            for (uint32_t i = threadIdx.x; i < padded + 2; i += ATTEND_THREADS) {
                out[i] = part[i];
            }
            return;
        }
        if (chunk > 0) {
            join_part(part, next, dim);
        }
    }
    finish_part(part, dim, job.out + row);
}

// Of one token: the parts of a head, in ascending order.
static __global__ void __launch_bounds__(ATTEND_THREADS) join_chunks(const __grid_constant__ attention_job job)
{
    const uint32_t dim = job.dim, head = blockIdx.x, floats = part_floats(dim);
    float *part = dynamic_shared<float>();
    pdl_launch();
    pdl_wait();
    const uint32_t chunks = job.state->position / MQ_ATTENTION_CHUNK + 1;
    const float *parts = job.parts + static_cast<size_t>(head) * job.chunks * floats;
    for (uint32_t i = threadIdx.x; i < padded_dim(dim) + 2; i += ATTEND_THREADS) {
        part[i] = parts[i];
    }
    __syncthreads();
    for (uint32_t chunk = 1; chunk < chunks; chunk++) {
        join_part(part, parts + chunk * floats, dim);
    }
    finish_part(part, dim, job.out + static_cast<size_t>(head) * dim);
}

#endif
