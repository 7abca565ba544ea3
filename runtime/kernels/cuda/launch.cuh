// launch.cuh: starting kernels on the host's side, with or without an overlap with the kernel before.
#ifndef MQ_CUDA_LAUNCH_H
#define MQ_CUDA_LAUNCH_H

#include <cuda_runtime.h>

struct launch_config {
    dim3 grid, block;
    size_t shared;       // bytes of dynamic shared memory
    cudaStream_t stream;
    bool pdl;            // may start before the kernel before it has ended: it calls pdl_wait() before it reads
};

template <typename... Parameters, typename... Arguments>
static cudaError_t launch(const launch_config &config, void (*kernel)(Parameters...), Arguments... arguments)
{
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t how = {};
    how.gridDim = config.grid;
    how.blockDim = config.block;
    how.dynamicSmemBytes = config.shared;
    how.stream = config.stream;
    how.attrs = &attribute;
    how.numAttrs = config.pdl ? 1 : 0;
    return cudaLaunchKernelEx(&how, kernel, static_cast<Parameters>(arguments)...);
}

// More dynamic shared memory than 48 KiB has to be asked for, once per kernel.
template <typename Kernel>
static cudaError_t allow_shared(Kernel kernel, size_t bytes)
{
    return bytes <= 48 * 1024 ? cudaSuccess
                              : cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}

#endif
