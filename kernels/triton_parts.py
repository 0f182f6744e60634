"""What the Triton forms share: the device they launch on, and rounding that is right in the interpreter too."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device: while this lasts, it is the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def interpreted(tensor: Tensor) -> bool:
    """Whether kernels on this tensor run in Triton's interpreter, which is where those on CPU tensors do."""
    return tensor.device.type == "cpu"


@triton.jit
def rounded(b_x, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """fp32 -> dtype, to nearest, ties to even. The interpreter's own cast to bf16 cuts off instead."""
    if INTERPRETED and dtype == tl.bfloat16:
        b_bits = b_x.to(tl.int32, bitcast=True)
        b_up = b_bits + 0x7FFF + ((b_bits >> 16) & 1)
        b_bits = tl.where(b_x == b_x, b_up, 0x7FC00000)  # the carry would make an infinity of a NaN
        b_y = (b_bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        b_y = b_x.to(dtype)
    return b_y


@triton.jit
def widened(b_x, INTERPRETED: tl.constexpr):
    """Any float dtype -> fp32. The interpreter's own cast gets subnormal bf16 wrong."""
    if INTERPRETED and b_x.dtype == tl.bfloat16:
        b_y = (b_x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        b_y = b_x.to(tl.float32)
    return b_y
