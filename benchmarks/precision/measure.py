"""What a model does, unedited or with a patch on: refusals of every set, ability, perplexity, KL."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from pke_fast.config import PKEConfig
from pke_fast.encoding import Encoded
from pke_fast.evaluating.ability import measure_ability
from pke_fast.evaluating.divergence import FIRST_TOKENS
from pke_fast.evaluation import evaluate_model
from pke_fast.modes import evaluating
from pke_fast.patch import Patch
from precision.cells import Value, digest
from precision.lab import Lab, applied

JUDGES = ("xstest", "advbench", "jailbreakbench")
JUDGE = JUDGES[0]  # whose rates stand in the tables: it misses the fewest jailbroken answers (docs/evaluation.md)


def answers(lab: Lab, name: str, patch: Patch | None, sha: str, config: PKEConfig, *, whole: bool) -> Value:
    """Refusals of every set by the judges: ``{"sets": {set: {"n", "refused": {judge: n}, "degenerate", "verdicts"}}}``.

    Args:
        sha: of the patch's file.
        whole: make answers whole and judge them by every list; else each ends once XSTest's rule has its verdict, and
            whether it is degenerate isn't known.
    """
    sides = {"harmful": lab.sets.attacks, "benign": lab.sets.benign}
    judges = JUDGES if whole else JUDGES[:1]
    inputs = [lab.base, sha, prompting(config), sides, judges, lab.max_new_tokens]

    def make() -> Value:
        given = {side: [prompt for prompts in sets.values() for prompt in prompts] for side, sets in sides.items()}
        with lab.bench(config) as bench, applied(patch, lab.model):
            result = evaluate_model(
                lab.model,
                lab.loaded.tokenizer,
                bench.encoder,
                given["harmful"],
                given["benign"],
                None,
                judges=judges,
                max_new_tokens=lab.max_new_tokens,
                stages=bench.stages,
                when=name,
                keep=lab.cells.path(f"answers, {name}", inputs, ".jsonl"),
                stop_early=not whole,
            )
        found = {}
        for side, sets in sides.items():
            rows = iter([row for row in result.generations if row["set"] == side])
            for set_name, prompts in sets.items():
                found[set_name] = _counted([next(rows) for _ in prompts], judges, whole)
        return {"sets": found, "cost": result.cost}

    return lab.cells.cell(f"answers, {name}", inputs, make)


def _counted(rows: list[dict[str, Any]], judges: tuple[str, ...], whole: bool) -> dict[str, Any]:
    return {
        "n": len(rows),
        "refused": {judge: sum(row["refused"][judge] for row in rows) for judge in judges},
        "degenerate": sum(row["degenerate"] for row in rows) if whole else None,
        "verdicts": [int(row["refused"][JUDGE]) for row in rows],
    }


def prompting(config: PKEConfig) -> list[str]:
    """The settings that decide what a prompt becomes."""
    return [config.system_prompt, config.suffix_system_prompt]


def damage(
    lab: Lab, name: str, patch: Patch | None, sha: str, config: PKEConfig, questions: Mapping[str, int | None]
) -> Value:
    """What is broken: ``{"text": {"nll", "tokens"}, "ability": {set: {"correct"}}, "kl"}``.

    Args:
        questions: how many of each set; None for all.
    """
    asked = {key: lab.sets.questions[key][:count] for key, count in questions.items()}
    shown = {key: [vars(question) for question in chosen] for key, chosen in asked.items()}
    inputs = [lab.base, sha, prompting(config), digest([shown, lab.sets.text, lab.sets.answered])]

    def make() -> Value:
        with lab.bench(config) as bench:
            before = _base_log_p(lab, config)
            with applied(patch, lab.model):
                result = evaluate_model(
                    lab.model, lab.loaded.tokenizer, bench.encoder, None, None, lab.sets.text, stages=bench.stages
                )
                ability = {}
                for key, chosen in asked.items():
                    with bench.stages.stage(f"Answering {key}", sum(len(q.options) for q in chosen)) as advance:
                        ability[key] = measure_ability(lab.model, lab.loaded.tokenizer, chosen, advance=advance)
                now = _log_p(lab, config)
        kls = [float((old.exp() * (old - new)).sum(-1).mean()) for old, new in zip(before, now, strict=True)]
        return {"text": result.text, "ability": ability, "kl": math.fsum(kls) / len(kls)}

    return lab.cells.cell(f"damage, {name}", inputs, make)


def _base_log_p(lab: Lab, config: PKEConfig) -> list[torch.Tensor]:
    """Of the unedited model, made once."""
    key = ("log p", *prompting(config))
    if key not in lab.memory:
        lab.memory[key] = _log_p(lab, config)
    found: list[torch.Tensor] = lab.memory[key]
    return found


def _log_p(lab: Lab, config: PKEConfig) -> list[torch.Tensor]:
    """Of each harmless prompt with its answer, [tokens, V]: what is said of the answer's first tokens."""
    found = []
    with lab.bench(config) as bench, evaluating(lab.model):
        for prompt, answer in lab.sets.answered:
            sequence: Encoded = bench.encoder.encode(prompt, answer, answer_tokens=FIRST_TOKENS)
            ids = torch.tensor([sequence.ids], device=lab.model.device)
            logits = lab.model(input_ids=ids, use_cache=False).logits[0]
            found.append(logits[sequence.prompt_length - 1 : -1].float().log_softmax(-1))
    return found
