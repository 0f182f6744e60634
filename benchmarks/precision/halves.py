"""Two processes at once, each with half of the cores, which small models use better so."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from pke_fast.errors import PKEError
from precision.run import VANILLA, called
from precision.settings import DEFAULT, DRAFT_PRESET, Setting


def chains(settings: Mapping[str, Setting]) -> list[list[str]]:
    """Names of cells by process, so that both take about as long: the default configuration and the published methods;
    the draft, what changes one thing in it, and the edits in a row that are made with it."""
    drafts, published = [], []
    for name, setting in settings.items():
        if name != DEFAULT:
            chain = drafts if setting.preset == DRAFT_PRESET else published
            chain += [called(name, seed) for seed in setting.seeds]
    return [[VANILLA, f"{DEFAULT}-", "probe", *published], [*drafts, "sequential", "kind"]]


def alone(settings: Mapping[str, Setting]) -> list[str]:
    """The cell whose time is told, and so is made first, with all cores."""
    return [f"edit, {called(DEFAULT, settings[DEFAULT].seeds[0])}"]


def make(commands: Sequence[Sequence[str]], out: Path, doc: Path) -> None:
    """Runs commands of the benchmark at once, each with its share of the cores and a document of its own.

    Raises:
        PKEError: one of them failed; what it said is kept in the folder.
    """
    out.mkdir(parents=True, exist_ok=True)
    threads = max(1, (os.cpu_count() or 1) // len(commands))
    running = []
    for number, command in enumerate(commands):
        mine, log = out / f"half-{number}.md", out / f"half-{number}.log"
        shutil.copy(doc, mine)
        with log.open("w", encoding="utf-8") as told:
            process = subprocess.Popen(
                [sys.executable, str(Path(__file__).parent), *command, "--doc", str(mine), "--processes", "1"],
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
                stderr=told,
            )
        running.append((process, log))
    failed = [log for process, log in running if process.wait()]
    if failed:
        said = "\n".join(log.read_text(encoding="utf-8", errors="replace")[-1000:].strip() for log in failed)
        names = ", ".join(map(str, failed))
        raise PKEError(f"a part failed: {names}", got=said, do="run it again: what is made is kept")
