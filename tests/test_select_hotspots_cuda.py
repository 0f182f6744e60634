"""select_hotspots in CUDA: its kernels run on the CPU wherever there is a g++, and on a GPU where there is one."""

from __future__ import annotations

import ctypes
import importlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hotspot_problems import INF, WIDTHS, assert_equal, problems, random_scores
from hypothesis import given, settings
from torch import Tensor

from pke_fast import native as loader
from pke_fast.errors import PKEError
from pke_fast.kernels.select_hotspots import Selected, fp32, reference
from pke_fast.kernels.select_hotspots_native import select_hotspots as native
from pke_fast.proving import poisoned_memory

ROOT = Path(__file__).resolve().parent.parent
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TILED = (*WIDTHS, 4096, 4099, 9001)  # several tiles a layer, and addresses that are not aligned

needs_gxx = pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("g++"), reason="the emulation is built with g++ on Linux"
)


def compile_emulation(to: Path, *flags: str) -> Path:
    """The kernels and their launches, unchanged, with tests/native/cuda_runtime.h in CUDA's place."""
    own = ["-std=c++17", "-g", "-pthread", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-DPKE_FAST_CUDA"]
    include = ["-I", ROOT / "tests/native", "-I", ROOT / "csrc"]
    sources = [ROOT / "tests/native/emulated_select_hotspots.cpp", ROOT / "csrc/select_hotspots.cpp"]
    done = subprocess.run(["g++", *own, *flags, *include, *sources, "-o", to], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return to


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Selected]:
    """select_hotspots by the emulated kernels, with results that were full of other numbers before."""
    path = compile_emulation(tmp_path_factory.mktemp("emulation") / "kernels.so", "-O2", "-shared", "-fPIC")
    function = ctypes.CDLL(str(path)).emulated_select_hotspots
    size, pointer = ctypes.c_size_t, ctypes.c_void_p
    function.argtypes = [pointer, ctypes.c_int, *[size] * 7, pointer, ctypes.c_float, *[pointer] * 3]

    def choose(
        scores: Tensor,
        k: int,
        first: int,
        end: int,
        cap: int = 0,
        exclude: Tensor | None = None,
        minimum: float = -INF,
    ) -> Selected:
        rows, (depth, width) = scores.shape[:-2], scores.shape[-2:]
        shapes = ((*rows, depth + 1), (rows.numel() * k,), rows)
        result = [torch.full(shape, -7, dtype=torch.int64) for shape in shapes]
        function(
            *(scores.data_ptr(), DTYPES.index(scores.dtype), rows.numel(), depth, width, k, first, end, cap),
            *(None if exclude is None else exclude.data_ptr(), fp32(minimum), *[part.data_ptr() for part in result]),
        )
        return Selected(result[0], result[1][: int(result[0].flatten()[-1])], result[2])

    return choose


@needs_gxx
@pytest.mark.parametrize("dtype", DTYPES)
def test_emulated_kernels_choose_what_the_reference_does(emulated: Callable, dtype: torch.dtype) -> None:
    @settings(max_examples=60, deadline=None)
    @given(problems(TILED))
    def check(problem: tuple) -> None:
        scores, *rest = problem
        assert_equal(emulated(scores.to(dtype), *rest), reference(scores.to(dtype), *rest))

    check()


@needs_gxx
@pytest.mark.parametrize("dtype", DTYPES)
def test_emulated_kernels_over_all_keys(emulated: Callable, dtype: torch.dtype) -> None:
    """Every 16-bit pattern once (fp32: as its upper half), and every one that a minimum may fall between."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32)
    patterns = (patterns << 16).view(torch.float32) if dtype == torch.float32 else patterns.short().view(dtype)
    scores = patterns[torch.randperm(2**16, generator=torch.Generator().manual_seed(0))].reshape(4, -1)
    for k, cap, minimum in ((2**16, 0, -INF), (2**16, 9000, 1e-7), (30_000, 0, -3.0001), (2**16, 0, INF), (7, 3, 7e4)):
        assert_equal(emulated(scores, k, 0, 4, cap, None, minimum), reference(scores, k, 0, 4, cap, None, minimum))


@needs_gxx
@pytest.mark.slow
def test_emulated_plan_of_many_tiles(emulated: Callable) -> None:
    """More tiles than a block has threads, ties across all of them."""
    scores = random_scores(600, 8).round(decimals=1)
    for cap in (0, 3):
        assert_equal(emulated(scores, 1000, 0, 600, cap), reference(scores, 1000, 0, 600, cap))


@needs_gxx
@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_emulated_kernels_have_no_races_and_stay_inside(tmp_path: Path, sanitizer: str) -> None:
    """ThreadSanitizer sees each thread of a block as a thread: a missing barrier or fence is reported."""
    program = compile_emulation(tmp_path / "kernels", "-O1", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all")
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "choose what the C++ form chooses" in done.stdout


NVCC_WARNING = re.compile(r"^.*\bwarning\b.*$", re.MULTILINE | re.IGNORECASE)


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("nvcc") or os.environ.get("CUDA_HOME")), reason="no nvcc on PATH or in CUDA_HOME")
def test_compiles_for_every_architecture_and_spills_nothing(tmp_path: Path) -> None:
    nvcc = str(Path(os.environ["CUDA_HOME"], "bin/nvcc")) if "CUDA_HOME" in os.environ else "nvcc"
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    archs = [arch for arch in ("80", "86", "89", "90", "100", "120") if f"sm_{arch}" in known]
    assert archs
    codes = [option for arch in archs for option in ("-gencode", f"arch=compute_{arch},code=sm_{arch}")]
    own = ["-std=c++17", "-O3", "-DPKE_FAST_CUDA", "--threads", "0", "-Xcompiler=-Wall,-Wextra", "-Xptxas=-v"]
    compiled = [ROOT / "csrc/select_hotspots.cu", "-o", tmp_path / "kernels.o"]
    done = subprocess.run([nvcc, *own, *codes, "-c", *compiled], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert NVCC_WARNING.findall(done.stderr) == []
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    shared = [int(size) for size in re.findall(r"(\d+) bytes smem", done.stderr)]
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", done.stderr)]
    kernels = len(DTYPES) * 4  # count_digits twice, plan_tiles, gather
    assert len(spills) == len(shared) == len(registers) == kernels * len(archs)
    assert set(spills) == {("0", "0", "0")}
    assert max(shared) <= 48 << 10  # what every device has without asking
    assert max(registers) * 512 <= 64 << 10


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.gpu
class TestOnGPU:
    @pytest.fixture(autouse=True)
    def built_with_cuda(self) -> None:
        assert loader.library().cuda_architectures, "pke_fast was built without CUDA: see PKE_FAST_CUDA in setup.py"

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_same_as_reference(self, dtype: torch.dtype) -> None:
        @settings(max_examples=300, deadline=None)
        @given(problems(TILED))
        def check(problem: tuple) -> None:
            scores, *between, exclude, minimum = problem
            scores = scores.to(dtype)
            expected = reference(scores, *between, exclude, minimum)
            on_card = scores.cuda(), None if exclude is None else exclude.cuda()
            with poisoned_memory():
                got = native(on_card[0], *between, on_card[1], minimum)
            assert {part.device.type for part in got} == {"cuda"}
            assert_equal(got, expected)

        check()

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("k", [0, 1, 1000, 200_000, 458_752])
    @pytest.mark.parametrize("cap", [0, 100])
    def test_size_of_a_model(self, dtype: torch.dtype, k: int, cap: int) -> None:
        scores = random_scores(2, 32, 14336).exp().to(dtype)
        expected = reference(scores, k, 4, 30, cap)
        chosen = [native(scores.cuda(), k, 4, 30, cap) for _ in range(3)]  # the same bits every time
        for got in chosen:
            assert_equal(got, expected)

    def test_strides_and_autograd(self) -> None:
        scores = random_scores(6, 300, 9).cuda().transpose(-1, -2)
        exclude = (random_scores(6, 300, 9, seed=1) > 0).cuda().transpose(-1, -2)
        expected = reference(scores, 500, 1, 6, 90, exclude, 0.1)
        assert_equal(native(scores.requires_grad_(), 500, 1, 6, 90, exclude, 0.1), expected)

    def test_on_another_stream(self) -> None:
        """The scores are written late on a stream of their own; a selection on any other would see what was before."""
        expected = reference(random_scores(32, 4096), 1000, 0, 32)
        late = random_scores(32, 4096).cuda()
        scores = torch.zeros_like(late)
        stream = torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            scores.copy_(late)
            assert_equal(native(scores, 1000, 0, 32), expected)


@pytest.mark.skipif(
    loader.problem() is not None or not loader.library().cuda_architectures, reason="built without CUDA"
)
def test_more_than_the_kernels_can_count() -> None:
    sizes = {"scores": 0, "k": 0, "first": 0, "layer_cap": 0, "exclude": 0, "minimum": 0.0}
    for rows, layers, neurons, message in ((2**20, 2**12, 1, "too many rows"), (1, 2**12, 2**20, r"2\^32 scores")):
        query = loader.library().HotspotQuery(rows=rows, layers=layers, neurons=neurons, end=layers, **sizes)
        with pytest.raises(ValueError, match=message):
            loader.library().hotspot_scratch_size(query)


def test_without_cuda_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("pke_fast.kernels.select_hotspots_native")

    class Library:
        cuda_architectures: list[str] = []  # noqa: RUF012

    monkeypatch.setattr(module, "library", Library)
    monkeypatch.setattr(module, "check", lambda *_: None)

    class Scores:
        device = torch.device("cuda", 0)

    with pytest.raises(PKEError, match=r"built without CUDA[\s\S]*PKE_FAST_CUDA=1"):
        native(Scores(), 1, 0, 1)
