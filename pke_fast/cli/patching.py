"""What each command on patches and checkpoints on disk does."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from pke_fast import terminal
from pke_fast.cli.common import console_of, finish
from pke_fast.errors import InputError
from pke_fast.files import check_output_file
from pke_fast.patch import Patch


def apply(options: Namespace) -> None:
    _rewrite(options, revert=False)


def revert(options: Namespace) -> None:
    _rewrite(options, revert=True)


def _rewrite(options: Namespace, revert: bool) -> None:
    from pke_fast.checkpoint import patch_checkpoint
    from pke_fast.combine import scale as scale_patch
    from pke_fast.inplace import patch_in_place

    if options.in_place and (options.force or options.allow_pickle):
        given = "--force" if options.force else "--allow-pickle"
        raise InputError(f"{given} has no meaning with --in-place", do="leave it out, or give --out DIR")
    patch, name = Patch.load(options.patch), str(options.patch)
    if options.scale is not None:
        patch, name = scale_patch(patch, options.scale, name), f"{name} scaled by {options.scale:g}"
    if not revert:
        patch.check_finite()
    recovered = _recovered(options.model)
    if options.in_place:
        written = patch_in_place(Path(options.model), patch, revert=revert, name=name)
    else:
        where = {"revert": revert, "force": options.force, "allow_pickle": options.allow_pickle}
        written = patch_checkpoint(Path(options.model), patch, Path(options.out), keep=[options.patch], **where)
    written["scale"] = options.scale
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


def diff(options: Namespace) -> None:
    from pke_fast.diff import diff_checkpoints

    if options.out:
        check_output_file(options.out, options.force, [options.a, options.b])
    ended = [_recovered(folder) for folder in (options.a, options.b)]
    found = diff_checkpoints(options.a, options.b, want_patch=bool(options.out), ignore_others=options.ignore_others)
    if options.out:
        if found.patch is None:
            raise InputError(
                f"{options.a} and {options.b} have the same neurons, to the bit: there is no patch to write",
                do="compare the checkpoint before the change with the one after it",
            )
        found.patch.save(options.out)
    summary = {
        "tensors": found.tensors,
        "neurons": sum(found.neurons.values()),
        "by_layer": {str(layer): count for layer, count in found.neurons.items()},
        "others": [asdict(other) for other in found.others],
        "out": options.out,
        "recovered": [before or now for before, now in zip(ended, found.recovered, strict=True)],
    }
    console = console_of(options)
    shown = {key: summary[key] for key in ("tensors", "neurons", "by_layer")}
    terminal.facts(console, "Compared", {**shown, "others": len(found.others), "out": options.out or "nothing written"})
    if found.others:
        terminal.facts(console, "Differs, and is in no patch: patches hold weights of MLP neurons", {
            other.tensor: f"{other.kind}, {other.rows:,} of {other.of:,} rows" for other in found.others
        })  # fmt: skip
    finish(options, summary)


def merge(options: Namespace) -> None:
    from pke_fast.combine import merge as merge_patches

    check_output_file(options.out, options.force, options.patches)
    names = [str(path) for path in options.patches]
    merged = merge_patches([Patch.load(name) for name in names], names)
    merged.save(options.out)
    parts = merged.meta["made_from"]["patches"]
    summary = {
        "out": options.out,
        "neurons": merged.n_neurons,
        "patches": [{key: part[key] for key in ("name", "relation", "neurons")} for part in parts],
    }
    console = console_of(options)
    bases = [part["meta"].get("base") for part in parts if part["relation"] != "on top"]
    prints = {str(base.get("fingerprint")) for base in bases if isinstance(base, dict)}
    if len(prints) > 1:
        terminal.warnings(console, ["these patches were made from models with other fingerprints; apply will compare"])
    shown = {part["name"]: f"{part['relation']}, {part['neurons']:,} neurons" for part in parts}
    terminal.facts(console, "Merged", {**shown, "neurons": merged.n_neurons, "out": options.out})
    finish(options, summary)


def scale(options: Namespace) -> None:
    from pke_fast.combine import scale as scale_patch

    check_output_file(options.out, options.force, [options.patch])
    scaled = scale_patch(Patch.load(options.patch), options.by, str(options.patch))
    scaled.save(options.out)
    summary = {"out": options.out, "by": options.by, "neurons": scaled.n_neurons}
    terminal.facts(console_of(options), "Scaled", summary)
    finish(options, summary)
