"""The demo: the main job on a real model with the shipped prompts, measured on prompts that it was not edited on."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from pathlib import Path
from typing import Any

from pke_fast import engine, shipped, terminal
from pke_fast.cli.common import console_of, finish, settings_of
from pke_fast.cli.outputs import check_out, write_edit
from pke_fast.cli.unseen import Unseen, harmless
from pke_fast.evaluation import Evaluation
from pke_fast.loading import load_model
from pke_fast.report import as_json
from pke_fast.stages import Stages

REQUESTS = 96  # shipped harmful requests to edit on; of the others, companions join them
SHOWN = 3  # prompts of each kind, shown with both answers


def run(options: Namespace) -> None:
    """Evaluate, edit, evaluate again, write, show."""
    config = settings_of(options)
    check_out(options)
    console = console_of(options)
    limit = slice(options.limit)
    loaded = load_model(options.model, options.device, options.dtype, stages=Stages())
    stages = Stages(device=loaded.device)
    harmful, benign = shipped.harmful_held_out()[limit], harmless(options.limit)
    unseen = Unseen(loaded, config, stages, harmful, benign, shipped.prose(), shipped.kinds())
    unseen.measure("before")
    result = engine.edit(
        loaded.model,
        loaded.tokenizer,
        shipped.harmful()[:REQUESTS][limit],
        config,
        stages=stages,
        name=loaded.name,
        source="the shipped harmful requests",
        samples=0,  # the evaluation's answers are shown instead
    )
    unseen.measure("after")
    report = result.report
    report["evaluation"] = unseen.compared()
    alike = shipped.look_alikes_held_out()[:1]
    report["samples"] = _samples(unseen.done, {"harmful": harmful, "benign": [*alike, *benign]})
    report["stages"] = [dataclasses.asdict(stage) for stage in stages.done]
    write_edit(result, options)
    terminal.edit_summary(console, report, Path(options.out), redact=options.redact)
    finish(options, as_json(report, options.redact))


def _samples(evaluations: list[Evaluation], prompts: dict[str, list[str]]) -> list[dict[str, Any]]:
    """The first prompts of each kind with their answers before and after."""
    answers = [{row["prompt"]: row["answer"] for row in evaluation.generations} for evaluation in evaluations]
    return [
        {"kind": kind, "prompt": prompt, "before": answers[0][prompt], "after": answers[1][prompt]}
        for kind, listed in prompts.items()
        for prompt in listed[:SHOWN]
    ]
