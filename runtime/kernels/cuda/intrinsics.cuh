// intrinsics.cuh: the few instructions that CUDA C++ has no name for, and half precision by its bits.
#ifndef MQ_CUDA_INTRINSICS_H
#define MQ_CUDA_INTRINSICS_H

#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

// The block's shared memory whose size the launch gives.
template <typename T>
__device__ inline T *dynamic_shared()
{
    extern __shared__ uint4 mq_shared[];
    return reinterpret_cast<T *>(mq_shared);
}

// Programmatic dependent launch (compute capability 9.0 and later): wait until the kernels before this one have written what
// they write; let the next one start while this one still runs. Without it kernels follow one another whole.
__device__ inline void pdl_wait()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ inline void pdl_launch()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ inline float f16_to_f32(uint16_t half)
{
    return __half2float(__ushort_as_half(half));
}

__device__ inline uint16_t f32_to_f16(float value)
{
    return __half_as_ushort(__float2half_rn(value));
}

// 16 bytes that are read once: they take no room in the first-level cache.
__device__ inline uint4 load_stream(const void *address)
{
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(address));
    return v;
}

__device__ inline void prefetch_l2(const void *address)
{
    asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

__device__ inline int sum_warp(int value)
{
    return __reduce_add_sync(0xffffffffu, value);
}

// c += A·B, exact: A 16 rows × 32 unsigned bytes, B 32 × 8 signed bytes. Of lane l, a0 and a2 hold row l / 4 and a1 and a3 row
// l / 4 + 8, b0 and b1 column l / 4: bytes 4·(l % 4) on, and from 16 + 4·(l % 4) on. c: rows l / 4 (twice) and l / 4 + 8, columns
// 2·(l % 4) and the next.
__device__ inline void mma_u8s8(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1)
{
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

#endif
