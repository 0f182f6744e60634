"""What each command on patches and checkpoints on disk does."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from rich.console import Console

from pke_fast import terminal
from pke_fast.cli.common import console_of, finish
from pke_fast.errors import InputError
from pke_fast.patch import Patch


def apply(options: Namespace) -> None:
    _rewrite(options, revert=False)


def revert(options: Namespace) -> None:
    _rewrite(options, revert=True)


def _rewrite(options: Namespace, revert: bool) -> None:
    from pke_fast.checkpoint import patch_checkpoint
    from pke_fast.inplace import patch_in_place

    if options.in_place and options.force:
        raise InputError("--force has no meaning with --in-place", do="leave it out: no folder is replaced")
    patch = Patch.load(options.patch)
    recovered = _recovered(options.model)
    if options.in_place:
        written = patch_in_place(Path(options.model), patch, revert=revert, name=str(options.patch))
    else:
        written = patch_checkpoint(Path(options.model), patch, Path(options.out), revert=revert, force=options.force)
    written["recovered"] = written["recovered"] or recovered
    shown = {key: value for key, value in written.items() if value is not None}
    terminal.facts(console_of(options), "Reverted" if revert else "Applied", shown)
    finish(options, written)


def _recovered(folder: str) -> str | None:
    """Ends an interrupted change and says so at once, since the command itself may fail later."""
    from pke_fast.journal import recover

    recovery = recover(folder)
    if recovery is None:
        return None
    terminal.warnings(Console(stderr=True), [recovery.message])
    return recovery.outcome


def recover(options: Namespace) -> None:
    from pke_fast.shards import check_folder

    check_folder(Path(options.model))
    done = {"model": options.model, "recovered": _recovered(options.model)}
    terminal.facts(console_of(options), "Recovered" if done["recovered"] else "Nothing was interrupted", done)
    finish(options, done)


def show(options: Namespace) -> None:
    description = Patch.load(options.patch).describe()
    terminal.patch(console_of(options), description)
    finish(options, description)
