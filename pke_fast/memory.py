"""Whether memory ran out: torch tells it in several ways."""

from __future__ import annotations

import torch

OUT_OF_MEMORY = (
    "can't allocate memory",  # torch on the CPU
    "CUDA error: out of memory",  # the driver: pinned memory, what is outside torch's allocator
    "[CUDA]: out of memory",  # Triton, as it loads a kernel
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out: torch's on a GPU, or what has no class of its own."""
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)
