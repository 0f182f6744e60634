"""The engine: edit, locate and evaluate, each from a model in memory to a result that can be written to a folder."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pke_fast import dinm, editing, summary
from pke_fast.config import PKEConfig
from pke_fast.drawn import Drawn, draw_for
from pke_fast.editing import Outcome
from pke_fast.evaluation import Evaluation, evaluate_model
from pke_fast.files import atomic_folder
from pke_fast.foretelling import foretell
from pke_fast.generation import TOKENS_AT_ONCE
from pke_fast.hotspots import HotSpots
from pke_fast.inputs import check_evaluation, check_job, checked_items
from pke_fast.locating import Located, check_fits, locate_hot_spots
from pke_fast.patch import Patch
from pke_fast.plan import Load, Plan
from pke_fast.planning import PLANNING, plan_loaded
from pke_fast.preparation import Job, lengths, prepare
from pke_fast.ranks import ALONE, Ranks
from pke_fast.report import write_report
from pke_fast.requests import EditRequest, Pair
from pke_fast.resume import Resume, resumed_pace
from pke_fast.scoring import drift
from pke_fast.stages import Stages
from pke_fast.structure import find_structure
from pke_fast.versions import versions
from pke_fast.workbench import Workbench, workbench

SAMPLE_TOKENS = 40  # length of the answers shown before and after


@dataclass(frozen=True, eq=False)
class EditResult:
    """An edit that was made.

    Attributes:
        patch: the changed neurons, old and new.
        report: what report.json holds.
        located: the scores and hot spots that it went by.
        model, tokenizer: as they were given; the model is edited.
        resume: the state that was kept meanwhile; it ends with `write`.
    """

    patch: Patch
    report: dict[str, Any]
    located: Located
    model: Any = field(repr=False)
    tokenizer: Any = field(repr=False)
    resume: Resume = field(default_factory=Resume, repr=False)

    def revert(self) -> None:
        """Puts the model's weights back, exact to the bit.

        Raises:
            PatchError: the edited weights have changed since.
        """
        self.patch.revert(self.model)

    def write(self, folder: str | Path, *, force: bool = False, redact: bool = False, save_model: bool = False) -> None:
        """Writes patch.safetensors, report.json, report.html and, if asked for, model/; all of it or nothing.

        Raises:
            InputError: the folder exists and isn't empty, and `force` isn't set.
        """
        files = {
            "patch.safetensors": "the changed neurons, old and new, with checksums",
            "report.html": "the report, one page",
            "report.json": "the same as data",
        }
        if save_model:
            files["model/"] = "the edited model and its tokenizer"
        self.report["files"] = files
        with atomic_folder(Path(folder), force=force) as new:
            self.patch.save(new / "patch.safetensors")
            if save_model:
                self.model.save_pretrained(new / "model", safe_serialization=True)
                self.tokenizer.save_pretrained(new / "model")
            spots = {layer: neurons.tolist() for layer, neurons in self.located.hot_spots.by_layer().items()}
            write_report(new, self.report, self.located.score_map, spots, redact=redact)
        self.resume.finish()


@dataclass(frozen=True, eq=False)
class LocateResult:
    """Where the unsafe behaviour sits, and from how many requests that was told.

    Attributes:
        located: score map, hot spots and scores.
        window: the layers in which hot spots were sought.
        given: how many requests came.
        requests, already_refused, locality: how many there were of each; where more came, of those that were drawn.
        stages: seconds and peak memory.
        plan: how it was run, with the memory foretold and measured.
        resume: the state that was kept meanwhile; it ends with `write`.
        probe: how precise an edit can be, by what the model knows of these prompts (`foretelling.foretell`).
    """

    located: Located
    window: tuple[int, int]
    given: int
    requests: int
    already_refused: int
    locality: int
    stages: Stages
    plan: dict[str, Any]
    resume: Resume = field(default_factory=Resume, repr=False)
    probe: dict[str, Any] | None = None

    @property
    def hot_spots(self) -> HotSpots:
        """The neurons that an edit would change."""
        return self.located.hot_spots

    @property
    def score_map(self) -> Tensor:
        """What they were chosen by, fp32 [L, D] on the CPU; NaN in layers that weren't scored."""
        return self.located.score_map

    def write(self, folder: str | Path, *, force: bool = False) -> dict[str, str]:
        """Writes scores.safetensors, hotspots.json and heatmap.png; the folder appears whole or not at all."""
        with atomic_folder(Path(folder), force=force) as new:
            files = self.located.write(new, self.window, self.probe)
        self.resume.finish()
        return files


def edit(
    model: Any,
    tokenizer: Any,
    requests: Iterable[EditRequest],
    config: PKEConfig | None = None,
    *,
    locality: Iterable[Pair] | None = None,
    stages: Stages | None = None,
    name: str | None = None,
    source: str = "given",
    samples: int = 3,
    memory_budget: int | None = None,
    device: str | None = None,
    offload_folder: str | Path | None = None,
    resume: str | Path | None = None,
    resume_minutes: float | None = None,
    ranks: Ranks = ALONE,
    held_out: Sequence[str] = (),
) -> EditResult:
    """Edits a model in place so that it gives the safe answers to the requests and answers all else as before.

    Args:
        model: a decoder-only causal language model of transformers, in fp32, bf16 or fp16.
        tokenizer: its tokenizer; its chat template is used where it has one.
        requests: harmful prompts; what they leave out is filled in (`EditRequest`). Of more than the edit can come to
            by its settings, so many are drawn by the seed; of a generator the others aren't kept.
        config: settings; the defaults are for method ``pke``.
        locality: benign pairs that must not move, drawn in the same way; by default the model's own answers to the
            shipped prompts, and then shipped harmful requests join the given ones (`PKEConfig.companions`).
        stages: for progress bars and measurements of one's own.
        name, source: what model and requests are called in the report.
        samples: of how many prompts of each kind the report shows the answers before and after.
        memory_budget: bytes that may be used in all, the loaded model's included; by default what the device has free.
        device: where the work is done, such as "cuda:0"; by default where the model is. A model in the host's memory is
            brought there; what doesn't fit stays with the host and comes when it is used. It ends where it was.
        offload_folder: where offloaded layers are put that the host can't pin and that lie in no safetensors file.
        resume: a folder where the state of the job is kept every few minutes. Called again with the same arguments,
            a job that was interrupted goes on from there, to the same patch; the folder is removed
            once the result is written.
        resume_minutes: between two states that are kept there; by default 5.
        ranks: the processes that share the job, each called with the same arguments; all get the same result.
        held_out: harmful prompts that the edit will be measured on: shipped requests among them don't join the given
            ones.

    Returns:
        the patch, and a report with the keys that docs/design.md names.

    Raises:
        InputError: the model, a request or a setting can't be used; the model is unchanged.
        EditError: the edit failed on the way, as by a loss that became NaN; the weights were put back.
    """
    check_job(model, tokenizer, config, memory_budget, held_out)
    config = config or PKEConfig()
    drawn, pairs = _drawn(requests, locality, config, edits=True)
    keeping = partial(Resume, resume, minutes=resume_minutes)
    with workbench(model, tokenizer, config, stages, name, ranks=ranks, device=device) as bench:
        facts = summary.model_facts(bench)
        check_fits(bench.structure, bench.config)
        plan, bench = _planned(
            bench,
            drawn,
            pairs,
            memory_budget,
            offload_folder,
            keeping,
            edits=True,
            samples=samples,
            held_out=held_out,
        )
        job = prepare(bench, drawn, pairs, held_out)
        shown = [("harmful", r.prompt) for r in job.requests[:samples]]
        shown += [("benign", p.prompt) for p in job.locality[:samples]]
        before = _answers(bench, shown, "Answering a few prompts before")
        first, _ = config.layer_window(len(bench.structure.layers))
        located = locate_hot_spots(bench, job, first=first)
        outcome = _run(bench, job, located)
        counts = len(job.requests), len(job.locality)
        patch = Patch(outcome.layers, summary.patch_meta(facts, config.as_dict(), *counts, outcome))
        with _reverted_on_failure(patch, model):
            after = _answers(bench, shown, "Answering them after")
            report = summary.report_of(bench, facts, job, located, outcome, patch, source, plan)
            report["samples"] = [
                {"kind": kind, "prompt": prompt, "before": old, "after": new}
                for (kind, prompt), old, new in zip(shown, before, after, strict=True)
            ]
            bench.ranks.wait()  # the first rank's write removes what the others may still read
    return EditResult(patch, report, located, model, tokenizer, bench.resume)


def _answers(bench: Workbench, shown: Sequence[tuple[str, str]], doing: str) -> list[str]:
    return bench.answers([prompt for _, prompt in shown], SAMPLE_TOKENS, doing) if shown else []


@contextmanager
def _reverted_on_failure(patch: Patch, model: Any) -> Iterator[None]:
    try:
        yield
    except BaseException:
        patch.revert(model)
        raise


def _run(bench: Workbench, job: Job, located: Located) -> Outcome:
    requests, locality, unseen = job.safe(bench, job.edited_on), job.held(bench), job.safe(bench, job.unseen)
    hot_spots = located.hot_spots.by_layer()
    running: dict[str, Any] = {"pad_id": bench.pad_id, "stage": bench.stages.stage, "pace": bench.pace}
    if bench.config.method == "dinm-parity":
        (layer,) = hot_spots
        return dinm.edit_one_by_one(bench.structure, layer, requests, locality, bench.config, **running)
    more: dict[str, Any] = {"ranks": bench.ranks, "snapshot": bench.resume.part("edit"), "unseen": unseen}
    return editing.edit_columns(bench.structure, hot_spots, requests, locality, bench.config, **running, **more)


def locate(
    model: Any,
    tokenizer: Any,
    requests: Iterable[EditRequest],
    config: PKEConfig | None = None,
    *,
    locality: Iterable[Pair] | None = None,
    compare: Any = None,
    stages: Stages | None = None,
    name: str | None = None,
    memory_budget: int | None = None,
    device: str | None = None,
    offload_folder: str | Path | None = None,
    resume: str | Path | None = None,
    resume_minutes: float | None = None,
    ranks: Ranks = ALONE,
) -> LocateResult:
    """Scores every neuron of every layer, selects the hot spots, and asks what the model knows; it is left as it is.

    Args:
        compare: another checkpoint of the same shape: each neuron's drift from `model` to it then takes the place of
            the one-step weight change. Or a function that loads it: then it is let go before the plan is made.
        others: as for `edit`.

    Raises:
        InputError: the model, a request or a setting can't be used.
    """
    check_job(model, tokenizer, config, memory_budget, compare=compare)
    config = config or PKEConfig()
    drawn, pairs = _drawn(requests, locality, config, edits=False)
    keeping = partial(Resume, resume, minutes=resume_minutes)
    with workbench(model, tokenizer, config, stages, name, ranks=ranks, device=device) as bench:
        moved = None if compare is None else _drift_to(compare, bench)
        compare = None  # let go, as far as it is ours
        check_fits(bench.structure, bench.config)
        plan, bench = _planned(bench, drawn, pairs, memory_budget, offload_folder, keeping, edits=False)
        job = prepare(bench, drawn, pairs)
        located = locate_hot_spots(bench, job, drift=moved)
        known = foretell(bench, job) if bench.ranks.first else None
        window = config.layer_window(len(bench.structure.layers))
        bench.ranks.wait()  # the first rank's write removes what the others may still read
        counts = job.given, len(job.requests), job.already_refused, len(job.locality)
        return LocateResult(
            located, window, *counts, bench.stages, summary.plan_facts(plan, bench), bench.resume, known
        )


def _drawn(
    requests: Iterable[EditRequest], locality: Iterable[Pair] | None, config: PKEConfig, *, edits: bool
) -> tuple[Drawn[EditRequest], Drawn[Pair] | None]:
    """As many of either as the job comes to, each looked at."""
    pairs = None if locality is None else checked_items("locality", locality, Pair)
    return draw_for(config, checked_items("requests", requests, EditRequest), pairs, edits=edits)


def _drift_to(compare: Any, bench: Workbench) -> Tensor:
    other = compare if isinstance(compare, nn.Module) else compare()
    return drift(bench.structure, find_structure(other))


def _planned(
    bench: Workbench,
    requests: Drawn[EditRequest],
    locality: Drawn[Pair] | None,
    budget: int | None,
    offload_folder: str | Path | None,
    keeping: Callable[..., Resume],
    *,
    edits: bool,
    samples: int = 0,
    held_out: Sequence[str] = (),
) -> tuple[Plan | None, Workbench]:
    """The plan of a job, and the bench at its pace and with its state."""
    with bench.stages.stage(PLANNING):
        load = Load.of(*lengths(bench.encoder, bench.config, requests, locality, held_out))
        plan = plan_loaded(bench.structure, bench.config, load, budget, edits=edits, device=bench.device)
        job = {
            "model": bench.fingerprint,
            "work": "edit" if edits else "locate",
            **{f"setting {name}": json.dumps(value) for name, value in bench.config.as_dict().items()},
            "requests": _digest([request.as_dict() for request in (*requests, *requests.reserves)]),
            "locality": _digest([dataclasses.asdict(pair) for pair in locality or ()]),
            "versions": " ".join(f"{name} {version}" for name, version in versions().items()),
            "ranks": str(bench.ranks.size),
            "memory budget": str(budget),
            "device": bench.device.partition(":")[0],  # ranks have several of a kind
            "samples": str(samples),
            "held out": _digest(list(held_out)),
        }
        for what, value in job.items():
            bench.ranks.agree(what, value)
        kept = bench.ranks.in_turn(lambda: keeping(job=job, rank=bench.ranks.rank))
        pace = resumed_pace(plan.pace() if plan else bench.pace, kept.part("pace"))
    bench.place(plan, offload_folder)
    return plan, bench.going(pace, kept, plan.at_once(TOKENS_AT_ONCE) if plan else TOKENS_AT_ONCE)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def evaluate(
    model: Any,
    tokenizer: Any,
    harmful: Sequence[str] | None,
    benign: Sequence[str] | None,
    text: str | None = None,
    config: PKEConfig | None = None,
    *,
    judges: Sequence[str] = ("advbench", "jailbreakbench", "xstest"),
    max_new_tokens: int = 48,
    stages: Stages | None = None,
    name: str | None = None,
    when: str = "",
) -> Evaluation:
    """Attack success rate on harmful prompts, refusals of benign ones, and perplexity of a text; see `Evaluation`.

    Args:
        harmful, benign: prompts; None leaves the set out.
        text: plain text for the perplexity, of which the first 20,000 tokens count; None leaves it out.
        judges: by name, as of `pke-fast eval --judge`.
        max_new_tokens: length of an answer.
        stages: for progress bars and measurements of one's own.
        name: what the model is called in the report.
        when: a word that tells this evaluation's stages from another's, such as "before".

    Returns:
        the figures: rates are fractions from 0 to 1, each with its 95 % interval.

    Raises:
        InputError: a set is empty, or a prompt or a judge can't be used.
    """
    check_evaluation(model, tokenizer, harmful, benign, text, config, judges)
    with workbench(model, tokenizer, config or PKEConfig(), stages, name) as bench:
        return evaluate_model(
            model,
            tokenizer,
            bench.encoder,
            harmful,
            benign,
            text,
            judges=judges,
            max_new_tokens=max_new_tokens,
            stages=bench.stages,
            when=when,
        )
