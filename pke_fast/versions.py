"""Which versions ran: results hold for them."""

from __future__ import annotations

import platform
from importlib import metadata

import pke_fast


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide results."""
    names = ("torch", "transformers", "safetensors", "numpy")
    return {
        "pke_fast": pke_fast.__version__,
        "python": platform.python_version(),
        **{n: metadata.version(n) for n in names},
    }
