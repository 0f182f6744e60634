"""Every Triton kernel compiles for every architecture without spills, in processes where nothing is interpreted."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
pytest.importorskip("triton", minversion="3.4", reason="the recorder uses triton.knobs, which came with Triton 3.4")

HERE = Path(__file__).resolve().parent


def run(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, *(str(argument) for argument in arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=cwd)


def test_every_kernel_compiles(capfd) -> None:
    done = run(HERE / "compile_kernels.py")
    with capfd.disabled():
        sys.stdout.write("\n" + done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


SCRATCH = """
import torch, triton, triton.language as tl
from pke_fast.compiling import compiled, never_reached, recording

@triton.jit
def twice(x):
    return x * 2

@triton.jit
def forgotten_kernel(x):
    tl.store(x, 0.0)

@triton.jit
def copy_kernel(x, y, n, stride, B: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    tl.store(y + i * stride, twice(tl.load(x + i, i < n)), i < n)

@triton.jit
def scan_kernel(x, y, B: tl.constexpr):
    i = tl.arange(0, B)
    a, b, c = tl.load(x + i), tl.load(x + i + B), tl.load(x + i + 2 * B)
    tl.store(y + i, tl.cumsum(a * b, 0) + c)
    tl.store(y + i + B, tl.cumsum(a, 0) + b * c)

@triton.jit
def product_kernel(x, y, n, B: tl.constexpr, S: tl.constexpr):
    i = tl.arange(0, B)[:, None] * B + tl.arange(0, B)[None, :]
    sum = tl.zeros([B, B], tl.float32)
    for k in tl.range(0, n, num_stages=S):
        sum = tl.dot(tl.load(x + i + k * B), tl.load(x + i + k * B * B), sum)
    tl.store(y + i, sum)
"""

PROGRAM = """
import sys
sys.path.append(sys.argv[1])
import scratch as s
from scratch import torch, compiled, never_reached, recording

def copy(x, stride=1):
    s.copy_kernel[lambda known: (s.triton.cdiv(x.numel(), known["B"]),)](x, x, x.numel(), stride, B=256, num_warps=4)

x = torch.empty(2**20, dtype=torch.bfloat16, device="meta")
launches = []
with recording(launches):
    for again in range(2):
        copy(x)
    copy(x[1:-15])  # neither the address nor the length is a multiple of 16
    copy(x, 2)
    copy(x.float())
    copy(x.expand(2**13, -1))  # more than 2^31 elements
print(*(f"{launch.name}|{launch.variant()}|{launch.grid[0]}" for launch in launches), sep="\\n")

with recording(launches):
    s.scan_kernel[(1,)](x.float(), x.float(), B=4096, num_warps=4, maxnreg=32)
    s.product_kernel[(1,)](x, x.float(), 64, B=128, S=3, num_warps=4)
for launch in (launches[0], *launches[-2:]):
    for architecture in (86, 90):
        used = compiled(launch, architecture)
        print(launch.name, architecture, used.registers > 0, used.stack >= 0, used.faults(architecture))
print(never_reached([s], launches))
try:
    with recording([]):
        s.copy_kernel[(1, 70000)](x, x, 1, 1, B=16)
except ValueError as error:
    print(error)
"""


def test_recorder_tells_variants_and_faults(tmp_path: Path) -> None:
    (tmp_path / "scratch.py").write_text(SCRATCH, encoding="utf-8")
    done = run("-c", PROGRAM, tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    names = ["bf16"] * 3 + ["fp32", "bf16"]
    sizes = [2**12] * 4 + [2**25]
    assert lines[:5] == [f"copy_kernel|{name} B=256 warps=4|{n}" for name, n in zip(names, sizes, strict=True)]
    assert lines[5:7] == ["copy_kernel 86 True True []", "copy_kernel 90 True True []"]
    assert lines[7].startswith("scan_kernel 86 True True ['spills ")
    assert lines[8].startswith("scan_kernel 90 True True ['spills ")
    assert re.fullmatch(
        r"product_kernel 86 True True \['[\d,]+ bytes of shared memory, the limit is 101,376'\]", lines[9]
    )
    assert lines[10] == "product_kernel 90 True True []"
    assert lines[11] == "['scratch:forgotten_kernel']"
    assert lines[12] == "copy_kernel: grid (1, 70000), at most (2147483647, 65535, 65535) is possible"
