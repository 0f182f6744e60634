// The activations of MLPs: value and slope in fp32. At +-infinity they have their limits: no NaN but from NaN.
#pragma once

#include "vector_math.h"

namespace pke_fast {

enum class Activation { silu, gelu, gelu_tanh, relu, relu2 };

// Of an activation: value(x); and gradient(x, d), its value beside d times its slope.
struct ValueAndGradient {
    float value, gradient;
};

struct Silu {  // x * logistic(x)
    static PKE_FAST_INLINE float value(float x) { return at_least(x, -88.0f) * logistic(x).value; }
    static PKE_FAST_INLINE ValueAndGradient gradient(float x, float d) {
        const Logistic s = logistic(x);
        const float slope = s.value * (1.0f + within(x, 88.0f) * s.complement);
        return {at_least(x, -88.0f) * s.value, d * slope};
    }
};

struct Gelu {  // x * P(a normal number < x)
    static PKE_FAST_INLINE float value(float x) { return at_least(x, -14.0f) * normal(x).below; }
    static PKE_FAST_INLINE ValueAndGradient gradient(float x, float d) {
        const Normal p = normal(x);
        return {at_least(x, -14.0f) * p.below, d * (p.below + within(x, 14.0f) * p.density)};
    }
};

struct GeluTanh {  // x / 2 * (1 + tanh(u / 2)), which is x * logistic(u) with u = sqrt(8 / pi) * (x + 0.044715 x^3)
    static PKE_FAST_INLINE float value(float x) { return at_least(x, -14.0f) * logistic(u(within(x, 14.0f))).value; }
    static PKE_FAST_INLINE ValueAndGradient gradient(float x, float d) {
        const float a = within(x, 14.0f);
        const Logistic s = logistic(u(a));
        const float du = 1.5957691f + 0.21406445f * (a * a);
        return {at_least(x, -14.0f) * s.value, d * (s.value * (1.0f + a * du * s.complement))};
    }
    static PKE_FAST_INLINE float u(float a) { return a * (1.5957691f + 0.071354816f * (a * a)); }
};

struct Relu {
    static PKE_FAST_INLINE float value(float x) { return at_least(x, 0.0f); }
    static PKE_FAST_INLINE ValueAndGradient gradient(float x, float d) { return {value(x), x <= 0.0f ? 0.0f : d}; }
};

struct Relu2 {  // the square of relu
    static PKE_FAST_INLINE float value(float x) { return at_least(x, 0.0f) * at_least(x, 0.0f); }
    static PKE_FAST_INLINE ValueAndGradient gradient(float x, float d) {
        return {value(x), x <= 0.0f ? 0.0f : d * (2.0f * x)};
    }
};

}  // namespace pke_fast
