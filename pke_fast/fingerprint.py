"""The fingerprint of a model: which weights a patch was made for, told cheaply."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

SAMPLE = 4096  # elements looked at in one parameter: 1.2 MB in all for a 135M model, a few MB for an 8B one


def fingerprint(model: nn.Module) -> str:
    """SHA-256, in hex, over the name, dtype, shape and a sample of the raw bytes of every parameter.

    The sample is at most 4,096 elements of a parameter, evenly spread, the first and the last among them; on a GPU
    only the sample is copied. Parameters are taken in the order of their names and tied ones once, so the same
    weights have the same fingerprint on any device and wherever they were loaded from.

    It detects: another model, another training, another dtype or quantization of the same model, other names or
    shapes. It can miss a change of a few elements, such as an edit of some neurons, and says nothing about buffers
    or the configuration. Where every bit counts (applying and reverting a patch) the weights that are touched are
    compared as well, bit for bit.
    """
    from pke_fast.placement import stored_parameters

    digest = hashlib.sha256(b"pke_fast fingerprint 1\n")
    for name, parameter in sorted(stored_parameters(model), key=lambda item: item[0]):
        digest.update(f"{name} {parameter.dtype} {list(parameter.shape)}\n".encode())
        digest.update(_sampled_bytes(parameter))
    return digest.hexdigest()


def _sampled_bytes(parameter: Tensor) -> bytes:
    import torch

    size = parameter.numel()
    count = min(size, SAMPLE)
    positions = torch.arange(count, device=parameter.device) * (size - 1) // max(count - 1, 1)
    sample = parameter.detach().reshape(-1)[positions]
    return sample.view(torch.uint8).cpu().numpy().tobytes()
