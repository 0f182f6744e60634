"""The patch between two checkpoints on disk: which neurons differ, read in bands and compared to the bit."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pke_fast
from pke_fast.dtypes import STORED
from pke_fast.errors import InputError, PatchError
from pke_fast.journal import reading
from pke_fast.kinds import PROJECTIONS
from pke_fast.layer_patch import LayerPatch
from pke_fast.patch import Patch
from pke_fast.projections import Projection, find_projections
from pke_fast.shards import StoredTensor, read_checkpoint
from pke_fast.stored import BITS, Target, read_at, read_neurons, row_bands

NAMED = 8  # differing tensors that a message names


@dataclass(frozen=True)
class Other:
    """A difference that a patch can't hold.

    Attributes:
        tensor: its stored name.
        kind: ``gate``, ``up``, ``gate and up`` (fused) or ``down``, in a dtype that patches don't have; else ``other``.
        rows, of: how many rows differ (of a tensor with one dimension: values), of how many.
    """

    tensor: str
    kind: str
    rows: int
    of: int


@dataclass(frozen=True, eq=False)
class Difference:
    """What differs between two checkpoints.

    Attributes:
        neurons: by layer, how many differ, in whichever of their weights.
        others: whatever else does.
        patch: from the first checkpoint to the second, as far as neurons go; None where none differs or none was asked.
        tensors: how many were compared.
        recovered: of each checkpoint, see `Recovery.outcome`; None where no change of it was interrupted.
    """

    neurons: Mapping[int, int]
    others: tuple[Other, ...]
    patch: Patch | None
    tensors: int
    recovered: tuple[str | None, str | None]


def diff_checkpoints(
    a: str | Path, b: str | Path, *, want_patch: bool = True, ignore_others: bool = False
) -> Difference:
    """Compares two checkpoint folders of one shape, bit for bit, and makes the patch that turns `a` into `b`.

    Memory: the old and new weights of the neurons that differ, and a few MB. No model is loaded.

    Args:
        want_patch: False compares only.
        ignore_others: make the patch of the neurons although more differs, and applying it won't give `b`.

    Raises:
        InputError: a folder can't be used, or they have other tensors, shapes or dtypes.
        PatchError: more differs than MLP neurons' weights, which is all that a patch holds; names it.
    """
    first, second = (Path(os.path.realpath(path)) for path in (a, b))
    with reading(first) as left, reading(second) as right:
        ours, theirs = read_checkpoint(first), read_checkpoint(second)
        _check_same(first, second, ours, theirs)
        projections = find_projections(first, ours)
        changes: list[tuple[Projection, str, np.ndarray[Any, Any]]] = []
        others: list[Other] = []
        for name, tensor in ours.items():
            places = (first, tensor), (second, theirs[name])
            inside = projections.get(name, [])
            differs = _differing(places, by_column=bool(inside) and inside[0].axis == 1)
            if not differs.any():
                continue
            if tensor.dtype in BITS and sum(projection.neurons for projection in inside) == len(differs):
                for projection in inside:
                    end = projection.offset + projection.neurons
                    changes.append((projection, name, np.flatnonzero(differs[projection.offset : end])))
            else:
                kind = " and ".join(projection.kind for projection in inside) or "other"
                others.append(Other(name, kind, int(differs.sum()), len(differs)))
        changes = [change for change in changes if len(change[2])]
        changes.sort(key=lambda change: (change[0].layer, PROJECTIONS.index(change[0].kind)))
        patch = None
        if want_patch:
            if others and not ignore_others:
                raise _more_differs(first, second, others)
            parts = [_part(projection, ids, (first, ours[n]), (second, theirs[n])) for projection, n, ids in changes]
            if parts:
                made = {"how": "diff", "from": str(a), "to": str(b), "ignored": [other.tensor for other in others]}
                meta = {"base": {"name": str(a)}, "made_from": made, "versions": {"pke_fast": pke_fast.__version__}}
                patch = Patch(tuple(parts), meta)
    recovered = tuple(side.outcome if side else None for side in (left, right))
    return Difference(_counts(changes), tuple(others), patch, len(ours), (recovered[0], recovered[1]))


def _counts(changes: Sequence[tuple[Projection, str, np.ndarray[Any, Any]]]) -> dict[int, int]:
    neurons: dict[int, set[int]] = {}
    for projection, _, ids in changes:
        neurons.setdefault(projection.layer, set()).update(ids.tolist())
    return {layer: len(ids) for layer, ids in neurons.items()}


def _check_same(
    first: Path, second: Path, ours: Mapping[str, StoredTensor], theirs: Mapping[str, StoredTensor]
) -> None:
    missing = [(name, side) for side, names in ((second, ours.keys() - theirs), (first, theirs.keys() - ours))
               for name in sorted(names)]  # fmt: skip
    if missing:
        raise InputError(
            f"{first} and {second} have other tensors",
            expected="two checkpoints of one model",
            got=f"{len(missing)} that only one has, such as {missing[0][0]}, which {missing[0][1]} lacks",
        )
    for name, tensor in ours.items():
        other = theirs[name]
        if (tensor.shape, tensor.dtype, tensor.size) != (other.shape, other.dtype, other.size):
            raise InputError(
                f"{name} has another shape or dtype in {second}",
                expected=f"{list(tensor.shape)} {tensor.dtype}",
                got=f"{list(other.shape)} {other.dtype}",
                do="compare two checkpoints of one model, in one dtype",
            )


def _differing(
    places: tuple[tuple[Path, StoredTensor], tuple[Path, StoredTensor]], by_column: bool
) -> np.ndarray[Any, Any]:
    """Which rows of a tensor differ (values, where it has one dimension), or which columns of one with two."""
    (folder, tensor), (other_folder, other) = places
    values = prod(tensor.shape)
    item = tensor.size // values if values and tensor.size % values == 0 else 0
    if item not in (1, 2, 4, 8):  # nothing in it, or values that aren't whole bytes
        rows, width, item = 1, tensor.size, 1
    elif len(tensor.shape) < 2:
        rows, width = values, 1
    else:
        rows, width = values // tensor.shape[-1], tensor.shape[-1]
    bits = np.dtype(f"<u{item}")
    differs = np.zeros(width if by_column else rows, bool)
    paths = folder / tensor.shard, other_folder / other.shard
    if os.path.samefile(*paths) and tensor.offset == other.offset:
        return differs  # hard-linked by apply
    with FileIO(paths[0]) as file, FileIO(paths[1]) as other_file:
        for first, end in row_bands(rows, width * item):
            start, shape = first * width * item, (end - first, width)
            ours = read_at(file, tensor.offset + start, np.empty(shape, bits))
            theirs = read_at(other_file, other.offset + start, np.empty(shape, bits))
            unequal = ours != theirs
            if not unequal.any():
                continue
            if by_column:
                differs |= unequal.any(axis=0)
            else:
                differs[first:end] = unequal.any(axis=1)
    return differs


def _part(
    projection: Projection,
    ids: np.ndarray[Any, Any],
    old: tuple[Path, StoredTensor],
    new: tuple[Path, StoredTensor],
) -> LayerPatch:
    neurons = torch.from_numpy(ids)
    _, tensor = old
    dtype = STORED[tensor.dtype]
    blank = torch.empty((len(ids), tensor.shape[1 - projection.axis]), dtype=dtype)
    wanted = LayerPatch(
        projection.layer, projection.weight, projection.axis, neurons, blank, blank, projection.kind, projection.offset
    )
    values = []
    for folder, place in (old, new):
        with FileIO(folder / place.shard) as file:
            values.append(read_neurons(file, Target(wanted, place)))
    return replace(wanted, old=values[0], new=values[1])


def _more_differs(first: Path, second: Path, others: list[Other]) -> PatchError:
    listed = "; ".join(f"{other.tensor} ({other.rows:,} of {other.of:,} rows)" for other in others[:NAMED])
    more = f"; and {len(others) - NAMED:,} more" if len(others) > NAMED else ""
    return PatchError(
        f"{second} differs from {first} in more than MLP neurons' weights",
        expected="differences in gate, up and down projections, which is all that patches hold",
        got=f"{len(others):,} other tensors that differ: {listed}{more}",
        do="give --ignore-others to make the patch without them (applying it does not give the second checkpoint)",
    )
