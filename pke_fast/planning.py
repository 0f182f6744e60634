"""The plan of a job on a loaded model: what the device has room for, and which of the model's weights are there."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pke_fast.budget import free_bytes
from pke_fast.config import PKEConfig
from pke_fast.errors import InputError
from pke_fast.kernels import products
from pke_fast.mapped import mapped_bytes
from pke_fast.placement import is_spread
from pke_fast.plan import ALL_THERE, Load, Plan, Residence
from pke_fast.planner import PREFERRED, Planner
from pke_fast.rehearsal import NotRehearsed, Twin, twin_of
from pke_fast.stages import PeakMemory
from pke_fast.structure import Structure

LOG = logging.getLogger(__name__)
PLANNING = "Planning"  # the stage after which a job keeps its plan
RESIDENT = 0.7  # of what is free: a model that takes no more is loaded on the device, with room for the work beside it
# Of the rate of one product alone, what a job reaches: measured on a CPU (measured.md), and what is aimed at on a GPU.
REACHED = {"cpu": 0.5, "cuda": 0.45}
COPIED = 2**26  # bytes by which a copy's rate is measured
TIMED = 0.3  # seconds for which a rate is measured
PINNED = 0.5  # of what the host has free: pinned memory can't be swapped out, and torch takes powers of two of it


@dataclass(frozen=True)
class Room:
    """What a job has room for. Sizes are in bytes.

    Attributes:
        device: whose memory counts.
        budget: what may be used in all; None where nobody knows.
        process, mapped: as for `Planner`.
        residence: which weights are there.
    """

    device: str
    budget: int | None
    process: int = 0
    mapped: int = 0
    residence: Residence = ALL_THERE


def waits_on_host(device: str, weights: int, budget: int | None) -> bool:
    """Whether a model that is worked with on this device is better loaded in the host's memory, to be brought there:
    where a budget is asked for, or little room is left beside the weights."""
    if not device.startswith("cuda"):
        return False
    return budget is not None or weights > RESIDENT * (free_bytes(device) or 0)


def offloading() -> Residence:
    """Layers may wait with the host, in as much pinned memory as it can spare."""
    return Residence(offloads=True, pinnable=int(PINNED * (free_bytes("cpu") or 0)))


def plan_loaded(
    structure: Structure,
    config: PKEConfig,
    load: Load,
    budget: int | None,
    *,
    edits: bool,
    device: str | None = None,
) -> Plan | None:
    """The plan of a job on a loaded model; None for a model that can't be rehearsed, where no budget is asked for.

    Args:
        budget: bytes in all, the model's included; None for what the device has free.
        device: where the work is done; a model in the host's memory is brought there, as much of it as has room. None:
            where the model is.

    Raises:
        InputError: the budget is too small, or it is for a model on several devices.
        NotRehearsed: a budget can't be kept, since the model can't be rehearsed.
    """
    try:
        twin = twin_of(structure.model, structure.dtype)
        Planner(twin, config, load, str(structure.device), edits=edits).plan(None)  # loads what rehearsals need
        room = _room(structure, twin, budget, device)
        planner = Planner(
            twin,
            config,
            load,
            room.device,
            edits=edits,
            process=room.process,
            mapped=room.mapped,
            residence=room.residence,
        )
        return planner.plan(room.budget)
    except NotRehearsed as error:
        if budget is not None:
            raise
        LOG.info("%s", error)
        return None


def _room(structure: Structure, twin: Twin, budget: int | None, device: str | None) -> Room:
    where = str(structure.device)
    if device is not None and device != where:
        return Room(device, free_bytes(device) if budget is None else budget, residence=offloading())
    away = 0
    residence = ALL_THERE
    if is_spread(structure.model):
        where, there = _tightest(structure, budget)
        away = twin.weights - there
        residence = Residence(away=away, kept_from=structure.lowest_kept)
    used = PeakMemory(where).current() or 0
    mapped, resident = mapped_bytes(structure.model)
    own = used - resident  # the weights that aren't mapped included
    cuda = where.startswith("cuda")
    process = 0 if cuda else max(0, own - (twin.weights - away - mapped))
    if budget is None and (free := free_bytes(where)) is not None:
        budget = free + (twin.weights - away if cuda else own)  # mapped weights in memory count as free
    return Room(where, budget, process, mapped, residence)


def _tightest(structure: Structure, budget: int | None) -> tuple[str, int]:
    """Of the devices that a spread model works on, the one with the least room, and the bytes of weights there."""
    layers = range(len(structure.layers))
    devices = dict.fromkeys(str(structure.device_of(layer)) for layer in layers)
    devices |= dict.fromkeys((str(structure.device), str(structure.head_device)))
    if budget is not None and len(devices) > 1:
        raise InputError(
            "a memory budget for a model on several devices",
            expected="a model on one device",
            got=", ".join(devices),
            do="leave --memory-budget out: what each device has free is counted",
        )
    there = dict.fromkeys(devices, 0)
    for parameter in structure.model.parameters():
        if str(parameter.device) in there:
            there[str(parameter.device)] += parameter.nbytes
    tightest = min(devices, key=lambda name: free_bytes(name) or 0)
    return tightest, there[tightest]


def matmul_rate(device: str, dtype: torch.dtype, hidden: int, neurons: int) -> float:
    """Flops a second of products [512, hidden] x [hidden, neurons], measured now.

    Of random numbers, as a job multiplies them: what is all alike may be faster on a GPU.
    """
    seed = torch.Generator(device).manual_seed(0)
    left = torch.randn(PREFERRED["cpu"], hidden, generator=seed, dtype=dtype, device=device)
    right = torch.randn(hidden, neurons, generator=seed, dtype=dtype, device=device)
    return 2 * left.numel() * neurons / _least_seconds(lambda: products.matmul(left, right), device)


def copy_rate(device: str) -> float:
    """Bytes a second from the host's memory, pinned where the device is a GPU, to the device, measured now."""
    here = torch.ones(COPIED, dtype=torch.uint8, pin_memory=device.startswith("cuda"))
    there = torch.empty_like(here, device=device)
    return COPIED / _least_seconds(lambda: there.copy_(here, non_blocking=True), device)


def _least_seconds(work: Callable[[], Any], device: str) -> float:
    best, end = float("inf"), time.perf_counter() + TIMED
    while best == float("inf") or time.perf_counter() < end:
        start = time.perf_counter()
        work()
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best
