"""Which implementation of an op runs: one closed-form table by device and shape, and what overrides it.

An argument (`using`, the setting `backend`) goes before the environment variable PKE_FAST_BACKEND, and that before the
table. What is asked for by name and can't run here raises; the table's choice falls back, at last to the reference.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

from pke_fast import native
from pke_fast.errors import InputError, PKEError

BACKEND_VARIABLE = "PKE_FAST_BACKEND"
BACKENDS = ("reference", "native", "triton")
AUTO = "auto"
LEAST_CAPABILITY = (8, 0)  # of a CUDA device for Triton's kernels: Ampere, the first with bf16


def _always(*_args: Any) -> bool:
    return True


@dataclass(frozen=True)
class Rule:
    """On a kind of device, use a backend where `when` holds of the op's arguments, of which it reads shapes only.

    Attributes:
        why: what the form has over the next one, in words.
        where: `when` in words; empty where it always holds.
    """

    device: str
    backend: str
    why: str
    when: Callable[..., bool] = _always
    where: str = ""


# The first rule that fits and whose backend can run here decides; where none does, the reference runs.
_ONE_PASS = "one pass, statistics included"
_IN_PLACE = "one pass over state and weight, in place"
TABLE: dict[str, tuple[Rule, ...]] = {
    "glu_score_fwd": (Rule("cuda", "triton", _ONE_PASS), Rule("cpu", "native", _ONE_PASS)),
    "glu_score_bwd": (Rule("cuda", "triton", _ONE_PASS), Rule("cpu", "native", _ONE_PASS)),
    "column_grad_norm": (
        Rule("cuda", "triton", "tensor cores; no product in memory"),
        Rule("cpu", "native", "half of each Gram matrix; no product in memory"),
    ),
    "select_hotspots": (
        Rule("cuda", "native", "radix selection, nothing sorted"),
        Rule("cpu", "native", "one pass over the scores, nothing sorted"),
    ),
    "sparse_column_grad": (
        Rule("cuda", "triton", "tensor cores; no copy of the inputs in fp32"),
        Rule("cpu", "native", "no copy of the inputs in fp32"),
    ),
    "sparse_column_update": (Rule("cuda", "triton", _IN_PLACE), Rule("cpu", "native", _IN_PLACE)),
    "sparse_column_step": (
        Rule("cuda", "triton", "product, Adam and write in one kernel"),
        Rule("cpu", "native", "a gradient of a few neurons at a time"),
    ),
    "write_columns": (Rule("cuda", "triton", "in place"), Rule("cpu", "native", "in place, by the weight's rows")),
    "edit_loss": (Rule("cuda", "triton", "one sweep over the vocabulary, logits by chunks"),),
}

NATIVE_ON_CUDA = ("select_hotspots",)  # the ops with a CUDA form in csrc

_asked: str | None = None  # by `using`; of the whole process, since autograd runs backward passes in threads of its own


@contextmanager
def using(backend: str) -> Iterator[None]:
    """While it lasts, every op that has this backend runs in it, in every thread; "auto" leaves the choice as it is.

    Raises:
        InputError: there is no such backend.
    """
    global _asked
    before = _asked
    if backend != AUTO:
        _asked = _known(backend, "backend")
    try:
        yield
    finally:
        _asked = before


def asked_for() -> str | None:
    """The backend that an argument or PKE_FAST_BACKEND names; None where the choice is the table's.

    Raises:
        InputError: PKE_FAST_BACKEND names no backend.
    """
    if _asked is not None:
        return _asked
    named = os.environ.get(BACKEND_VARIABLE, AUTO)
    return None if named == AUTO else _known(named, BACKEND_VARIABLE)


def _known(backend: str, name: str) -> str:
    if backend not in BACKENDS:
        raise InputError(
            f"{name}={backend} names no backend", expected="one of " + ", ".join((AUTO, *BACKENDS)), do="leave it out"
        )
    return backend


def choose(op: str, has: Callable[[str], bool], args: tuple[Any, ...]) -> str:
    """The backend in which `op` runs on these arguments.

    Args:
        has: whether the op has a backend at all; one asked for that it doesn't have means the reference.
        args: the op's; the first one is a tensor and tells the device.

    Raises:
        PKEError: the backend asked for can't run here.
        InputError: PKE_FAST_BACKEND names no backend.
    """
    device = args[0].device
    asked = asked_for()
    if asked is not None:
        if asked == "reference" or not has(asked):
            return "reference"
        why_not = obstacle(op, asked, device)
        if why_not:
            raise PKEError(
                f"{op} can't run in the backend asked for",
                expected=f"{asked} on {device}",
                got=why_not,
                do=f"{remedy(asked)}, or leave {BACKEND_VARIABLE} and the setting `backend` out",
            )
        return asked
    for rule in TABLE[op]:
        if rule.device == device.type and rule.when(*args) and not obstacle(op, rule.backend, device):
            return rule.backend
    return "reference"


@cache
def obstacle(op: str, backend: str, device: torch.device) -> str | None:
    """Why a backend can't run on a device, in a line; None where it can."""
    if backend == "native":
        if native.problem() is not None:
            return native.problem()
        if device.type == "cpu":
            return None
        if device.type != "cuda" or op not in NATIVE_ON_CUDA:
            return f"its compiled form is for CPU tensors, not {device.type}"
        return None if native.cuda_architectures() else "the extension was built without CUDA"
    if backend == "triton":
        if find_spec("triton") is None:
            return "triton is not installed"
        if device.type == "cpu":
            return None if os.environ.get("TRITON_INTERPRET") == "1" else "Triton's kernels need a CUDA device"
        if device.type != "cuda":
            return f"Triton's kernels need a CUDA device, not {device.type}"
        capability = torch.cuda.get_device_capability(device)
        if capability < LEAST_CAPABILITY:
            return "compute capability {}.{}, at least {}.{} is needed".format(*capability, *LEAST_CAPABILITY)
        if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
            return "Triton finds no C compiler, which its first launch needs: install gcc, or set CC"
    return None


def remedy(backend: str) -> str:
    """What to do about a backend that can't run."""
    return {
        "native": "install pke_fast again with g++ (and nvcc for CUDA) on the path",
        "triton": "run on an NVIDIA GPU with `pip install triton`",
        "reference": "nothing is needed",
    }[backend]


def explain(op: str, device: torch.device, has: Callable[[str], bool]) -> str:
    """What would run for `op` on a device, and why not something faster: for people.

    Raises:
        InputError: PKE_FAST_BACKEND names no backend.
    """
    asked = asked_for()
    if asked is not None:
        if not has(asked):
            return f"reference ({asked} was asked for, which this op doesn't have)"
        why_not = obstacle(op, asked, device)
        return f"{asked}, asked for by name" + (f": fails, {why_not}" if why_not else "")
    would, obstacles = [], []
    for rule in TABLE[op]:
        if rule.device != device.type:
            continue
        why_not = obstacle(op, rule.backend, device)
        if why_not:
            obstacles.append(f"{rule.backend}: {why_not}")
            continue
        would.append(f"{rule.backend}{rule.where and ' ' + rule.where}: {rule.why}")
        if rule.when is _always:
            return ", else ".join(would)
    reason = "; ".join(obstacles) or f"no faster form for {device.type}"
    return ", else ".join([*would, f"reference ({reason})"])
