"""The plan: how many tokens at once and how many layers keep their graph, so that a job fits into its memory.

What a choice costs is seen in a rehearsal, not guessed. Of all that fit, the fastest is taken: keeping a layer's graph
saves one more forward of it; fewer tokens at once use the device less well.
"""

from __future__ import annotations

import logging
import math
from bisect import bisect_left
from collections.abc import Sequence
from functools import partial

import torch

from pke_fast.batches import make_batch
from pke_fast.columns import columns_of
from pke_fast.config import PKEConfig
from pke_fast.detectors import detectors_bytes, fit_bytes, wanted
from pke_fast.encoding import Encoded
from pke_fast.errors import InputError
from pke_fast.pace import LEAST_TOKENS, Pace
from pke_fast.plan import ALL_THERE, Load, Plan, Residence
from pke_fast.prefix import Prefix
from pke_fast.rehearsal import Twin
from pke_fast.scoring import LEAST_SEQUENCES, score_batch
from pke_fast.staging import staging_bytes
from pke_fast.structure import Structure
from pke_fast.tape import Tape, record
from pke_fast.trainer import Trainer, reached

LOG = logging.getLogger(__name__)

# Tokens at once from which on more gain little, and those at which half the time goes into reading weights: a CPU is
# busy with a few rows; a GPU of 150 to 300 flops a byte needs as many.
PREFERRED = {"cpu": 512, "cuda": 4096}
_IDLE = {"cpu": 24, "cuda": 300}
# Tokens that go up through a layer while its weights come: cards have 6,000 to 12,000 flops a byte of PCIe.
_BRINGING = {"cpu": 24, "cuda": 8000}
# What an allocator holds for what is in use: glibc keeps freed blocks between others, some 0.5 of it (measured.md).
_HELD = {"cpu": 1.5, "cuda": 1.0}
_LATER = 40 * 2**20  # what Python and its libraries grow by in a job: modules that it imports, buffers of threads
_ANSWER = 32  # tokens of a short prompt and its answer
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
        residence: which weights are on the device.
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
        residence: Residence = ALL_THERE,
    ) -> None:
        self._twin, self._load, self._edits = twin, load, edits
        self._config = config.replace(lr=config.lr or 1e-3)  # the default asks the weights, which aren't there
        self._process, self._mapped, self._on_disk = process + _LATER * bool(process), mapped, 0
        self._residence, self._offloaded = residence, 0  # how many layers are offloaded in the plan that is looked at
        self._neurons = twin.structure.neurons
        depth = len(twin.structure.layers)
        self._window = config.layer_window(depth) if config.method == "pke" else (0, 1)  # dinm: the costliest layer
        self._first = self._window[0] if edits else 0  # locating alone scores every layer
        self._scored, self._edited = depth - self._first, depth - self._window[0]  # layers that a pass goes through
        self._sizes = [sum(p.numel() * p.element_size() for p in layer.parameters()) for layer in twin.structure.layers]
        self._kind = "cuda" if device.startswith("cuda") else "cpu"
        self._most = config.micro_batch_tokens or PREFERRED[self._kind]
        self._begun = load.begun if edits and self._goes_on(load.begun) else 0
        self._rest = load.after(self._begun)  # what is edited on
        if config.method != "dinm-parity":  # which comes to every request
            self._rest = self._rest.reached(*reached(config, load.requests, load.locality))

    def plan(self, budget: int | None) -> Plan:
        """The fastest plan that fits; with weights left on disk, or layers offloaded, where nothing else does.

        Raises:
            InputError: the budget is smaller than the least possible, which is named.
        """
        self._on_disk = self._offloaded = 0
        best = self._best(budget)
        if best is None and self._mapped:
            self._on_disk = max(0, self._mapped - self._held())
            best = self._best(budget)
        if best is None and budget is not None and self._residence.offloads:
            best = self._best_offloaded(budget)
        if best is None:
            fewest = self._choices()[-1]
            self._offloaded = len(self._sizes) if self._residence.offloads else 0
            scoring, editing = (self._lightest(doing, fewest) for doing in ("scoring", "editing"))
            least = self._made(fewest, scoring, editing, budget)
            raise InputError(
                "the memory budget is too small",
                expected=f"at least {_size(least.peak)} for this model and job (weights {_size(least.weights)})",
                got=_size(budget or 0),
                do="raise it, lower k, give fewer requests, edit upper layers alone (--set window=[0.8,1.0]),"
                " or load the model in bf16",
            )
        return best

    def _held(self) -> int:
        """The mapped weights that have to be in memory all the same: two layers at a time, and what is written to."""
        first, end = self._window
        structure = self._twin.structure
        projection = structure.neurons * structure.hidden_size * structure.dtype.itemsize
        written = len(set(self._config.edited) & set(structure.mlps[0].kinds)) * self._edits
        return 2 * self._twin.layer_weights + (end - first) * projection * written

    def _best_offloaded(self, budget: int) -> Plan | None:
        """The fastest plan with as few layers offloaded as must be, or all below those that are gone through again."""
        best = None
        for tokens in self._choices():
            counts = range(1, len(self._sizes) + 1)
            nth = bisect_left(counts, True, key=lambda count: self._fits_offloaded(count, tokens, budget))
            if nth == len(counts):
                continue
            least = counts[nth]
            for offloaded in sorted({least, max(least, self._first)}):
                self._offloaded = offloaded
                whole = self._made(tokens, *self._most_kept(), budget)
                if best is None or self._slowness(whole) < self._slowness(best):  # the one that fits is no faster
                    fitted = self._fitted(whole)
                    if fitted is not None and (best is None or self._slowness(fitted) < self._slowness(best)):
                        best = fitted
        self._offloaded = 0 if best is None else best.layers_offloaded
        return best

    def _fits_offloaded(self, count: int, tokens: int, budget: int) -> bool:
        """Whether a plan fits with so many layers offloaded and the least kept. More offloaded take less."""
        self._offloaded = count
        kept = self._lightest("scoring", tokens), self._lightest("editing", tokens)
        return self._made(tokens, *kept, budget).peak <= budget

    def _most_kept(self) -> tuple[int, int]:
        """How many layers may keep their graph, while scores are made and in an edit step."""
        there = len(self._sizes) - max(self._offloaded, self._residence.kept_from)
        return min(self._scored, there), min(self._edited, there)

    def _best(self, budget: int | None) -> Plan | None:
        best, larger = None, []
        for tokens in self._choices():
            made = self._made(tokens, *self._most_kept(), budget)
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
        scoring = self._kept("scoring", whole.tokens, whole.scoring_kept, whole.locating, whole.room)
        if scoring is None:
            return None
        editing = self._kept("editing", whole.tokens, whole.editing_kept, whole.editing, whole.room)
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
        most = min(self._most_kept())
        return min((1, 0) if most else (0,), key=lambda kept: self._peak(doing, tokens, kept))

    def _slowness(self, plan: Plan) -> float:
        again = (1 - plan.scoring_kept / self._scored) + (1 - plan.editing_kept / self._edited)
        return (2 + again / 2) * self._idle(plan.tokens) + self._waiting(plan)

    def _waiting(self, plan: Plan) -> float:
        """For offloaded layers: bringing one lasts longer than what is computed meanwhile, on the way up and back."""
        bringing = _BRINGING[self._kind] / plan.tokens
        up, back = max(0.0, bringing - 1) / 3, max(0.0, bringing - 3) / 3  # of a way up and back
        offloaded = plan.layers_offloaded
        scored = offloaded * up + max(0, offloaded - self._first) * back
        edited = max(0, offloaded - self._window[0]) * (up + back)  # those below go up once, for all steps
        return scored / self._scored + edited / self._edited

    def _idle(self, tokens: int) -> float:
        return 1 + _IDLE[self._kind] / tokens

    def _made(self, tokens: int, scoring_kept: int, editing_kept: int, budget: int | None) -> Plan:
        structure, config, load = self._twin.structure, self._config, self._load
        item, pke, edits = structure.dtype.itemsize, config.method == "pke", self._edits
        kinds = set(structure.mlps[-1].kinds) & set(config.edited)
        values = (config.k if pke else self._neurons) * structure.hidden_size * len(kinds)
        columns = values * (4 * FP32 + item) if edits else 0  # old values, in fp32 too, masters, two moments
        forward = 2 * self._twin.layer_weights / item  # flops of a token in a layer
        there = 3 * self._scored - scoring_kept
        away = sum(self._sizes[: self._offloaded])
        staging = staging_bytes(structure.layers) if away else self._twin.layer_weights * bool(self._residence.away)
        minibatch = config.batch_size, config.locality_batch_size * bool(load.locality)
        rest, lengths = self._rest, (self._rest.request_length, self._rest.locality_length)
        sizes = [count * length for count, length in zip(minibatch, lengths, strict=True)]
        step = sum(sizes) + self._begun * sum(math.ceil(size / tokens) for size in sizes)
        below, stepped = rest.tokens * self._window[0], config.num_steps * step
        requests = min(load.requests, config.score_requests) * load.together
        pairs = min(load.locality, config.score_pairs)
        scored = requests * load.request_length + pairs * load.locality_length
        shared = self._shared(requests, pairs)
        held = rest.locality_tokens * self._edited * self._last_states
        answers = load.answer * minibatch[0] + load.held / max(1, load.locality) * minibatch[1]
        editing = forward * (below + held + stepped * (3 * self._edited - editing_kept))
        editing += 2 * self._head * config.num_steps * answers
        scoring = forward * (scored * there + (scored - shared) * self._first)
        scoring += 2 * self._head * load.answer * (requests + pairs)
        # What a step takes besides the columns, which are rehearsed with it.
        step_bytes = max(0, self._peak("editing", tokens, editing_kept) - columns) if edits else 0
        return Plan(
            budget,
            len(structure.layers),
            tokens,
            scoring_kept,
            editing_kept,
            self._process,
            self._twin.weights - self._on_disk - away - self._residence.away,
            self._on_disk,
            2 * 3 * len(structure.layers) * self._neurons * FP32 if pke else 0,
            self._peak("scoring", tokens, scoring_kept) if pke else 0,
            self._cache() if edits else 0,
            columns,
            step_bytes,
            scoring if pke else 0.0,
            editing if edits else 0.0,
            away + self._residence.away,
            self._offloaded,
            self._pinned(),
            staging,
            self._brought(tokens, scored, stepped),
            self._watched(step_bytes),
            self._answering(),
        )

    @property
    def _head(self) -> int:
        """Flops of a position's logits."""
        return 2 * self._twin.structure.head.weight.numel()

    def _shared(self, requests: int, pairs: int) -> int:
        """Tokens that locating needn't run in the layers below its window: what all sequences of a side begin with."""
        return self._begun * sum(count for count in (requests, pairs) if count >= LEAST_SEQUENCES)

    def _cache(self) -> int:
        """What is kept of all sequences, by what a micro-batch of their mean length keeps."""
        load, structure = self._rest, self._twin.structure
        tokens = min(self._most, load.tokens)
        width = math.ceil(load.tokens / (load.requests + load.locality))
        rows = [Encoded((0,) * width, max(1, width - load.answer))] * max(1, tokens // width)
        key = "tape", width, len(rows), load.tokens, self._window[0], self._begun
        if key not in self._twin.peaks:
            kept: list[int] = []

            def tapes(structure: Structure) -> None:
                beginning = self._after(structure, self._begun)
                kept.extend(tape.nbytes for tape in (beginning,) if tape)
                batch = make_batch(rows, range(len(rows)), 0)
                kept.append(record(structure, batch, self._window[0], after=beginning).nbytes)

            self._twin.rehearse(tapes, self._window[0])
            self._twin.peaks[key] = sum(kept[:-1]) + kept[-1] * load.tokens // (width * len(rows))
        held = load.held * structure.hidden_size * structure.dtype.itemsize
        return self._twin.peaks[key] + math.ceil(held * self._last_states)

    def _answering(self) -> int:
        """What a token takes while the model answers: keys and values in all layers, and its share of a pass."""
        vocabulary = len(self._twin.structure.head.weight)
        if "answering" not in self._twin.peaks:
            ids, device = range(_ANSWER), torch.device("cpu")
            try:
                taken = self._twin.rehearse(lambda structure: Prefix.of(structure.base, ids, device))
            except Exception as error:  # noqa: BLE001  as in `beginning_of`
                LOG.info("what answers take isn't known: %s", error)
                taken = 0
            logits = 2 * FP32 * vocabulary * bool(taken)  # of a row's last token, and once more to choose from
            self._twin.peaks["answering"] = (taken + logits) // _ANSWER
        return int(_HELD[self._kind] * self._twin.peaks["answering"])

    def _pinned(self) -> int:
        """How many offloaded layers, from the uppermost on, the host can pin."""
        pinned, left = 0, self._residence.pinnable
        for size in reversed(self._sizes[: self._offloaded]):
            left -= size
            if left < 0:
                break
            pinned += 1
        return pinned

    @property
    def _detecting(self) -> bool:
        """Whether the edit may begin with detectors."""
        kinds = set(self._twin.structure.mlps[-1].kinds)
        return wanted(self._config) and self._edits and bool(self._rest.locality) and kinds <= set(self._config.edited)

    @property
    def _last_states(self) -> float:
        """How often the locality pairs' last states are made and kept: of all, by the unedited model; and with the
        detectors, of those that steps come to."""
        again = self._config.num_steps * self._config.locality_batch_size / max(1, self._rest.locality)
        return 1 + min(1.0, again) * self._detecting

    def _watched(self, step: int) -> int:
        """What the edit's detectors take; on a GPU, fitting one over what a step takes, since they take turns."""
        structure, sequences = self._twin.structure, self._rest.requests + self._rest.locality
        if not self._detecting:
            return 0
        if self._kind != "cpu":
            return max(0, fit_bytes(sequences, structure.hidden_size) - step)
        layers = self._window[1] - self._window[0]
        return detectors_bytes(self._config, sequences, layers, structure.hidden_size, structure.dtype.itemsize)

    def _brought(self, tokens: int, scored: float, stepped: float) -> int:
        """Bytes of offloaded layers that are copied: once on the way up, once more on the way back."""
        sizes, lowest = self._sizes[: self._offloaded], self._window[0]
        once = math.ceil(self._rest.tokens / tokens)
        through = sum(sizes) + sum(sizes[self._first :])
        scoring = math.ceil(scored / tokens) * through * (self._config.method == "pke")
        editing = once * sum(sizes[:lowest]) + math.ceil(stepped / tokens) * 2 * sum(sizes[lowest:])
        return scoring + editing * self._edits

    def _goes_on(self, begun: int) -> bool:
        """Whether an edit's sequences go on from what all begin with: the model has to be of a kind that can."""
        if not begun or not self._window[0] or self._residence.kept_from > self._window[0]:
            return False
        try:
            self._twin.rehearse(lambda structure: self._after(structure, begun), self._window[0])
        except Exception as error:  # noqa: BLE001  as in `beginning_of`
            LOG.info("every sequence will run whole: %s", error)
            return False
        return True

    def _after(self, structure: Structure, begun: int) -> Tape | None:
        """What the sequences go on from; one does, to see whether it can."""
        if not begun:
            return None
        first, ids = self._window[0], (0,) * begun
        beginning = record(structure, make_batch([Encoded(ids, begun)], [0], 0), first, begins=True)
        record(structure, make_batch([Encoded((0, 0), 1)], [0], 0), first, after=beginning).run()
        return beginning

    def _peak(self, doing: str, tokens: int, kept: int) -> int:
        """What the allocator holds for `doing`, which is rehearsed once."""
        config, load = self._config, self._load if doing == "scoring" else self._rest
        together = 1
        if doing == "scoring":
            widths = load.scored_widths or load.request_widths
            requests = self._fullest(tokens, widths, load.requests, load.together)
            locality = self._fullest(tokens, load.locality_widths, load.locality)
            batches = [max(requests, locality, key=_tokens_of)]
            together = load.together if batches[0] is requests else 1
        else:
            requests = self._fullest(tokens, load.request_widths, min(config.batch_size, load.requests))
            locality = self._fullest(tokens, load.locality_widths, min(config.locality_batch_size, load.locality))
            batches = [requests, locality]
        shapes = tuple((len(batch), len(batch[0].ids) if batch else 0) for batch in batches)
        key = (doing, shapes, together, kept, self._first, self._window, load.answer, self._begun, config)
        if key not in self._twin.peaks:
            work = partial(self._score, together) if doing == "scoring" else self._step
            self._twin.peaks[key] = self._twin.rehearse(
                lambda structure: work(structure, kept, *batches),
                self._first if doing == "scoring" else self._window[0],
            )
        return int(_HELD[self._kind] * self._twin.peaks[key])

    def _fullest(self, tokens: int, widths: Sequence[int], most: int, together: int = 1) -> list[Encoded]:
        """The micro-batch with the most tokens, of at most so many sequences, that these lengths can give.

        Args:
            together: so many of one length stay together, and count as one.
        """
        if not widths or not most:
            return []
        groups = ((together * width, width) for width in widths)
        tokens, width = max((size * max(1, min(tokens // size, most)), width) for size, width in groups)
        return [Encoded((0,) * width, max(1, width - self._load.answer))] * (tokens // width)

    def _score(self, together: int, structure: Structure, kept: int, sequences: list[Encoded]) -> None:
        rows = range(len(sequences))
        batch = make_batch(sequences, rows, 0, [row // together for row in rows])
        score_batch(structure, batch, torch.ones(len(sequences)), self._first, kept)

    def _step(self, structure: Structure, kept: int, requests: list[Encoded], locality: list[Encoded]) -> None:
        """A micro-batch of requests and one of locality pairs: the first one's gradients wait for the second's."""
        first, end = self._window
        config = self._config
        each = max(1, config.k // (end - first)) if config.method == "pke" else self._neurons
        neurons = torch.arange(min(each, self._neurons))
        columns = columns_of(structure, dict.fromkeys(range(first, end), neurons), config.edited)
        most = max(_tokens_of(requests), _tokens_of(locality))
        beginning = self._after(structure, self._begun)
        pace = Pace(most, None, kept)
        trainer = Trainer(structure, columns, requests, locality, config, 0, pace=pace, beginning=beginning)
        trainer.gradients(0)
        trainer.update(0)


def _tokens_of(sequences: Sequence[Encoded]) -> int:
    return sum(len(sequence.ids) for sequence in sequences)


def _size(value: int) -> str:
    """Rounded up, so that the least budget that is named is enough."""
    unit, name = (2**30, "GiB") if value >= 2**30 else (2**20, "MiB")
    return f"{math.ceil(value * 1000 / unit) / 1000:.3f} {name}"
