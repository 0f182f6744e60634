"""Packaging: what is in the wheel, that it works without the source tree, and that `kernels` is not ours."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest

import pke_fast
from pke_fast.kernels import select_hotspots

ROOT = Path(__file__).resolve().parent.parent


def test_kernels_and_tests_are_no_packages() -> None:
    assert not list((ROOT / "kernels").rglob("__init__.py"))
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_kernels_is_not_importable_by_itself() -> None:
    """transformers imports another project's package of that name."""
    found = find_spec("kernels")
    places = [] if found is None else [found.origin, *(found.submodule_search_locations or [])]
    assert not any(place and Path(place).is_relative_to(ROOT / "kernels") for place in places)
    assert select_hotspots.__name__ == "pke_fast.kernels.select_hotspots"


def test_version_has_one_source() -> None:
    written = [
        path.relative_to(ROOT).as_posix()
        for path in [ROOT / "setup.py", ROOT / "pyproject.toml", *(ROOT / "pke_fast").rglob("*.py")]
        if re.search(r'^(__)?version(__)? *= *"', path.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert written == ["pke_fast/__init__.py"]


def test_installed_version_is_the_package_s() -> None:
    assert metadata.version("pke_fast") == pke_fast.__version__


def run(*arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(a) for a in arguments], cwd=cwd, env=os.environ | environment, capture_output=True, text=True
    )


def copy_of_the_source(to: Path) -> Path:
    left_out = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__", "*.so", "out", "demo-out")
    return Path(shutil.copytree(ROOT, to / "source", ignore=left_out))


PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel, built in isolation from a copy of the source, from another folder."""
    folder = tmp_path_factory.mktemp("wheel")
    source = copy_of_the_source(folder)
    built = run(*PIP, "wheel", "--no-deps", "--wheel-dir", folder / "out", source, cwd=folder)
    assert built.returncode == 0, built.stdout + built.stderr
    (found,) = (folder / "out").glob("*.whl")
    return found


@pytest.mark.slow
def test_wheel_holds_what_it_should(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = [path for folder in ("pke_fast", "kernels") for path in (ROOT / folder).rglob("*") if path.is_file()]
    expected = {
        path.relative_to(ROOT).as_posix().replace("kernels/", "pke_fast/kernels/", 1)
        for path in sources
        if path.parent.name != "__pycache__" and path.suffix not in (".so", ".pyd")
    }
    assert {"pke_fast/py.typed", "pke_fast/kernels/select_hotspots.py", "pke_fast/report.html.j2"} <= expected
    native = "pke_fast/_native" + sysconfig.get_config_var("EXT_SUFFIX")
    inside = {name for name in names if name.startswith("pke_fast/")}
    assert inside == expected | {native}
    (info,) = {name.split("/")[0] for name in names} - {"pke_fast"}
    assert info == f"pke_fast-{pke_fast.__version__}.dist-info"
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.slow
def test_wheel_works_alone(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    program = """
import importlib.util, torch, pke_fast
from pke_fast.kernels import select_hotspots, select_hotspots_native
print(pke_fast.__file__, select_hotspots.__file__, importlib.util.find_spec("kernels"), sep="\\n")
print(select_hotspots_native.select_hotspots(torch.tensor([[1.0, 3.0, 2.0]]), 2, 0, 1).neurons.tolist())
"""
    done = run(sys.executable, "-c", program, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert done.returncode == 0, done.stderr
    package, kernel, top_level, chosen = done.stdout.splitlines()
    assert Path(package) == tmp_path / "site/pke_fast/__init__.py"
    assert Path(kernel) == tmp_path / "site/pke_fast/kernels/select_hotspots.py"
    assert top_level == "None" or str(tmp_path) not in top_level
    assert chosen == "[1, 2]"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="the CUDA part is not built with Microsoft's compiler")
def test_build_with_an_nvcc_that_fails(tmp_path: Path) -> None:
    """auto does without the CUDA part, and says so; 1 fails."""
    nvcc = tmp_path / "cuda/bin/nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text('#!/bin/sh\n[ "$1" = --list-gpu-code ] && echo sm_90 && exit\n[ "$1" = --dryrun ]\n')
    nvcc.chmod(0o755)
    (tmp_path / "cuda/lib64").mkdir()
    (tmp_path / "cuda/lib64/libcudart_static.a").touch()
    build = (sys.executable, "setup.py", "build_ext", "--build-temp", tmp_path, "--build-lib", tmp_path)
    auto = run(*build, cwd=ROOT, CUDA_HOME=str(nvcc.parent.parent), PKE_FAST_CUDA="auto")
    assert auto.returncode == 0, auto.stdout + auto.stderr
    assert re.search("without its CUDA part: .* did not compile", auto.stdout + auto.stderr)
    assert list((tmp_path / "pke_fast").glob("_native*"))
    required = run(*build, cwd=ROOT, CUDA_HOME=str(nvcc.parent.parent), PKE_FAST_CUDA="1")
    assert required.returncode != 0
    assert "PKE_FAST_CUDA=1, but the CUDA part can't be built" in required.stdout + required.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"PKE_FAST_CUDA": "1", "CUDA_HOME": "/nowhere"}, "PKE_FAST_CUDA=1, but .*: no nvcc in CUDA_HOME=/nowhere"),
        ({"PKE_FAST_CUDA": "yes"}, "PKE_FAST_CUDA=yes: expected auto, 0 or 1"),
        ({"CXX": "no-such-compiler", "PATH": "/nowhere"}, "apt install g++"),
    ],
)
def test_build_that_can_not_be_says_why(tmp_path: Path, environment: dict[str, str], message: str) -> None:
    failed = run(*PIP, "wheel", "--no-deps", copy_of_the_source(tmp_path), cwd=tmp_path, **environment)
    assert failed.returncode != 0
    assert re.search(message, failed.stdout + failed.stderr)
    assert not list(tmp_path.glob("*.whl"))
