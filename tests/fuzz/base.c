/* base.c: see base.h. */
#include "base.h"

__asm__(".section .rodata\n"
        ".balign 64\n"
        ".global fuzz_base\n"
        ".global fuzz_base_end\n"
        "fuzz_base: .incbin \"" FUZZ_BASE_FILE "\"\n"
        "fuzz_base_end:\n"
        ".previous\n");
