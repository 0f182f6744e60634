"""A patch as full tensors, one for each changed weight: dense deltas, and the weights before and after."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

import pke_fast
from pke_fast.base_model import BaseModel
from pke_fast.deltas import LayerDelta
from pke_fast.dtypes import bits_of
from pke_fast.layer_patch import LayerPatch
from pke_fast.shards import StoredTensor
from pke_fast.stored import BITS, Target, read_at, row_bands
from pke_fast.streamed import PIECE, Streamed, write_streamed

DELTAS = "delta.safetensors"
BEFORE, AFTER = "weights_copy.safetensors", "weights.safetensors"


def write_deltas(folder: Path, deltas: list[LayerDelta], base: BaseModel) -> None:
    """``delta.safetensors``: {parameter name: new - old}, full tensors in fp32."""
    parts: dict[str, list[LayerDelta]] = {}
    for delta in deltas:
        parts.setdefault(delta.part.weight, []).append(delta)
    tensors = {
        weight: Streamed(base.shapes[weight], torch.float32, _dense(found, base.shapes[weight]))
        for weight, found in parts.items()
    }
    write_streamed(folder / DELTAS, tensors, _metadata("weight = weight + delta"))


def write_weights(folder: Path, base: BaseModel) -> None:
    """Each changed weight in full, {parameter name: tensor} in its dtype, before and after the patch.

    ``weights_copy.safetensors`` is what EasyEdit's `apply_*_to_model` returns as weights_copy, ``weights.safetensors``
    what the edited model holds in the same places.
    """
    assert base.folder is not None  # only a checkpoint has targets
    parts: dict[str, list[Target]] = {}
    for target in base.targets:
        parts.setdefault(target.part.weight, []).append(target)
    for file, after in ((BEFORE, False), (AFTER, True)):
        tensors = {}
        for weight, targets in parts.items():
            tensor, dtype = targets[0].tensor, targets[0].part.old.dtype
            changes = [target.part for target in targets] if after else []
            tensors[weight] = Streamed(tensor.shape, dtype, _stored(base.folder, tensor, dtype, changes))
        write_streamed(folder / file, tensors, _metadata("after the edit" if after else "before the edit"))


def _metadata(what: str) -> dict[str, str]:
    return {"format": "pt", "pke_fast": pke_fast.__version__, "what": what}


def _dense(deltas: Sequence[LayerDelta], shape: tuple[int, ...]) -> Iterator[Tensor]:
    for first, end in row_bands(shape[0], 4 * shape[1], PIECE):
        rows = torch.zeros(end - first, shape[1])
        for delta in deltas:
            _put(rows, first, delta.part.axis, delta.index, delta.delta)
        yield rows


def _stored(folder: Path, tensor: StoredTensor, dtype: torch.dtype, changes: Sequence[LayerPatch]) -> Iterator[Tensor]:
    bits = BITS[tensor.dtype]
    row_bytes = tensor.shape[1] * bits.itemsize
    with FileIO(folder / tensor.shard) as file:
        for first, end in row_bands(tensor.shape[0], row_bytes, PIECE):
            raw = torch.empty(end - first, tensor.shape[1], dtype=dtype)
            view = raw.view(bits_of(dtype)).numpy().view(bits)
            read_at(file, tensor.offset + first * row_bytes, view)
            for part in changes:
                _put(raw, first, part.axis, part.index, part.new)
            yield raw


def _put(rows: Tensor, first: int, axis: int, index: Tensor, values: Tensor) -> None:
    """Writes the neurons' values ``[n, d]`` into a band of the weight's rows that begins at `first`."""
    if axis == 1:
        rows[:, index] = values[:, first : first + len(rows)].T
    else:
        here = (index >= first) & (index < first + len(rows))
        rows[index[here] - first] = values[here]
