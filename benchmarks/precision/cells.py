"""Cells: one figure or file each, kept by a digest of what it was made from, so that a killed run goes on."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pke_fast.files import atomic_write

Value = dict[str, Any]


class Missing(Exception):
    """A cell that isn't there and isn't to be made now."""


def digest(value: Any) -> str:
    """SHA-256, in hex, of JSON values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


@dataclass
class Cells:
    """The cells of a folder.

    Attributes:
        folder: each cell is ``NAME-DIGEST.json`` in it, and what else it keeps has the same beginning.
        commit: what the code is called now; kept with each cell, since the digest knows nothing of the code.
        only: parts of names: other cells are taken if they are there, and not made.
        found: the values of this run's cells by name.
    """

    folder: Path
    commit: str = ""
    only: Sequence[str] = ()
    say: Callable[[str], None] = print
    found: dict[str, Value] = field(default_factory=dict)

    def path(self, name: str, inputs: Any, suffix: str = ".json") -> Path:
        """Where a cell of these inputs is, or one of its files."""
        plain = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")
        return self.folder / f"{plain}-{digest([name, inputs])[:12]}{suffix}"

    def wanted(self, name: str) -> bool:
        return not self.only or any(part in name for part in self.only)

    def cell(self, name: str, inputs: Any, make: Callable[[], Value]) -> Value:
        """The value of a cell: as it was kept, else made now and kept.

        Raises:
            Missing: it isn't there, and `only` leaves it out.
        """
        path = self.path(name, inputs)
        if path.exists():
            value: Value = json.loads(path.read_text(encoding="utf-8"))
        else:
            if not self.wanted(name):
                raise Missing(name)
            start = time.perf_counter()
            value = make()
            value["cell"] = {"seconds": time.perf_counter() - start, "commit": self.commit}
            with atomic_write(path) as new:
                new.write_text(json.dumps(value, allow_nan=False) + "\n", encoding="utf-8")
            self.say(f"{name}: {value['cell']['seconds']:.0f} s")
        self.found[name] = value
        return value
