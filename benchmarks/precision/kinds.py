"""Kinds of harm held out in turn: an edit and a probe that have seen all of them but one, measured on that one.

The shipped harmful requests alone have kinds, so they alone are edited on here.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from pke_fast import probe, shipped
from pke_fast.config import PKEConfig
from pke_fast.errors import InputError
from pke_fast.preparation import prepare
from pke_fast.requests import EditRequest
from pke_fast.roc import roc
from precision import fronts
from precision.cells import Value
from precision.edits import edited
from precision.lab import Lab, applied
from precision.settings import KINDS


def held_out(lab: Lab, config: PKEConfig) -> list[Value]:
    """A cell a kind: ``{"kind", "refused", "n", "benign": {set: {"refused", "n", "probe"}}}``.

    "probe" is the share of the kind's prompts that the probe finds at as many false alarms as the edit makes.
    """
    config = config.replace(**KINDS)
    known = shipped.kinds()
    requests = shipped.harmful()
    held = [prompt for prompt in shipped.harmful_held_out() if prompt in known]
    found = []
    for kind in dict.fromkeys(known[request.prompt] for request in requests if request.prompt in known):
        others = [request for request in requests if known.get(request.prompt) != kind]
        prompts = [r.prompt for r in requests if known.get(r.prompt) == kind] + [p for p in held if known[p] == kind]
        if others:
            found.append(_without(lab, config, kind, others, prompts))
    return found


def _without(lab: Lab, config: PKEConfig, kind: str, requests: list[EditRequest], prompts: list[str]) -> Value:
    benign = {name: prompts for name, prompts in lab.sets.shortened().items() if name in lab.sets.benign}
    shown = [dataclasses.asdict(request) for request in requests]
    inputs = [lab.edited_on, config.as_dict(), shown, prompts, benign]

    def make() -> Value:
        with lab.bench(config) as bench:
            job = prepare(bench, requests, None)
            seen = {request.prompt for request in job.requests} & set(prompts)
            if seen:
                raise InputError(
                    f"requests of the kind that is held out are edited on: {kind}",
                    got=f"{len(seen)} of {len(prompts)}",
                    do="turn off what adds requests, in KINDS of benchmarks/precision/settings.py",
                )
            layers = probe.candidates(len(bench.structure.layers))
            sides = [[r.prompt for r in job.requests], [p.prompt for p in job.locality]]
            kinds = shipped.kinds()
            bad, good = (probe.states_of(bench, side, layers) for side in sides)
            fitted = probe.fit(bad, good, ([kinds.get(p) for p in sides[0]], [kinds.get(p) for p in sides[1]]))
            scores = fitted.scores(bench, prompts)
            curves = {name: roc(scores, fitted.scores(bench, chosen)) for name, chosen in benign.items()}
        patch, _ = edited(lab, requests, config)
        with lab.bench(config) as bench:
            cheap = fronts.Cheap(bench, {"": prompts, **benign}, patch.layers[0].layer, config.refusal)
            with applied(patch, lab.model):
                verdicts = cheap.refused()
        beside: dict[str, Any] = {}
        for name, curve in curves.items():
            count, n = sum(verdicts[name]), len(verdicts[name])
            beside[name] = {"refused": count, "n": n, "probe": curve.tpr_at(count / n)}
        return {"kind": kind, "refused": sum(verdicts[""]), "n": len(prompts), "benign": beside}

    return lab.cells.cell(f"kind, {kind}", inputs, make)
