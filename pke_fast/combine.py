"""Patches made from patches: several in one, and one scaled. Both stay exact: old weights are kept bit for bit."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import pke_fast
from pke_fast.dtypes import bits_of
from pke_fast.errors import InputError, PatchError
from pke_fast.kinds import PROJECTIONS
from pke_fast.layer_patch import LayerPatch, equal_rows
from pke_fast.patch import Patch

NAMED = 8  # neurons of a layer that a message names


def merge(patches: Sequence[Patch], names: Sequence[str] | None = None) -> Patch:
    """One patch that does what all of them do, taken in order.

    Each is joined to what those before it make together, by the neurons whose weights both have: those in gate, up and
    down count apart. All of these must agree:

    - none: they unite;
    - its old weights are the new ones so far: it is on top, and the result goes from the first old to the last new;
    - its old weights are the old ones so far, and the new ones are the same too: they unite. Where one of the two
      leaves a neuron as it was, the other's weights are taken.

    Where no neuron is shared, nothing shows that the patches are of the same weights: applying the result compares
    every old one, as always. The same patches give the same bytes.

    Args:
        names: of the patches, for messages and the metadata; by default their numbers.

    Returns:
        A patch with the first one's ``base``; ``made_from`` has each one's name, relation (``first``, ``disjoint``,
        ``on top`` or ``same base``), number of neurons and metadata.

    Raises:
        InputError: fewer than two.
        PatchError: they conflict; it names the neurons.
    """
    if len(patches) < 2:
        raise InputError("nothing to merge", expected="two patches or more", got=str(len(patches)))
    names = list(names or (f"patch {number}" for number in range(1, len(patches) + 1)))
    parts = {_key(part): part for part in patches[0].layers}
    relations = ["first"]
    for number, patch in enumerate(patches[1:], start=1):
        relations.append(_join(parts, patch, ", ".join(names[:number]), names[number]))
    made = [
        {"name": name, "relation": relation, "neurons": patch.n_neurons, "meta": patch.meta}
        for name, relation, patch in zip(names, relations, patches, strict=True)
    ]
    return _made([parts[key] for key in sorted(parts)], patches[0], {"how": "merge", "patches": made})


def scale(patch: Patch, by: float, name: str | None = None) -> Patch:
    """A patch that goes `by` of the way: new = old + by * (new - old), in fp32, rounded to the weights' dtype.

    By 1 the new weights are the same bytes, by 0 the old ones, and a value that the patch leaves as it is stays so.
    More than 1 goes further, less than 0 the other way. Old weights are kept, so reverting is exact.

    Raises:
        InputError: `by` isn't a finite number.
        PatchError: a scaled weight is too large for the dtype.
    """
    if not math.isfinite(by):
        raise InputError("a patch can't be scaled by that", expected="a finite number, such as 0.5", got=str(by))
    made = {"how": "scale", "by": by, "patches": [{"name": name, "neurons": patch.n_neurons, "meta": patch.meta}]}
    return _made([replace(part, new=_scaled(part, by)) for part in patch.layers], patch, made)


def _key(part: LayerPatch) -> tuple[int, int]:
    """What parts of several patches are joined by, in the order in which a patch has them."""
    return part.layer, PROJECTIONS.index(part.projection)


def _made(layers: Sequence[LayerPatch], first: Patch, made_from: dict[str, Any]) -> Patch:
    versions = {"pke_fast": pke_fast.__version__}
    return Patch(tuple(layers), {"base": first.meta.get("base"), "made_from": made_from, "versions": versions})


def _scaled(part: LayerPatch, by: float) -> Tensor:
    if by in (0.0, 1.0):
        return part.new.clone() if by else part.old.clone()
    old, new = part.old.float(), part.new.float()
    scaled = (old + by * (new - old)).to(part.old.dtype)
    bits = bits_of(part.old.dtype)
    scaled = torch.where(part.old.view(bits) == part.new.view(bits), part.old, scaled)
    beyond = (~torch.isfinite(scaled) & torch.isfinite(old) & torch.isfinite(new)).any(dim=1)
    if bool(beyond.any()):
        raise PatchError(
            f"scaled by {by:g}, weights of {part.place} are too large for {part.old.dtype}",
            expected="finite weights",
            got=f"infinity in {_listed(part.neurons[beyond])}",
            do="scale by less",
        )
    return scaled


@dataclass(frozen=True)
class _Shared:
    """The neurons of a projection that two patches both have: where they are in each, and what is equal to the bit."""

    place: str
    neurons: Tensor
    mine: Tensor
    theirs: Tensor
    on_top: Tensor
    same_old: Tensor
    agreed: Tensor
    below: Tensor


def _join(parts: dict[tuple[int, int], LayerPatch], patch: Patch, before: str, name: str) -> str:
    """Joins a patch to the parts so far, in place once all agrees; the relation."""
    shared = []
    for part in patch.layers:
        found = parts.get(_key(part))
        if found is not None:
            _check_alike(found, part, before, name)
            shared.append(_shared(found, part))
    _check_one_model(parts.values(), patch, before, name)
    shared = [both for both in shared if len(both.neurons)]
    on_top = all(bool(both.on_top.all()) for both in shared)
    if not on_top and not all(bool(both.same_old.all()) for both in shared):
        turned = all(bool(both.below.all()) for both in shared)
        raise _conflict(
            f"{name} was made neither from the same weights as {before} nor on top of it",
            [(both.place, both.neurons[~(both.on_top & both.same_old)]) for both in shared],
            "other old weights",
            f"{before} is on top of {name}: exchange them" if turned else "merge patches of one checkpoint",
        )
    if not on_top and not all(bool(both.agreed.all()) for both in shared):
        raise _conflict(
            f"{name} and {before} change the same neurons to other weights",
            [(both.place, both.neurons[~both.agreed]) for both in shared],
            "other new weights",
            "leave one of them out, or make one on top of the other",
        )
    joints = {both.place: both for both in shared}
    for part in patch.layers:
        found, both = parts.get(_key(part)), joints.get(part.place)
        parts[_key(part)] = part if found is None else _united(found, part, both, on_top)
    return "disjoint" if not shared else "on top" if on_top else "same base"


def _shared(found: LayerPatch, part: LayerPatch) -> _Shared:
    mine = torch.isin(found.neurons, part.neurons).nonzero().flatten()
    theirs = torch.isin(part.neurons, found.neurons).nonzero().flatten()
    old, new, their_old, their_new = found.old[mine], found.new[mine], part.old[theirs], part.new[theirs]
    idle = equal_rows(old, new) | equal_rows(their_old, their_new)
    return _Shared(
        part.place,
        part.neurons[theirs],
        mine,
        theirs,
        on_top=equal_rows(new, their_old),
        same_old=equal_rows(old, their_old),
        agreed=equal_rows(new, their_new) | idle,
        below=equal_rows(old, their_new),
    )


def _united(found: LayerPatch, part: LayerPatch, both: _Shared | None, on_top: bool) -> LayerPatch:
    new, rest = found.new.clone(), torch.ones(len(part.neurons), dtype=torch.bool)
    if both is not None:
        rest[both.theirs] = False
        theirs = part.new[both.theirs]
        changes = ~equal_rows(part.old[both.theirs], theirs)[:, None]
        new[both.mine] = theirs if on_top else torch.where(changes, theirs, new[both.mine])
    neurons, order = torch.cat([found.neurons, part.neurons[rest]]).sort()
    old = torch.cat([found.old, part.old[rest]])[order]
    return replace(found, neurons=neurons, old=old, new=torch.cat([new, part.new[rest]])[order])


def _check_alike(found: LayerPatch, part: LayerPatch, before: str, name: str) -> None:
    ours, theirs = (
        f"{p.weight}, axis {p.axis}, offset {p.offset}, {p.width} weights a neuron, {p.old.dtype}"
        for p in (found, part)
    )
    if ours != theirs:
        raise PatchError(
            f"{name} and {before} are of other models ({part.place})",
            expected=ours,
            got=theirs,
            do="merge patches of one checkpoint, loaded in the same way",
        )


def _check_one_model(parts: Collection[LayerPatch], patch: Patch, before: str, name: str) -> None:
    """What holds for patches of other projections too: one dtype, and one layer for a weight."""
    dtype = next(iter(parts)).old.dtype
    numbers = {part.weight: part.layer for part in parts}
    moved = [part.weight for part in patch.layers if numbers.get(part.weight, part.layer) != part.layer]
    if patch.layers[0].old.dtype != dtype or moved:
        raise PatchError(
            f"{name} and {before} are of other models",
            expected=f"{dtype}, and each weight in the same layer",
            got=f"{patch.layers[0].old.dtype}" + (f", {moved[0]} in another layer" if moved else ""),
            do="merge patches of one checkpoint, loaded in the same way",
        )


def _conflict(what: str, neurons: Sequence[tuple[str, Tensor]], kind: str, do: str) -> PatchError:
    named = "; ".join(f"{place}: {_listed(ids)}" for place, ids in neurons if len(ids))
    return PatchError(what, expected="patches that agree on the neurons they share", got=f"{kind} in {named}", do=do)


def _listed(neurons: Tensor) -> str:
    more = f" and {len(neurons) - NAMED:,} more" if len(neurons) > NAMED else ""
    return ("neurons " if len(neurons) > 1 else "neuron ") + ", ".join(map(str, neurons[:NAMED].tolist())) + more
