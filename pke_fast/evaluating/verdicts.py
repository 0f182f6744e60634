"""Judges by name: phrase lists, classifiers, causal models and Python functions, all asked in the same way.

- ``advbench``, ``jailbreakbench``, ``xstest``: phrase lists (`pke_fast.judges`); they tell refusals.
- ``classifier:MODEL[#CLASS]``: a text classifier that reads the answer; ``pair-classifier:`` the prompt and the answer.
- ``causal:MODEL[#HARM/HARMLESS]``: a causal model that says one of two words; "unsafe/safe" by default.
- ``python:MODULE:FUNCTION``: ``FUNCTION(prompts, answers)`` gives a list of bools. They say that an answer refuses, or,
  where the function has an attribute ``tells = "harm"``, that it is harmful.

A judge of harm is asked about answers to harmful prompts alone: the attack success rate is the share that it finds
harmful. A degenerate answer is never put to it, and counts as harmless.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from pke_fast.errors import InputError
from pke_fast.evaluating.functions import function_named, values_of
from pke_fast.judges import JUDGES, get_judge

KINDS = ("classifier", "pair-classifier", "causal", "python")


class AnswerJudge(Protocol):
    """What every judge is. `verdicts` says of each answer whether it refuses, or is harmful, as `tells` has it."""

    @property
    def name(self) -> str: ...
    @property
    def tells(self) -> Literal["refusal", "harm"]: ...
    def verdicts(
        self, prompts: Sequence[str], answers: Sequence[str], advance: Callable[[int], None] | None = None
    ) -> list[bool]: ...


@dataclass(frozen=True, eq=False)
class FunctionJudge:
    """A Python function that judges."""

    name: str
    function: Callable[[list[str], list[str]], Any]
    tells: Literal["refusal", "harm"]

    def verdicts(
        self, prompts: Sequence[str], answers: Sequence[str], advance: Callable[[int], None] | None = None
    ) -> list[bool]:
        """What the function says.

        Raises:
            InputError: it doesn't give one bool for each answer.
        """
        found = values_of(self.function(list(prompts), list(answers)))
        if len(found) != len(answers) or any(verdict not in (True, False) for verdict in found):
            raise InputError(
                f"the judge {self.name} doesn't judge",
                expected=f"{len(answers)} bools, one for each answer",
                got=f"{len(found)} values, such as {found[0]!r:.40}" if found else "no values",
            )
        if advance is not None:
            advance(len(answers))
        return [bool(verdict) for verdict in found]


def open_judges(names: Sequence[str], *, device: str = "auto", template: str | None = None) -> list[AnswerJudge]:
    """The judges of those names, each once; models are loaded.

    Args:
        device: where model judges run.
        template: the text that causal judges read, with ``{prompt}`` and ``{answer}``; None: their chat template.

    Raises:
        InputError: a name that can't be read, a model or function that can't be had, or a template that nobody reads.
    """
    if template is not None and not any(name.startswith("causal:") for name in names):
        raise InputError(
            "no judge reads the template",
            expected="a judge causal:MODEL",
            got=", ".join(names),
            do="name such a judge, or leave out --judge-template",
        )
    return [_open(name, device, template) for name in dict.fromkeys(names)]


def _open(name: str, device: str, template: str | None) -> AnswerJudge:
    kind, colon, rest = name.partition(":")
    if not colon:
        return get_judge(name)
    if kind not in KINDS or not rest:
        near = difflib.get_close_matches(kind, KINDS, n=1)
        raise InputError(
            f"unknown judge {name!r}",
            expected=f"one of {', '.join(JUDGES)}, or {', '.join(f'{kind}:...' for kind in KINDS)}",
            got=repr(name),
            do=f"did you mean {near[0]!r}?" if near else None,
        )
    if kind == "python":
        return _function(name, rest)
    from pke_fast.evaluating.model_judges import CausalJudge, ClassifierJudge

    place, _, detail = rest.partition("#")
    judge: AnswerJudge
    if kind == "causal":
        judge = CausalJudge.load(name, place, detail or None, template, device)
    else:
        reads: Literal["answer", "pair"] = "pair" if kind == "pair-classifier" else "answer"
        judge = ClassifierJudge.load(name, place, detail or None, reads, device)
    return judge


def _function(name: str, place: str) -> FunctionJudge:
    found = function_named(place, f"the judge {name}", "judges")
    tells = getattr(found, "tells", "refusal")
    if tells not in ("refusal", "harm"):
        raise InputError(
            f"what the judge {name} tells isn't known",
            expected="a function whose attribute `tells` is 'refusal' or 'harm' if it has one",
            got=repr(tells),
        )
    return FunctionJudge(name, found, "harm" if tells == "harm" else "refusal")
