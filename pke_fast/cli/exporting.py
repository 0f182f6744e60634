"""The command `export`: a patch in the formats of other tools."""

from __future__ import annotations

from argparse import Namespace

from pke_fast import terminal
from pke_fast.cli.common import console_of, finish
from pke_fast.patch import Patch


def export(options: Namespace) -> None:
    from pke_fast.export import export_patch

    done = export_patch(
        Patch.load(options.patch),
        options.model,
        options.out,
        options.format,
        max_rank=options.max_rank,
        exact=options.exact,
        force=options.force,
        keep=[options.patch],
    )
    console = console_of(options)
    shown = {key: done[key] for key in ("out", "format", "neurons", "layers", "ranks")}
    if not done["ranks"]:
        del shown["ranks"]
    shown["files"] = ", ".join(done["files"])
    shown["MB"] = round(done["bytes"] / 1e6, 1)
    terminal.facts(console, "Exported", shown)
    terminal.warnings(console, done["warnings"])
    finish(options, done)
