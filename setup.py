"""Builds the native extension pke_fast._native with ninja. The package's name and needs are in pyproject.toml."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
BINDINGS = "csrc/bindings.cpp"
SOURCES = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "csrc").glob("*.cpp"))]


def check_cuda_setting() -> None:
    """PKE_FAST_CUDA: 1 fails where the CUDA part can't be built; there is none yet, so auto and 0 are the same."""
    setting = os.environ.get("PKE_FAST_CUDA", "auto")
    if setting not in ("auto", "0", "1"):
        raise CompileError(f"PKE_FAST_CUDA={setting}: expected auto, 0 or 1")
    if setting == "1":
        raise CompileError("PKE_FAST_CUDA=1: csrc has no CUDA sources to build; unset it, or set it to auto or 0")


def find_compiler() -> str:
    """The C++ compiler: $CXX, else what Python itself was built with, else a usual one."""
    names = [os.environ.get("CXX"), sysconfig.get_config_var("CXX"), "c++", "g++", "clang++"]
    for name in names:
        if name and shutil.which(name.split()[0]):
            return name
    raise CompileError("no C++ compiler found: install one (Debian: apt install g++) or name it in CXX")


def find_python_headers() -> str:
    folder = sysconfig.get_path("include")
    if not Path(folder, "Python.h").is_file():
        raise CompileError(f"no Python.h in {folder}: install Python's headers (Debian: apt install python3-dev)")
    return folder


class NinjaBuild(build_ext):
    """Compiles in parallel and only what changed: the objects stay in build/ from one install to the next."""

    def build_extension(self, ext: Extension) -> None:
        check_cuda_setting()
        if self.compiler.compiler_type == "msvc":  # setuptools knows how to set up Microsoft's tools; ninja doesn't
            super().build_extension(ext)
            return
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = ROOT / "build" / f"native-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(self.ninja_file(ext), encoding="utf-8")
        done = subprocess.run([sys.executable, "-m", "ninja", "-C", str(folder)])
        if done.returncode:
            raise CompileError("the C++ part of pke_fast did not compile: see the compiler's messages above")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / "_native.so", target)

    def ninja_file(self, ext: Extension) -> str:
        """Only the bindings see the folders of Python and pybind11, which differ between isolated builds."""
        includes = " ".join(f'-isystem "{_escape(path)}"' for path in ext.include_dirs)
        shared = "-bundle -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared"
        lines = [
            f"cxx = {_escape(find_compiler())}",
            "flags = -O3 -fno-math-errno -fno-trapping-math -std=c++17 -fPIC -fvisibility=hidden -Wall -Wextra",
            "rule compile",
            "  command = $cxx $flags $includes -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = $cxx {shared} $in -o $out",
        ]
        objects = [Path(source).stem + ".o" for source in SOURCES]
        for source, made in zip(SOURCES, objects, strict=True):
            lines.append(f"build {made}: compile {_escape(ROOT / source, ' :')}")
            if source == BINDINGS:
                lines.append(f"  includes = {includes}")
        lines += [f"build _native.so: link {' '.join(objects)}", "default _native.so", ""]
        return "\n".join(lines)


def _escape(text: str | os.PathLike[str], special: str = "") -> str:
    """Text as ninja reads it; in the names of files, blanks and colons are special too."""
    return "".join("$" + c if c in "$" + special else c for c in os.fspath(text))


def native_extension() -> Extension:
    import pybind11

    return Extension(
        "pke_fast._native",
        SOURCES,
        include_dirs=[pybind11.get_include(), find_python_headers()],
        language="c++",
        extra_compile_args=["/O2", "/std:c++17"] if sys.platform == "win32" else [],
    )


setup(
    # Namespace packages, since data/ and configs/ hold no code.
    packages=[*find_namespace_packages(include=["pke_fast*"], exclude=["*.__pycache__"]), "pke_fast.kernels"],
    # kernels/ is a part of pke_fast. It must not be importable as `kernels`: that is another project's package, which
    # transformers imports.
    package_dir={"pke_fast": "pke_fast", "pke_fast.kernels": "kernels"},
    package_data={"": ["py.typed", "*.j2", "*.jsonl", "*.txt", "*.yaml"]},
    ext_modules=[native_extension()],
    cmdclass={"build_ext": NinjaBuild},
)
