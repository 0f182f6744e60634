"""Shared by all tests: one thread, no hub, small seeded examples, and the forms of an op that are proven here."""

from __future__ import annotations

import importlib
import os
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on a hub
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: threads would only wait for each other
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton's kernels run on the CPU, in its interpreter


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of the test's own, in place of the user's."""
    monkeypatch.setenv("PKE_FAST_CACHE", str(tmp_path / "cache"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--extension", type=Path, metavar="FOLDER", help="test the pke_fast/_native that lies in this folder"
    )
    parser.addoption(
        "--pretended-gpu", action="store_true", help="run as if there were a GPU (tests/support/pretended_gpu.py)"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--pretended-gpu"):
        from pretended_gpu import pretended_gpu

        pretending = ExitStack()
        pretending.enter_context(pretended_gpu())
        config.add_cleanup(pretending.close)
    folder = config.getoption("--extension")
    if folder is None:
        return
    import pke_fast

    pke_fast.__path__.insert(0, str(Path(folder, "pke_fast").resolve()))
    found = Path(importlib.import_module("pke_fast._native").__file__)
    if not found.is_relative_to(Path(folder).resolve()):
        raise pytest.UsageError(f"there is no pke_fast/_native in {folder}: {found} would be tested")


@pytest.fixture
def sequences():
    """Makes n random encoded sequences of 5 to 20 tokens with answers of 1 to 4."""
    from pke_fast.encoding import Encoded

    def make(n: int, seed: int = 0) -> list[Encoded]:
        rng = random.Random(seed)
        lengths = [(rng.randint(5, 20), rng.randint(1, 4)) for _ in range(n)]
        return [Encoded(tuple(rng.randrange(256) for _ in range(a)), a - b) for a, b in lengths]

    return make


@pytest.fixture
def tapped():
    """A hook that sees the gradient at a layer's MLP output, as the taps of scoring and editing do."""

    @contextmanager
    def tapped(structure, layer, seen):
        anchor = torch.zeros((), requires_grad=True)

        def tap(_module, _args, out):
            if not torch.is_grad_enabled():
                return out
            out = out + 0 * anchor
            out.register_hook(lambda grad: seen.append(grad.clone()))
            return out

        handle = structure.mlps[layer].down.register_forward_hook(tap)
        yield
        handle.remove()

    return tapped


@dataclass(frozen=True)
class Form:
    """One form of an op: while the fixture `form` is in use, the op runs in it."""

    backend: str
    device: str


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with the fixture `form` and the mark op(name) runs once for each form that the op has on each device."""
    if "form" not in metafunc.fixturenames:
        return
    from pke_fast.choice import NATIVE_ON_CUDA
    from pke_fast.ops import OPS

    marker = metafunc.definition.get_closest_marker("op")
    assert marker is not None, "a test with the fixture `form` needs @pytest.mark.op(name of the op)"
    op = marker.args[0]
    forms = []
    for backend in OPS[op].implementations:
        for device in ("cpu", "cuda"):
            if device == "cuda" and backend == "native" and op not in NATIVE_ON_CUDA:
                continue
            if device == "cpu" and backend == "triton" and torch.cuda.is_available():
                continue  # compiled for the GPU instead
            marks = [pytest.mark.gpu] if device == "cuda" else []
            forms.append(pytest.param(Form(backend, device), id=f"{backend}-{device}", marks=marks))
    metafunc.parametrize("form", forms, indirect=True)


@pytest.fixture
def form(request: pytest.FixtureRequest) -> Iterator[Form]:
    from pke_fast.choice import using

    with using(request.param.backend):
        yield request.param
