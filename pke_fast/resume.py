"""What an interrupted run goes on from: the state of its parts, kept in a folder every few minutes.

The state is all that decides the rest of the run, so a run that was killed at any point and started again with the same
folder ends with the same bytes as one that never was (on the same machine, with the same versions and plan; on a
GPU to the rounding of attention, whose backward adds up in any order).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from pke_fast.errors import InputError
from pke_fast.files import atomic_write
from pke_fast.pace import Pace

State = dict[str, Tensor]
JOB = "job.json"
EVERY_MINUTES = 5.0


class Snapshot:
    """The state of one part of a run; this one is kept nowhere."""

    def load(self) -> State | None:
        """What an earlier run of the same job left, if it left anything."""
        return None

    def save(self, state: Callable[[], Mapping[str, Tensor]], *, done: bool = False) -> None:
        """Keeps the state where it is time to; `state` is called only then.

        Args:
            done: the part is finished, or slowed down: kept at once.
        """


NOWHERE = Snapshot()


class _FileSnapshot(Snapshot):
    def __init__(self, path: Path, every: float) -> None:
        self._path, self._every, self._last = path, every, time.monotonic()

    def load(self) -> State | None:
        from safetensors import SafetensorError, safe_open

        if not self._path.exists():
            return None
        try:
            with safe_open(self._path, "pt") as file:
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dictionary
                kept = (file.metadata() or {}).get("sha256")
        except (SafetensorError, OSError) as error:
            raise self._spoilt(str(error)) from error
        if kept != _checksum(state):
            raise self._spoilt("other bytes than were written")
        return state

    def _spoilt(self, got: str) -> InputError:
        return InputError(
            f"can't read the interrupted run's {self._path}", got=got, do="delete it: that part begins anew"
        )

    def save(self, state: Callable[[], Mapping[str, Tensor]], *, done: bool = False) -> None:
        from safetensors.torch import save_file

        if not done and time.monotonic() - self._last < self._every:
            return
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state().items()}
        with atomic_write(self._path) as path:
            save_file(tensors, path, {"sha256": _checksum(tensors)})
        self._last = time.monotonic()


def _checksum(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class Resume:
    """The folder of a run that can be interrupted.

    Args:
        folder: made where it isn't there; None for a run that keeps nothing.
        job: what decides the result (model, requests, settings, versions, budget), to be compared on the next start.
        minutes: between two states of a part, 0 for every one; None: `EVERY_MINUTES`.
        rank: several ranks share a folder; each keeps its own parts, the first one the job.

    Raises:
        InputError: the folder is of another job, which is told apart by what differs; or the minutes are below 0.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        job: Mapping[str, str] | None = None,
        *,
        minutes: float | None = None,
        rank: int = 0,
    ) -> None:
        minutes = EVERY_MINUTES if minutes is None else minutes
        if not minutes >= 0:
            raise InputError(f"can't keep a state every {minutes} minutes", expected="0 or more")
        self._folder, self._rank = None if folder is None else Path(folder), rank
        self._every = 60 * minutes
        self._job = dict(job or {})
        self._files = [JOB]  # patterns of what is kept, by earlier runs of the job too
        if self._folder is None:
            return
        held = self._held()
        if held is None:
            self._write_job()
            return
        job = self._job
        kept, self._files = held
        if kept != job:
            differs = sorted(name for name in {*kept, *job} if kept.get(name) != job.get(name))
            raise InputError(
                f"the resume folder {self._folder} is of another job",
                expected="the run that was interrupted: " + ", ".join(f"{n} {kept.get(n, '-')}" for n in differs),
                got=", ".join(f"{name} {job.get(name, '-')}" for name in differs),
                do="start it as it was started first, or give another folder",
            )

    def _held(self) -> tuple[dict[str, str], list[str]] | None:
        """The job whose folder it is, and its files."""
        assert self._folder is not None
        if not self._folder.exists():
            return None
        if not self._folder.is_dir():
            raise InputError(f"can't resume from {self._folder}", expected="a folder", got="a file")
        try:
            held = json.loads((self._folder / JOB).read_text(encoding="utf-8"))
            return dict(held["job"]), [str(pattern) for pattern in held["files"]]
        except FileNotFoundError:
            if not {*self._folder.iterdir()} <= {*self._unfinished(JOB)}:
                raise InputError(
                    f"can't resume from {self._folder}",
                    expected=f"an empty folder, or that of an interrupted run (it holds {JOB})",
                    got="a folder with other files",
                ) from None
            return None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InputError(f"can't read {self._folder / JOB}", got=str(error), do="give another folder") from error

    def _unfinished(self, pattern: str) -> Iterator[Path]:
        """What a run that was killed while it wrote such a file has left of it."""
        assert self._folder is not None
        return self._folder.glob(f".tmp-*-{pattern}")

    def _keeps(self, pattern: str) -> None:
        """Such files are the job's: noted before there is one, for whichever run ends the job."""
        if pattern not in self._files:
            self._files.append(pattern)
            self._write_job()

    def _write_job(self) -> None:
        assert self._folder is not None
        if self._rank == 0:
            with atomic_write(self._folder / JOB) as path:
                text = json.dumps({"job": self._job, "files": self._files}, indent=1)
                path.write_text(text + "\n", encoding="utf-8")

    def part(self, name: str) -> Snapshot:
        """One part's state, such as ``scores-requests``."""
        if self._folder is None:
            return NOWHERE
        self._keeps(f"{name}.*.safetensors")
        return _FileSnapshot(self._folder / f"{name}.{self._rank}.safetensors", self._every)

    def remembered(self, name: str, make: Callable[[], list[str]]) -> list[str]:
        """Texts that an earlier run of the same job made, or those that `make` makes now."""
        if self._folder is None:
            return make()
        path = self._folder / f"{name.lower().replace(' ', '-')}.json"
        self._keeps(path.name)
        with suppress(OSError, ValueError):  # not there, or spoilt by the disk: made anew
            return [str(text) for text in json.loads(path.read_text(encoding="utf-8"))]
        texts = make()
        if self._rank == 0:
            with atomic_write(path) as new:
                new.write_text(json.dumps(texts), encoding="utf-8")
        return texts

    def finish(self) -> None:
        """Removes what was kept: the run's result stands, and there is nothing left to go on from."""
        if self._folder is None or self._rank:
            return
        for pattern in reversed(self._files):  # the job last: until then, what is left is known
            for path in (*self._folder.glob(pattern), *self._unfinished(pattern)):
                path.unlink(missing_ok=True)
        with suppress(OSError):  # someone else's file is in it
            self._folder.rmdir()


def resumed_pace(pace: Pace, snapshot: Snapshot) -> Pace:
    """The pace that an interrupted run began with and where it was halved, since how sequences were packed decides the
    last bits; kept from now on."""
    state = snapshot.load()
    if state:
        tokens, scoring, editing = (int(value) for value in state["pace"])
        pace = Pace(tokens, None if scoring < 0 else scoring, None if editing < 0 else editing)
        pace.halvings = [(int(place), int(tokens)) for place, tokens in state["halvings"]]
    begun = torch.tensor([-1 if v is None else v for v in (pace.tokens, pace.scoring_kept, pace.editing_kept)])

    def halved() -> State:
        return {"pace": begun, "halvings": torch.tensor(pace.halvings, dtype=torch.int64).reshape(-1, 2)}

    pace.keep = partial(snapshot.save, halved, done=True)
    if not state:
        pace.keep()
    return pace
