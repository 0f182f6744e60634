"""Safetensors files written piece by piece: a tensor may be larger than the memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pke_fast.errors import PKEError
from pke_fast.patch_file import header

PIECE = 4 * 2**20  # bytes made and written at once


@dataclass(frozen=True)
class Streamed:
    """A tensor to be written.

    Attributes:
        shape, dtype: its own.
        pieces: its values in order, as tensors of that dtype on the CPU; their shapes don't matter. Read once.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: Iterable[Tensor]


def write_streamed(path: Path, tensors: Mapping[str, Streamed], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file in the order of `tensors`. The same values give the same bytes.

    Not atomic: `path` is one in a folder that becomes visible later (files.py).

    Raises:
        PKEError: the pieces of a tensor are not as many bytes as its shape says.
        OSError: the file can't be written.
    """
    shapes = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in tensors.items()}
    with path.open("wb") as file:
        file.write(header(shapes, metadata))
        for name, tensor in tensors.items():
            start = file.tell()
            for piece in tensor.pieces:
                file.write(piece.contiguous().view(-1).view(torch.uint8).numpy().data)
            wanted = shapes[name].numel() * shapes[name].element_size()
            if file.tell() - start != wanted:
                raise PKEError(f"{name} changed while it was written", expected=f"{wanted:,} bytes")
