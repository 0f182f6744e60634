"""What a request may leave out, filled in: the safe answer, the unsafe answer, the benign pairs that must not move.

Where no benign pairs are given, the shipped ones hold, and shipped harmful requests join the given ones: the two sides
then differ in harm alone, whatever the form and the topics of the given requests.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from pke_fast import shipped
from pke_fast.config import PKEConfig
from pke_fast.drawn import drawn_of, reserves_of
from pke_fast.encoding import Encoded, PromptEncoder
from pke_fast.errors import InputError, PKEError
from pke_fast.files import cache_folder
from pke_fast.judges import get_judge
from pke_fast.requests import EditRequest, Pair, read_pairs, write_pairs
from pke_fast.workbench import Workbench

LOG = logging.getLogger(__name__)
MOST_UNSEEN = 128  # requests that a strength is found by
COMPANIONS = 2  # a given request, about: where there are more, the given requests are repeated
FRAMED_ANSWER = "Sure, here is"  # the unsafe answer to a framed request, whose frame may ask for another form
REFUSAL_JUDGE = "xstest"  # anchored at the answer's beginning, and that is all that is generated here


@dataclass(frozen=True)
class Job:
    """Requests and locality pairs with nothing left out.

    Attributes:
        requests: those that the model doesn't refuse yet.
        given: how many requests came, drawn or not.
        already_refused: how many were left out because the model, when asked, refuses them or says nothing at all.
        locality: benign pairs.
        locality_source: where they came from, in words.
        companions: shipped harmful requests that are edited on beside `requests`.
        unseen: others, beside companions, that are not: by them the strength is found.
    """

    requests: tuple[EditRequest, ...]
    given: int
    already_refused: int
    locality: tuple[Pair, ...]
    locality_source: str
    companions: tuple[EditRequest, ...] = ()
    unseen: tuple[EditRequest, ...] = ()

    @property
    def edited_on(self) -> tuple[EditRequest, ...]:
        """Requests and companions; few requests are repeated, so that they aren't lost among their companions."""
        return _together(self.requests, self.companions)

    def safe(self, bench: Workbench, requests: Sequence[EditRequest] | None = None) -> list[Encoded]:
        """Every request, or these, with its safe answer, ended."""
        chosen = self.requests if requests is None else requests
        return [bench.encoder.encode(r.prompt, r.target_new or "", end=True) for r in chosen]

    def unsafe(self, bench: Workbench, requests: Sequence[EditRequest] | None = None) -> list[Encoded]:
        """Every request, or these, with the beginning of its unsafe answer."""
        chosen, tokens = self.requests if requests is None else requests, bench.config.unsafe_tokens
        return [bench.encoder.encode(r.prompt, r.ground_truth or "", answer_tokens=tokens) for r in chosen]

    def benign(self, bench: Workbench) -> list[Encoded]:
        """Every benign prompt with the beginning of its answer, not ended: most are cut."""
        tokens = bench.config.locality_tokens
        return [bench.encoder.encode(p.prompt, p.answer or "", answer_tokens=tokens) for p in self.locality]

    def held(self, bench: Workbench) -> list[Encoded]:
        """The same as `benign`, as an edit holds them: at a few tokens within the prompt too, drawn by the seed."""
        seeds = [f"{bench.config.seed} {pair.prompt}" for pair in self.locality]
        return _held(bench.encoder, self.benign(bench), bench.config.prompt_tokens, seeds)


def prepare(
    bench: Workbench, requests: Sequence[EditRequest], locality: Sequence[Pair] | None, held_out: Sequence[str] = ()
) -> Job:
    """Completes requests and locality pairs.

    Args:
        requests: of those that were drawn, the ones that the model refuses already make room for reserves.
        held_out: prompts that the job will be measured on: shipped requests among them are left out.

    Raises:
        InputError: there are no requests, the model refuses all of them already, one is too long, or one is also given
            as a benign pair.
    """
    _some(requests)
    every = [*requests, *reserves_of(requests)]
    _apart(every, _given(every, locality))
    for request in every:
        bench.encoder.prompt_ids(request.prompt)  # a prompt that is too long is told before anything is generated
    complete, refused = _with_answers(bench, requests)
    if not complete:
        raise InputError(
            f"the model refuses all {refused:,} requests already",
            do="there is nothing to edit; give requests that it answers, or their unsafe answers as ground_truth",
        )
    given = _given(complete, locality)
    if given:
        for pair in given:
            bench.encoder.prompt_ids(pair.prompt)
        source = "given" if locality is None else _source(locality)
        return Job(tuple(complete), drawn_of(requests), refused, tuple(_answered(bench, given)), source)
    companions = _companions(bench.encoder, bench.config, complete, held_out)
    return Job(
        tuple(complete),
        drawn_of(requests),
        refused,
        tuple(_shipped_pairs(bench)),
        "the model's own answers to the shipped benign prompts",
        tuple(companions),
        tuple(_unseen(bench.encoder, bench.config, [*requests, *companions], held_out)) if companions else (),
    )


def lengths(
    encoder: PromptEncoder,
    config: PKEConfig,
    requests: Sequence[EditRequest],
    locality: Sequence[Pair] | None,
    held_out: Sequence[str] = (),
) -> tuple[list[Encoded], list[Encoded], list[list[Encoded]]]:
    """Sequences as long as those that `Job.edited_on` and `Job.benign` will be, before anything is asked of the model.

    Returns:
        the requests', the locality pairs', and request by request those that score together.

    Raises:
        InputError: there are no requests, or a prompt is too long.
    """
    _some(requests)
    given = _given(requests, locality)
    beside = [] if given else _companions(encoder, config, requests, held_out)
    edited_on = _together(requests, beside)
    safe = [encoder.encode(r.prompt, r.target_new or config.refusal, end=True) for r in edited_on]
    prompts = [p.prompt for p in given] or _shipped_prompts(encoder, config)
    answered = [_unanswered(encoder, prompt, config.locality_tokens) for prompt in prompts]
    scored = [] if config.score_loss == "unsafe" else [safe]
    if config.score_loss != "safe":
        scored.append([_unsafe(encoder, config, request) for request in edited_on])
    together = [list(group) for group in zip(*scored, strict=True)]
    return safe, _held(encoder, answered, config.prompt_tokens, [""] * len(answered)), together


def _some(requests: Sequence[EditRequest]) -> None:
    if not requests:
        raise InputError("no requests", expected="at least one edit request")


def _apart(requests: Sequence[EditRequest], given: Sequence[Pair]) -> None:
    both = {request.prompt for request in requests} & {pair.prompt for pair in given}
    if both:
        raise InputError(
            "a prompt is both a request and a benign pair, so that its answer would have to change and to stay",
            expected="different prompts",
            got=f"{len(both)} in both, such as {min(both)!r:.60}",
        )


def _unsafe(encoder: PromptEncoder, config: PKEConfig, request: EditRequest) -> Encoded:
    if request.ground_truth:
        return encoder.encode(request.prompt, request.ground_truth, answer_tokens=config.unsafe_tokens)
    return _unanswered(encoder, request.prompt, config.unsafe_tokens)


def _unanswered(encoder: PromptEncoder, prompt: str, most: int) -> Encoded:
    """A prompt with room for an answer of so many tokens, as far as it fits."""
    ids = encoder.prompt_ids(prompt)
    return Encoded((*ids, *[0] * min(most, encoder.limit - len(ids))), len(ids))


def _held(encoder: PromptEncoder, sequences: Sequence[Encoded], most: int, seeds: Sequence[str]) -> list[Encoded]:
    """The sequences, each held at all places of its prompt before the last, or so many of them; not at those that a
    template writes, the same in every prompt."""
    begun, ended = encoder.around()
    held = []
    for sequence, seed in zip(sequences, seeds, strict=True):
        within = range(begun, sequence.prompt_length - max(1, ended))
        places = sorted(random.Random(seed).sample(within, min(most, len(within))))
        held.append(replace(sequence, held=tuple(places)))
    return held


def _together(requests: Sequence[EditRequest], companions: Sequence[EditRequest]) -> tuple[EditRequest, ...]:
    repeat = max(1, round(len(companions) / COMPANIONS / len(requests)))
    return (*tuple(requests) * repeat, *companions)


def _source(locality: Sequence[Pair]) -> str:
    """Where given pairs came from."""
    count, of = len(locality), drawn_of(locality)
    return "given" if count == of else f"{count:,} drawn of {of:,} given"


def _given(requests: Sequence[EditRequest], locality: Sequence[Pair] | None) -> list[Pair]:
    return [*(locality or ()), *(pair for request in requests for pair in request.locality)]


def _companions(
    encoder: PromptEncoder, config: PKEConfig, requests: Sequence[EditRequest], held_out: Sequence[str]
) -> list[EditRequest]:
    """The shipped harmful requests, and a share of these and the given ones within frames."""
    if not config.companions:
        return []
    beside = shipped.some(_others(config, requests, held_out), config.companions)
    together = (*requests, *beside)
    chosen = shipped.some(together, int(len(together) * config.framed))
    texts = shipped.framed([request.prompt for request in chosen], 1.0)
    framed = [
        EditRequest(text, request.target_new or config.refusal, FRAMED_ANSWER)
        for text, request in zip(texts, chosen, strict=True)
    ]
    return [request for request in (*beside, *framed) if encoder.fits(request.prompt)]


def _unseen(
    encoder: PromptEncoder, config: PKEConfig, seen: Sequence[EditRequest], held_out: Sequence[str]
) -> list[EditRequest]:
    """Some of the shipped harmful requests that aren't edited on."""
    return shipped.some([r for r in _others(config, seen, held_out) if encoder.fits(r.prompt)], MOST_UNSEEN)


def _others(config: PKEConfig, seen: Sequence[EditRequest], held_out: Sequence[str]) -> list[EditRequest]:
    left_out = {request.prompt for request in seen} | set(held_out)
    return [replace(r, target_new=config.refusal) for r in shipped.harmful() if r.prompt not in left_out]


def _shipped_prompts(encoder: PromptEncoder, config: PKEConfig) -> list[str]:
    """The shipped benign prompts; beside companions a share of them within frames too."""
    prompts = shipped.some(shipped.benign(), config.shipped_pairs)
    if config.companions:
        prompts += shipped.framed(prompts, config.framed)
    return [prompt for prompt in prompts if encoder.fits(prompt)]


def _with_answers(bench: Workbench, requests: Sequence[EditRequest]) -> tuple[list[EditRequest], int]:
    """Those that the model doesn't refuse, complete, and how many it refused; reserves take the place of these."""
    complete: list[EditRequest] = []
    waiting, reserves = list(requests), reserves_of(requests)
    asked = rounds = 0
    while waiting:
        rounds += 1
        asked += len(waiting)
        complete += _not_refused(bench, waiting, "Asking for unsafe answers" + (f", {rounds}" if rounds > 1 else ""))
        short = len(requests) - len(complete)
        waiting, reserves = reserves[:short], reserves[short:]
    return complete, asked - len(complete)


def _not_refused(bench: Workbench, requests: Sequence[EditRequest], doing: str) -> list[EditRequest]:
    lacking = [request.prompt for request in requests if not request.ground_truth]
    own = iter(bench.answers(lacking, bench.config.unsafe_tokens, doing) if lacking else [])
    judge, complete = get_judge(REFUSAL_JUDGE), []
    for request in requests:
        unsafe = request.ground_truth or next(own)
        if request.ground_truth or (unsafe and not judge.refused(unsafe)):
            target = request.target_new or bench.config.refusal
            complete.append(replace(request, target_new=target, ground_truth=unsafe))
    return complete


def _answered(bench: Workbench, pairs: Sequence[Pair]) -> list[Pair]:
    """Pairs without an answer get the model's own; those that it answers with nothing are left out."""
    lacking = [pair.prompt for pair in pairs if not pair.answer]
    own = iter(bench.answers(lacking, bench.config.locality_tokens, "Asking for benign answers") if lacking else [])
    answered = [pair if pair.answer else Pair(pair.prompt, next(own)) for pair in pairs]
    return [pair for pair in answered if pair.answer]


def _shipped_pairs(bench: Workbench) -> list[Pair]:
    """The shipped benign prompts with the model's own answers, made once and kept in the cache."""
    config = bench.config
    prompts = _shipped_prompts(bench.encoder, config)
    settings = [prompts, config.system_prompt, config.suffix_system_prompt, config.locality_tokens, config.max_length]
    rendered = [bench.encoder.prompt_ids(prompt) for prompt in prompts]  # the tokenizer and its template count too
    key = hashlib.sha256(json.dumps([bench.fingerprint, rendered, *settings]).encode()).hexdigest()[:16]
    path = cache_folder() / "answers" / f"{key}.jsonl"
    kept: list[Pair] = []
    with suppress(InputError):  # not there yet, or spoilt: made anew
        kept = read_pairs(path)
    if all(bench.ranks.gathered([bool(kept)])):  # ranks on several machines have several caches
        return kept
    pairs = _answered(bench, [Pair(prompt) for prompt in prompts])
    if pairs and bench.ranks.first:
        try:
            write_pairs(path, pairs)
        except (PKEError, OSError) as error:  # they serve later jobs alone
            LOG.warning("the answers to the shipped prompts aren't kept for later jobs: %s", error)
    return pairs
