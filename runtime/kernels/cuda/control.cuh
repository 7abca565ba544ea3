// control.cuh: what the kernels of a pass read from device memory because it changes from token to token, so that a recorded
// pass can be replayed.
#ifndef MQ_CUDA_CONTROL_H
#define MQ_CUDA_CONTROL_H

#include <stdint.h>

struct control {
    uint32_t position;       // of the first token of the pass
    uint32_t routed;         // 1: depths from the routers, 0: from the table
    uint32_t generated;      // greedy: tokens chosen so far
    uint32_t unused;
    unsigned long long best; // greedy: the largest logit so far and its token, see argmax.cuh
    int32_t tokens[];        // [n_batch]
};

#endif
