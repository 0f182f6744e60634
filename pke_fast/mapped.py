"""Weights that stay in their file: safetensors maps it, and the system reads a weight when it is used.

So a model larger than memory runs on a CPU: whatever isn't written to may be dropped and read again. What is written
to, the projections that are edited, becomes the process's own.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from pathlib import Path

from torch import nn


def mapped_bytes(model: nn.Module) -> tuple[int, int]:
    """Bytes of the weights that lie in a mapped file, and how many bytes of such files are in memory now.

    (0, 0) where the system isn't Linux, and for weights that were converted when they were loaded.
    """
    spans, resident = _spans()
    starts = [start for start, _ in spans]
    total = 0
    for parameter in model.parameters():
        if parameter.device.type != "cpu" or not parameter.numel():
            continue
        index = bisect_right(starts, parameter.data_ptr()) - 1
        if index >= 0 and parameter.data_ptr() + parameter.nbytes <= spans[index][1]:
            total += parameter.nbytes
    return total, resident if total else 0


def _spans() -> tuple[list[tuple[int, int]], int]:
    """Address ranges of this process that are safetensors files, neighbours as one; bytes of them in memory."""
    if sys.platform != "linux":
        return [], 0
    spans: list[tuple[int, int]] = []
    inside, resident = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key = line.split(maxsplit=1)[0]
        if not key.endswith(":"):  # a range's own line: address, rights, offset, device, inode, path
            inside = line.removesuffix(" (deleted)").endswith(".safetensors")
            start, end = (int(part, 16) for part in key.split("-"))
            if inside and spans and spans[-1][1] == start:
                spans[-1] = (spans[-1][0], end)
            elif inside:
                spans.append((start, end))
        elif inside and key == "Rss:":
            resident += int(line.split()[1]) * 1024
    return spans, resident
