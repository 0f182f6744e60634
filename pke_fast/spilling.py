"""Weights of offloaded layers that are put on disk, where the host's memory had better hold something else.

A checkpoint's weights in their own dtype lie in its mapped file already. What was converted, or was read from another
format, is written to a folder and mapped from there; the files have no name afterwards, so they go with the process.
"""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from torch import nn

from pke_fast.errors import InputError
from pke_fast.files import explained_write
from pke_fast.mapped import mapped_bytes

FULL = (errno.ENOSPC, errno.EDQUOT)


def spill(layers: Sequence[nn.Module], folder: str | Path) -> int:
    """Puts the weights of these layers that lie in no file into one of a folder, and maps it; the bytes it took.

    Raises:
        InputError: there is no such folder, it has no room, or it can't be written to; the weights are where they were.
        PKEError: the system fails otherwise; the same holds.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file

    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"no such offload folder: {folder}", expected="a folder", do="make it, or name another one")
    loose = [layer for layer in layers if mapped_bytes(layer)[0] < _bytes(layer)]
    need = sum(_bytes(layer) for layer in loose)
    if need > (free := shutil.disk_usage(folder).free):
        _no_room(folder, need, f"{free / 2**20:,.0f} MiB free")
    with explained_write(folder), tempfile.TemporaryDirectory(prefix="pke-fast-offload-", dir=folder) as files:
        paths = [Path(files, f"{index}.safetensors") for index in range(len(loose))]
        try:
            for layer, path in zip(loose, paths, strict=True):
                save_file({name: p.detach().contiguous() for name, p in layer.named_parameters()}, path)
        except (OSError, SafetensorError) as error:
            if not _says_full(error):
                raise
            _no_room(folder, need, str(error))
        for layer, path in zip(loose, paths, strict=True):
            with safe_open(path, "pt") as file:
                for name, parameter in layer.named_parameters():
                    parameter.data = file.get_tensor(name)
    return need


def _says_full(error: Exception) -> bool:
    """safetensors' writer raises an error of its own, which has the system's number in its text."""
    return getattr(error, "errno", None) in FULL or any(f"os error {number})" in str(error) for number in FULL)


def _bytes(layer: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in layer.parameters())


def _no_room(folder: Path, need: int, got: str) -> NoReturn:
    raise InputError(
        f"the offload folder has no room: {folder}",
        expected=f"{need / 2**20:,.0f} MiB for the layers that are offloaded",
        got=got,
        do="free some space, name a folder on another disk, or load the checkpoint in its own dtype, which needs none",
    )
