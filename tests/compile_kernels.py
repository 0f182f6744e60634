"""Compiles every Triton kernel as its launcher would launch it, for each architecture, with no GPU; prints a table.

    python tests/compile_kernels.py [--ops glu_score_fwd ...] [--architectures 86 90 ...] [--processes 2]

Fails where a kernel spills registers, wants more shared memory than the architecture has, can't be compiled, or was
never launched by the calls in `CALLS`. Main variants are compiled for all six architectures, the others for two: sm_86
has the least shared memory, and sm_90 compiles products of matrices in a way of its own.
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pke_fast.compiling import ARCHITECTURES, Launch, Resources, compiled, never_reached, recording
from pke_fast.kernels.glu_score import ACTIVATIONS
from pke_fast.ops import OPS, implementation

FEW = (86, 90)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class Model(NamedTuple):
    hidden: int
    neurons: int
    vocabulary: int


LLAMA_8B = Model(4096, 14336, 128256)
SMOLLM2 = Model(576, 1536, 49152)
ODD = Model(577, 1537, 49153)  # no model's: elements are loaded one by one, and their addresses may spill
GPT2 = Model(768, 3072, 50257)  # its vocabulary is odd
HUGE = Model(4096, 300_000, 0)  # with 8,192 tokens, T * D is over 2^31


class Call(NamedTuple):
    """One call of a launcher; what it launches is compiled for all architectures where it is a main one.

    Attributes:
        odd: sizes that no model has; what spills then is told, but is no fault.
    """

    op: str
    main: bool
    args: tuple[Any, ...]
    odd: bool = False


class Recorded(NamedTuple):
    """A launch, and of what kind the first call was that needed it."""

    launch: Launch
    main: bool
    odd: bool


def empty(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def glu_calls() -> Iterator[Call]:
    def calls(
        tokens: int, requests: int, model: Model, dtype: torch.dtype, act: str, layout: str, masked: bool, main: bool
    ) -> Iterator[Call]:
        one = empty(tokens, model.neurons, dtype=dtype)
        gate = empty(tokens, 2 * model.neurons, dtype=dtype) if layout == "fused" else one
        up = one if layout == "gated" else None
        mask = empty(tokens, dtype=torch.bool) if masked else None
        rest = (gate, up, act, empty(requests + 1, dtype=torch.int64), mask, layout == "fused")
        yield Call("glu_score_fwd", main, rest, model is ODD)
        yield Call("glu_score_bwd", main, (one, *rest), model is ODD)

    usual = {"model": LLAMA_8B, "dtype": BF16, "act": "silu", "layout": "gated", "masked": False, "main": True}
    for tokens, requests in [(1, 1), (512, 1), (512, 32), (8192, 1), (8192, 32)]:
        yield from calls(tokens, requests, **usual | {"main": requests == 32})
    yield from calls(8192, 32, **usual | {"masked": True})
    yield from calls(8192, 32, **usual | {"layout": "fused"})
    for dtype, act in itertools.product((BF16, FP16, FP32), ACTIVATIONS):
        for layout in ("gated", "plain"):
            yield from calls(8192, 32, LLAMA_8B, dtype, act, layout, False, main=dtype == FP32 and act == "gelu")
    for dtype, layout in itertools.product((BF16, FP32), ("gated", "plain", "fused")):
        yield from calls(512, 32, SMOLLM2, dtype, "gelu_tanh", layout, True, main=False)
    for model in (ODD, HUGE):
        yield from calls(8192, 1, **usual | {"model": model, "main": False})


def column_grad_norm_calls() -> Iterator[Call]:
    shapes = [(512, 1), (1024, 8), (8192, 1), (8192, 32), (1, 1)]
    for model, dtype, (tokens, requests) in itertools.product((LLAMA_8B, SMOLLM2, ODD), (BF16, FP32, FP16), shapes):
        if model is not LLAMA_8B and (dtype == FP16 or tokens == 1):
            continue
        main = model is LLAMA_8B and dtype != FP16 and tokens > 1 and (requests == 1 or dtype == BF16)
        inputs = (empty(tokens, model.hidden, dtype=dtype), empty(tokens, model.neurons, dtype=dtype))
        offsets = empty(requests + 1, dtype=torch.int64)
        yield Call("column_grad_norm", main, (*inputs, offsets, tokens // requests), model is ODD)


def sparse_column_calls() -> Iterator[Call]:
    for model, dtype, count in itertools.product((LLAMA_8B, SMOLLM2, ODD), (BF16, FP32, FP16), (1000, 31, 1)):
        if (model is not LLAMA_8B or count == 1) and dtype == FP16:
            continue
        hidden, odd = model.hidden, model is ODD
        often = model is LLAMA_8B and dtype == BF16 and count > 1
        for tokens in (512, 8192, 1):
            into = empty(count, hidden)
            inputs = (empty(tokens, hidden, dtype=dtype), empty(tokens, count, dtype=dtype))
            yield Call("sparse_column_grad", often or (dtype == FP32 and count == 1000), (*inputs, into), odd)
            for axis, (decay, bound) in itertools.product((1, 0), [(0.0, math.inf), (0.1, 0.01)]):
                columns = column_state(model, dtype, axis, count)
                adam = (1, 1e-3, 0.9, 0.999, 1e-8, decay, bound)
                yield Call("sparse_column_step", often and axis == 1 and tokens == 512, (*columns, *inputs, *adam), odd)
                if tokens == 512:
                    yield Call("sparse_column_update", often and count == 1000, (*columns, into, *adam), odd)
    for axis, weight, values in itertools.product((0, 1), (BF16, FP16, FP32), (FP32, BF16)):
        columns = column_state(LLAMA_8B, weight, axis, 1000)[:3]
        main = weight == BF16 and values == FP32
        yield Call("write_columns", main, (*columns, empty(1000, LLAMA_8B.hidden, dtype=values)))


def column_state(model: Model, dtype: torch.dtype, axis: int, count: int) -> tuple[Any, ...]:
    shape = (model.hidden, model.neurons) if axis == 1 else (model.neurons, model.hidden)
    state = [empty(count, model.hidden) for _ in range(4)]
    return (empty(*shape, dtype=dtype), axis, empty(count, dtype=torch.int64), *state)


def edit_loss_calls() -> Iterator[Call]:
    sizes = [(LLAMA_8B, 1024), (LLAMA_8B, 1), (SMOLLM2, 100), (GPT2, 100)]
    for (model, tokens), dtype, bias, cap in itertools.product(sizes, (BF16, FP32, FP16), (False, True), (0.0, 30.0)):
        if tokens != 1024 and (dtype == FP16 or (tokens == 1 and dtype == FP32)):
            continue
        for kl in (False, True):
            main = tokens == 1024 and dtype == BF16 and bias == bool(cap)
            hidden, head = empty(tokens, model.hidden, dtype=dtype), empty(model.vocabulary, model.hidden, dtype=dtype)
            added = empty(model.vocabulary, dtype=dtype) if bias else None
            wanted = (None, hidden) if kl else (empty(tokens, dtype=torch.int64), None)
            yield Call("edit_loss", main, (hidden, head, added, *wanted, empty(tokens), 1.0, cap))


CALLS: tuple[Callable[[], Iterator[Call]], ...] = (
    glu_calls,
    column_grad_norm_calls,
    sparse_column_calls,
    edit_loss_calls,
)


def recorded(ops: list[str]) -> list[Recorded]:
    """What these ops' calls launch, main ones first and odd ones last, each variant of a kernel once."""
    launches: list[Launch] = []
    kinds: list[tuple[bool, bool]] = []
    calls = [call for make in CALLS for call in make() if call.op in ops]
    with recording(launches):
        for call in sorted(calls, key=lambda call: (call.odd, not call.main)):
            implementation(call.op, "triton")(*call.args)
            kinds += [(call.main, call.odd)] * (len(launches) - len(kinds))
    return [Recorded(launch, *kind) for launch, kind in zip(launches, kinds, strict=True)]


def compile_one(task: tuple[int, int]) -> Resources | str:
    """In a worker, which has inherited `LAUNCHES`: what a launch takes on an architecture, or why there is nothing."""
    index, architecture = task
    try:
        return compiled(LAUNCHES[index].launch, architecture)
    except Exception as error:  # noqa: BLE001  whatever a compiler says is told beside the others' results
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"


LAUNCHES: list[Recorded] = []


def table(results: dict[tuple[int, int], Resources | str], architectures: list[int]) -> str:
    """A row a kernel variant: registers a thread and KiB of shared memory a block, the most where rows are alike."""
    rows: dict[tuple[str, str], dict[int, list[Resources]]] = {}
    for (index, architecture), result in results.items():
        if isinstance(result, Resources):
            launch = LAUNCHES[index].launch
            row = rows.setdefault((launch.name, launch.variant()), {a: [] for a in architectures})
            row[architecture].append(result)
    width = max((len(name) + len(variant) + 2 for name, variant in rows), default=0)
    lines = ["registers a thread / KiB of shared memory a block"]
    lines.append(" " * width + "".join(f"{f'sm_{a}':>10}" for a in architectures))
    for (name, variant), by_architecture in sorted(rows.items()):
        cells = []
        for of in by_architecture.values():
            registers, shared = max((r.registers for r in of), default=0), max((r.shared for r in of), default=0)
            cells.append(f"{registers}/{shared / 1024:.0f}" if of else "")
        lines.append(f"{name}  {variant}".ljust(width) + "".join(f"{cell:>10}" for cell in cells))
    return "\n".join(lines)


def main() -> int:
    jitted = [name for name, op in OPS.items() if "triton" in op.implementations]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ops", nargs="+", choices=jitted, default=jitted)
    parser.add_argument("--architectures", nargs="+", type=int, choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--processes", type=int, default=2)
    wanted = parser.parse_args()

    started = time.perf_counter()
    LAUNCHES.extend(recorded(wanted.ops))
    tasks = [
        (index, architecture)
        for index, recorded_launch in enumerate(LAUNCHES)
        for architecture in wanted.architectures
        if recorded_launch.main or architecture in FEW
    ]
    with ProcessPoolExecutor(wanted.processes, multiprocessing.get_context("fork")) as pool:
        results = dict(zip(tasks, pool.map(compile_one, tasks), strict=True))

    print(table(results, wanted.architectures))
    faults, notes = [], []
    for (index, architecture), result in results.items():
        launch, _, odd = LAUNCHES[index]
        name = f"{launch.name}  {launch.variant()}  sm_{architecture}"
        if isinstance(result, str):
            faults.append(f"{name}: {result}")
            continue
        faults += [f"{name}: {words}" for words in result.faults(architecture, spilling=odd)]
        if odd and result.spills:
            notes.append(f"{name}: spills {result.spills} bytes")
    if wanted.ops == jitted:
        folder = Path(__file__).resolve().parent.parent / "kernels"
        modules = [import_module(f"pke_fast.kernels.{path.stem}") for path in sorted(folder.glob("*.py"))]
        faults += [f"{name} was never launched" for name in never_reached(modules, [each.launch for each in LAUNCHES])]
    seconds = time.perf_counter() - started
    print(f"{len(LAUNCHES)} variants, {len(tasks)} compilations in {seconds:.0f} s, {len(faults)} faults")
    for kind, lines in (("at odd sizes, no fault", notes), ("fault", faults)):
        for line in lines:
            print(f"{kind}: {line}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
