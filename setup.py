"""Builds the native extension pke_fast._native with ninja. The package's name and needs are in pyproject.toml."""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
BINDINGS = "csrc/bindings.cpp"
SOURCES = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "csrc").glob("*.cpp"))]
CUDA_SOURCES = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "csrc").glob("*.cu"))]
# Those that the nvcc at hand knows of these; and PTX of the newest, which the driver compiles for what comes after.
CUDA_ARCHS = ("80", "86", "89", "90", "100", "120")
# Loops are only vectorised where the compiler needn't keep errno and floating-point traps as they would be one by one.
FLAGS = "-O3 -fno-math-errno -fno-trapping-math -std=c++17 -fPIC -fvisibility=hidden -pthread -Wall -Wextra"
# As for other builds: added to what is given to the compiler, and to the linker.
CXXFLAGS, LDFLAGS = os.environ.get("CXXFLAGS", ""), os.environ.get("LDFLAGS", "")


class NoCUDAError(Exception):
    """Why there can be no CUDA part."""


@dataclass(frozen=True)
class CUDA:
    """What the CUDA part is compiled with."""

    nvcc: str
    root: Path
    archs: list[str]

    @property
    def libraries(self) -> Path:
        """The folder of the static runtime: with it, pke_fast can be imported where there is neither GPU nor driver."""
        for folder in ("lib64", "lib", f"targets/{os.uname().machine}-linux/lib"):
            if (self.root / folder / "libcudart_static.a").is_file():
                return self.root / folder
        raise NoCUDAError(f"there is no libcudart_static.a in {self.root}")

    @property
    def code(self) -> str:
        """nvcc's options for machine code of each architecture and PTX of the newest."""
        newest = self.archs[-1]
        each = [f"-gencode arch=compute_{arch},code=sm_{arch}" for arch in self.archs]
        return " ".join([*each, f"-gencode arch=compute_{newest},code=compute_{newest}"])


def cuda_setting() -> str:
    """PKE_FAST_CUDA: 1 fails where the CUDA part can't be built, 0 leaves it out, auto has it where it can be."""
    setting = os.environ.get("PKE_FAST_CUDA", "auto")
    if setting not in ("auto", "0", "1"):
        raise CompileError(f"PKE_FAST_CUDA={setting}: expected auto, 0 or 1")
    return setting


def find_cuda() -> CUDA:
    """nvcc, its CUDA and the architectures to compile for.

    Raises:
        NoCUDAError: there is no nvcc here, or it can't be used.
    """
    home = os.environ.get("CUDA_HOME")
    nvcc = str(Path(home, "bin", "nvcc")) if home else shutil.which("nvcc")
    if not nvcc or not shutil.which(nvcc):
        raise NoCUDAError(f"no nvcc in CUDA_HOME={home}" if home else "no nvcc on PATH, and CUDA_HOME is not set")
    # nvcc on PATH may be a wrapper elsewhere: only nvcc itself knows where its CUDA lies.
    told = _output(nvcc, "--dryrun", "-x", "cu", os.devnull)
    top = re.search(r"^#\$ (?:_?TOP_?)=(.*)$", told, re.MULTILINE)
    if not home and not top:
        raise NoCUDAError(f"{nvcc} --dryrun names no TOP, and CUDA_HOME is not set")
    root = Path(home or top.group(1)).resolve()
    known = re.findall(r"sm_(\d+)", _output(nvcc, "--list-gpu-code"))
    asked = re.findall(r"\d+", os.environ.get("PKE_FAST_CUDA_ARCHS", ""))
    if missing := [arch for arch in asked if arch not in known]:
        raise NoCUDAError(f"PKE_FAST_CUDA_ARCHS names {', '.join(missing)}; {nvcc} knows {', '.join(known)}")
    archs = sorted(asked or [arch for arch in CUDA_ARCHS if arch in known], key=int)
    if not archs:
        raise NoCUDAError(f"{nvcc} knows none of the architectures {', '.join(CUDA_ARCHS)}")
    return CUDA(nvcc, root, archs)


def _output(*command: str) -> str:
    """What a command prints, messages too."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise NoCUDAError(f"{' '.join(command)} failed: {done.stdout.strip()}")
    return done.stdout


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

    def finalize_options(self) -> None:
        if self.build_temp is None:
            self.build_temp = str(ROOT / "build" / f"native-{sysconfig.get_platform()}-{sys.implementation.cache_tag}")
        super().finalize_options()

    def build_extension(self, ext: Extension) -> None:
        setting = cuda_setting()
        if self.compiler.compiler_type == "msvc":  # setuptools knows how to set up Microsoft's tools; ninja doesn't
            if setting == "1":
                raise CompileError("PKE_FAST_CUDA=1: the CUDA part can't be built with Microsoft's compiler")
            super().build_extension(ext)
            return
        if setting == "0" or not self.build_with_cuda(ext, required=setting == "1"):
            self.run_ninja(ext, None)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(Path(self.build_temp, "_native.so"), target)

    def build_with_cuda(self, ext: Extension, required: bool) -> bool:
        """Whether the extension, CUDA part and all, has been built."""
        try:
            cuda = find_cuda()
            self.run_ninja(ext, cuda)
        except (NoCUDAError, CompileError) as error:
            if required:
                raise CompileError(f"PKE_FAST_CUDA=1, but the CUDA part can't be built: {error}") from error
            level = logging.WARNING if isinstance(error, CompileError) else logging.INFO
            self.announce(f"pke_fast is built without its CUDA part: {error}", level)
            return False
        self.announce(f"pke_fast is built with CUDA for sm_{', sm_'.join(cuda.archs)}", logging.INFO)
        return True

    def run_ninja(self, ext: Extension, cuda: CUDA | None) -> None:
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(self.ninja_file(ext, cuda), encoding="utf-8")
        done = subprocess.run([sys.executable, "-m", "ninja", "-C", str(folder)])
        if done.returncode:
            raise CompileError("csrc/ did not compile: see the compiler's messages above")

    def ninja_file(self, ext: Extension, cuda: CUDA | None) -> str:
        """Only the bindings see the folders of Python and pybind11, which differ between isolated builds."""
        includes = " ".join(f'-isystem "{_escape(path)}"' for path in ext.include_dirs)
        shared = "-bundle -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared"
        libraries, defines = "", ""
        if cuda:
            # Its names stay inside: torch brings a CUDA runtime of its own, and neither may call the other's.
            libraries = f'"{_escape(cuda.libraries / "libcudart_static.a")}" -ldl -lrt -Wl,--exclude-libs,ALL'
            defines = f"-DPKE_FAST_CUDA={','.join(cuda.archs)}"
        lines = [
            f"cxx = {_escape(find_compiler())}",
            f"flags = {FLAGS} {_escape(CXXFLAGS)}",
            "rule compile",
            "  command = $cxx $flags $more -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = $cxx {shared} -pthread $in {libraries} {_escape(LDFLAGS)} -o $out",
        ]
        sources = list(SOURCES)
        if cuda:
            host = f" -ccbin {_escape(os.environ['CXX'].split()[0])}" if os.environ.get("CXX") else ""
            lines += [
                "rule cuda",
                f"  command = {_escape(cuda.nvcc)}{host} -O3 -std=c++17 {cuda.code} --threads 0 -DPKE_FAST_CUDA"
                " -Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra -MMD -MF $out.d -c $in -o $out",
                "  depfile = $out.d",
                "  deps = gcc",
            ]
            sources += CUDA_SOURCES
        objects = [Path(source).name + ".o" for source in sources]
        for source, made in zip(sources, objects, strict=True):
            rule = "cuda" if source in CUDA_SOURCES else "compile"
            lines += [f"build {made}: {rule} {_escape(ROOT / source, ' :')}"]
            if source == BINDINGS:
                lines.append(f"  more = {includes} {defines}")
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
