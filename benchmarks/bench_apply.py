"""Apply a patch to a checkpoint on disk, as a copy and in place, against `cp` of the shards that it must rewrite.

The checkpoint is generated: shards of 1 GB (a quarter of all, if that is less) of bf16 layers with the shapes of an 8B
Llama. Set PKE_BENCH_CHECKPOINT_GB for its size (default 1) and PKE_BENCH_FOLDER for where it is made. Each run is a
process of its own, whose peak resident memory is noted; the results are compared byte for byte first.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pke_fast.patch import LayerPatch, Patch

GB = float(os.environ.get("PKE_BENCH_CHECKPOINT_GB", "1"))
D, WIDTH = 4096, 14336  # of Llama 3.1 8B
NEURONS = 1000
# The peak is VmHWM, the process's own; getrusage's ru_maxrss begins with that of the process that started it.
RUN = """
import json, sys, time
from pke_fast.checkpoint import patch_checkpoint
from pke_fast.inplace import patch_in_place
from pke_fast.patch import Patch
from pke_fast.stages import PeakMemory
way, model, patch, out = sys.argv[1:]
loaded, memory = Patch.load(patch), PeakMemory()
memory.reset()
before, start = memory.current(), time.perf_counter()
patch_checkpoint(model, loaded, out) if way == "copy" else patch_in_place(model, loaded)
print(json.dumps({"seconds": time.perf_counter() - start, "peak": memory.peak(), "over": memory.peak() - before}))
"""


def make_checkpoint(folder: Path, gigabytes: float) -> Patch:
    """Shards of layers of gate, up, down and a square projection; a patch of some columns in every layer."""
    from safetensors.torch import save_file

    layer_bytes = 2 * (3 * D * WIDTH + D * D)
    layers = max(1, round(gigabytes * 1e9 / layer_bytes))
    each = max(1, min(round(1e9 / layer_bytes), -(-layers // 4)))
    generator = torch.Generator().manual_seed(0)
    ids = torch.arange(0, WIDTH, -(-WIDTH * layers // NEURONS))
    index: dict[str, str] = {}
    parts = []
    for first in range(0, layers, each):
        tensors = {}
        for layer in range(first, min(first + each, layers)):
            name = f"model.layers.{layer}.{{}}.weight"
            for kind, shape in (("mlp.gate_proj", (WIDTH, D)), ("mlp.up_proj", (WIDTH, D)), ("o_proj", (D, D))):
                tensors[name.format(kind)] = torch.zeros(shape, dtype=torch.bfloat16).random_(generator=generator)
            down = torch.zeros(D, WIDTH, dtype=torch.bfloat16).random_(generator=generator)
            tensors[name.format("mlp.down_proj")] = down
            old = down[:, ids].T.contiguous()
            parts.append(LayerPatch(layer, name.format("mlp.down_proj"), 1, ids, old, old + 1))
        shard = f"model-{first:05d}.safetensors"
        save_file(tensors, folder / shard)
        index.update(dict.fromkeys(tensors, shard))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return Patch(tuple(parts), {"base": {"name": "generated"}})


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A checkpoint `model` and a patch `patch`; all is deleted afterwards."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("PKE_BENCH_FOLDER")) as name:
        folder = Path(name)
        (folder / "model").mkdir()
        make_checkpoint(folder / "model", GB).save(folder / "patch")
        yield folder


def run(way: str, folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-c", RUN, way, folder / "model", folder / "patch", folder / "out"]
    os.sync()
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def seconds_of_cp(folder: Path) -> float:
    """`cp` of the shards, all of which the patch changes."""
    (folder / "cp").mkdir()
    os.sync()
    start = time.perf_counter()
    subprocess.run(["cp", *sorted((folder / "model").glob("*.safetensors")), folder / "cp"], check=True)
    seconds = time.perf_counter() - start
    shutil.rmtree(folder / "cp")
    return seconds


@pytest.mark.benchmark(group="apply to a checkpoint")
@pytest.mark.parametrize("way", ["copy", "in place"])
def bench_apply(benchmark: Any, way: str, folder: Path) -> None:
    copies, runs = [], []
    for _ in range(5):  # interleaved: the disk's mood is the same for both
        copies.append(seconds_of_cp(folder))
        runs.append(run(way, folder))
        if way == "copy":
            check_copy(folder)
        else:
            revert(folder)
    seconds = sorted(result["seconds"] for result in runs)[2]
    benchmark.extra_info["GB"] = GB
    benchmark.extra_info["seconds x 1000"] = 1000 * seconds
    benchmark.extra_info["cp seconds x 1000"] = 1000 * sorted(copies)[2]
    benchmark.extra_info["% of cp"] = 100 * seconds / sorted(copies)[2]
    benchmark.extra_info["peak MiB"] = max(result["peak"] for result in runs) / 2**20
    benchmark.extra_info["peak MiB over the loaded patch"] = max(result["over"] for result in runs) / 2**20
    benchmark.pedantic(lambda: None, rounds=1)  # the figures are those noted


def check_copy(folder: Path) -> None:
    """The copy reverted in place is the checkpoint, byte for byte; then it is deleted."""
    from pke_fast.inplace import patch_in_place

    patch_in_place(folder / "out", Patch.load(folder / "patch"), revert=True)
    for shard in sorted((folder / "model").glob("*.safetensors")):
        subprocess.run(["cmp", shard, folder / "out" / shard.name], check=True)
    shutil.rmtree(folder / "out")


def revert(folder: Path) -> None:
    from pke_fast.inplace import patch_in_place

    patch_in_place(folder / "model", Patch.load(folder / "patch"), revert=True)
