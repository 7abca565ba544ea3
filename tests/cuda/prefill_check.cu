// prefill_check.cu: the prefill kernels against kernels/scalar.c, bit for bit, over shapes that fit no tile. Prints what differs;
// the exit status is 0 when nothing does. tests/test_cuda_prefill.py builds and runs it.
extern "C" {
#include "kernels.h"
}
#include "matmat.cuh"
#include "prefill_attention.cuh"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

static void check(cudaError_t status)
{
    if (status != cudaSuccess) {
        printf("CUDA: %s\n", cudaGetErrorString(status));
        exit(2);
    }
}

// Values on both sides. Outputs start as NaN, with a guard past their end.
template <typename T>
struct shared_array {
    std::vector<T> host;
    T *device = nullptr;

    explicit shared_array(size_t size) : host(size)
    {
        check(cudaMalloc(&device, size * sizeof(T)));
        check(cudaMemset(device, 0xff, size * sizeof(T)));
    }
    shared_array(const shared_array &) = delete;
    ~shared_array() { cudaFree(device); }
    void to_device() { check(cudaMemcpy(device, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice)); }
    void from_device() { check(cudaMemcpy(host.data(), device, host.size() * sizeof(T), cudaMemcpyDeviceToHost)); }
};

static std::mt19937 generator(1);

static float uniform(float low, float high)
{
    return std::uniform_real_distribution<float>(low, high)(generator);
}

static uint16_t to_half(float value)
{
    return __half_as_ushort(__float2half_rn(value));
}

static size_t differing(const char *what, const float *found, const float *expected, size_t n)
{
    size_t count = 0;
    for (size_t i = 0; i < n; i++) {
        if (memcmp(found + i, expected + i, sizeof(float)) != 0 && count++ == 0) {
            printf("%s: element %zu is %.9g, scalar.c has %.9g\n", what, i, (double)found[i], (double)expected[i]);
        }
    }
    return count;
}

struct linear {
    shared_array<uint8_t> planes[MQ_SLICE_COUNT];
    shared_array<uint16_t> scale_offset;
    mq_matrix host, device;

    // extreme: all codes 255, so that a group's sum is as large as it can be
    linear(uint32_t rows, uint32_t columns, bool extreme)
        : planes{shared_array<uint8_t>(bytes(rows, columns)), shared_array<uint8_t>(bytes(rows, columns)),
                 shared_array<uint8_t>(bytes(rows, columns)), shared_array<uint8_t>(bytes(rows, columns))},
          scale_offset(bytes(rows, columns) / MQ_TILE_BYTES * 2 * MQ_TILE_ROWS)
    {
        const uint32_t tiles = (rows + 15) / 16, groups = (columns + 127) / 128;
        host = device = {{}, nullptr, rows, columns, tiles, groups};
        for (uint32_t e = 0; e < MQ_SLICE_COUNT; e++) {
            for (uint8_t &byte : planes[e].host) {
                byte = extreme ? 255 : (uint8_t)generator();
            }
            planes[e].to_device();
            host.plane[e] = planes[e].host.data(), device.plane[e] = planes[e].device;
        }
        for (size_t i = 0; i < scale_offset.host.size(); i++) {
            scale_offset.host[i] = to_half(i / MQ_TILE_ROWS % 2 == 0 ? uniform(0.001f, 0.02f) : uniform(-0.01f, 0.05f));
        }
        scale_offset.to_device();
        host.scale_offset = scale_offset.host.data(), device.scale_offset = scale_offset.device;
    }

    static size_t bytes(uint32_t rows, uint32_t columns)
    {
        return (size_t)((rows + 15) / 16) * ((columns + 127) / 128) * MQ_TILE_BYTES;
    }
};

enum { MIXED = 0 };

struct linears_case {
    std::vector<uint32_t> rows; // of linears that read the same tokens
    uint32_t columns, n;
    uint32_t depth;      // MIXED: of each token its own
    uint32_t room;       // row tiles that the workspace has room for; 0: all
    bool extreme;
};

static size_t check_linears(const linears_case &c, mq::gemm_launch gemm)
{
    const size_t groups = (c.columns + 127) / 128, inputs = groups * MQ_GROUP_SIZE;
    shared_array<int8_t> q(c.n * inputs);
    shared_array<float> scale(c.n * groups), sum(c.n * groups);
    std::vector<float> x(c.columns);
    for (uint32_t t = 0; t < c.n; t++) {
        for (float &value : x) {
            value = c.extreme ? 1.0f : uniform(-2.0f, 2.0f);
        }
        mq_kernels_scalar.quantize(x.data(), c.columns, &q.host[t * inputs], &scale.host[t * groups], &sum.host[t * groups]);
    }
    q.to_device(), scale.to_device(), sum.to_device();

    constexpr uint32_t STRIDE = 7, GUARD = 3; // of the depths; floats after a token's outputs
    std::vector<linear *> linears;
    std::vector<shared_array<uint8_t> *> depths;
    std::vector<shared_array<float> *> outputs;
    std::vector<mq_cuda_job> jobs;
    size_t rows = 0;
    for (const uint32_t r : c.rows) {
        linears.push_back(new linear(r, c.columns, c.extreme));
        depths.push_back(new shared_array<uint8_t>(c.n * STRIDE));
        for (uint8_t &depth : depths.back()->host) {
            depth = (uint8_t)(c.depth == MIXED ? 1 + generator() % MQ_SLICE_COUNT : c.depth);
        }
        depths.back()->to_device();
        outputs.push_back(new shared_array<float>((size_t)c.n * (r + GUARD)));
        jobs.push_back({linears.back()->device, depths.back()->device, STRIDE, outputs.back()->device, r + GUARD});
        rows += r;
    }
    const size_t least = mq_cuda_matmat_workspace(c.n, 0, groups); // has room for LEAST_TILES
    const size_t bytes = c.room == 0 ? mq_cuda_matmat_workspace(c.n, rows, groups)
                                     : least + (c.room - mq::LEAST_TILES) * groups * mq::CODE_BYTES;
    shared_array<uint8_t> workspace(bytes);
    check(mq::matmat(jobs.data(), (uint32_t)jobs.size(), {q.device, scale.device, sum.device, (uint32_t)groups}, c.n,
                     workspace.device, bytes, nullptr, gemm));
    check(cudaDeviceSynchronize());

    size_t wrong = 0;
    for (size_t i = 0; i < c.rows.size(); i++) {
        outputs[i]->from_device();
        std::vector<float> expected(linears[i]->host.tiles * MQ_TILE_ROWS + GUARD);
        memset(expected.data() + c.rows[i], 0xff, GUARD * sizeof(float));
        for (uint32_t t = 0; t < c.n; t++) {
            mq_kernels_scalar.matvec(&linears[i]->host, depths[i]->host[t * STRIDE], &q.host[t * inputs], &scale.host[t * groups],
                                     &sum.host[t * groups], 0, linears[i]->host.tiles, expected.data());
            wrong += differing("linear", &outputs[i]->host[(size_t)t * (c.rows[i] + GUARD)], expected.data(), c.rows[i] + GUARD);
        }
        delete linears[i];
        delete depths[i];
        delete outputs[i];
    }
    return wrong;
}

struct attention_case {
    uint32_t heads, heads_kv, head_dim, position, n;
};

typedef cudaError_t (*attention_launch)(const mq_cuda_attention &a, cudaStream_t stream);

static size_t check_attention(const attention_case &c, attention_launch attention)
{
    const size_t dim = c.head_dim, padded = mq_padded_dim(dim), floats = mq_part_floats(dim), shared = c.heads / c.heads_kv;
    const size_t positions = (c.position + c.n + 15) / 16 * 16 + 16;
    shared_array<float> query(c.n * c.heads * dim), out(query.host.size());
    shared_array<uint16_t> keys(c.heads_kv * positions * dim), values(c.heads_kv * positions * padded);
    for (float &value : query.host) {
        value = uniform(-3.0f, 3.0f);
    }
    for (uint16_t &key : keys.host) {
        key = to_half(uniform(-1.0f, 1.0f));
    }
    for (size_t i = 0; i < values.host.size(); i++) {
        values.host[i] = i % padded < dim ? to_half(uniform(-1.0f, 1.0f)) : 0;
    }
    query.to_device(), keys.to_device(), values.to_device();
    const float scale = 1.0f / std::sqrt((float)dim);
    check(attention({query.device, keys.device, values.device, positions, c.heads, c.heads_kv, c.head_dim, c.position, c.n, scale,
                     out.device},
                    nullptr));
    check(cudaDeviceSynchronize());
    out.from_device();

    size_t wrong = 0;
    std::vector<float> part(floats), next(floats), expected(dim);
    for (size_t i = 0; i < (size_t)c.n * c.heads; i++) {
        const size_t head = i % c.heads / shared, seen = c.position + i / c.heads + 1;
        mq_queries one = {};
        one.query = &query.host[i * dim], one.tokens = one.heads = 1, one.head_dim = dim, one.scale = scale;
        for (size_t begin = 0; begin < seen; begin += MQ_ATTENTION_CHUNK) {
            const size_t length = seen - begin < MQ_ATTENTION_CHUNK ? seen - begin : MQ_ATTENTION_CHUNK;
            const size_t at = head * positions + begin;
            const mq_stored stored = {&keys.host[at * dim], &values.host[at * padded], nullptr, nullptr};
            mq_kernels_scalar.attend(&one, length, &stored, begin == 0 ? part.data() : next.data());
            if (begin > 0) {
                mq_kernels_scalar.join(part.data(), next.data(), dim);
            }
        }
        for (size_t d = 0; d < dim; d++) {
            expected[d] = part[d] * (1.0f / part[padded + MQ_PART_TOTAL]);
        }
        wrong += differing("attention", &out.host[i * dim], expected.data(), dim);
    }
    return wrong;
}

int main()
{
    size_t wrong = 0;
    const linears_case few[] = {{{16}, 128, 2, 1, 0, false}, {{40}, 300, 5, MIXED, 0, false}, {{72}, 1200, 8, 2, 0, false},
                                {{40, 33, 100}, 1300, 16, MIXED, 0, false}, {{48}, 2200, 11, 4, 0, false}, {{30}, 300, 1, 3, 0, true}};
    for (const linears_case &c : few) {
        wrong += check_linears(c, mq::choose_gemm(c.n, c.depth == MIXED));
    }
    const linears_case many[] = {{{48}, 256, 17, 1, 0, false},      {{200}, 700, 40, MIXED, 0, false},
                                 {{130, 50, 16}, 1400, 350, MIXED, 0, false}, {{400}, 300, 70, 3, 8, false},
                                 {{150, 300}, 200, 33, MIXED, 9, false},      {{64}, 300, 20, 4, 0, true}};
    const mq::gemm_launch gemms[] = {mq::choose_gemm(64, false), mq::choose_gemm(128, false), mq::choose_gemm(1024, false),
                                     mq::launch_gemm<4, 2, 2, 1>};
    for (const mq::gemm_launch gemm : gemms) {
        for (const linears_case &c : many) {
            wrong += check_linears(c, gemm);
        }
    }
    const attention_case prompts[] = {{4, 1, 36, 0, 5}, {4, 2, 64, 0, 40}, {2, 2, 128, 250, 20}, {8, 2, 128, 500, 37}, {3, 1, 200, 300, 7},
                                      {6, 2, 80, 255, 2}, {2, 1, 256, 513, 1}};
    const attention_launch attentions[] = {mq::launch_attention<64>, mq::launch_attention<32>};
    for (const attention_launch attention : attentions) {
        for (const attention_case &c : prompts) {
            wrong += check_attention(c, attention);
        }
    }
    printf("%zu values differ\n", wrong);
    return wrong == 0 ? 0 : 1;
}
