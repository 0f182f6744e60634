"""The dtypes that are edited: their names here and in safetensors, and the integers of the same width."""

from __future__ import annotations

import torch

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
BY_NAME = {name: dtype for dtype, name in NAMES.items()}
STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # by safetensors' names


def called(dtype: torch.dtype) -> str:
    """Our name of a dtype, or torch's where we have none."""
    return NAMES.get(dtype, str(dtype))


def bits_of(dtype: torch.dtype) -> torch.dtype:
    """The integers that a dtype's bits are compared and copied as."""
    return torch.int32 if dtype.itemsize == 4 else torch.int16
