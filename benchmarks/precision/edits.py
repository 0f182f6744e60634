"""The edits, each a cell with its patch beside it; the model is left as it was."""

from __future__ import annotations

import hashlib
import math
import time
from typing import Any

from pke_fast import engine
from pke_fast.config import PKEConfig
from pke_fast.patch import Patch
from pke_fast.preparation import prepare
from pke_fast.requests import EditRequest, Pair
from precision import lora
from precision.cells import Value
from precision.lab import Lab
from precision.settings import Setting


def edit(lab: Lab, name: str, setting: Setting, seed: int) -> tuple[Value, Patch]:
    """An edit by a setting: what it cost and changed, and its patch."""
    config = setting.config(lab.structure, seed)
    inputs = [lab.edited_on, config.as_dict(), setting.by]
    file = lab.cells.path(f"edit, {name}", inputs, ".safetensors")

    def make() -> Value:
        start = time.perf_counter()
        more: dict[str, Any] = {}
        if setting.by == "lora":
            with lab.bench(config, long=False) as bench:
                patch, more = lora.edit(bench, prepare(bench, lab.sets.requests, None), config)
        else:
            patch, more = edited(lab, lab.sets.requests, config)
        seconds = time.perf_counter() - start
        patch.save(file)
        return {**facts(lab, patch), **more, "seconds": seconds, "settings": config.as_dict()}

    value = lab.cells.cell(f"edit, {name}", inputs, make)
    patch = Patch.load(file)
    return {**value, "sha": hashlib.sha256(file.read_bytes()).hexdigest()}, patch


def edited(
    lab: Lab, requests: list[EditRequest], config: PKEConfig, locality: list[Pair] | None = None
) -> tuple[Patch, dict[str, Any]]:
    """The patch of an edit of the model as it is now, and its losses; the edit is taken back."""
    result = engine.edit(
        lab.model, lab.loaded.tokenizer, requests, config, locality=locality, name=lab.loaded.name, samples=0
    )
    result.revert()
    losses = {key: result.report["losses"][key] for key in ("before", "after", "stopped")}
    return result.patch, {"losses": losses | {"steps": len(result.report["losses"]["steps"])}}


def facts(lab: Lab, patch: Patch) -> dict[str, Any]:
    """How much a patch changes: neurons, their share, and the Frobenius norm of the change."""
    squares = [float((part.new.double() - part.old.double()).square().sum()) for part in patch.layers]
    changed = sum(int(((part.new != part.old).any(1)).sum()) for part in patch.layers)
    return {
        "neurons": patch.n_neurons,
        "share": patch.n_neurons / (len(lab.structure.layers) * lab.structure.neurons),
        "change": math.sqrt(math.fsum(squares)),
        "rows_changed": changed,
        "layers": sorted({part.layer for part in patch.layers}),
    }
