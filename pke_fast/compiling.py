"""What Triton launchers would run on a GPU, with no GPU at hand: launches recorded, compiled and measured.

A launcher that never reads its tensors' data runs on `meta` tensors. `recording` notes what it would launch, as the JIT
of Triton itself would specialise it (dtypes, widths of integers, values of 1, divisibility by 16), so that there is no
second list of signatures to keep. `compiled` then makes machine code of one launch for one architecture and reads what
it takes.

Triton decides when a kernel is defined whether it is compiled or interpreted: TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

# Most shared memory of one block, in KiB, by compute capability: NVIDIA's CUDA C++ Programming Guide, table "Technical
# Specifications per Compute Capability", row "Maximum amount of shared memory per thread block".
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
ARCHITECTURES = tuple(SHARED_KIB)
TAKEN_FOR = 90  # what the JIT takes for the device while launches are recorded
GRID_LIMITS = (2**31 - 1, 65535, 65535)  # the same table, for x, y and z

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class _NoDevice:
    """Stands in for Triton's driver: the architecture asked for is the current device, and its number too."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)


@contextmanager
def _pretending(architecture: int) -> Iterator[None]:
    config = triton.runtime.driver
    before = config._active
    config.set_active(_NoDevice(architecture))
    try:
        yield
    finally:
        config._active = before


@dataclass(frozen=True, eq=False)
class Launch:
    """One kernel as it would be launched.

    Attributes:
        key: what distinguishes the JIT's compiled variants of the kernel.
        grid: programs along x, y and z, as far as given.
    """

    kernel: Any
    args: tuple[Any, ...]
    options: dict[str, Any]
    grid: tuple[int, ...]
    key: str

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)

    def variant(self) -> str:
        """The element types of its tensors, its flags and sizes known when compiling, and its warps: for people."""
        known = {**dict(zip(self.kernel.arg_names, self.args, strict=False)), **self.options}
        types = dict.fromkeys(_short(a.dtype) for a in self.args if hasattr(a, "data_ptr"))
        fixed = [p.name for p in self.kernel.params if p.is_constexpr and p.name in known]
        words = [f"{name}={_short(known[name])}" for name in fixed]
        return " ".join([",".join(types), *words, f"warps={known.get('num_warps', 4)}"])


def _short(value: Any) -> str:
    if isinstance(value, bool):
        return str(int(value))
    names = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "int64": "i64", "int32": "i32"}
    last = str(value).rsplit(".", 1)[-1] if not isinstance(value, float) else str(value)
    return names.get(last, last)


@contextmanager
def recording(into: list[Launch]) -> Iterator[None]:
    """While it lasts, kernels that are launched are noted instead, once for each variant, and nothing is compiled.

    Raises:
        ValueError: a grid is larger than CUDA allows.
    """
    seen: set[tuple[Any, str]] = set()
    run = JITFunction.run

    def note(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        sizes = grid(dict(zip(self.arg_names, args, strict=False)) | options) if callable(grid) else tuple(grid)
        if any(n > most for n, most in zip(sizes, GRID_LIMITS, strict=False)):
            raise ValueError(f"{self.fn.__name__}: grid {sizes}, at most {GRID_LIMITS} is possible")
        keys: list[str] = []

        def hook(*, key: str, **_: Any) -> bool:
            keys.append(key)
            return True  # the JIT then leaves out compiling

        with mock.patch.object(knobs.runtime, "jit_cache_hook", hook):
            run(self, *args, grid=grid, warmup=True, **options)
        (key,) = keys
        if (self, key) not in seen:
            seen.add((self, key))
            into.append(Launch(self, args, options, sizes, key))

    with _pretending(TAKEN_FOR), mock.patch.object(JITFunction, "run", note):
        yield


@dataclass(frozen=True)
class Resources:
    """What one kernel takes on one architecture: registers a thread; shared memory a block and the rest, in bytes.

    Attributes:
        spills: bytes of registers that a thread keeps in memory for want of room: stores and loads.
        stack: bytes of the stack frame, spills included.
    """

    registers: int
    shared: int
    stack: int
    spills: int

    def faults(self, architecture: int, spilling: bool = False) -> list[str]:
        """What is wrong with them, in words; none where the kernel can run at full speed.

        Args:
            spilling: is no fault.
        """
        limit = SHARED_KIB[architecture] * 1024
        faults = [f"spills {self.spills} bytes"] if self.spills and not spilling else []
        if self.shared > limit:
            faults.append(f"{self.shared:,} bytes of shared memory, the limit is {limit:,}")
        return faults


def compiled(launch: Launch, architecture: int) -> Resources:
    """Compiles a launch for an architecture (86 stands for sm_86) and reads what its machine code takes.

    Raises:
        triton.compiler.errors.CompilationError and others of Triton's: it can't be compiled.
    """
    with _pretending(architecture):
        kernel = launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(kernel.asm["cubin"])
        usage = _output(TOOLS / "cuobjdump", "--dump-resource-usage", cubin)
        used = {name: int(number) for name, number in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
        stack = used["STACK"] + used["LOCAL"]
    # spilled registers lie in the stack frame: without one there are none, and no need to compile again
    spills = _spills(kernel, launch.options) if stack else 0
    # What a kernel's tiles take is allocated at launch and stands in the metadata; what is fixed stands in the machine
    # code, from sm_90 on with the 1 KiB that CUDA keeps for itself, which the limits above have left out already.
    fixed = max(0, used["SHARED"] - (1024 if architecture >= 90 else 0))
    return Resources(used["REG"], kernel.metadata.shared + fixed, stack, spills)


def _output(*command: str | Path) -> str:
    return subprocess.run([str(c) for c in command], check=True, capture_output=True, text=True).stdout


def _spills(kernel: Any, options: dict[str, Any]) -> int:
    """Bytes of spills, stores and loads, as the assembler's log of the same compilation tells them."""
    log = io.StringIO()
    with knobs.nvidia.scope(), knobs.compilation.scope(), redirect_stdout(log):
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = True  # nothing is logged for what comes from the cache
        triton.compile(kernel.src, target=kernel.metadata.target, options=options)
    return sum(int(number) for number in re.findall(r"(\d+) bytes spill", log.getvalue()))


def never_reached(modules: Iterable[ModuleType], launches: Iterable[Launch]) -> list[str]:
    """The jitted functions defined in these modules that are neither launched nor called by what is, as module:name."""
    reached: set[Any] = set()
    todo = [launch.kernel for launch in launches]
    while todo:
        function = todo.pop()
        if function not in reached:
            reached.add(function)
            todo += _called(function)
    return sorted(
        f"{module.__name__}:{name}"
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and value.fn.__module__ == module.__name__ and value not in reached
    )


def _called(function: Any) -> list[Any]:
    """The jitted functions that a jitted function names, directly or as an attribute of a module."""
    names = function.fn.__globals__
    found = []
    for node in ast.walk(ast.parse(function.src)):
        value = None
        if isinstance(node, ast.Name):
            value = names.get(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            value = getattr(names.get(node.value.id), node.attr, None)
        if isinstance(value, JITFunction):
            found.append(value)
    return found
