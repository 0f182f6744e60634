"""The yardstick: a probe trained on what an edit is made from, its ROC on pairs of sets, and the edits beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pke_fast import probe, shipped
from pke_fast.config import PKEConfig
from pke_fast.preparation import prepare
from pke_fast.roc import Roc, Standing, roc, standing
from precision.cells import Value
from precision.lab import Lab
from precision.measure import prompting


def yardstick(lab: Lab, config: PKEConfig) -> Value:
    """The probe's scores of every set: ``{"layer", "auc_by_layer", "cross_validated", "scores": {set: [...]}}``."""
    layers = probe.candidates(len(lab.structure.layers))
    inputs = [lab.edited_on, prompting(config), config.refusal, lab.sets.all, layers, probe.INVERSE_PENALTY]

    def make() -> Value:
        with lab.bench(config) as bench:
            job = prepare(bench, lab.sets.requests, None)
            sides = [request.prompt for request in job.requests], [pair.prompt for pair in job.locality]
            kinds = shipped.kinds()
            groups = [[kinds.get(prompt) for prompt in side] for side in sides]
            bad, good = (probe.states_of(bench, side, layers) for side in sides)
            found = probe.fit(bad, good, groups=(groups[0], groups[1]))
            scores = {name: found.scores(bench, prompts) for name, prompts in lab.sets.all.items()}
        return {
            "layer": found.layer,
            "auc_by_layer": {str(layer): auc for layer, auc in found.auc_by_layer.items()},
            "cross_validated": found.cross_validated.auc,
            "trained": [len(job.requests), len(job.locality)],
            "scores": {name: values.tolist() for name, values in scores.items()},
        }

    return lab.cells.cell("probe", inputs, make)


def curve_of(found: Mapping[str, Mapping[str, list[float]]], attacks: str, benign: str) -> Roc:
    """The probe's ROC of a pair of sets."""
    return roc(found["scores"][attacks], found["scores"][benign])


def beside(curve: Roc, attacks: Sequence[int], benign: Sequence[int]) -> Standing:
    """Where an edit stands beside the probe's curve, from its verdicts on the two sets."""
    return standing(curve, (sum(attacks), len(attacks)), (sum(benign), len(benign)))
