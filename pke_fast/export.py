"""A patch in the formats of other tools: LoRA adapters of PEFT, dense deltas, EasyEdit's weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from pke_fast import full_tensors, lora
from pke_fast.base_model import BaseModel, base_model
from pke_fast.deltas import ROUNDS, LayerDelta, rounds_of
from pke_fast.errors import InputError, PatchError
from pke_fast.files import atomic_folder, check_output_folder
from pke_fast.patch import Patch
from pke_fast.sources import find_path
from pke_fast.stored import read_all

FORMATS = ("peft", "dense-delta", "easyedit")
_Write = Callable[[Path], None]


def export_patch(
    patch: Patch,
    model: str,
    out: str | Path,
    format: str = "peft",
    *,
    max_rank: int | None = None,
    exact: bool = False,
    force: bool = False,
    keep: Iterable[str | Path] = (),
) -> dict[str, Any]:
    """Writes a patch in the format of another tool, without loading the model; whole or not at all.

    - ``peft``: a LoRA adapter in `out`, or several, ``out/part-1`` and so on, that are added in this order. Rank and
      alpha of a module are the number of its changed neurons; of a fused gate and up, of both halves'.
    - ``dense-delta``: ``delta.safetensors``, {parameter name: new - old}, full tensors in fp32.
    - ``easyedit``: ``weights_copy.safetensors`` and ``weights.safetensors``, {parameter name: full tensor} before and
      after, in the weights' dtype.

    Args:
        model: what was edited: a folder of safetensors, a hub id, ``smollm2``, or (not for ``easyedit``) a folder with
            a config.json alone. Old weights that it has are compared in part (``easyedit``: in full).
        out: a new or an empty folder apart from the model; any such with `force`, which replaces it as a whole.
        max_rank: ``peft`` only: no module of an adapter has a higher rank. None puts no bound.
        exact: ``peft`` only: adds adapters with what the first ones miss by rounding, so that all of them merged in
            order give the patch's weights to the bit in every dtype.
        keep: files and folders that `out` has to be apart from too, such as the patch's file.

    Returns:
        ``out``, ``format``, ``files`` (relative to `out`), ``bytes`` of them all, ``neurons`` that change, ``layers``
        that have such, ``ranks`` (``peft``: the largest of each adapter), ``missed`` and ``error``: how many weights
        of round(old + change) aren't the new ones, and the largest difference; ``warnings``.

    Raises:
        InputError: a model or folder that can't be used, or an option that the format doesn't have.
        PatchError: the patch doesn't fit the model, changes nothing, or can't be held by the format.
        PKEError: the disk is full, or another error of the system.
    """
    _check_options(format, max_rank, exact)
    check_output_folder(out, force, keep)
    with base_model(model, patch) as base:
        source = base.folder or find_path(model)
        check_output_folder(out, force, [source] if source else [])
        rounds = [rounds_of(part, ROUNDS if exact else 1) for part in patch.layers]
        changed: dict[int, set[int]] = {}
        for part in rounds:
            changed.setdefault(part[0].part.layer, set()).update(part[0].neurons.tolist())
        if not any(changed.values()):
            raise PatchError("the patch changes no weight: there is nothing to export", do="check which patch it is")
        said: dict[str, Any] = {"ranks": [], "missed": 0, "error": 0.0, "warnings": []}
        write, more = _prepared(format, patch, base, rounds, max_rank)
        with atomic_folder(out, force) as folder:
            write(folder)
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            names = [str(path.relative_to(folder)) for path in files]
            size = sum(path.stat().st_size for path in files)
    counts = {"neurons": sum(map(len, changed.values())), "layers": sum(map(bool, changed.values()))}
    return {"out": str(out), "format": format, "files": names, "bytes": size, **counts, **said, **more}


def _prepared(
    format: str, patch: Patch, base: BaseModel, rounds: Sequence[Sequence[LayerDelta]], max_rank: int | None
) -> tuple[_Write, dict[str, Any]]:
    """What writes the files, and what is to be said of them; everything is checked by then."""
    if format == "easyedit":
        _check_weights(base, patch)
        return lambda folder: full_tensors.write_weights(folder, base), {}
    last = [part[-1] for part in rounds]
    said: dict[str, Any] = {
        "missed": sum(delta.missed for delta in last),
        "error": max(delta.error for delta in last),
        "warnings": _rounding(last, format),
    }
    if format == "dense-delta":
        deltas = [part[0] for part in rounds if len(part[0].neurons)]
        return lambda folder: full_tensors.write_deltas(folder, deltas, base), said
    _check_one_side(patch)
    adapters = lora.adapters_of(rounds, max_rank)
    said["ranks"] = [max(module.rank for module in adapter) for adapter in adapters]
    if max(said["ranks"]) > lora.MOST_SERVED:
        said["warnings"].append(
            f"a module has rank {max(said['ranks']):,}: peft loads that, but vLLM serves {lora.MOST_SERVED}. "
            f"--max-rank {lora.MOST_SERVED} splits it into adapters that are added one after another; where only "
            "one is taken, as in vLLM, use the merged checkpoint that pke-fast apply writes"
        )
    return lambda folder: _write_adapters(folder, adapters, patch, base), said


def _check_options(format: str, max_rank: int | None, exact: bool) -> None:
    if format not in FORMATS:
        raise InputError(f"unknown format: {format}", expected=f"one of: {', '.join(FORMATS)}", got=repr(format))
    if format != "peft" and (max_rank is not None or exact):
        given = "--exact" if exact else "--max-rank"
        raise InputError(f"{given} has no meaning with --format {format}", do="leave it out, or take --format peft")
    if max_rank is not None and (type(max_rank) is not int or max_rank < 1):
        raise InputError("the rank of an adapter can't be that", expected="1 or more", got=repr(max_rank))


def _check_weights(base: BaseModel, patch: Patch) -> None:
    """Full tensors are taken from the checkpoint: every old weight of the patch must be in it, to the bit."""
    if base.folder is None:
        raise InputError(
            f"{base.name} has no safetensors to take the weights from",
            expected="the folder of a checkpoint: EasyEdit's weights are full tensors",
            got="a configuration without weights",
            do="name a folder with weights, or take --format dense-delta",
        )
    patch.check(read_all(base.folder, base.targets), False, f"the checkpoint {base.folder}")


def _check_one_side(patch: Patch) -> None:
    if len({part.transposed for part in patch.layers}) > 1:
        raise PatchError(
            "an adapter can't hold this patch: some of its weights are stored transposed, others aren't",
            expected="one way for all modules of an adapter (fan_in_fan_out)",
            do="export it with --format dense-delta, or apply it to the checkpoint with pke-fast apply",
        )


def _rounding(last: Sequence[LayerDelta], format: str) -> list[str]:
    missed = sum(delta.missed for delta in last)
    if not missed:
        return []
    total, error = sum(delta.part.new.numel() for delta in last), max(delta.error for delta in last)
    do = "--exact adds adapters that make up for it" if format == "peft" else "pke-fast apply is exact"
    return [f"old + change, rounded, misses {missed:,} of {total:,} new weights, by {error:.1e} at most; {do}"]


def _write_adapters(folder: Path, adapters: Sequence[list[lora.Module]], patch: Patch, base: BaseModel) -> None:
    widths = {lora.module_of(part.weight): base.shapes[part.weight][part.axis] for part in patch.layers}
    for number, adapter in enumerate(adapters, start=1):
        place = folder if len(adapters) == 1 else folder / f"part-{number}"
        place.mkdir(exist_ok=True)
        lora.write_adapter(place, adapter, patch, base.name, widths)
