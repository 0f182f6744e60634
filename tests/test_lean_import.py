"""`import pke_fast` stays lean: no torch, no transformers, no CUDA."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys
import pke_fast
dir(pke_fast), pke_fast.PKEConfig, pke_fast.InputError, pke_fast.__version__
heavy = {"torch", "transformers", "numpy", "safetensors", "rich", "jinja2", "matplotlib", "yaml", "pke_fast._native"}
print(sorted(heavy & set(sys.modules)))
"""


def test_import_brings_in_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_ops_do_not_start_cuda() -> None:
    program = "import pke_fast.ops, pke_fast.kernels.select_hotspots, torch; print(torch.cuda.is_initialized())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
