// tensor.cuh: instructions of the prefill kernels that CUDA C++ has no name for: copies into shared memory that go on while others
// compute, and integer products of the tensor cores.
#ifndef MQ_CUDA_TENSOR_H
#define MQ_CUDA_TENSOR_H

#include <cuda_runtime.h>
#include <stdint.h>

__device__ inline uint32_t shared_address(const void *pointer)
{
    return (uint32_t)__cvta_generic_to_shared(pointer);
}

// Copies BYTES (4 or 16) to shared memory without waiting; zeros when not valid.
template <int BYTES>
__device__ inline void copy_async(void *to, const void *from, bool valid)
{
    if constexpr (BYTES == 16) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 16 : 0));
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 4 : 0));
    }
}

__device__ inline void copy_commit()
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most LEFT of this thread's groups of copies are on their way.
template <int LEFT>
__device__ inline void copy_wait()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

// Four 8x16-byte matrices; lane 8·i + r gives the address of row r of the i-th.
__device__ inline void load_matrices(uint32_t (&to)[4], const void *row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// d = a · b + c; a: 16 rows x 32 codes, b: 32 x 8 activations.
__device__ inline void multiply(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const int32_t (&c)[4])
{
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%10, %11, %12, %13};"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
}

// Of compute capability 9.0a: barriers that count arrivals, for warps that hand data to others, and products of 128 threads.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define MQ_WARPGROUPS

__device__ inline void barrier_set(uint64_t *barrier, uint32_t arrivals)
{
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

__device__ inline void barrier_arrive(uint64_t *barrier)
{
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives when this thread's copies so far have.
__device__ inline void barrier_arrive_copied(uint64_t *barrier)
{
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives, and makes the phase wait for so many bytes of copy_bulk().
__device__ inline void barrier_expect(uint64_t *barrier, uint32_t bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}

// One thread copies a multiple of 16 bytes.
__device__ inline void copy_bulk(void *to, const void *from, uint32_t bytes, uint64_t *barrier)
{
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address(to)),
                 "l"(from), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
}

// Waits for the end of the phase of this parity.
__device__ inline void barrier_wait(uint64_t *barrier, uint32_t parity)
{
    asm volatile("{.reg .pred done;\n"
                 "again: mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
                 "@!done bra again;}" ::"r"(shared_address(barrier)), "r"(parity)
                 : "memory");
}

// What threads wrote to shared memory before becomes visible to the tensor cores.
__device__ inline void fence_tensor_reads()
{
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

template <uint32_t COUNT>
__device__ inline void registers_raise()
{
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

template <uint32_t COUNT>
__device__ inline void registers_lower()
{
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

__device__ inline void warpgroup_begin()
{
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// The products since warpgroup_begin() go on by themselves,
__device__ inline void warpgroup_send()
{
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// until here; what they gave may be read from here on.
template <uint32_t COUNT>
__device__ inline void warpgroup_receive(int32_t (&d)[COUNT])
{
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
    for (uint32_t i = 0; i < COUNT; i++) {
        asm volatile("" : "+r"(d[i])::"memory");
    }
}

// Rows of 128 bytes in shared memory, 16-byte pieces in the order piece ^ row % 8, aligned to 1,024 bytes; the k-th 32 columns.
__device__ inline uint64_t warpgroup_matrix(const void *rows, uint32_t k)
{
    return (uint64_t)((shared_address(rows) & 0x3ffffu) >> 4) + 2 * k | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

template <typename T>
__device__ inline T *align_stages(uint8_t *memory)
{
    return reinterpret_cast<T *>(memory + (0u - shared_address(memory)) % alignof(T));
}

// d = a · b (+ d if add): a 64 rows x 32 codes, of warp w rows 16·w.. as in multiply(); b 32 x N activations of matrix b; d[4·n + i] as
// in multiply() for activations 8·n...
__device__ inline void warpgroup_multiply(int32_t (&d)[16], const uint32_t (&a)[4], uint64_t b, int32_t add)
{
    asm volatile("{.reg .pred p; setp.ne.b32 p, %21, 0; wgmma.mma_async.sync.aligned.m64n32k32.s32.u8.s8 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
                 "{%16, %17, %18, %19}, %20, p;}"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]), "+r"(d[4]), "+r"(d[5]), "+r"(d[6]), "+r"(d[7]),
                   "+r"(d[8]), "+r"(d[9]), "+r"(d[10]), "+r"(d[11]), "+r"(d[12]), "+r"(d[13]), "+r"(d[14]), "+r"(d[15])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}

__device__ inline void warpgroup_multiply(int32_t (&d)[32], const uint32_t (&a)[4], uint64_t b, int32_t add)
{
    asm volatile("{.reg .pred p; setp.ne.b32 p, %37, 0; wgmma.mma_async.sync.aligned.m64n64k32.s32.u8.s8 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
                 "{%32, %33, %34, %35}, %36, p;}"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]), "+r"(d[4]), "+r"(d[5]), "+r"(d[6]), "+r"(d[7]),
                   "+r"(d[8]), "+r"(d[9]), "+r"(d[10]), "+r"(d[11]), "+r"(d[12]), "+r"(d[13]), "+r"(d[14]), "+r"(d[15]),
                   "+r"(d[16]), "+r"(d[17]), "+r"(d[18]), "+r"(d[19]), "+r"(d[20]), "+r"(d[21]), "+r"(d[22]), "+r"(d[23]),
                   "+r"(d[24]), "+r"(d[25]), "+r"(d[26]), "+r"(d[27]), "+r"(d[28]), "+r"(d[29]), "+r"(d[30]), "+r"(d[31])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}

#endif

#endif
