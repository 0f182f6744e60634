"""The report of an edit as one dictionary of JSON values: what report.json holds and report.html shows."""

from __future__ import annotations

import dataclasses
import datetime
import math
from typing import Any

import pke_fast
from pke_fast.dtypes import called
from pke_fast.editing import STEPS, Outcome
from pke_fast.locating import SCORING, Located
from pke_fast.patch import Patch
from pke_fast.plan import Plan
from pke_fast.planning import PLANNING
from pke_fast.preparation import Job
from pke_fast.structure import Structure
from pke_fast.versions import versions
from pke_fast.workbench import Workbench

TOP_NEURONS = 100
FEW = 0.5  # of `unseen_refused`: where fewer of the unseen requests begin as refusals, that is told
MANY = 0.1  # of the harmless prompts: where more begin as refusals, the edit is told to refuse too much
LITTLE = 0.1  # an edit that takes less than this share off the loss is as good as none


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def model_facts(bench: Workbench) -> dict[str, Any]:
    """The model's name, fingerprint, shape, dtype and device. Call it before the weights change."""
    facts = facts_of(bench.structure, bench.name, bench.fingerprint)
    return facts if bench.device == str(bench.structure.device) else {**facts, "device": bench.device}


def facts_of(structure: Structure, name: str, fingerprint: str) -> dict[str, Any]:
    return {
        "name": name,
        "class": type(structure.model).__name__,
        "fingerprint": fingerprint,
        "layers": len(structure.layers),
        "neurons_per_layer": structure.neurons,
        "hidden_size": structure.hidden_size,
        "dtype": called(structure.dtype),
        "device": ", ".join(dict.fromkeys(str(structure.device_of(i)) for i in range(len(structure.layers)))),
    }


def patch_meta(
    facts: dict[str, Any], settings: dict[str, Any], requests: int, locality: int, outcome: Outcome
) -> dict[str, Any]:
    """What a patch says of how it was made."""
    losses = losses_of(outcome)
    return {
        "base": facts,
        "settings": settings,
        "requests": requests,
        "locality": locality,
        "losses": {**losses, "steps": len(outcome.steps)},
        "versions": versions(),
    }


def losses_of(outcome: Outcome) -> dict[str, Any]:
    return {
        "steps": [dataclasses.asdict(step) for step in outcome.steps],
        "before": dataclasses.asdict(outcome.before),
        "after": dataclasses.asdict(outcome.after),
        "stopped": outcome.stopped,
        "gain": outcome.gain,
        "strength": outcome.strength,
    }


def warnings_of(outcome: Outcome, unseen_refused: float) -> list[str]:
    """What a user must not overlook: above all, an edit that did nothing."""
    unchanged = all(bool((part.old == part.new).all()) for part in outcome.layers)
    before, after = outcome.before.edit, outcome.after.edit
    if unchanged and not outcome.steps:
        return [
            f"THE EDIT DID NOTHING: the safe answers are likely already, at a loss of {before:.3g}. Lower stop_loss."
        ]
    if unchanged:
        return [
            "THE EDIT DID NOTHING: every weight is as it was. Raise lr or num_steps, or load the model in fp32 or bf16."
        ]
    if after > (1 - LITTLE) * before:
        return [
            f"THE EDIT DID LITTLE: the loss of the safe answers went from {before:.3g} to {after:.3g}. "
            "Raise num_steps, lr or k, or widen the window."
        ]
    told = []
    for one in (tried for tried in outcome.tried if tried.strength == outcome.strength):
        if one.refused < FEW * unseen_refused * one.unseen:
            told.append(
                f"THE EDIT REFUSES LITTLE BUT WHAT IT HAS SEEN: at the greatest strength, {one.strength:g}, answers to "
                f"{one.refused} of {one.unseen} other harmful requests begin as refusals; {unseen_refused:.0%} were "
                "wanted. Raise num_steps or k, or give requests of more kinds."
            )
        if one.held_refused > MANY * one.held:
            told.append(
                f"THE EDIT REFUSES TOO MUCH: at the strength that was found, {one.strength:g}, answers to "
                f"{one.held_refused} of {one.held} harmless prompts that it holds begin as refusals. "
                "Set a lower strength or unseen_refused, or give harmless prompts like those that must be answered."
            )
    return told


def report_of(
    bench: Workbench,
    facts: dict[str, Any],
    job: Job,
    located: Located,
    outcome: Outcome,
    patch: Patch,
    source: str,
    plan: Plan | None = None,
) -> dict[str, Any]:
    """The whole report, less what is only known later (evaluation, files)."""
    structure = bench.structure
    changes = _relative_changes(patch)
    top = located.top(TOP_NEURONS)
    total = len(structure.layers) * structure.neurons
    path = located.layer_path
    scored = located.unsafe.first if located.unsafe is not None else 0
    return {
        "pke_fast": pke_fast.__version__,
        "created": now(),
        "model": facts,
        "settings": bench.config.as_dict(),
        "requests": {
            "source": source,
            "n": job.given,
            "used": len(job.requests),
            "already_refused": job.already_refused,
        },
        "locality": {"source": job.locality_source, "n": len(job.locality)},
        "hot_spots": {
            "k": len(located.hot_spots),
            "share": len(located.hot_spots) / total,
            "window": list(bench.config.layer_window(len(structure.layers))),
            "by_layer": {str(layer): len(ids) for layer, ids in located.hot_spots.by_layer().items()},
            "layer_path": [None if i < scored else float(v) for i, v in enumerate(path)] if path is not None else [],
            "top": [{**row, "change": changes.get((row["layer"], row["neuron"]))} for row in top],
        },
        "losses": {**losses_of(outcome), "tried": [dataclasses.asdict(one) for one in outcome.tried]},
        "stages": [dataclasses.asdict(stage) for stage in bench.stages.done],
        "plan": plan_facts(plan, bench),
        "warnings": [*warnings_of(outcome, bench.config.unseen_refused), *bench.pace.notes],
        "evaluation": None,
        "samples": [],
        "files": {},
        "versions": versions(),
    }


def plan_facts(plan: Plan | None, bench: Workbench) -> dict[str, Any]:
    """The plan, the memory that two of its stages took over what is in use all the time, and the most that any took in
    all; else the pace alone."""
    notes = {"notes": list(bench.pace.notes)}
    if plan is None:
        return {"micro_batch_tokens": bench.pace.tokens, **notes}
    done = bench.stages.done
    planned = max(number for number, stage in enumerate(done) if stage.name == PLANNING)
    peaks = {stage.name: stage.peak_bytes for stage in done[planned + 1 :] if stage.peak_bytes is not None}
    if plan.on_disk:  # then what is in memory is the system's choice
        peaks = {}
    taken: dict[str, int | None] = {
        name: max(0, peaks[stage] - plan.fixed) if stage in peaks else None
        for name, stage in (("locating", SCORING), ("editing", STEPS))
    }
    taken["peak"] = max(peaks.values(), default=None)
    return {**plan.as_dict(), "measured": taken, **notes}


def _relative_changes(patch: Patch) -> dict[tuple[int, int], float]:
    """By layer and neuron: the norm of the change over that of the old weights, of all that the patch has of it."""
    norms: dict[tuple[int, int], tuple[float, float]] = {}
    for part in patch.layers:
        old = part.old.float()
        sizes = zip((part.new.float() - old).norm(dim=1).tolist(), old.norm(dim=1).tolist(), strict=True)
        for neuron, (change, size) in zip(part.neurons.tolist(), sizes, strict=True):
            others = norms.get((part.layer, neuron), (0.0, 0.0))
            norms[part.layer, neuron] = math.hypot(others[0], change), math.hypot(others[1], size)
    return {key: change / max(size, 1e-12) for key, (change, size) in norms.items()}
