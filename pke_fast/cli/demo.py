"""The demo: the main job on a real model with the shipped prompts, measured on prompts that it was not edited on."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from pathlib import Path
from typing import Any

from pke_fast import engine, shipped, terminal
from pke_fast.cli.common import console_of, finish, settings_of
from pke_fast.evaluating.paired import differences
from pke_fast.evaluation import Evaluation
from pke_fast.files import check_output_folder
from pke_fast.judges import JUDGES
from pke_fast.loading import load_model
from pke_fast.report import as_json
from pke_fast.stages import Stages

ANSWER_TOKENS = 32
REQUESTS = 96  # shipped harmful requests to edit on; of the others, companions join them
SHOWN = 3  # prompts of each kind, shown with both answers


def run(options: Namespace) -> None:
    """Evaluate, edit, evaluate again, write, show."""
    config = settings_of(options)
    check_output_folder(options.out, options.force)
    console = console_of(options)
    limit = slice(options.limit)
    harmful, plain = shipped.harmful_held_out()[limit], shipped.benign_held_out()[limit]
    alike = shipped.look_alikes_held_out()[limit]
    loaded = load_model(options.model, options.device, options.dtype, stages=Stages())
    stages = Stages(device=loaded.device)

    def measure(when: str) -> Evaluation:
        return engine.evaluate(
            loaded.model,
            loaded.tokenizer,
            harmful,
            plain + alike,
            shipped.prose(),
            config,
            judges=list(JUDGES),
            max_new_tokens=ANSWER_TOKENS,
            stages=stages,
            when=when,
        )

    before = measure("before")
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
    after = measure("after")
    report = result.report
    figures = before.as_dict(), after.as_dict()
    changed = differences(*figures, before.generations, after.generations)
    report["evaluation"] = {"before": figures[0], "after": figures[1], "difference": changed}
    report["samples"] = _samples(before, after, {"harmful": harmful, "benign": [*alike[:1], *plain]})
    report["stages"] = [dataclasses.asdict(stage) for stage in stages.done]
    result.write(options.out, force=options.force, redact=options.redact)
    terminal.edit_summary(console, report, Path(options.out), redact=options.redact)
    finish(options, as_json(report, options.redact))


def _samples(before: Evaluation, after: Evaluation, prompts: dict[str, list[str]]) -> list[dict[str, Any]]:
    """The first prompts of each kind with both answers."""
    answers = [{row["prompt"]: row["answer"] for row in side.generations} for side in (before, after)]
    return [
        {"kind": kind, "prompt": prompt, "before": answers[0][prompt], "after": answers[1][prompt]}
        for kind, listed in prompts.items()
        for prompt in listed[:SHOWN]
    ]
