"""What a model does: how much harmful it answers, how much benign it refuses, how well it still predicts text."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pke_fast.encoding import PromptEncoder
from pke_fast.errors import InputError, PKEError
from pke_fast.evaluating.cost import Cost
from pke_fast.evaluating.fluency import fluency
from pke_fast.evaluating.kept import KeptAnswers, weights_digest
from pke_fast.evaluating.measured import digest
from pke_fast.evaluating.paired import judges_of, succeeded
from pke_fast.evaluating.verdicts import AnswerJudge, open_judges
from pke_fast.fingerprint import fingerprint
from pke_fast.generation import end_token_ids, generate
from pke_fast.intervals import listed, ratio_interval, wilson
from pke_fast.judges import JUDGES, Judge, is_degenerate
from pke_fast.perplexity import MAX_TOKENS, WINDOW, losses_perplexity, text_windows, windows_losses
from pke_fast.stages import Stages

if TYPE_CHECKING:
    from pke_fast.patch import Patch

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """The figures of one model; every rate is a fraction from 0 to 1.

    Attributes:
        harmful: ``{"n", "sha256", "asr": {judge: rate}, "degenerate_rate", "intervals"}``; None where no harmful
            prompts were given. The attack success rate is ``1 - refused / n``, or ``harmful / n`` by judges of harm.
            "intervals" has Wilson's 95 % interval under the same keys, "sha256" is the prompts' digest.
        benign: ``{"n", "sha256", "refusal_rate": {judge: rate}, "degenerate_rate", "intervals"}``, or None.
        text: ``{"perplexity", "interval", "nll", "tokens", "sha256"}``, or None: the interval is the bootstrap's over
            windows (None of a single one), of which "nll" and "tokens" have the summed losses in nats and the tokens
            predicted, and "sha256" is the digest. What isn't finite is None, as of a damaged model.
        settings: what the figures depend on besides the model.
        generations: every answer: ``{"set", "prompt", "answer", "refused": {judge: bool}, "degenerate"}``,
            and "harmful", {judge: bool}, from judges of harm. A degenerate answer neither refuses nor is harmful.
        cost: of generating: ``{"answers", "reused", "tokens", "seconds", "tokens_per_second"}``; the tokens are
            of answers made now, without prompts and padding.
        defense: ``{metric: {"n", "defended": {judge: rate}, "degenerate_rate", "intervals"}}``, DINM's, or None.
        fluency: of each set the mean n-gram entropy of its answers: ``{set: {"ngram_entropy", "interval"}}``.
        more: further sections by name, such as "ability" and "divergence", and what `identity` says.
    """

    harmful: dict[str, Any] | None
    benign: dict[str, Any] | None
    text: dict[str, Any] | None
    settings: dict[str, Any]
    generations: list[dict[str, Any]]
    cost: dict[str, Any] = field(default_factory=dict)
    defense: dict[str, Any] | None = None
    fluency: dict[str, Any] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The figures without the generations, ready for JSON."""
        figures = {"harmful": self.harmful, "benign": self.benign, "text": self.text}
        found = {**figures, "defense": self.defense, "fluency": self.fluency, **self.more}
        return {**found, "settings": self.settings, "cost": self.cost}


def evaluate_model(
    model: Any,
    tokenizer: Any,
    encoder: PromptEncoder,
    harmful: Sequence[str] | None,
    benign: Sequence[str] | None,
    text: str | None,
    *,
    judges: Sequence[str | AnswerJudge] = ("advbench", "jailbreakbench"),
    max_new_tokens: int = 48,
    stages: Stages,
    when: str = "",
    keep: Path | None = None,
    stop_early: bool = False,
    defense: Mapping[str, Sequence[str]] | None = None,
    only_more: bool = False,
) -> Evaluation:
    """Generates greedy answers, judges them, and measures the perplexity of a text.

    Args:
        harmful, benign: prompts; None for a set that isn't wanted.
        text: its first 20,000 tokens count; None for no perplexity.
        judges: each has a rate of its own; by name (`pke_fast.evaluating.verdicts`), or opened already.
        stages: runs the parts, for progress and cost.
        when: a word that tells this evaluation's stages from another's, such as "before".
        keep: a file that gets every batch of answers as soon as it is made; answers that are in it already, of the same
            weights, settings and prompts, aren't made again.
        stop_early: end an answer once no judge can change its verdict; such answers are shorter, and a loop that would
            have come later isn't seen.
        defense: prompts by metric, as `pke_fast.evaluating.defense.read_safeedit` gives them; answers to them are
            judged as those to harmful prompts are.
        only_more: nothing to evaluate is no error: the caller measures something else, and adds it to `more`.

    Raises:
        InputError: before anything is generated: an unknown judge or none, an empty set, a prompt that is too long,
            a text that is too short, nothing to evaluate at all.
    """
    chosen = [judge for given in dict.fromkeys(judges) for judge in _opened(given)]
    if not chosen:
        raise InputError("no judge is named", expected="at least one", do="name one, such as advbench")
    lists = [judge for judge in chosen if isinstance(judge, Judge)]
    if stop_early and len(lists) < len(chosen):
        raise InputError(
            "answers can't be stopped early with these judges",
            expected=f"phrase lists alone: {', '.join(JUDGES)}",
            got=", ".join(judge.name for judge in chosen if judge not in lists),
            do="leave out --stop-early",
        )
    if harmful is None and benign is None and text is None and not defense and not only_more:
        raise InputError(
            "nothing to evaluate", expected="harmful prompts, benign prompts or a text", got="none of them"
        )
    sets = {name: prompts for name, prompts in (("harmful", harmful), ("benign", benign)) if prompts is not None}
    sets |= defense or {}
    for name, prompts in sets.items():
        if not prompts:
            raise InputError(f"the set of {name} prompts is empty", expected="at least one prompt", got="none")
        for prompt in prompts:
            encoder.prompt_ids(prompt)  # a prompt that is too long is found now, not minutes later
    windows = None if text is None else text_windows(model, tokenizer, text)

    suffix = f", {when}" if when else ""
    generations: list[dict[str, Any]] = []
    kept = None
    if keep is not None:
        identity = {"max_new_tokens": max_new_tokens, "ends": end_token_ids(model, tokenizer)}
        identity |= {"stop": [judge.name for judge in chosen] if stop_early else []}
        kept = KeptAnswers(keep, {**identity, "weights": weights_digest(model)})
    cost = Cost()
    decided = (lambda answer: all(judge.decided(answer) for judge in lists)) if stop_early else None
    for name, prompts in sets.items():
        with stages.stage(f"Answering {name} prompts{suffix}", len(prompts)) as advance:
            answers = generate(
                model,
                tokenizer,
                encoder,
                prompts,
                max_new_tokens=max_new_tokens,
                advance=advance,
                decided=decided,
                **cost.counted(prompts, kept, encoder),
            )
        cost.end()
        generations += _judged(name, prompts, answers, chosen, stages, suffix)
    figures = None
    if windows is not None:
        try:
            with stages.stage(f"Reading plain text{suffix}", sum(map(len, windows))) as advance:
                losses = windows_losses(model, windows, advance=advance)
            figures = _text_figures(losses)
        except PKEError as error:  # NaN; the answers are there all the same
            LOG.warning("%s", error)
            tokens = [len(ids) - 1 for ids in windows]
            figures = {"perplexity": None, "interval": None, "nll": None, "tokens": tokens}
        figures["sha256"] = digest(windows)
    settings = {
        "judges": [judge.name for judge in chosen],
        "decoding": "greedy",
        "max_new_tokens": max_new_tokens,
        "stop_early": stop_early,
        "chat_template": encoder.chat,
        "system_prompt": encoder.system_prompt,
        "suffix_system_prompt": encoder.suffix,
        "perplexity_max_tokens": MAX_TOKENS,
        "perplexity_window": WINDOW,
    }
    results = {name: _rates(name, [row for row in generations if row["set"] == name]) for name in sets}
    return Evaluation(
        results.get("harmful"),
        results.get("benign"),
        figures,
        settings,
        generations,
        cost.as_dict(),
        {metric: _defended(results[metric]) for metric in defense} if defense else None,
        {name: _fluency([row["answer"] for row in generations if row["set"] == name]) for name in sets},
    )


def _opened(judge: str | AnswerJudge) -> list[AnswerJudge]:
    return open_judges([judge]) if isinstance(judge, str) else [judge]


def _judged(
    name: str,
    prompts: Sequence[str],
    answers: Sequence[str],
    judges: Sequence[AnswerJudge],
    stages: Stages,
    suffix: str,
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {"set": name, "prompt": prompt, "answer": answer, "refused": {}, "degenerate": is_degenerate(answer)}
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    asked = [row for row in rows if not row["degenerate"]]
    for judge in judges:
        if judge.tells == "harm" and name == "benign":
            continue
        given = [row["prompt"] for row in asked], [row["answer"] for row in asked]
        if isinstance(judge, Judge):
            verdicts = judge.verdicts(*given)
        else:
            with stages.stage(f"Judging {name} answers by {judge.name}{suffix}", len(asked)) as advance:
                verdicts = judge.verdicts(*given, advance)
        key = "refused" if judge.tells == "refusal" else "harmful"
        for row in rows:
            row.setdefault(key, {})[judge.name] = False
        for row, verdict in zip(asked, verdicts, strict=True):
            row[key][judge.name] = verdict
    return rows


def _rates(name: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    count = len(rows)
    key = "refusal_rate" if name == "benign" else "asr"
    if key == "asr":
        counted = {judge: sum(succeeded(row, judge) for row in rows) for judge in judges_of(rows[0])}
    else:
        counted = {judge: sum(row["refused"][judge] for row in rows) for judge in rows[0]["refused"]}
    degenerate = sum(row["degenerate"] for row in rows)
    return {
        "n": count,
        "sha256": digest([row["prompt"] for row in rows]),
        key: {judge: number / count for judge, number in counted.items()},
        "degenerate_rate": degenerate / count,
        "intervals": {
            key: {judge: list(wilson(number, count)) for judge, number in counted.items()},
            "degenerate_rate": list(wilson(degenerate, count)),
        },
    }


def by_category(rows: Sequence[dict[str, Any]], categories: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """By category of harm, in order of its name, what `Evaluation.harmful` has of all harmful prompts.

    Args:
        rows: `Evaluation.generations`.
        categories: by prompt; a prompt without one is left out.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["set"] == "harmful" and row["prompt"] in categories:
            found.setdefault(categories[row["prompt"]], []).append(row)
    return {name: _rates("harmful", found[name]) for name in sorted(found)}


def _defended(rates: dict[str, Any]) -> dict[str, Any]:
    """The figures of a set of attacks, told from the defender's side."""
    intervals = rates["intervals"]
    return {
        "n": rates["n"],
        "defended": {judge: 1 - rate for judge, rate in rates["asr"].items()},
        "degenerate_rate": rates["degenerate_rate"],
        "intervals": {
            "defended": {judge: [1 - high, 1 - low] for judge, (low, high) in intervals["asr"].items()},
            "degenerate_rate": intervals["degenerate_rate"],
        },
    }


def _fluency(answers: Sequence[str]) -> dict[str, Any]:
    mean, interval = fluency(answers)
    return {"ngram_entropy": mean, "interval": listed(interval)}


def _text_figures(losses: Sequence[tuple[float, int]]) -> dict[str, Any]:
    nll, tokens = [loss for loss, _ in losses], [count for _, count in losses]
    perplexity: float | None = losses_perplexity(losses)
    if perplexity == math.inf:
        mean = sum(nll) / sum(tokens)
        LOG.warning("the perplexity isn't finite: a mean loss of %.0f nats a token; is the model damaged?", mean)
        perplexity = None
    bounds = ratio_interval(nll, tokens)
    try:
        interval = bounds and [math.exp(bound) for bound in bounds]
    except OverflowError:
        interval = None
    return {"perplexity": perplexity, "interval": interval, "nll": nll, "tokens": tokens}


def identity(model: Any, patch: Patch | None) -> dict[str, str | None]:
    """What figures are of, for eval.json: the fingerprint of the model without the patch, and the patch's digest."""
    return {"fingerprint": fingerprint(model), "patch_sha256": None if patch is None else patch.digest()}


def redacted(generations: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with "[redacted]" for every answer that isn't to a benign prompt, refusals too: judges err."""
    from pke_fast.report import REDACTED

    return [row if row["set"] == "benign" else {**row, "answer": REDACTED} for row in generations]


def write_evaluation(folder: Path, evaluation: Evaluation, model_name: str, patch_name: str | None) -> None:
    """Writes eval.json and generations.jsonl (one answer a line) into a folder, each whole or not at all."""
    from pke_fast.files import atomic_write

    with atomic_write(folder / "generations.jsonl") as path:
        lines = (json.dumps(row) + "\n" for row in evaluation.generations)
        path.write_text("".join(lines), encoding="utf-8")
    with atomic_write(folder / "eval.json") as path:
        content = {"model": model_name, "patch": patch_name, **evaluation.as_dict()}
        path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
