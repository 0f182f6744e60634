"""The compiled part, pke_fast._native: loaded when first called, and explained where it is missing."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import torch

from pke_fast.dtypes import NAMES
from pke_fast.errors import PKEError


@cache
def library() -> Any:
    """The extension module.

    Raises:
        PKEError: it was not built for this Python, or can't be loaded.
    """
    try:
        return import_module("pke_fast._native")
    except ImportError as error:
        raise PKEError(
            "the compiled part of pke_fast can't be loaded",
            expected="the extension pke_fast._native, built when pke_fast is installed",
            got=str(error),
            do="install pke_fast again, `pip install .` in its folder (needs g++ and python3-dev);"
            " PKE_FAST_BACKEND=reference works without it, slower",
        ) from error


def problem() -> str | None:
    """Why the extension can't be loaded, in a line; None where it can."""
    try:
        library()
    except PKEError as error:
        return f"{error.what}: {error.__cause__}"
    return None


def cuda_architectures() -> list[str]:
    """What the extension's CUDA part was compiled for, as "sm_90"; empty without one, or without the extension."""
    return [] if problem() else list(getattr(library(), "cuda_architectures", []))


def dtype_of(tensor: torch.Tensor) -> Any:
    """A tensor's dtype as the extension names it: fp32, bf16 or fp16."""
    return getattr(library().Dtype, NAMES[tensor.dtype])
