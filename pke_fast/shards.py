"""Where the tensors of a safetensors checkpoint lie on disk: read from the headers alone, and checked."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pke_fast.errors import InputError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_MAX_HEADER = 100_000_000  # bytes; safetensors' own limit
_WEIGHTS = {".safetensors", ".bin", ".pth", ".pt", ".gguf"}
_SIZES = {"F32": 4, "BF16": 2, "F16": 2}  # bytes of a value, of the dtypes that a patch can have


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint.

    Attributes:
        name: its name in the checkpoint.
        shard: the file's name in the checkpoint folder.
        dtype: safetensors' name of it, such as ``BF16``.
        shape: its dimensions.
        offset: of its first byte in the file.
        size: in bytes.
    """

    name: str
    shard: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int


def read_checkpoint(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the checkpoint, by name, in the files that transformers would load.

    Raises:
        InputError: no such folder, no safetensors in it, a damaged index, or a shard that is missing or damaged.
    """
    check_folder(folder)
    try:
        return _read_folder(folder)
    except OSError as error:
        raise InputError(
            f"can't read the checkpoint {folder}",
            got=f"{error.strerror}: {error.filename}",
            do="check that you may read its files",
        ) from error


def check_folder(folder: Path) -> None:
    """Raises InputError where there is no such folder."""
    if not folder.is_dir():
        raise InputError(
            f"no checkpoint folder {folder}",
            expected=f"a folder with {SINGLE}, or with {INDEX} and its shards",
            got="a file" if folder.exists() else "nothing of that name",
            do="give the local folder of the checkpoint (for a hub id: where it was downloaded to)",
        )


def other_weights(names: Iterable[str], shards: set[str]) -> list[str]:
    """The files among `names` that may hold weights besides the checkpoint's own: a second format, an adapter."""
    return [name for name in names if Path(name).suffix in _WEIGHTS and name not in shards]


def _read_folder(folder: Path) -> dict[str, StoredTensor]:
    if (folder / SINGLE).is_file():  # transformers prefers it where both are there
        return {tensor.name: tensor for tensor in _read_shard(folder, SINGLE)}
    if not (folder / INDEX).is_file():
        raise _no_safetensors(folder)
    shards = _read_index(folder / INDEX)
    stored = {name: {t.name: t for t in _read_shard(folder, name)} for name in sorted(set(shards.values()))}
    for name, shard in shards.items():
        if name not in stored[shard]:
            raise _damaged(folder / INDEX, f"it says that {name} is in {shard}, which hasn't it")
    return {name: stored[shard][name] for name, shard in shards.items()}


def _read_index(path: Path) -> dict[str, str]:
    try:
        shards = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path, f"no weight_map can be read from it: {error}") from error
    if not isinstance(shards, dict) or not shards:
        raise _damaged(path, "its weight_map is not an object of names")
    for shard in shards.values():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise _damaged(path, f"{shard!r} is not the name of a file beside it")
        if not (path.parent / shard).is_file():
            raise InputError(
                f"{path} names a shard that isn't there: {shard}",
                expected=f"{len(set(shards.values()))} shards beside it",
                do="finish the download of the checkpoint",
            )
    return shards


def _read_shard(folder: Path, shard: str) -> list[StoredTensor]:
    path = folder / shard
    total = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if total < 8 or not 2 <= length <= min(_MAX_HEADER, total - 8):
            raise _damaged(path, f"a header of {length:,} bytes in a file of {total:,}")
        text = file.read(length)
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        tensors = [_entry(name, shard, 8 + length, entry) for name, entry in entries.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, f"a header that can't be read: {error}") from error
    end = max((tensor.offset + tensor.size for tensor in tensors), default=8 + length)
    if total != end:
        raise _damaged(path, f"{total:,} bytes where the header says {end:,}")
    return tensors


def _entry(name: str, shard: str, start: int, entry: dict[str, Any]) -> StoredTensor:
    first, last = (int(offset) for offset in entry["data_offsets"])
    shape = tuple(int(n) for n in entry["shape"])
    size = last - first
    value = _SIZES.get(entry["dtype"])
    if first < 0 or size < 0 or (value is not None and math.prod(shape) * value != size):
        raise ValueError(f"the bytes of {name} don't agree with its shape")
    return StoredTensor(name, shard, str(entry["dtype"]), shape, start + first, size)


def _damaged(path: Path, got: str) -> InputError:
    return InputError(
        f"{path} is cut short or damaged", expected="a whole safetensors checkpoint", got=got, do="copy it again"
    )


def _no_safetensors(folder: Path) -> InputError:
    others = sorted(path.name for path in folder.iterdir() if path.suffix in _WEIGHTS)
    return InputError(
        f"the checkpoint {folder} has no {SINGLE} and no {INDEX}",
        expected="weights as transformers' save_pretrained writes them, in safetensors",
        got=", ".join(others[:4]) or "no weights",
        do="save it as safetensors (transformers' save_pretrained); of a pytorch_model.bin that you trust, pke-fast "
        "apply --out DIR --allow-pickle makes a copy in safetensors"
        if others
        else "check the path",
    )
