"""Checkpoints in torch's pickle format, converted to safetensors: only where that is asked for."""

from __future__ import annotations

import json
import pickle
import zipfile
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pke_fast import patch_file
from pke_fast.errors import InputError
from pke_fast.stored import write_at

_SINGLE, _INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


def is_pickled(folder: Path) -> bool:
    """Whether the folder has pickled weights under transformers' names, and no safetensors that would be preferred."""
    safe = ("model.safetensors", "model.safetensors.index.json")
    return not any((folder / name).is_file() for name in safe) and any(
        (folder / name).is_file() for name in (_SINGLE, _INDEX)
    )


def convert(source: Path, folder: Path) -> list[str]:
    """Writes the pickled weights of `source` to `folder` as safetensors, file by file; the names of what was read.

    torch.load reads them with weights_only, which runs no code of theirs. Memory: one tensor, where the files are zip
    archives (torch 1.6 and newer); else the largest file. Tied tensors are written under each of their names.

    Raises:
        InputError: torch is older than 2.6, whose weights_only could be got round (CVE-2025-32434); a file is missing,
            can't be read in this way, or holds anything but dense tensors by name.
    """
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < (2, 6):
        raise InputError(
            "pickled weights aren't read with this torch: its weights_only lets code through (CVE-2025-32434)",
            expected="torch 2.6 or newer",
            got=torch.__version__,
            do="install a newer torch, or get the checkpoint as safetensors",
        )
    if (source / _SINGLE).is_file():  # transformers prefers it where both are there
        _write(folder / _converted(_SINGLE), _load(source / _SINGLE))
        return [_SINGLE]
    index, shards = _read_index(source)
    names: dict[str, str] = {}
    for shard in sorted(set(shards.values())):
        tensors = _load(source / shard)
        missing = [name for name, place in shards.items() if place == shard and name not in tensors]
        if missing:
            raise InputError(
                f"{source / _INDEX} says that {missing[0]} is in {shard}, which hasn't it", do="get it anew"
            )
        names.update(dict.fromkeys((name for name in tensors if shards.get(name) == shard), _converted(shard)))
        _write(folder / _converted(shard), tensors)
    new = {**index, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(new, indent=2), encoding="utf-8")
    return [_INDEX, *sorted(set(shards.values()))]


def _converted(name: str) -> str:
    return Path(name).stem.removeprefix("pytorch_") + ".safetensors"


def _read_index(source: Path) -> tuple[dict[str, Any], dict[str, str]]:
    path = source / _INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        shards = dict(index["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged", got=f"no weight_map can be read from it: {error}") from error
    for shard in shards.values():
        if not isinstance(shard, str) or Path(shard).name != shard or not (source / shard).is_file():
            raise InputError(f"{path} names a shard that isn't there: {shard}", do="finish the download")
    return index, shards


def _load(path: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(
            f"{path} can't be read without running code that it may hold, or is damaged",
            expected="a pickle of tensors by name, as transformers wrote it",
            got=" ".join(str(error).split())[:300],
            do="get the checkpoint as safetensors",
        ) from error
    if not isinstance(found, dict) or not found:
        raise InputError(f"{path} holds no weights", expected="tensors by name", got=type(found).__name__)
    for name, tensor in found.items():
        dense = isinstance(tensor, Tensor) and tensor.layout == torch.strided and tensor.dtype in patch_file.CODES
        if not isinstance(name, str) or not dense:
            kind = f"{tensor.layout} {tensor.dtype}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise InputError(
                f"{path} holds more than weights", expected="dense tensors by name", got=f"{name!r}: {kind}"
            )
    return found


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    # Wide values first: then each tensor is aligned to its dtype in the file.
    ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])))
    start = patch_file.header(ordered, {"format": "pt"})
    with FileIO(path, "w") as file:
        file.write(start)
        position = len(start)
        for tensor in ordered.values():
            values = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
            write_at(file, position, values)
            position += values.size
