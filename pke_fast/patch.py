"""Patches: the neurons that an edit changed, with their weights before and after: apply and revert are exact."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import pke_fast.ops  # noqa: F401  registers torch.ops.pke_fast
from pke_fast import patch_file
from pke_fast.dtypes import NAMES, called
from pke_fast.errors import PatchError
from pke_fast.kernels.sparse_columns import read_columns
from pke_fast.kinds import PROJECTIONS
from pke_fast.layer_patch import TENSORS, LayerPatch, check_weight, differing, incomplete, refuse
from pke_fast.placement import can_be_written, live_weight

if TYPE_CHECKING:
    from torch import nn

__all__ = ["LayerPatch", "Patch"]


@dataclass(frozen=True, eq=False)
class Patch:
    """A sparse change of a model's weights.

    Attributes:
        layers: what changes, ascending by layer, then gate, up, down, at least one; all in one dtype. Each has a weight
            of its own, but that gate and up may have other places of one (Phi-3's are fused).
        meta: what is known about the edit, JSON values only. `describe` and the error messages know the keys ``base``
            (``{"name", "fingerprint", ...}``), ``settings``, ``losses``, ``versions``, ``created`` and ``made_from``.

    Raises:
        PatchError: the layers don't agree with the above.
    """

    layers: tuple[LayerPatch, ...]
    meta: dict[str, Any]

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        order = [(part.layer, PROJECTIONS.index(part.projection)) for part in self.layers]
        if not order or order != sorted(set(order)):
            refuse("the patch", "one or more layers, ascending, with gate, up and down in this order",
                   ", ".join(part.place for part in self.layers))  # fmt: skip
        for weight in dict.fromkeys(part.weight for part in self.layers):
            _check_apart([part for part in self.layers if part.weight == weight])
        if len({part.old.dtype for part in self.layers}) > 1:
            refuse("the patch", "one dtype", ", ".join(sorted({NAMES[part.old.dtype] for part in self.layers})))

    def by_layer(self) -> dict[int, Tensor]:
        """Each changed layer's neurons, int64, ascending, each once whichever of its weights change."""
        found: dict[int, list[Tensor]] = {}
        for part in self.layers:
            found.setdefault(part.layer, []).append(part.neurons)
        return {layer: torch.cat(ids).unique() for layer, ids in found.items()}

    @property
    def n_neurons(self) -> int:
        return sum(map(len, self.by_layer().values()))

    def check_finite(self) -> None:
        """Raises PatchError where a new weight is NaN or infinite: every command refuses a checkpoint of such."""
        if bad := [part.place for part in self.layers if not part.new.isfinite().all()]:
            raise PatchError(
                f"the patch holds weights that aren't finite: {', '.join(bad)}",
                expected="finite weights",
                do="make the patch again with pke-fast edit",
            )

    @property
    def dtype(self) -> str:
        """``fp32``, ``bf16`` or ``fp16``: the dtype of the weights that it was made from."""
        return NAMES[self.layers[0].old.dtype]

    def describe(self) -> dict[str, Any]:
        """What the patch is, as JSON values: for `pke-fast show`.

        ``layers`` has, for each projection that changes, ``layer``, ``projection``, ``weight``, ``axis``, ``offset``,
        ``neurons`` (how many), ``width`` (weights a neuron) and ``relative_change`` (see `LayerPatch`).
        """
        settings = self.meta.get("settings")
        return {
            "method": settings.get("method") if isinstance(settings, dict) else None,
            "neurons": self.n_neurons,
            "dtype": self.dtype,
            "layers": [
                {
                    "layer": part.layer,
                    "projection": part.projection,
                    "weight": part.weight,
                    "axis": part.axis,
                    "offset": part.offset,
                    "neurons": len(part.neurons),
                    "width": part.width,
                    "relative_change": part.relative_change,
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
        """Compares the values that are there now, ``[n, d]`` for each of `layers`, with those the patch expects there.

        Raises:
            PatchError: they differ in a bit. The message names the projections, and says if the patch is there already.
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
        places = ", ".join(
            f"{part.place} ({count} of {len(part.neurons)} neurons)"
            for part, count in zip(self.layers, counts, strict=True)
            if count
        )
        raise PatchError(
            f"the patch does not fit {where}: the weights differ in {places}",
            expected=f"bit for bit the weights {'it wrote' if revert else 'it was made from'}{self._base()}",
            got=f"other weights in {sum(map(bool, counts))} of {len(counts)} projections",
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
        """What its file holds: in version 1, which every pke_fast reads, where it can say all there is to say."""
        version = 1 if all((part.projection, part.offset) == ("down", 0) for part in self.layers) else 2
        layers: list[dict[str, Any]] = []
        for part in self.layers:
            layers.append({"layer": part.layer, "weight": part.weight, "axis": part.axis})
            if version > 1:
                layers[-1] |= {"projection": part.projection, "offset": part.offset}
        # The int64 tensors come first: every tensor is then aligned to its dtype in the file.
        tensors = {
            f"{_prefix(entry)}.{name}": getattr(part, name)
            for name in TENSORS
            for part, entry in zip(self.layers, layers, strict=True)
        }
        return patch_file.Content(version, layers, tensors, self.meta)

    def digest(self) -> str:
        """SHA-256, in hex, of its file without `meta`: of what changes, and of the weights before and after."""
        digest = hashlib.sha256()
        for piece in patch_file.pieces(dataclasses.replace(self.content(), meta={})):
            digest.update(piece)
        return digest.hexdigest()

    @classmethod
    def load(cls, path: str | Path) -> Patch:
        """Reads a patch and checks every part of it.

        Raises:
            PatchError: no such file, not a patch, a newer format, cut short, or damaged; it names what is damaged.
        """
        content = patch_file.read(path)
        try:
            layers = []
            for entry in content.layers:
                tensors: dict[str, Any] = {name: content.tensors[f"{_prefix(entry)}.{name}"] for name in TENSORS}
                layers.append(LayerPatch(**entry, **tensors))
        except (KeyError, TypeError) as error:
            raise incomplete(path, error) from error
        return cls(tuple(layers), content.meta)


def _prefix(entry: Mapping[str, Any]) -> str:
    """Of the names of a part's tensors in the file."""
    return f"layers.{entry['layer']}" + (f".{entry['projection']}" if "projection" in entry else "")


def _check_apart(parts: Sequence[LayerPatch]) -> None:
    """Refuses parts of one weight that aren't gate and up of one layer, each with places of its own in it."""
    if len(parts) == 1:
        return
    places = torch.cat([part.index for part in parts])
    alike = {(part.layer, part.axis, part.width) for part in parts}
    if len(alike) > 1 or any(part.projection == "down" for part in parts) or len(places.unique()) < len(places):
        refuse("the patch", "each projection with a weight of its own, or gate and up with other places of one",
               f"{parts[0].weight} in {' and '.join(part.place for part in parts)}")  # fmt: skip


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
    check_weight(part, "the model", tuple(weight.shape), called(weight.dtype))
    if not can_be_written(model, part.weight):
        raise PatchError(
            f"{part.weight} is not in memory (meta device)",
            expected="weights on the CPU or a GPU, or brought there by accelerate's hooks",
            do="load the model with its weights, or patch the checkpoint with pke-fast apply",
        )
    return live_weight(model, part.weight)


def _read(weight: Tensor, part: LayerPatch) -> Tensor:
    """The neurons' weights as they are now, ``[n, d]`` on the CPU."""
    return read_columns(weight.detach(), part.axis, part.index.to(weight.device)).to("cpu")


def _write(weight: Tensor, part: LayerPatch, values: Tensor) -> None:
    with torch.no_grad():
        torch.ops.pke_fast.write_columns(weight, part.axis, part.index.to(weight.device), values.to(weight.device))
