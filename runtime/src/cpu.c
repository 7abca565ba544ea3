/* cpu.c: which kernels this CPU can run. The table is in order of preference, the definition last. */
#include "kernels.h"

#include "mobiquant.h"

#include <stdbool.h>
#include <string.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

static bool always(void)
{
    return true;
}

#if defined(__x86_64__)
/* Laptops and servers since Haswell and Zen. */
static bool has_avx2(void)
{
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __get_cpuid(1, &a, &b, &c, &d) != 0
           && (c & bit_F16C) != 0;
}

/* Ice Lake, Sapphire Rapids, Zen 4 and later. */
static bool has_avx512vnni(void)
{
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")
           && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni") && has_avx2();
}
#endif

static const struct {
    const mq_kernels *kernels;
    bool (*supported)(void);
} TABLE[] = {
#if defined(__x86_64__)
    {&mq_kernels_avx512vnni, has_avx512vnni},
    {&mq_kernels_avx2, has_avx2},
#endif
    {&mq_kernels_scalar, always},
};

enum { TABLE_SIZE = sizeof TABLE / sizeof TABLE[0] };

const mq_kernels *mq_kernels_at(size_t index)
{
    return index < TABLE_SIZE ? TABLE[index].kernels : NULL;
}

const char *mq_kernel_name(size_t index)
{
    return index < TABLE_SIZE ? TABLE[index].kernels->name : NULL;
}

int32_t mq_kernel_supported(size_t index)
{
    return index < TABLE_SIZE && TABLE[index].supported();
}

const mq_kernels *mq_kernels_find(const char *name)
{
    for (size_t i = 0; i < TABLE_SIZE; i++) {
        if (TABLE[i].supported() && (name == NULL || strcmp(name, TABLE[i].kernels->name) == 0)) {
            return TABLE[i].kernels;
        }
    }
    return NULL;
}
