// Sixteen floats as one value: an AVX-512 register, two of AVX2, four of SSE or NEON. For loops whose sums have to stay
// in registers, which a compiler doesn't see in arrays.
#pragma once

#include <cstddef>

#include "widest.h"

namespace pke_fast {

constexpr std::size_t kLane = 16;

#if defined(__GNUC__)
typedef float Lanes __attribute__((vector_size(kLane * sizeof(float)), aligned(4), may_alias));
#else
struct Lanes {
    float at[kLane];
    Lanes& operator+=(const Lanes& other) {
        for (std::size_t i = 0; i < kLane; ++i) at[i] += other.at[i];
        return *this;
    }
    friend Lanes operator*(const Lanes& a, const Lanes& b) {
        Lanes product;
        for (std::size_t i = 0; i < kLane; ++i) product.at[i] = a.at[i] * b.at[i];
        return product;
    }
    friend Lanes operator*(float factor, const Lanes& lanes) {
        Lanes product;
        for (std::size_t i = 0; i < kLane; ++i) product.at[i] = factor * lanes.at[i];
        return product;
    }
};
#endif

// By reference: a function that returns so many bytes would depend on what its processor has.
PKE_FAST_INLINE const Lanes& lanes_at(const float* x) { return *reinterpret_cast<const Lanes*>(x); }
PKE_FAST_INLINE Lanes& lanes_at(float* x) { return *reinterpret_cast<Lanes*>(x); }

}  // namespace pke_fast
