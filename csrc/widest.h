// One binary for every x86-64 processor: the loader picks the widest version of a function that the processor has.
#pragma once

// Needs glibc's indirect functions. "haswell" is AVX2 with FMA and F16C, "skylake-avx512" is AVX-512 F, BW, DQ and VL.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define PKE_FAST_WIDEST __attribute__((target_clones("default", "arch=haswell", "arch=skylake-avx512")))
#else
#define PKE_FAST_WIDEST
#endif
