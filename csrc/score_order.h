// Scores as unsigned integers of the same order, for the C++ form and the CUDA kernels alike.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define PKE_FAST_BOTH __host__ __device__
#else
#define PKE_FAST_BOTH
#endif

namespace pke_fast {

// The formats scores come in: the integer that holds one, and the magnitude of infinity in it. Tensors' elements as C++
// types are another thing: elements.h.
namespace score_format {

struct Float32 {
    using Bits = uint32_t;
    static constexpr uint32_t kInfinity = 0x7f800000u;
};
struct BFloat16 {
    using Bits = uint16_t;
    static constexpr uint32_t kInfinity = 0x7f80u;
};
struct Float16 {
    using Bits = uint16_t;
    static constexpr uint32_t kInfinity = 0x7c00u;
};

}  // namespace score_format

// -inf is 0, -0 equals +0, +inf is kRawInfinity and every NaN is above. Comparing integers also keeps denormals apart
// where the processor is set to flush them to zero.
template <typename Format>
constexpr uint32_t kRawInfinity = 2 * Format::kInfinity;

template <typename Format>
PKE_FAST_BOTH inline uint32_t raw_key(typename Format::Bits bits) {
    constexpr int kSign = 8 * sizeof(bits) - 1;
    const uint32_t magnitude = bits & ((1u << kSign) - 1);
    const uint32_t value = bits >> kSign ? 0u - magnitude : magnitude;  // sign and magnitude to two's complement
    return value + Format::kInfinity;                                   // a negative NaN wraps round to the top
}

// What scores are chosen by: a NaN comes below everything, the numbers from 1 up.
constexpr uint32_t kNaN = 0;

template <typename Format>
PKE_FAST_BOTH inline uint32_t order_key(typename Format::Bits bits) {
    const uint32_t raw = raw_key<Format>(bits);
    return raw > kRawInfinity<Format> ? kNaN : raw + 1;
}

}  // namespace pke_fast
