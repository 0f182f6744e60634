"""What the Triton forms share: bf16 that is right in the interpreter too, and products of exact fp32."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import os

import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def rounded(b_x, dtype: tl.constexpr):
    """fp32 -> dtype, to nearest, ties to even. The interpreter's own cast to bf16 cuts off instead."""
    if _INTERPRETED and dtype == tl.bfloat16:
        b_bits = b_x.to(tl.int32, bitcast=True)
        b_up = b_bits + 0x7FFF + ((b_bits >> 16) & 1)
        b_bits = tl.where(b_x == b_x, b_up, 0x7FC00000)  # the carry would make an infinity of a NaN
        b_y = (b_bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        b_y = b_x.to(dtype)
    return b_y


@triton.jit
def widened(b_x):
    """Any float dtype -> fp32. The interpreter's own cast gets subnormal bf16 wrong."""
    if _INTERPRETED and b_x.dtype == tl.bfloat16:
        b_y = (b_x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        b_y = b_x.to(tl.float32)
    return b_y


@triton.jit
def dot(b_a, b_b, b_sums):
    """sums + a b in fp32; of fp32 "ieee", since tf32's products would be off by far more than torch's. The interpreter
    takes bf16 for integers; its products fit fp32."""
    if _INTERPRETED and b_a.dtype == tl.bfloat16:
        b_y = tl.dot(b_a.to(tl.float32), b_b.to(tl.float32), b_sums, input_precision="ieee")
    else:
        b_y = tl.dot(b_a, b_b, b_sums, input_precision="ieee")
    return b_y
