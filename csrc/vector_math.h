// exp, the logistic function and the normal distribution in fp32, without branches or tables, so that loops vectorise.
// Polynomials: least relative maximum error (Lawson's iteration) against values of 15 digits, rounded to fp32.
#pragma once

#include <cmath>
#include <cstdint>

#include "dtypes.h"
#include "widest.h"

namespace pke_fast {

// exp(x + correction) for x <= 0 and |correction| < 0.01, to 1.2 ulp; 0 where it is below the normal numbers.
PKE_FAST_INLINE float exp_of_negative(float x, float correction = 0.0f) {
    const float magic = 0x1.8p23f;  // adding it rounds to an integer, which its lowest bits then hold
    const float shifted = x * 0x1.715476p0f + magic;
    const float n = shifted - magic;
    // ln 2 in two parts, the first with so few bits that the product is exact (Cody & Waite)
    const float r = (x - n * 0x1.63p-1f) + (n * 0x1.bd0106p-13f + correction);
    float p = 1.3901533e-03f;
    p = p * r + 8.36374e-03f;
    p = p * r + 4.166686e-02f;
    p = p * r + 1.6666573e-01f;
    p = p * r + 0.5f;
    p = (p * r) * r + r + 1.0f;
    const float power = float_of((bits_of(shifted) << 23) + 0x3f800000u);
    return x < -87.3f ? 0.0f : p * power;
}

// 1 / (1 + exp(-x)) and one less it, both without cancellation.
struct Logistic {
    float value, complement;
};

PKE_FAST_INLINE Logistic logistic(float x) {
    const float e = exp_of_negative(-std::fabs(x));
    const float larger = 1.0f / (1.0f + e);
    const float smaller = e * larger;
    return {x < 0.0f ? smaller : larger, x < 0.0f ? larger : smaller};
}

// The normal distribution: the probability of less than x, and its density there. The lower tail keeps its relative
// accuracy: it is exp(-x^2 / 2) times a polynomial in y, which maps 0 .. 13.5 (where fp32's normal numbers end) to
// 1 .. -0.6.
struct Normal {
    float below, density;
};

PKE_FAST_INLINE Normal normal(float x) {
    const float size = std::fabs(x);
    const float a = size > 13.5f ? 13.5f : size;
    const float high = float_of(bits_of(a) & 0xfffff000u);  // its square is exact
    const float e = exp_of_negative(-0.5f * (high * high), -0.5f * ((a - high) * (a + high)));
    const float y = (1.0f - 0.3f * a) / (1.0f + 0.3f * a);
    float q = -1.0190523e-05f;
    q = q * y + 1.643827e-04f;
    q = q * y + -1.1675291e-04f;
    q = q * y + -1.4930965e-03f;
    q = q * y + -3.1316633e-04f;
    q = q * y + 1.47876255e-02f;
    q = q * y + 5.7156235e-02f;
    q = q * y + 1.2556466e-01f;
    q = q * y + 1.93275e-01f;
    q = q * y + 1.109853e-01f;
    const float tail = e * q;
    return {x < 0.0f ? tail : 1.0f - tail, e * 0.39894228f};
}

// x, no less than `least` (and no more than its negative): where the factor beside it is 0 already, so that the product
// with an infinite x is 0 and not NaN. NaN stays.
PKE_FAST_INLINE float at_least(float x, float least) { return x < least ? least : x; }

PKE_FAST_INLINE float within(float x, float most) { return at_least(x > most ? most : x, -most); }

}  // namespace pke_fast
