// control.cuh: what the kernels of a pass read from device memory because it changes from token to token, so that a recorded
// pass can be replayed; and how blocks of threads learn that the others are done.
#ifndef MQ_CUDA_CONTROL_H
#define MQ_CUDA_CONTROL_H

#include <cuda_runtime.h>
#include <stdint.h>

struct control {
    uint32_t position;       // of the first token of the pass
    uint32_t routed;         // 1: depths from the routers, 0: from the table
    uint32_t generated;      // greedy: tokens chosen so far
    uint32_t unused;
    unsigned long long best; // greedy: the largest logit so far and its token, see argmax.cuh
    int32_t tokens[];        // [n_batch]
};

// True in every thread of the block that arrives last, which then sees what the others wrote.
__device__ inline bool arrives_last(uint32_t *arrived, uint32_t blocks)
{
    __shared__ uint32_t before;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        before = atomicInc(arrived, blocks - 1); // back to 0 with the last
    }
    __syncthreads();
    __threadfence();
    return before == blocks - 1;
}

#endif
