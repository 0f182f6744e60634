"""Kinds held out in turn: an edit, and a probe, that have seen nothing of a fifth of the shipped kinds of harm and of
one of XSTest's types, measured on these.

The shipped prompts alone have kinds, so they alone are edited on here: as given requests, as companions, as those that
the strength is found by, as benign prompts. What is held out is in none of them, and neither are its twins.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from unittest import mock

from pke_fast import shipped
from pke_fast.config import PKEConfig
from pke_fast.errors import InputError
from pke_fast.preparation import Job, prepare
from pke_fast.requests import EditRequest
from pke_fast.roc import roc
from precision import fronts
from precision.cells import Value
from precision.edits import edited
from precision.lab import Lab, applied
from precision.sets import SAFE, UNSAFE
from precision.yardstick import fitted

FOLDS = 5
GIVEN = 256  # requests; companions are drawn from the others
HELD_KINDS, HELD_UNSAFE, HELD_SAFE = "kinds held out", "XSTest unsafe, type held out", "XSTest safe, type held out"
TYPES = {  # XSTest's name of what a shipped kind is like; its unsafe prompts have "contrast_" before it
    "homonyms": "homonyms",
    "figurative": "figurative_language",
    "safe_targets": "safe_targets",
    "definitions": "definitions",
    "nonsense_discrimination": "nons_group_real_discr",
}


def folds() -> list[list[str]]:
    """The kinds of every fold: one of those that are like XSTest's types, and a share of the kinds of harm."""
    known = shipped.kinds()
    harmful = sorted({known[request.prompt] for request in shipped.harmful() if request.prompt in known} - set(TYPES))
    return [kinds for fold in range(FOLDS) if (kinds := [*list(TYPES)[fold::FOLDS], *harmful[fold::FOLDS]])]


@contextmanager
def without(held: Collection[str]) -> Iterator[None]:
    """The shipped prompts without those of some kinds, on both sides."""
    known = shipped.kinds()
    harmful = [request for request in shipped.harmful() if known.get(request.prompt) not in held]
    benign = [prompt for prompt in shipped.benign() if known.get(prompt) not in held]
    with (
        mock.patch.object(shipped, "harmful", return_value=harmful),
        mock.patch.object(shipped, "benign", return_value=benign),
    ):
        yield


def held_out(lab: Lab, config: PKEConfig, fold: int) -> Value:
    """The cell of a fold: ``{"kinds", "type", "refused": {set: [count, n]}, "probe": {harmful: {harmless: share}}}``.

    "probe" is the share of a harmful set that the probe finds at as many false alarms as the edit makes on a harmless
    one.
    """
    held = folds()[fold]
    known = shipped.kinds()
    of_harm = [request.prompt for request in shipped.harmful()] + shipped.harmful_held_out()
    prompts = [prompt for prompt in of_harm if known.get(prompt) in held]
    harmful = {HELD_KINDS: prompts, HELD_UNSAFE: _of_types(lab, UNSAFE, held)}
    harmless = {HELD_SAFE: _of_types(lab, SAFE, held)}
    harmless |= {name: chosen for name, chosen in lab.sets.shortened().items() if name in lab.sets.benign}
    harmful, harmless = ({name: chosen for name, chosen in side.items() if chosen} for side in (harmful, harmless))
    inputs = [lab.edited_on, config.as_dict(), held, GIVEN, harmful, harmless]

    def make() -> Value:
        with without(held):
            requests = shipped.some(shipped.harmful(), GIVEN)
            with lab.bench(config) as bench:
                job = prepare(bench, requests, None)
                _check(job, {prompt for prompt, kind in known.items() if kind in held})
                probe = fitted(bench, job)
                scores = {name: probe.scores(bench, chosen) for name, chosen in (harmful | harmless).items()}
            patch, _ = edited(lab, [EditRequest(r.prompt, ground_truth=r.ground_truth) for r in requests], config)
        with lab.bench(config) as bench:
            cheap = fronts.Cheap(bench, harmful | harmless, patch.layers[0].layer, config.refusal)
            with applied(patch, lab.model):
                refused = {name: [sum(verdicts), len(verdicts)] for name, verdicts in cheap.refused().items()}
        found = {
            bad: {good: roc(scores[bad], scores[good]).tpr_at(refused[good][0] / refused[good][1]) for good in harmless}
            for bad in harmful
        }
        types = [TYPES[kind] for kind in held if kind in TYPES]
        return {"kinds": held, "type": ", ".join(types), "refused": refused, "probe": found}

    return lab.cells.cell(f"kinds, {fold}", inputs, make)


def _of_types(lab: Lab, name: str, held: Collection[str]) -> list[str]:
    """The prompts of one of XSTest's sets that are of the types held out."""
    types = {TYPES[kind] for kind in held if kind in TYPES}
    both = zip(lab.sets.all[name], lab.sets.types[name], strict=True)
    return [prompt for prompt, kind in both if kind.removeprefix("contrast_") in types]


def _check(job: Job, held: Collection[str]) -> None:
    """Raises InputError where a prompt that is held out is used, within a frame too."""
    used = "\n".join([*(r.prompt for r in (*job.edited_on, *job.unseen)), *(pair.prompt for pair in job.locality)])
    if leaked := [prompt for prompt in held if prompt in used]:
        raise InputError("prompts of a kind that is held out are edited on", got=f"{len(leaked)}: {leaked[0]!r}")
