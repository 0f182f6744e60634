"""What commands write: never over what they read, and an edit that was made isn't lost."""

from __future__ import annotations

import os
import secrets
import sys
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from pke_fast.config import PRESETS
from pke_fast.errors import PKEError
from pke_fast.files import cache_folder, check_output_folder
from pke_fast.loading import SPREADS

if TYPE_CHECKING:
    from pke_fast.engine import EditResult
    from pke_fast.patch import Patch

_MODELS, _JUDGES = ("model", "compare"), ("judge", "winrate")
_FILES = ("config", "device_map", "resume", "requests", "locality", "patch", "runs")
_MEASURED = ("harmful", "benign", "text", "safeedit", "ability", "judge_template")
# What these options may say besides a path; it then names no file, even if there is one of that name.
_WORDS = {"config": PRESETS, "device_map": SPREADS} | dict.fromkeys(_MODELS + _JUDGES, ("smollm2",))


def files_read(options: Namespace) -> list[str]:
    """The files and folders that a command reads, by its options: its result must not replace any of them."""
    found = []
    for option in _MODELS + _JUDGES + _FILES + _MEASURED:
        given = getattr(options, option, None) or []
        for name in given if isinstance(given, list) else [given]:
            if option in _JUDGES:  # classifier:MODEL#CLASS
                name = name.partition(":")[2].partition("#")[0]
            place = os.path.expanduser(name)
            if name not in _WORDS.get(option, ()) and (option == "resume" or os.path.exists(place)):
                found.append(place)
    return found


def check_out(options: Namespace) -> None:
    """Raises InputError where the command's result can't be written to ``--out``, or would replace what it reads."""
    resume = getattr(options, "resume", None)  # deleted once the result is written
    check_output_folder(options.out, options.force, files_read(options), [resume] if resume else [])


def write_edit(result: EditResult, options: Namespace, save_model: bool = False) -> None:
    """Writes an edit, or where that fails its patch alone: it may have taken hours.

    Raises:
        PKEError: it could not be written; says where the patch is.
    """
    try:
        result.write(options.out, force=options.force, redact=options.redact, save_model=save_model)
    except BaseException as error:
        place = _saved_alone(result.patch, Path(os.path.realpath(options.out)))
        told = f"the edit isn't lost: its patch is in {place}" if place else "its patch couldn't be saved elsewhere"
        if isinstance(error, PKEError):
            raise PKEError(error.what, expected=error.expected, got=error.got, do=told) from error
        if isinstance(error, OSError):
            raise PKEError(f"can't write {options.out}", got=str(error), do=told) from error
        print(f"pke-fast: {told}", file=sys.stderr)
        raise


def _saved_alone(patch: Patch, out: Path) -> Path | None:
    """Saves a patch beside the folder that couldn't be written, else in the cache, else among temporary files."""
    for folder in (lambda: out.parent, cache_folder, tempfile.gettempdir):
        try:
            place = Path(folder(), f"{out.name}.patch.safetensors")
            if place.exists():  # perhaps of another edit
                place = place.with_name(f"{out.name}-{secrets.token_hex(4)}.patch.safetensors")
            patch.save(place)
        except (PKEError, OSError, RuntimeError):  # RuntimeError: there is no home folder
            continue
        return place
    return None
