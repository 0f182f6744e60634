"""One part of a patch: what changes in one projection of one layer, and whether a weight can be changed so."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from pke_fast.dtypes import NAMES, bits_of
from pke_fast.errors import PatchError
from pke_fast.kinds import PROJECTIONS, Kind

TENSORS = ("neurons", "old", "new")
_REMAKE = "make the patch again with pke-fast edit"


@dataclass(frozen=True, eq=False)
class LayerPatch:
    """What changes in one projection of one layer. The tensors are kept on the CPU and must not be changed.

    Attributes:
        layer: number of the decoder layer.
        weight: name of the projection's weight, as in `model.named_parameters()`.
        axis: the dimension of the weight that counts neurons. Of a Linear it is 1 for down ``[d, D]`` and 0 for gate
            and up ``[D, d]``; a Conv1D stores the reverse.
        neurons: int64 ``[n]``, ascending, at least one.
        old, new: ``[n, d]`` in the weight's dtype (fp32, bf16 or fp16): each neuron's weights before and after.
        projection: ``gate`` is also the one projection into a plain MLP.
        offset: where neuron 0 is along the axis: D for the up half of a fused ``[2D, d]``, else 0.

    Raises:
        PatchError: the values don't agree with each other or with the above.
    """

    layer: int
    weight: str
    axis: int
    neurons: Tensor
    old: Tensor
    new: Tensor
    projection: Kind = "down"
    offset: int = 0

    def __post_init__(self) -> None:
        for name in TENSORS:
            object.__setattr__(self, name, getattr(self, name).detach().to("cpu").contiguous())
        where, ids = f"{self.place} in the patch", self.neurons
        if type(self.layer) is not int or self.layer < 0 or not isinstance(self.weight, str) or not self.weight:
            refuse(where, "a layer number and a weight's name", f"{self.layer!r}, {self.weight!r}")
        if type(self.axis) is not int or self.axis not in (0, 1):
            refuse(where, "axis 0 or 1", repr(self.axis))
        if self.projection not in PROJECTIONS or type(self.offset) is not int or self.offset < 0:
            refuse(where, "gate, up or down, and an offset of 0 or more", f"{self.projection!r}, {self.offset!r}")
        if ids.dtype != torch.int64 or ids.dim() != 1 or not len(ids):
            refuse(where, "one or more neuron ids, int64 [n]", f"{ids.dtype} {list(ids.shape)}")
        if int(ids[0]) < 0 or bool((ids[1:] <= ids[:-1]).any()):
            refuse(where, "ascending neuron ids of 0 or more, each once", "ids that are negative or out of order")
        shapes = f"old {list(self.old.shape)} {self.old.dtype}, new {list(self.new.shape)} {self.new.dtype}"
        if self.old.dim() != 2 or self.old.shape != self.new.shape or len(self.old) != len(ids):
            refuse(where, f"old and new values of {len(ids)} neurons, [n, d]", shapes)
        if self.old.dtype != self.new.dtype or self.old.dtype not in NAMES:
            refuse(where, "old and new values both in fp32, bf16 or fp16", shapes)

    @property
    def place(self) -> str:
        """Where it is, for a message."""
        return f"layer {self.layer}'s {self.projection} projection"

    @property
    def width(self) -> int:
        """Weights that a neuron has here: d."""
        return self.old.shape[1]

    @property
    def index(self) -> Tensor:
        """Where the neurons are along the weight's axis, int64 ``[n]``."""
        return self.neurons + self.offset

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored ``[in, out]``, as a Conv1D's is, and not ``[out, in]``."""
        return self.axis == (0 if self.projection == "down" else 1)

    @property
    def relative_change(self) -> float | None:
        """Frobenius norm of new - old over that of old; None where old is 0, or a weight isn't finite."""
        size = float(torch.linalg.vector_norm(self.old.double()))
        change = float(torch.linalg.vector_norm(self.new.double() - self.old.double()))
        return change / size if size and math.isfinite(change / size) else None


def check_weight(part: LayerPatch, where: str, shape: tuple[int, ...], dtype: str) -> None:
    """Checks that a weight of this shape and dtype (``fp32``...) can be changed by the part; PatchError otherwise."""
    highest = int(part.neurons[-1]) + part.offset
    if len(shape) != 2 or shape[1 - part.axis] != part.width or shape[part.axis] <= highest:
        sizes = ["d", "d"]
        sizes[part.axis], sizes[1 - part.axis] = f"more than {highest}", str(part.width)
        raise PatchError(
            f"{part.weight} of {where} has another shape than the patch was made for (layer {part.layer})",
            expected=f"[{', '.join(sizes)}]",
            got=str(list(shape)),
            do="use the model that was edited",
        )
    made = NAMES[part.old.dtype]
    if dtype != made:
        raise PatchError(
            f"the patch was made in {made}, and {part.weight} of {where} is in {dtype}",
            expected=made,
            got=dtype,
            do=f"load the model with --dtype {made}, or make the patch again with pke-fast edit --dtype {dtype}",
        )


def differing(found: Tensor, expected: Tensor) -> int:
    """Number of rows that differ in a bit. Compared as integers: NaN equals itself, and -0 is not 0."""
    return int((~equal_rows(found, expected)).sum())


def equal_rows(a: Tensor, b: Tensor) -> Tensor:
    """Which rows of two ``[n, d]`` of one dtype are equal bit for bit: bool ``[n]``."""
    bits = bits_of(a.dtype)
    return (a.view(bits) == b.view(bits)).all(dim=1)


def refuse(where: str, expected: str, got: str) -> NoReturn:
    """Raises the PatchError of a patch that contradicts itself."""
    raise PatchError(f"{where} is not valid", expected=expected, got=got, do=_REMAKE)


def incomplete(path: object, missing: object) -> PatchError:
    """The error of a file that lacks a part of a patch."""
    return PatchError(f"the patch {path} is incomplete", got=f"no {missing}", do=_REMAKE)
