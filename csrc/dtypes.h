// bf16 and fp16 beside fp32, without the processor's own instructions: plain integer code that compilers vectorise and
// that gives the same bits on every machine, denormals included, also where denormals are set to be flushed to zero.
#pragma once

#include <cstdint>
#include <cstring>

namespace pke_fast {

enum class Dtype { fp32, bf16, fp16 };

inline uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// To the nearest, ties to even; a NaN stays one, without its payload.
inline uint16_t to_bf16(float value) {
    const uint32_t bits = bits_of(value);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

inline float from_bf16(uint16_t bits) { return float_of(static_cast<uint32_t>(bits) << 16); }

// To the nearest, ties to even: adding a power of two that is 2^13 times the value's own (or the least normal one's)
// leaves the addition to round at fp16's last bit. The two factors turn what is too large into infinity.
inline uint16_t to_fp16(float value) {
    const uint32_t bits = bits_of(value);
    const uint32_t doubled = bits + bits;  // without the sign
    const uint32_t exponent = doubled & 0xff000000u;
    const uint32_t bias = exponent < 0x71000000u ? 0x71000000u : exponent;
    const float scaled = (float_of(bits & 0x7fffffffu) * 0x1p+112f) * 0x1p-110f;
    const uint32_t sum = bits_of(float_of((bias >> 1) + 0x07800000u) + scaled);
    const uint32_t magnitude = ((sum >> 13) & 0x7c00u) + (sum & 0x0fffu);
    return static_cast<uint16_t>(((bits >> 16) & 0x8000u) | (doubled > 0xff000000u ? 0x7e00u : magnitude));
}

inline float from_fp16(uint16_t bits) {
    const uint32_t word = static_cast<uint32_t>(bits) << 16;
    const uint32_t doubled = word + word;  // without the sign
    const float normal = float_of((doubled >> 4) + 0x70000000u) * 0x1p-112f;
    const float denormal = float_of((doubled >> 17) | 0x3f000000u) - 0.5f;
    return float_of((word & 0x80000000u) | (doubled < 0x08000000u ? bits_of(denormal) : bits_of(normal)));
}

}  // namespace pke_fast
