// One binary for every x86-64 processor: the loader picks the widest version of a function that the processor has.
#pragma once

#include <cstddef>

// Needs glibc's indirect functions; not under a sanitizer, whose own code can't run yet when the loader picks.
// x86-64-v3 is AVX2 with FMA and F16C, x86-64-v4 adds AVX-512 F, BW, DQ and VL. The levels are features: a processor's
// name there (arch=haswell) would match that one model and leave AMD's to "default".
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#if __GNUC__ >= 12
#define PKE_FAST_V3 "x86-64-v3"
#define PKE_FAST_V4 "x86-64-v4"
#define PKE_FAST_WIDEST __attribute__((target_clones("default", "arch=" PKE_FAST_V3, "arch=" PKE_FAST_V4)))
#else
#define PKE_FAST_V3 "avx2"
#define PKE_FAST_V4 "avx512f"
#define PKE_FAST_WIDEST __attribute__((target_clones("default", PKE_FAST_V3, PKE_FAST_V4)))
#endif
#else
#define PKE_FAST_WIDEST
#endif

// For what such a function calls: only what is inlined into it is compiled for its processors.
#if defined(__GNUC__)
#define PKE_FAST_INLINE inline __attribute__((always_inline))
#else
#define PKE_FAST_INLINE inline
#endif

namespace pke_fast {

// Bytes of a register in the version that the loader picks; 16 is SSE's and NEON's.
inline std::size_t widest_bytes() {
#ifdef PKE_FAST_V3
    if (__builtin_cpu_supports(PKE_FAST_V4)) return 64;
    if (__builtin_cpu_supports(PKE_FAST_V3)) return 32;
#endif
    return 16;
}

}  // namespace pke_fast
