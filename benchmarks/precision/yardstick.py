"""The yardstick: a probe trained on what an edit is made from, its ROC on pairs of sets, and the edits beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pke_fast import probe, shipped
from pke_fast.config import PKEConfig
from pke_fast.preparation import Job, prepare
from pke_fast.roc import Roc, Standing, roc, standing
from pke_fast.workbench import Workbench
from precision.cells import Value
from precision.lab import Lab


def yardstick(lab: Lab, config: PKEConfig) -> Value:
    """The probe's scores of every set: ``{"layer", "auc_by_layer", "cross_validated", "scores": {set: [...]}}``."""
    layers = probe.candidates(len(lab.structure.layers))
    inputs = [lab.edited_on, config.as_dict(), lab.sets.all, layers, probe.INVERSE_PENALTY]

    def make() -> Value:
        with lab.bench(config) as bench:
            job = prepare(bench, lab.sets.requests, None)
            found = fitted(bench, job)
            scores = {name: found.scores(bench, prompts) for name, prompts in lab.sets.all.items()}
        return {
            "layer": found.layer,
            "auc_by_layer": {str(layer): auc for layer, auc in found.auc_by_layer.items()},
            "cross_validated": found.cross_validated.auc,
            "trained": [len(side) for side in sides_of(job)],
            "scores": {name: values.tolist() for name, values in scores.items()},
        }

    return lab.cells.cell("probe", inputs, make)


def sides_of(job: Job) -> tuple[list[str], list[str]]:
    """The harmful and the harmless prompts that an edit is made from, each once."""
    return list(dict.fromkeys(r.prompt for r in job.edited_on)), list(dict.fromkeys(p.prompt for p in job.locality))


def fitted(bench: Workbench, job: Job) -> probe.Probe:
    """A probe that is trained on those."""
    layers = probe.candidates(len(bench.structure.layers))
    sides, kinds = sides_of(job), shipped.kinds()
    bad, good = (probe.states_of(bench, side, layers) for side in sides)
    groups = [[kinds.get(prompt) for prompt in side] for side in sides]
    return probe.fit(bad, good, groups=(groups[0], groups[1]))


def curve_of(found: Mapping[str, Mapping[str, list[float]]], attacks: str, benign: str) -> Roc:
    """The probe's ROC of a pair of sets."""
    return roc(found["scores"][attacks], found["scores"][benign])


def beside(curve: Roc, attacks: Sequence[int], benign: Sequence[int]) -> Standing:
    """Where an edit stands beside the probe's curve, from its verdicts on the two sets."""
    return standing(curve, (sum(attacks), len(attacks)), (sum(benign), len(benign)))
