"""The plan: how many tokens at once and how many layers keep their graph, so that a job fits into its memory.

What a choice costs is seen in a rehearsal, not guessed. Of all that fit, the fastest is taken: keeping a layer's graph
saves one more forward of it; fewer tokens at once use the device less well.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence

import torch

from pke_fast.batches import make_batch
from pke_fast.budget import free_bytes
from pke_fast.columns import columns_of
from pke_fast.config import PKEConfig
from pke_fast.editing import Trainer
from pke_fast.encoding import Encoded
from pke_fast.errors import InputError
from pke_fast.mapped import mapped_bytes
from pke_fast.pace import LEAST_TOKENS, Pace
from pke_fast.plan import Load, Plan
from pke_fast.rehearsal import NotRehearsed, Twin, twin_of
from pke_fast.scoring import score_batch
from pke_fast.stages import PeakMemory
from pke_fast.structure import Structure

LOG = logging.getLogger(__name__)

# Tokens at once from which on more gain little, and those at which half the time goes into reading weights: a CPU is
# busy with a few rows; a GPU of 150 to 300 flops a byte needs as many.
PREFERRED = {"cpu": 512, "cuda": 4096}
_IDLE = {"cpu": 24, "cuda": 300}
FP32 = 4


class Planner:
    """Makes plans for one model and job.

    Args:
        twin: of the model.
        config: the settings.
        load: what the sequences are like.
        device: where the work will be done.
        edits: False for a job that only locates, in all layers.
        process: as of `Plan`.
        mapped: bytes of the weights that lie in a mapped file: they needn't be in memory where there is no room.
    """

    def __init__(
        self,
        twin: Twin,
        config: PKEConfig,
        load: Load,
        device: str = "cpu",
        *,
        edits: bool = True,
        process: int = 0,
        mapped: int = 0,
    ) -> None:
        self._twin, self._load, self._edits = twin, load, edits
        self._config = config.replace(lr=config.lr or 1e-3)  # the default asks the weights, which aren't there
        self._process, self._mapped, self._on_disk = process, mapped, 0
        self._neurons = twin.structure.neurons
        depth = len(twin.structure.layers)
        self._window = config.layer_window(depth) if config.method == "pke" else (0, 1)  # dinm: the costliest layer
        self._first = self._window[0] if edits else 0  # locating alone scores every layer
        self._scored, self._edited = depth - self._first, depth - self._window[0]  # layers that a pass goes through
        self._kind = "cuda" if device.startswith("cuda") else "cpu"
        self._most = config.micro_batch_tokens or PREFERRED[self._kind]

    def plan(self, budget: int | None) -> Plan:
        """The fastest plan that fits; with weights left on disk where nothing else does.

        Raises:
            InputError: the budget is smaller than the least possible, which is named.
        """
        self._on_disk = 0
        best = self._best(budget)
        if best is None and self._mapped:
            self._on_disk = max(0, self._mapped - self._held())
            best = self._best(budget)
        if best is None:
            fewest = self._choices()[-1]
            scoring, editing = (self._lightest(doing, fewest) for doing in ("scoring", "editing"))
            least = self._made(fewest, scoring, editing, budget)
            raise InputError(
                "the memory budget is too small",
                expected=f"at least {_size(least.peak)} for this model and job (weights {_size(least.weights)})",
                got=_size(budget or 0),
                do="raise it, lower k, edit upper layers alone (--set window=[0.8,1.0]), or load the model in bf16",
            )
        return best

    def _held(self) -> int:
        """The mapped weights that have to be in memory all the same: two layers at a time, and what is written to."""
        first, end = self._window
        structure = self._twin.structure
        down = structure.neurons * structure.hidden_size * structure.dtype.itemsize
        return 2 * self._twin.layer_weights + (end - first) * down * self._edits

    def _best(self, budget: int | None) -> Plan | None:
        best, larger = None, []
        for tokens in self._choices():
            made = self._made(tokens, self._scored, self._edited, budget)
            if budget is None or made.peak <= budget:
                best = made
                break  # fewer tokens would only be slower
            larger.append(made)
        for whole in larger:
            if best is None or self._bound(whole) < self._slowness(best):
                fitted = self._fitted(whole)
                if fitted is not None and (best is None or self._slowness(fitted) < self._slowness(best)):
                    best = fitted
        return best

    def _choices(self) -> list[int]:
        tokens = [self._most]
        while tokens[-1] >= 2 * LEAST_TOKENS:
            tokens.append(tokens[-1] // 2)
        return tokens

    def _bound(self, whole: Plan) -> float:
        """No plan with as many tokens at once as this one, whose layers all keep their graph, is faster."""
        again = sum(max(0.0, 1 - whole.room / size) for size in (whole.locating, whole.editing) if size)
        return (2 + again / 2) * self._idle(whole.tokens)

    def _fitted(self, whole: Plan) -> Plan | None:
        """The plan with as many tokens at once, and as many kept layers as fit; None if none fits."""
        scoring = self._kept("scoring", whole.tokens, self._scored, whole.locating, whole.room)
        if scoring is None:
            return None
        editing = self._kept("editing", whole.tokens, self._edited, whole.editing, whole.room)
        return None if editing is None else self._made(whole.tokens, scoring, editing, whole.budget)

    def _kept(self, doing: str, tokens: int, depth: int, whole: int, room: int) -> int | None:
        """How many of `depth` layers can keep their graph, where all of them take `whole`; None if none can."""
        if whole <= room or room < 0:
            return depth if whole <= room else None
        least = self._lightest(doing, tokens)
        besides = whole - self._peak(doing, tokens, depth)
        none = besides + self._peak(doing, tokens, least)
        if none > room:
            return None
        kept = least + (depth - least) * (room - none) // (whole - none)
        while besides + self._peak(doing, tokens, kept) > room:  # what lies between isn't quite a line
            kept -= 1
        return kept

    def _lightest(self, doing: str, tokens: int) -> int:
        """The kept layers that take least. One may take less than none: its input needn't be held apart."""
        return min((1, 0), key=lambda kept: self._peak(doing, tokens, kept))

    def _slowness(self, plan: Plan) -> float:
        again = (1 - plan.scoring_kept / self._scored) + (1 - plan.editing_kept / self._edited)
        return (2 + again / 2) * self._idle(plan.tokens)

    def _idle(self, tokens: int) -> float:
        return 1 + _IDLE[self._kind] / tokens

    def _made(self, tokens: int, scoring_kept: int, editing_kept: int, budget: int | None) -> Plan:
        structure, config, load = self._twin.structure, self._config, self._load
        item, pke, edits = structure.dtype.itemsize, config.method == "pke", self._edits
        values = (config.k if pke else self._neurons) * structure.hidden_size
        columns = values * (4 * FP32 + item) if edits else 0  # old values, in fp32 too, masters, two moments
        forward = 2 * self._twin.layer_weights / item  # flops of a token in a layer
        there = self._first + 3 * self._scored - scoring_kept
        every = config.num_steps * (config.batch_size + config.locality_batch_size * bool(load.locality))
        stepped = every * load.tokens / max(1, load.requests + load.locality)
        return Plan(
            budget,
            len(structure.layers),
            tokens,
            scoring_kept,
            editing_kept,
            self._process,
            self._twin.weights - self._on_disk,
            self._on_disk,
            2 * 3 * len(structure.layers) * self._neurons * FP32 if pke else 0,
            self._peak("scoring", tokens, scoring_kept) if pke else 0,
            load.tokens * structure.hidden_size * item if edits else 0,
            columns,
            max(0, self._peak("editing", tokens, editing_kept) - columns) if edits else 0,  # they are rehearsed with it
            forward * load.tokens * there if pke else 0.0,
            forward * (load.tokens * self._window[0] + stepped * (3 * self._edited - editing_kept)) if edits else 0.0,
        )

    def _peak(self, doing: str, tokens: int, kept: int) -> int:
        """What `doing` takes, rehearsed once."""
        config, load = self._config, self._load
        if doing == "scoring":
            parts = [(load.request_widths, load.requests), (load.locality_widths, load.locality)]
            batches = [max((self._fullest(tokens, *part) for part in parts), key=_tokens_of)]
        else:
            requests = self._fullest(tokens, load.request_widths, min(config.batch_size, load.requests))
            locality = self._fullest(tokens, load.locality_widths, min(config.locality_batch_size, load.locality))
            batches = [requests, locality]
        shapes = tuple((len(batch), len(batch[0].ids) if batch else 0) for batch in batches)
        key = (doing, shapes, kept, self._first, self._window, load.answer, config)
        if key not in self._twin.peaks:
            work = self._score if doing == "scoring" else self._step
            self._twin.peaks[key] = self._twin.rehearse(
                lambda structure: work(structure, kept, *batches),
                self._first if doing == "scoring" else self._window[0],
            )
        return self._twin.peaks[key]

    def _fullest(self, tokens: int, widths: Sequence[int], most: int) -> list[Encoded]:
        """The micro-batch with the most tokens, of at most so many sequences, that these lengths can give."""
        if not widths or not most:
            return []
        tokens, width = max((width * max(1, min(tokens // width, most)), width) for width in widths)
        return [Encoded((0,) * width, max(1, width - self._load.answer))] * (tokens // width)

    def _score(self, structure: Structure, kept: int, sequences: list[Encoded]) -> None:
        batch = make_batch(sequences, range(len(sequences)), 0)
        score_batch(structure, batch, torch.ones(len(sequences)), self._first, kept)

    def _step(self, structure: Structure, kept: int, requests: list[Encoded], locality: list[Encoded]) -> None:
        """A micro-batch of requests and one of locality pairs: the first one's gradients wait for the second's."""
        first, end = self._window
        config = self._config
        each = max(1, config.k // (end - first)) if config.method == "pke" else self._neurons
        neurons = torch.arange(min(each, self._neurons))
        columns = columns_of(structure, dict.fromkeys(range(first, end), neurons), config.edited)
        most = max(_tokens_of(requests), _tokens_of(locality))
        trainer = Trainer(structure, columns, requests, locality, config, 0, pace=Pace(most, None, kept))
        trainer.gradients(0)
        trainer.update(0)


def _tokens_of(sequences: Sequence[Encoded]) -> int:
    return sum(len(sequence.ids) for sequence in sequences)


def _size(value: int) -> str:
    """Rounded up, so that the least budget that is named is enough."""
    unit, name = (2**30, "GiB") if value >= 2**30 else (2**20, "MiB")
    return f"{math.ceil(value * 1000 / unit) / 1000:.3f} {name}"


def plan_loaded(structure: Structure, config: PKEConfig, load: Load, budget: int | None, *, edits: bool) -> Plan | None:
    """The plan of a job on a loaded model; None for a model that can't be rehearsed, where no budget is asked for.

    Args:
        budget: bytes in all, the model's included; None for what the device has free.

    Raises:
        InputError: the budget is too small.
        NotRehearsed: a budget can't be kept, since the model can't be rehearsed.
    """
    device = str(structure.device)
    cuda = device.startswith("cuda")
    try:
        twin = twin_of(structure.model, structure.dtype)
        Planner(twin, config, load, device, edits=edits).plan(None)  # loads what rehearsals need
        used = PeakMemory(device).current() or 0
        mapped, resident = mapped_bytes(structure.model)
        own = used - resident  # the weights that aren't mapped included
        process = 0 if cuda else max(0, own - (twin.weights - mapped))
        room = budget
        if budget is None and (free := free_bytes(device)) is not None:
            room = free + (twin.weights if cuda else own)  # mapped weights in memory count as free
        return Planner(twin, config, load, device, edits=edits, process=process, mapped=mapped).plan(room)
    except NotRehearsed as error:
        if budget is not None:
            raise
        LOG.info("%s", error)
        return None


def matmul_rate(device: str, dtype: torch.dtype, hidden: int, neurons: int, seconds: float = 0.3) -> float:
    """Flops a second of products [512, hidden] x [hidden, neurons], measured now: the least of the times counts."""
    left = torch.ones(PREFERRED["cpu"], hidden, dtype=dtype, device=device)
    right = torch.ones(hidden, neurons, dtype=dtype, device=device)
    best, end = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < end:
        start = time.perf_counter()
        left @ right
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * left.numel() * neurons / best
