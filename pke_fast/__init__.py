"""pke_fast: Precision Knowledge Editing. Finds the few MLP neurons behind unsafe answers and changes only them."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from pke_fast.backend import select, trace, update
    from pke_fast.config import PKEConfig, load_config
    from pke_fast.engine import EditResult, LocateResult, edit, evaluate, locate
    from pke_fast.errors import EditError, InputError, PatchError, PKEError
    from pke_fast.export import export_patch
    from pke_fast.hotspots import HotSpots
    from pke_fast.loading import load_model
    from pke_fast.patch import Patch
    from pke_fast.requests import (
        EditRequest,
        Pair,
        read_pairs,
        read_prompts,
        read_requests,
        stream_pairs,
        stream_requests,
    )
    from pke_fast.scoring import Scores

# Where each public name lives: torch and transformers are imported when one that needs them is first used.
_PUBLIC = {
    "EditError": "errors",
    "EditRequest": "requests",
    "EditResult": "engine",
    "HotSpots": "hotspots",
    "InputError": "errors",
    "LocateResult": "engine",
    "PKEConfig": "config",
    "PKEError": "errors",
    "Pair": "requests",
    "Patch": "patch",
    "PatchError": "errors",
    "Scores": "scoring",
    "edit": "engine",
    "evaluate": "engine",
    "export_patch": "export",
    "load_config": "config",
    "load_model": "loading",
    "locate": "engine",
    "read_pairs": "requests",
    "read_prompts": "requests",
    "read_requests": "requests",
    "select": "backend",
    "stream_pairs": "requests",
    "stream_requests": "requests",
    "trace": "backend",
    "update": "backend",
}

__all__ = [
    "EditError",
    "EditRequest",
    "EditResult",
    "HotSpots",
    "InputError",
    "LocateResult",
    "PKEConfig",
    "PKEError",
    "Pair",
    "Patch",
    "PatchError",
    "Scores",
    "edit",
    "evaluate",
    "export_patch",
    "load_config",
    "load_model",
    "locate",
    "read_pairs",
    "read_prompts",
    "read_requests",
    "select",
    "stream_pairs",
    "stream_requests",
    "trace",
    "update",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])


def _find_kernels() -> None:
    """In the source tree the folder `kernels` stands beside this package; a wheel has it inside."""
    beside = Path(__file__).resolve().parent.parent / "kernels"
    if not (Path(__file__).parent / "kernels").exists() and beside.is_dir():
        spec = ModuleSpec(f"{__name__}.kernels", None, is_package=True)
        spec.submodule_search_locations = [str(beside)]
        sys.modules[spec.name] = globals()["kernels"] = module_from_spec(spec)


_find_kernels()
