// The elements of tensors as C++ types, so that templates tell them apart, and their way to fp32 and back.
#pragma once

#include <cstdint>

#include "dtypes.h"
#include "widest.h"

namespace pke_fast {

struct BFloat16 {
    uint16_t bits;
};

struct Float16 {
    uint16_t bits;
};

PKE_FAST_INLINE float widen(float x) { return x; }
PKE_FAST_INLINE float widen(BFloat16 x) { return from_bf16(x.bits); }
PKE_FAST_INLINE float widen(Float16 x) { return from_fp16(x.bits); }

PKE_FAST_INLINE void narrow(float x, float& into) { into = x; }
PKE_FAST_INLINE void narrow(float x, BFloat16& into) { into.bits = to_bf16(x); }
PKE_FAST_INLINE void narrow(float x, Float16& into) { into.bits = to_fp16(x); }

}  // namespace pke_fast
