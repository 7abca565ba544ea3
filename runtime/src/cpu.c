/* cpu.c: which kernels this CPU can run. The table is in order of preference, the definition last. */
#include "kernels.h"

#include "mobiquant.h"

#include <stdbool.h>
#include <string.h>
#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
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

#if defined(MQ_AVXVNNI)
/* Alder Lake and its successors, which have no AVX-512, and Zen 5. */
static bool has_avxvnni(void)
{
    unsigned a = 0, b = 0, c = 0, d = 0;
    return has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a & 1u << 4) != 0;
}
#endif

/* Skylake-X, Cascade Lake. */
static bool has_avx512bw(void)
{
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")
           && __builtin_cpu_supports("avx512dq") && has_avx2();
}

/* Ice Lake, Sapphire Rapids, Zen 4 and later. */
static bool has_avx512vnni(void)
{
    return __builtin_cpu_supports("avx512vnni") && has_avx512bw();
}
#elif defined(__aarch64__)
/* Cortex-A55 and A75 and later, every Apple silicon Mac. */
static bool has_dotprod(void)
{
#if defined(__ARM_FEATURE_DOTPROD) /* the build already asks for it, as on macOS */
    return true;
#elif defined(__linux__)
    enum { ASIMDDP = 20 }; /* HWCAP_ASIMDDP */
    return (getauxval(AT_HWCAP) >> ASIMDDP & 1) != 0;
#else
    return false;
#endif
}
#endif

static const struct {
    const mq_kernels *kernels;
    bool (*supported)(void);
} TABLE[] = {
#if defined(__x86_64__)
    {&mq_kernels_avx512vnni, has_avx512vnni},
#if defined(MQ_AVXVNNI)
    {&mq_kernels_avxvnni, has_avxvnni},
#endif
    {&mq_kernels_avx512bw, has_avx512bw},
    {&mq_kernels_avx2, has_avx2},
#elif defined(__aarch64__)
    {&mq_kernels_neon_dotprod, has_dotprod},
    {&mq_kernels_neon, always},
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
