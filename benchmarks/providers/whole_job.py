"""The whole job, locating included: until a held-out loss is reached, with the clock stopped while that is measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from pke_fast import shipped
from pke_fast.batches import Batch, pack
from pke_fast.bench.subjects import repeated
from pke_fast.config import PKEConfig
from pke_fast.encoding import Encoded, PromptEncoder
from pke_fast.generation import generate
from pke_fast.loading import context_length, load_model, pad_token_id
from pke_fast.structure import Structure, find_structure
from pke_fast.workbench import laid_out

# What all tools do alike: down alone, a steady rate.
WHOLE = PKEConfig(batch_size=16, lr_end=1.0, w_kl=4.0, projections=("down",))
HELD_OUT_TOKENS = 1024  # in flight while the held-out loss is measured, which nobody is charged for


@dataclass(frozen=True, eq=False)
class Job:
    """What every provider is given.

    Attributes:
        requests, unsafe: harmful prompts with the safe answer, and with the beginning of an unsafe one.
        locality: benign prompts with the model's own answers.
        config: k, window, batch sizes, weights of the losses, micro-batch; `lr` is the provider's own.
        held_out: what decides when the job is done.
    """

    structure: Structure
    requests: list[Encoded]
    unsafe: list[Encoded]
    locality: list[Encoded]
    pad_id: int
    config: PKEConfig
    held_out: HeldOut

    @property
    def layers(self) -> range:
        """The layers of the window."""
        return range(*self.config.layer_window(len(self.structure.layers)))

    @property
    def scored(self) -> tuple[list[Encoded], list[Encoded]]:
        """What neurons are located by: `score_requests` of the requests, `score_pairs` of the pairs, evenly spread."""
        config = self.config
        return shipped.some(self.requests, config.score_requests), shipped.some(self.locality, config.score_pairs)


class HeldOut:
    """Mean cross-entropy of the safe answer on prompts that aren't edited on, every token alike; and the mean KL to the
    unedited model at the first answer token of benign prompts that aren't held."""

    def __init__(self, structure: Structure, harmful: list[Encoded], benign: list[Encoded], pad_id: int) -> None:
        self.structure = structure
        device = structure.device
        self._harmful = [batch.to(device) for batch in pack(harmful, HELD_OUT_TOKENS, pad_id)]
        self._benign = [batch.to(device) for batch in pack(benign, HELD_OUT_TOKENS, pad_id)]
        with torch.no_grad():
            self._base = [self._log_p(batch) for batch in self._benign]

    def _log_p(self, batch: Batch) -> Tensor:
        hidden = self.structure.base(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
        ).last_hidden_state
        return F.log_softmax(self.structure.head(hidden.flatten(0, 1)[batch.positions]).float(), -1)

    @torch.no_grad()
    def measure(self) -> tuple[float, float]:
        """Both, with the weights as they are."""
        loss, kl = 0.0, 0.0
        for batch in self._harmful:
            losses = F.nll_loss(self._log_p(batch), batch.targets, reduction="none")
            loss += float((losses * batch.answer_weights()).sum())
        for batch, base in zip(self._benign, self._base, strict=True):
            first = batch.nth == 0
            kl += float(F.kl_div(self._log_p(batch)[first], base[first], log_target=True, reduction="sum"))
        return loss / sum(len(b.rows) for b in self._harmful), kl / sum(len(b.rows) for b in self._benign)


class Ended(Exception):
    """The job is done, or has gone on for too long."""


@dataclass
class Watch:
    """The clock of a whole job. Calling it says that a step was made; it raises `Ended` when there need be no more.

    Attributes:
        target: the held-out loss to reach.
        most_kl: the held-out KL at which reaching it counts; infinite where the KL is only reported.
        every: steps between two measurements.
        most_steps, most_seconds: when to give up.
        curve: (steps, seconds, held-out loss, KL) at every measurement.
    """

    held_out: HeldOut
    target: float
    most_kl: float = float("inf")
    every: int = 2
    most_steps: int = 60
    most_seconds: float = float("inf")
    curve: list[tuple[int, float, float, float]] = field(default_factory=list)
    steps: int = 0
    _seconds: float = 0.0
    _since: float = 0.0

    def start(self) -> None:
        self._since = time.perf_counter()

    def __call__(self, count: int = 1) -> None:
        self.steps += count
        if self.steps % self.every:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._seconds += time.perf_counter() - self._since
        loss, kl = self.held_out.measure()
        self.curve.append((self.steps, self._seconds, loss, kl))
        if self.reached or self.steps >= self.most_steps or self._seconds > self.most_seconds:
            raise Ended
        self._since = time.perf_counter()

    @property
    def reached(self) -> bool:
        return bool(self.curve) and self.curve[-1][2] < self.target and self.curve[-1][3] <= self.most_kl


Edit = Callable[[Job, float, Callable[[int], None]], None]
"""(job, lr, after each step): locates and edits until the last raises; the weights are put back then."""


def run(edit: Edit, job: Job, lr: float, watch: Watch) -> Watch:
    """Runs one provider's whole job and puts the weights back."""
    watch.start()
    with suppress(Ended):
        edit(job, lr, watch)
    return watch


@contextmanager
def job_of(
    model: str,
    *,
    requests: int = 64,
    held_out: int = 16,
    device: str = "cpu",
    dtype: str = "fp32",
    config: PKEConfig | None = None,
) -> Iterator[Job]:
    """The job on the shipped prompts; answers to benign prompts are the model's own."""
    config = config or WHOLE
    loaded = load_model(model, device=device, dtype=dtype)
    encoder = PromptEncoder(loaded.tokenizer, config, context_length(loaded.model))
    with laid_out(loaded.model):
        structure = find_structure(loaded.model)
        pad_id = pad_token_id(loaded.tokenizer, loaded.model)

        def safe(prompts: list[str]) -> list[Encoded]:
            return [encoder.encode(prompt, config.refusal, end=True) for prompt in prompts]

        def own(prompts: list[str], tokens: int) -> list[Encoded]:
            answers = generate(loaded.model, loaded.tokenizer, encoder, prompts, max_new_tokens=tokens)
            pairs = [(p, a) for p, a in zip(prompts, answers, strict=True) if a.strip()]
            return [encoder.encode(prompt, answer, answer_tokens=tokens) for prompt, answer in pairs]

        harmful = shipped.harmful()[:requests]
        unsafe = [
            encoder.encode(r.prompt, r.ground_truth or "Sure", answer_tokens=config.unsafe_tokens) for r in harmful
        ]
        yield Job(
            structure,
            repeated(safe([request.prompt for request in harmful]), requests),
            repeated(unsafe, requests),
            own(shipped.benign()[:requests], config.locality_tokens),
            pad_id,
            config,
            HeldOut(
                structure,
                safe(shipped.harmful_held_out()[:held_out]),
                own(shipped.benign_held_out()[:held_out], 1),
                pad_id,
            ),
        )
