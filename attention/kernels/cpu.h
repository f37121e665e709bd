/* Whether this machine has the instructions of simd.h. Included before that file asks for them,
 * once in a library. */
#pragma once

enum { NOTHING = 0, FLOAT32 = 1, BFLOAT16 = 2 }; /* what this machine multiplies, as bits */

int supported(void) {
    __builtin_cpu_init();
    if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
          __builtin_cpu_supports("fma")))
        return NOTHING;
    return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni")
               ? FLOAT32 | BFLOAT16
               : FLOAT32;
}
