"""How precise an edit can be on given requests, told before anything is edited by a probe of what the model knows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pke_fast import probe, shipped
from pke_fast.intervals import wilson
from pke_fast.preparation import Job
from pke_fast.workbench import Workbench

LEAST = 20  # prompts on each side: with fewer, one prompt is more than what is told
FALSE_ALARMS = (0.02, 0.05, 0.15)


def foretell(bench: Workbench, job: Job) -> dict[str, Any] | None:
    """What a linear probe tells of the requests and the locality prompts, cross-validated.

    Prompts that have a kind, as the shipped ones do, are held out kind by kind; the others at random, which flatters
    where they are alike.

    Returns:
        ``{"layer", "auc", "auc_by_layer", "harmful", "harmless", "flagged": [{"false_alarms", "share", "interval"}]}``:
        the area under its ROC, and the share of the harmful requests that it finds, with Wilson's 95 % interval, at
        shares of false alarms. None where there are too few prompts on a side.
    """
    harmful, harmless = [r.prompt for r in job.requests], [p.prompt for p in job.locality]
    if min(len(harmful), len(harmless)) < LEAST:
        return None
    layers = probe.candidates(len(bench.structure.layers))
    with bench.stages.stage("Asking what the model knows", len(harmful) + len(harmless)) as advance:
        bad, good = (probe.states_of(bench, prompts, layers, advance) for prompts in (harmful, harmless))
        kinds = shipped.kinds()
        found = probe.fit(bad, good, groups=(_kinds(harmful, kinds), _kinds(harmless, kinds)))
    flagged = []
    for share in FALSE_ALARMS:
        tpr = found.cross_validated.tpr_at(share)
        interval = list(wilson(round(tpr * len(harmful)), len(harmful)))
        flagged.append({"false_alarms": share, "share": tpr, "interval": interval})
    return {
        "layer": found.layer,
        "auc": found.cross_validated.auc,
        "auc_by_layer": {str(layer): auc for layer, auc in found.auc_by_layer.items()},
        "harmful": len(harmful),
        "harmless": len(harmless),
        "flagged": flagged,
    }


def _kinds(prompts: Sequence[str], known: dict[str, str]) -> list[str | None]:
    return [known.get(prompt) for prompt in prompts]
