"""Patches: the neurons that an edit changed, with their weights before and after: apply and revert are exact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

import pke_fast.ops  # noqa: F401  registers torch.ops.pke_fast
from pke_fast import patch_file
from pke_fast.errors import PatchError
from pke_fast.kernels.sparse_columns import read_columns

if TYPE_CHECKING:
    from torch import nn

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
_REMAKE = "make the patch again with pke-fast edit"
_PARTS = ("neurons", "old", "new")


@dataclass(frozen=True, eq=False)
class LayerPatch:
    """What changes in one layer. The tensors are kept on the CPU and must not be changed.

    Attributes:
        layer: number of the decoder layer.
        weight: name of the down projection's weight, as in `model.named_parameters()`.
        axis: 1 where neurons are columns of a ``[d, D]`` weight, 0 where they are rows of a ``[D, d]`` weight.
        neurons: int64 ``[n]``, ascending, at least one.
        old, new: ``[n, d]`` in the weight's dtype (fp32, bf16 or fp16): each neuron's weights before and after.

    Raises:
        PatchError: the values don't agree with each other or with the above.
    """

    layer: int
    weight: str
    axis: int
    neurons: Tensor
    old: Tensor
    new: Tensor

    def __post_init__(self) -> None:
        for part in _PARTS:
            object.__setattr__(self, part, getattr(self, part).detach().to("cpu").contiguous())
        where, ids = f"layer {self.layer} of the patch", self.neurons
        if type(self.layer) is not int or self.layer < 0 or not isinstance(self.weight, str) or not self.weight:
            _refuse(where, "a layer number and a weight's name", f"{self.layer!r}, {self.weight!r}")
        if type(self.axis) is not int or self.axis not in (0, 1):
            _refuse(where, "axis 0 or 1", repr(self.axis))
        if ids.dtype != torch.int64 or ids.dim() != 1 or not len(ids):
            _refuse(where, "one or more neuron ids, int64 [n]", f"{ids.dtype} {list(ids.shape)}")
        if int(ids[0]) < 0 or bool((ids[1:] <= ids[:-1]).any()):
            _refuse(where, "ascending neuron ids of 0 or more, each once", "ids that are negative or out of order")
        shapes = f"old {list(self.old.shape)} {self.old.dtype}, new {list(self.new.shape)} {self.new.dtype}"
        if self.old.dim() != 2 or self.old.shape != self.new.shape or len(self.old) != len(ids):
            _refuse(where, f"old and new values of {len(ids)} neurons, [n, d]", shapes)
        if self.old.dtype != self.new.dtype or self.old.dtype not in DTYPES:
            _refuse(where, "old and new values both in fp32, bf16 or fp16", shapes)


@dataclass(frozen=True, eq=False)
class Patch:
    """A sparse change of a model's weights.

    Attributes:
        layers: the changed layers, ascending, at least one; all in one dtype.
        meta: what is known about the edit, JSON values only. `describe` and the error messages know the keys ``base``
            (``{"name", "fingerprint", ...}``), ``settings``, ``losses``, ``versions``, ``created`` and ``made_from``.

    Raises:
        PatchError: the layers don't agree with the above.
    """

    layers: tuple[LayerPatch, ...]
    meta: dict[str, Any]

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        numbers = [part.layer for part in self.layers]
        if not numbers or numbers != sorted(set(numbers)) or len({part.weight for part in self.layers}) < len(numbers):
            _refuse("the patch", "one or more layers, ascending, each with a weight of its own", str(numbers))
        if len({part.old.dtype for part in self.layers}) > 1:
            _refuse("the patch", "one dtype", ", ".join(sorted({DTYPES[part.old.dtype] for part in self.layers})))

    @property
    def n_neurons(self) -> int:
        return sum(len(part.neurons) for part in self.layers)

    @property
    def dtype(self) -> str:
        """``fp32``, ``bf16`` or ``fp16``: the dtype of the weights that it was made from."""
        return DTYPES[self.layers[0].old.dtype]

    def describe(self) -> dict[str, Any]:
        """What the patch is, as JSON values: for `pke-fast show`.

        ``layers`` has ``layer``, ``weight``, ``axis``, ``neurons`` (how many), ``width`` (weights a neuron) and
        ``relative_change`` (of the changed neurons: Frobenius norm of new - old over that of old; None where old is 0).
        """
        settings = self.meta.get("settings")
        return {
            "method": settings.get("method") if isinstance(settings, dict) else None,
            "neurons": self.n_neurons,
            "dtype": self.dtype,
            "layers": [
                {
                    "layer": part.layer,
                    "weight": part.weight,
                    "axis": part.axis,
                    "neurons": len(part.neurons),
                    "width": part.old.shape[1],
                    "relative_change": _relative_change(part),
                }
                for part in self.layers
            ],
            **{key: self.meta.get(key) for key in ("base", "settings", "losses", "versions", "created", "made_from")},
        }

    def apply(self, model: nn.Module) -> None:
        """Replaces the old weights by the new ones, in place, on whatever device they are.

        Every old value is compared first, bit for bit. If anything fails on the way (Ctrl-C too), what was written is
        put back.

        Raises:
            PatchError: the model hasn't exactly the weights that the patch was made from; nothing was changed.
        """
        self._replace(model, revert=False)

    def revert(self, model: nn.Module) -> None:
        """Puts the old weights back: `apply` with old and new exchanged."""
        self._replace(model, revert=True)

    def _replace(self, model: nn.Module, revert: bool) -> None:
        weights = [_weight(model, part) for part in self.layers]
        before, after = ("new", "old") if revert else ("old", "new")
        found = [_read(weight, part) for weight, part in zip(weights, self.layers, strict=True)]
        self.check(found, revert, "the model")
        touched = []
        try:
            for weight, part in zip(weights, self.layers, strict=True):
                touched.append((weight, part))
                _write(weight, part, getattr(part, after))
            for weight, part in touched:
                if differing(_read(weight, part), getattr(part, after)):
                    raise PatchError(
                        f"{part.weight} did not keep what was written to it; the weights were put back",
                        expected="weights of their own in every layer",
                        got="a weight that is shared between layers, or is not plain memory",
                    )
        except BaseException:
            for weight, part in reversed(touched):
                _write(weight, part, getattr(part, before))
            raise

    def check(self, found: Sequence[Tensor], revert: bool, where: str) -> None:
        """Compares the values that are there now, ``[n, d]`` for each layer, with those the patch expects there.

        Raises:
            PatchError: they differ in a bit. The message names the layers, and says if the patch is there already.
        """
        expected = [part.new if revert else part.old for part in self.layers]
        counts = [differing(values, want) for values, want in zip(found, expected, strict=True)]
        if not any(counts):
            return
        others = [part.old if revert else part.new for part in self.layers]
        if not any(differing(values, other) for values, other in zip(found, others, strict=True)):
            raise PatchError(
                f"the patch is not applied to {where}: its weights are the old ones"
                if revert
                else f"the patch is already applied to {where}",
                do="nothing is left to do" if revert else "nothing is left to do; revert takes it back",
            )
        layers = ", ".join(
            f"layer {part.layer} ({count} of {len(part.neurons)} neurons)"
            for part, count in zip(self.layers, counts, strict=True)
            if count
        )
        raise PatchError(
            f"the patch does not fit {where}: the weights differ in {layers}",
            expected=f"bit for bit the weights {'it wrote' if revert else 'it was made from'}{self._base()}",
            got=f"other weights in {sum(map(bool, counts))} of {len(counts)} layers",
            do="use the very checkpoint that was edited (a fine-tuned, otherwise patched or quantised one, such as a "
            "GGUF of the same model, has other weights), or make a patch for this one with pke-fast edit",
        )

    def _base(self) -> str:
        base = self.meta.get("base")
        name = base.get("name") if isinstance(base, dict) else base
        return f" ({name}, {self.dtype})" if isinstance(name, str) else f" ({self.dtype})"

    def save(self, path: str | Path) -> None:
        """Writes the patch as a safetensors file, whole or not at all. The same patch gives the same bytes.

        Raises:
            PKEError: the file can't be written.
        """
        patch_file.write(path, self.content())

    def content(self) -> patch_file.Content:
        """What its file holds."""
        layers = [{"layer": part.layer, "weight": part.weight, "axis": part.axis} for part in self.layers]
        # The int64 tensors come first: every tensor is then aligned to its dtype in the file.
        tensors = {f"layers.{part.layer}.{name}": getattr(part, name) for name in _PARTS for part in self.layers}
        return patch_file.Content(layers, tensors, self.meta)

    @classmethod
    def load(cls, path: str | Path) -> Patch:
        """Reads a patch and checks every part of it.

        Raises:
            PatchError: no such file, not a patch, a newer format, cut short, or damaged; it names what is damaged.
        """
        content = patch_file.read(path)
        try:
            layers = tuple(
                LayerPatch(
                    entry["layer"],
                    entry["weight"],
                    entry["axis"],
                    *(content.tensors[f"layers.{entry['layer']}.{name}"] for name in _PARTS),
                )
                for entry in content.layers
            )
        except (KeyError, TypeError) as error:
            raise PatchError(f"the patch {path} is incomplete", got=f"no {error}", do=_REMAKE) from error
        return cls(layers, content.meta)


def _weight(model: nn.Module, part: LayerPatch) -> Tensor:
    """The model's weight that the part changes, checked for shape and dtype."""
    try:
        weight = model.get_parameter(part.weight)
    except AttributeError as error:
        raise PatchError(
            f"the model has no weight {part.weight}, which the patch changes (layer {part.layer})",
            got=type(model).__name__,
            do="load the model that was edited, in the same way",
        ) from error
    check_weight(part, "the model", tuple(weight.shape), DTYPES.get(weight.dtype, str(weight.dtype)))
    if weight.is_meta:
        raise PatchError(
            f"{part.weight} is not in memory (meta device)",
            expected="weights on the CPU or a GPU",
            do="load the model without offloading, or patch the checkpoint with pke-fast apply",
        )
    return weight


def check_weight(part: LayerPatch, where: str, shape: tuple[int, ...], dtype: str) -> None:
    """Checks that a weight of this shape and dtype (``fp32``...) can be changed by the part; PatchError otherwise."""
    width, highest = part.old.shape[1], int(part.neurons[-1])
    if len(shape) != 2 or shape[1 - part.axis] != width or shape[part.axis] <= highest:
        sizes = ["d", "d"]
        sizes[part.axis], sizes[1 - part.axis] = f"more than {highest}", str(width)
        raise PatchError(
            f"{part.weight} of {where} has another shape than the patch was made for (layer {part.layer})",
            expected=f"[{', '.join(sizes)}]",
            got=str(list(shape)),
            do="use the model that was edited",
        )
    made = DTYPES[part.old.dtype]
    if dtype != made:
        raise PatchError(
            f"the patch was made in {made}, and {part.weight} of {where} is in {dtype}",
            expected=made,
            got=dtype,
            do=f"load the model with --dtype {made}, or make the patch again with pke-fast edit --dtype {dtype}",
        )


def _index(weight: Tensor, part: LayerPatch) -> Tensor:
    return part.neurons.to(weight.device)


def _read(weight: Tensor, part: LayerPatch) -> Tensor:
    """The neurons' weights as they are now, ``[n, d]`` on the CPU."""
    return read_columns(weight.detach(), part.axis, _index(weight, part)).to("cpu")


def _write(weight: Tensor, part: LayerPatch, values: Tensor) -> None:
    with torch.no_grad():
        torch.ops.pke_fast.write_columns(weight, part.axis, _index(weight, part), values.to(weight.device))


def differing(found: Tensor, expected: Tensor) -> int:
    """Number of rows that differ in a bit. Compared as integers: NaN equals itself, and -0 is not 0."""
    return int((~equal_rows(found, expected)).sum())


def equal_rows(a: Tensor, b: Tensor) -> Tensor:
    """Which rows of two ``[n, d]`` of one dtype are equal bit for bit: bool ``[n]``."""
    bits = _BITS[a.dtype]
    return (a.view(bits) == b.view(bits)).all(dim=1)


def _relative_change(part: LayerPatch) -> float | None:
    size = float(torch.linalg.vector_norm(part.old.double()))
    return float(torch.linalg.vector_norm(part.new.double() - part.old.double())) / size if size else None


def _refuse(where: str, expected: str, got: str) -> NoReturn:
    raise PatchError(f"{where} is not valid", expected=expected, got=got, do=_REMAKE)
