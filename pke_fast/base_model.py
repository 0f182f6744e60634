"""The model that a patch is exported for: its name, and the shapes of the weights that the patch changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from pke_fast.errors import InputError, PatchError
from pke_fast.journal import reading
from pke_fast.layer_patch import LayerPatch, check_weight
from pke_fast.patch import Patch
from pke_fast.projections import Projection, find_projections, model_without_weights, projections_of
from pke_fast.shards import StoredTensor, read_checkpoint
from pke_fast.stored import Target, find_targets, read_all, row_bands

_SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")


@dataclass(frozen=True)
class BaseModel:
    """What is known of it without loading it.

    Attributes:
        name: as it was given.
        shapes: of each weight of the patch, by the patch's name.
        folder: of its safetensors; None where only its configuration is there.
        targets: where the patch's weights lie in them; empty where there are none.
    """

    name: str
    shapes: Mapping[str, tuple[int, ...]]
    folder: Path | None
    targets: tuple[Target, ...]


@contextmanager
def base_model(name: str, patch: Patch) -> Iterator[BaseModel]:
    """Finds the model: a folder, a hub id or ``smollm2``. While it is in use, no change of it in place may begin.

    From a checkpoint's headers, with some rows of every weight compared with the patch's old ones; where there are no
    safetensors, from config.json alone.

    Raises:
        InputError: no such model, or it can't be used.
        PatchError: it isn't the one that was edited, as far as can be told.
    """
    folder = _folder(name)
    if not any((folder / file).is_file() for file in _SAFETENSORS) and (folder / "config.json").is_file():
        yield _by_config(name, folder, patch)
        return
    with reading(folder):
        tensors = read_checkpoint(folder)
        targets = tuple(find_targets(tensors, patch, folder))
        _check_sides(folder, tensors, targets)
        _check_values(folder, targets, patch)
        yield BaseModel(name, {t.part.weight: t.tensor.shape for t in targets}, folder, targets)


def _folder(name: str) -> Path:
    from pke_fast.sources import ask_hub, find_path

    if name == "smollm2":
        from pke_fast import smollm2

        return smollm2.default_model_folder() if smollm2.is_installed() else ask_hub(smollm2.HUB_ID)[0]
    path = find_path(name)
    if path is not None and path.is_file():
        raise InputError(
            f"{name} can't take an export", expected="the folder or the hub id of a transformers checkpoint",
            got="a .gguf file", do="name the checkpoint that it was converted to",
        )  # fmt: skip
    return path or ask_hub(name)[0]


def _by_config(name: str, folder: Path, patch: Patch) -> BaseModel:
    """By the model that config.json describes, made without weights: its dtype and values can't be compared."""
    from pke_fast.sources import check_config

    check_config(folder, name, trust_remote_code=False)
    model = model_without_weights(folder, name)
    known: dict[str, list[Projection]] = {}
    for projection in projections_of(model):
        known.setdefault(projection.weight, []).append(projection)
    shapes = {}
    for part in patch.layers:
        if not any((found.kind == "down") == (part.projection == "down") for found in known.get(part.weight, [])):
            names = [weight for weight, found in known.items() if part.projection in [each.kind for each in found]]
            raise PatchError(
                f"{name} has no {part.projection} projection {part.weight}, which the patch changes "
                f"(layer {part.layer})",
                got=f"names such as {next(iter(names), None)}",
                do="name the model that was edited",
            )
        shapes[part.weight] = tuple(model.get_parameter(part.weight).shape)
        check_weight(part, name, shapes[part.weight], patch.dtype)
        _check_holds(known[part.weight], part)
    return BaseModel(name, shapes, None, ())


def _check_sides(folder: Path, tensors: dict[str, StoredTensor], targets: tuple[Target, ...]) -> None:
    """Refuses rows of a weight whose neurons are columns, and the reverse."""
    # An MLP is wider than the model, as a rule; the model itself is asked only where the shapes don't say so.
    unclear = [t for t in targets if t.tensor.shape[t.part.axis] <= t.tensor.shape[1 - t.part.axis]]
    if not unclear:
        return
    projections = find_projections(folder, tensors)
    for target in unclear:
        _check_holds(projections.get(target.tensor.name, []), target.part)


def _check_holds(found: Sequence[Projection], part: LayerPatch) -> None:
    if not any(projection.holds(part) for projection in found):
        raise PatchError(
            f"the patch changes {'rows' if part.axis == 0 else 'columns'} of {part.weight} that are no neurons "
            f"(layer {part.layer})",
            expected="neurons' weights: rows of gate and up [D, d], columns of a down projection [d, D], the reverse "
            "where a Conv1D stores them",
            got=f"axis {part.axis}, up to {int(part.index[-1])}, as a {part.projection} projection",
            do="apply it to the checkpoint with pke-fast apply",
        )


def _check_values(folder: Path, targets: tuple[Target, ...], patch: Patch) -> None:
    """Compares the first rows of each weight: a model that was edited already or tuned otherwise is seen by them."""
    some = []
    for target in targets:
        part, tensor = target.part, target.tensor
        if part.axis == 1:
            row_bytes = tensor.size // tensor.shape[0]
            rows = next(iter(row_bands(tensor.shape[0], row_bytes)))[1]
            part = replace(part, old=part.old[:, :rows], new=part.new[:, :rows])
            tensor = replace(tensor, shape=(rows, tensor.shape[1]), size=rows * row_bytes)
        some.append(Target(part, tensor))
    found = read_all(folder, some)
    Patch(tuple(target.part for target in some), patch.meta).check(found, False, f"the checkpoint {folder}")
