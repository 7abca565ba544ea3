// matmat.cuh: slice linears over the tokens of a batch, with the bits of matmat in kernels/scalar.c: which kernels run.
#ifndef MQ_CUDA_MATMAT_H
#define MQ_CUDA_MATMAT_H

#include "combine.cuh"
#include "gemm.cuh"
#include "wide_gemm.cuh"

namespace mq {

// Multiplies what is combined.
typedef cudaError_t (*gemm_launch)(const batch &b, cudaStream_t stream);

// y = W·x of up to three linears that read the same x, for n >= 1 tokens. A workspace with less room than the linears want makes
// it go in several launches; least: 8 row tiles.
inline cudaError_t matmat(const mq_cuda_job *jobs, uint32_t count, const mq_activations &x, uint32_t n, void *workspace,
                          size_t workspace_bytes, cudaStream_t stream, gemm_launch gemm)
{
    if (count == 0 || count > MAX_JOBS || n == 0 || n > MAX_TOKENS) {
        return cudaErrorInvalidValue;
    }
    batch b = {};
    b.count = count, b.n = n, b.groups = x.groups, b.x = x;
    for (uint32_t i = 0; i < count; i++) {
        b.job[i] = jobs[i];
        b.tiles[i] = jobs[i].matrix.tiles;
    }
    const size_t tile_bytes = (size_t)x.groups * CODE_BYTES, lists = count * (sorted_bytes(n) + factor_bytes(n, x.groups));
    if (workspace_bytes < lists + LEAST_TILES * tile_bytes) {
        return cudaErrorInvalidValue;
    }
    uint8_t *at = static_cast<uint8_t *>(workspace);
    for (uint32_t i = 0; i < count; i++, at += sorted_bytes(n)) {
        b.tokens[i].first = reinterpret_cast<uint32_t *>(at);
        b.tokens[i].order = b.tokens[i].first + 8;
    }
    for (uint32_t i = 0; i < count; i++, at += factor_bytes(n, x.groups)) {
        b.factors[i] = reinterpret_cast<float2 *>(at);
    }
    cudaError_t status = launch({count, SORT_THREADS, 0, stream, false}, sort, b);
    status = status == cudaSuccess ? launch({dim3(b.groups, count), GATHER_THREADS, 0, stream, false}, gather, b) : status;
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
            piece.job[to] = jobs[job], piece.tokens[to] = b.tokens[job], piece.factors[to] = b.factors[job];
            piece.codes[to] = at + (room - left) * tile_bytes;
            piece.tile_begin[to] = tile, piece.tiles[to] = tiles;
            left -= tiles;
            tile += tiles;
            if (tile == jobs[job].matrix.tiles) {
                job++, tile = 0;
            }
        }
        status = launch_combine(piece, stream);
        status = status == cudaSuccess ? gemm(piece, stream) : status;
    }
    return status;
}

// The fastest there is for this device and n tokens. mixed: they may differ in depth, and each depth fills blocks of its own.
inline gemm_launch choose_gemm(uint32_t n, bool mixed)
{
    int device = 0, major = 0, minor = 0, shared = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (major == 9 && minor == 0) {
        const uint32_t together = mixed ? n / 2 : n; // of the depth that most have, say
        // Of 512 tokens, blocks of 256 leave multiprocessors idle where a linear has few rows.
        return together <= 64 ? launch_wide<2, 2, 32, 7> : together <= 512 ? launch_wide<2, 2, 64, 6> : launch_wide<2, 4, 64, 4>;
    }
    return (size_t)shared >= gemm_shape<4, 2, 4>::SHARED ? launch_gemm<4, 2, 4, 1> : launch_gemm<4, 2, 2, 1>;
}

} // namespace mq

// Bytes with which linears of `rows` rows together and `groups` groups run as one launch, at most n tokens at once.
inline size_t mq_cuda_matmat_workspace(uint32_t n, size_t rows, size_t groups)
{
    return mq::MAX_JOBS * (mq::sorted_bytes(n) + mq::factor_bytes(n, groups)) + (rows / MQ_TILE_ROWS + mq::LEAST_TILES) * groups * mq::CODE_BYTES;
}

// mixed: tokens may differ in depth.
inline cudaError_t mq_cuda_matmat(const mq_cuda_job *jobs, uint32_t count, const mq_activations &x, uint32_t n, bool mixed, void *workspace,
                                  size_t workspace_bytes, cudaStream_t stream)
{
    return mq::matmat(jobs, count, x, n, workspace, workspace_bytes, stream, mq::choose_gemm(n, mixed));
}

#endif
