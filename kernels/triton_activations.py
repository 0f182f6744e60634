"""The MLPs' activations and their derivatives in Triton, in fp32; `glu_score.ACTIVATIONS` has the same names.

All but the rectified ones are x * s(x) with s between 0 and 1. Where s or its slope has underflowed to 0 the product is
taken as 0: that is its limit, and x = inf would make it NaN.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _zero_or_product(x, factor):
    return tl.where(factor == 0.0, 0.0, x * factor)


@triton.jit
def _sigmoid(x):
    """-> 1 / (1 + exp(-x)) and its derivative; the exponential is of -|x| and never overflows."""
    small = tl.exp(-tl.abs(x))
    large = 1.0 / (1.0 + small)
    return tl.where(x >= 0.0, large, small * large), small * large * large


@triton.jit
def activation(x, ACT: tl.constexpr):
    """-> act(x) and act'(x); what isn't used of them, the compiler leaves out."""
    if ACT == "silu":
        s, slope = _sigmoid(x)
        return _zero_or_product(x, s), s + _zero_or_product(x, slope)
    elif ACT == "gelu_tanh":
        # (1 + tanh(u)) / 2 is sigmoid(2u), and needs no tanh; here 2u = x * inner
        inner = 1.5957691216057308 + 0.07135481282553483 * x * x  # 2 sqrt(2 / pi) * (1, 0.044715)
        s, slope = _sigmoid(x * inner)
        steep = 1.5957691216057308 + 0.21406443847660449 * x * x
        return _zero_or_product(x, s), s + _zero_or_product(x * steep, slope)
    elif ACT == "gelu":
        s = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        slope = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        return _zero_or_product(x, s), s + _zero_or_product(x, slope)
    elif ACT == "relu":
        return tl.where(x <= 0.0, 0.0, x), tl.where(x > 0.0, 1.0, 0.0)  # NaN stays NaN
    else:
        tl.static_assert(ACT == "relu2")
        positive = tl.where(x <= 0.0, 0.0, x)
        return positive * positive, 2.0 * positive
