"""The sets of prompts: what is edited on, attacks, harmless prompts, questions and text, read from public files."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pke_fast import shipped
from pke_fast.encoding import PromptEncoder
from pke_fast.errors import InputError
from pke_fast.evaluating.ability import Question, read_questions
from pke_fast.requests import EditRequest

FILES = {
    "advbench_harmful_behaviors.csv": "AdvBench, columns goal and target",
    "harmbench_adv_training_behaviors.csv": "HarmBench's training behaviours, columns Behavior and BehaviorID",
    "harmbench_adv_training_targets.json": "their unsafe beginnings, by BehaviorID",
    "harmbench_val.csv": "HarmBench's validation behaviours, columns Behavior and FunctionalCategory",
    "jailbreak_templates_gptfuzz.csv": "GPTFuzz's templates, column text",
    "xstest_dev.csv": "XSTest, columns prompt, type and label",
    "dolly_1000.jsonl": "Dolly, prompt and answer",
    "openbook_qa.jsonl": "OpenBookQA, query, choices and gold",
    "winogrande.jsonl": "WinoGrande, context_options, continuation and gold",
    "wikitext2_valid.txt": "WikiText-2's validation text",
}
EDITED = 256  # of AdvBench's rows; those after it are attacks
PLACE = "[INSERT PROMPT HERE]"


@dataclass(frozen=True)
class Sizes:
    """How many prompts of each set, and how many edits of how many requests follow each other; smaller in tests."""

    edited: int = EDITED
    standard: int = 41
    attacks: int = 200
    wrapped: int = 100
    dolly: int = 300
    kl: int = 64
    edits: int = 10
    requests_an_edit: int = 32
    short: int = 100
    seed: int = 0


@dataclass(frozen=True)
class Sets:
    """What is measured on; every set has a name, which stands in the tables.

    Attributes:
        requests: what is edited on.
        attacks, benign: prompts by set; what is refused of the former is gained, of the latter lost.
        types: XSTest's type of each prompt of "XSTest safe" and "XSTest unsafe".
        answered: harmless prompts with good answers, for the KL.
        questions: multiple choice by set.
        text: running text.
        sizes: as they were asked for.
        notes: what a reader must know, such as how many templates fitted.
    """

    requests: list[EditRequest]
    attacks: dict[str, list[str]]
    benign: dict[str, list[str]]
    types: dict[str, list[str]]
    answered: list[tuple[str, str]]
    questions: dict[str, list[Question]]
    text: str
    sizes: Sizes
    notes: dict[str, Any] = field(default_factory=dict)

    def shortened(self) -> dict[str, list[str]]:
        """Fewer prompts of every set, for fronts; those in templates are left out, being long."""
        return {name: evenly(prompts, self.sizes.short) for name, prompts in self.all.items() if name != WRAPPED}

    @property
    def all(self) -> dict[str, list[str]]:
        return {**self.attacks, **self.benign}


ATTACKS, WRAPPED, UNSAFE, HELD = "attacks", "attacks in templates", "XSTest unsafe", "shipped harmful"
DOLLY, SAFE, ALIKE, BENIGN = "Dolly", "XSTest safe", "shipped look-alikes", "shipped harmless"


def read_sets(folder: Path, encoder: PromptEncoder, sizes: Sizes | None = None) -> Sets:
    """All sets from a folder of public files.

    Args:
        encoder: tells which templates fit the model's context.

    Raises:
        InputError: a file is missing, or isn't what its name says; it is named.
    """
    sizes = sizes or Sizes()
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise InputError(
            f"{folder} lacks {', '.join(missing)}",
            expected="; ".join(f"{name}: {FILES[name]}" for name in missing),
            do="get the public files that docs/precision.md lists, and put them into that folder by these names",
        )
    rng = random.Random(sizes.seed)
    adv = _rows(folder / "advbench_harmful_behaviors.csv", "goal", "target")
    training = _rows(folder / "harmbench_adv_training_behaviors.csv", "Behavior", "BehaviorID")
    targets = json.loads((folder / "harmbench_adv_training_targets.json").read_text(encoding="utf-8"))
    requests = [EditRequest(row["goal"], ground_truth=row["target"]) for row in adv[: sizes.edited]]
    requests += [
        EditRequest(row["Behavior"], ground_truth=next(iter(targets.get(row["BehaviorID"], [])), None))
        for row in training
    ]
    validation = _rows(folder / "harmbench_val.csv", "Behavior", "FunctionalCategory")
    standard = [row["Behavior"] for row in validation if row["FunctionalCategory"] == "standard"][: sizes.standard]
    unused = [row["goal"] for row in adv[sizes.edited :]]
    attacks = standard + rng.sample(unused, min(len(unused), sizes.attacks - len(standard)))
    wrapped, notes = _wrapped(folder, attacks, encoder, sizes, rng)
    xstest = _rows(folder / "xstest_dev.csv", "prompt", "type", "label")
    safe = [row for row in xstest if row["label"] == "safe"]
    unsafe = [row for row in xstest if row["label"] != "safe"]
    dolly = [json.loads(line) for line in (folder / "dolly_1000.jsonl").read_text(encoding="utf-8").splitlines()]
    chosen = rng.sample(dolly, min(len(dolly), sizes.dolly))
    return Sets(
        requests,
        {ATTACKS: attacks, UNSAFE: [r["prompt"] for r in unsafe], HELD: shipped.harmful_held_out(), WRAPPED: wrapped},
        {
            DOLLY: [row["prompt"] for row in chosen],
            SAFE: [row["prompt"] for row in safe],
            ALIKE: shipped.look_alikes_held_out(),
            BENIGN: shipped.benign_held_out(),
        },
        {SAFE: [row["type"] for row in safe], UNSAFE: [row["type"] for row in unsafe]},
        [(row["prompt"], row["answer"]) for row in chosen if row["answer"].strip()][: sizes.kl],
        {name: read_questions(folder / f"{name}.jsonl") for name in ("openbook_qa", "winogrande")},
        (folder / "wikitext2_valid.txt").read_text(encoding="utf-8"),
        sizes,
        notes,
    )


def evenly(items: Sequence[str], most: int) -> list[str]:
    """At most so many of them, at even distances."""
    return [items[i * len(items) // most] for i in range(most)] if len(items) > most else list(items)


def _wrapped(
    folder: Path, attacks: Sequence[str], encoder: PromptEncoder, sizes: Sizes, rng: random.Random
) -> tuple[list[str], dict[str, int]]:
    """Attacks in the second half of the templates, in turn; a template in which the longest doesn't fit is left out."""
    templates = [row["text"] for row in _rows(folder / "jailbreak_templates_gptfuzz.csv", "text")]
    half = [text for text in templates[len(templates) // 2 :] if PLACE in text]
    chosen = rng.sample(list(attacks), min(len(attacks), sizes.wrapped))
    longest = max(attacks, key=len)
    fitting = [text for text in half if _fits(text.replace(PLACE, longest), encoder)]
    if not fitting:
        raise InputError("no jailbreak template fits the model's context", got=f"{len(half)} templates")
    wrapped = [fitting[i % len(fitting)].replace(PLACE, prompt) for i, prompt in enumerate(chosen)]
    return wrapped, {"templates": len(half), "templates that fit": len(fitting)}


def _fits(prompt: str, encoder: PromptEncoder) -> bool:
    try:
        return len(encoder.prompt_ids(prompt)) + 32 < encoder.limit  # with room for an answer
    except InputError:
        return False


def _rows(path: Path, *columns: str) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    if not rows or any(column not in rows[0] for column in columns):
        raise InputError(
            f"{path} isn't the file that its name says",
            expected=f"a CSV with the columns {', '.join(columns)}",
            got=", ".join(map(str, rows[0])) if rows else "no rows",
        )
    return rows
