"""Memory that may be used: a size that a user writes, or what the device has free."""

from __future__ import annotations

import re
from pathlib import Path

from pke_fast.errors import InputError
from pke_fast.ranks import ranks_here

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}
_FEWEST = 2**16  # bytes: a smaller size without a unit lacks one
SHARE = 0.9  # of what is free: others breathe too
_LIMITS = (  # of a control group, what it uses, and which of that is its files' cache: cgroup 2, then 1
    ("/sys/fs/cgroup", "memory.max", "memory.current", "file"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache"),
)


def parse_bytes(text: str) -> int:
    """Bytes of a size such as ``8GiB``, ``500MB`` or ``8G``."""
    match = re.fullmatch(r"\s*([0-9]{0,15}\.?[0-9]{1,15})\s*([KMG]I?)?B?\s*", text.upper())
    if not match:
        raise InputError(f"can't read the size {text!r:.40}", expected="a number and a unit, such as 8GiB or 500MB")
    size = int(float(match[1]) * _UNITS[match[2] or ""])
    if not match[2] and size < _FEWEST:
        raise InputError(f"a size of {size:,} bytes", expected="a number and a unit, such as 8GiB or 500MB", got=text)
    return size


def free_bytes(device: str) -> int | None:
    """What a job may take of the memory that the device has free now; None where the system can't tell.

    The ranks of one machine share what its host has.
    """
    if device.startswith("cuda"):
        import torch

        # What torch keeps for later use is this process's own, and torch gives it back before memory runs out.
        allocated = torch.cuda.memory_allocated(device)
        free, total = (int(size) for size in torch.cuda.mem_get_info(device))
        free += torch.cuda.memory_reserved(device) - allocated
        fraction = getattr(torch.cuda, "get_per_process_memory_fraction", None)  # which torch 2.4 lacks
        if fraction is not None:
            free = min(free, int(fraction(device) * total) - allocated)
        return int(SHARE * max(0, free))
    groups = [_left(Path(root, group), *names) for root, *names in _LIMITS for group in _own_groups()]
    known = [value for value in (_available(), *groups) if value is not None]
    return int(SHARE * min(known)) // ranks_here() if known else None


def _available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _own_groups() -> list[str]:
    """The control groups of this process, relative to their root, and the root, which is a container's own."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return ["."]
    return [
        ".",
        *(path.lstrip("/") for _, kinds, path in (line.split(":", 2) for line in lines) if kinds in ("", "memory")),
    ]


def _left(group: Path, limit: str, usage: str, cache: str) -> int | None:
    """What a control group may still take; files that it has read make room when it does."""
    try:
        most, used = (group / limit).read_text().strip(), int((group / usage).read_text())
        figures = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return max(0, int(most) - used + int(figures.get(cache, 0))) if most.isdecimal() else None
