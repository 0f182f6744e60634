"""The closed-form beginning of an edit: in a few layers, one hot spot becomes a detector of what is to be refused.

What the model knows of a prompt stands in the residual stream at its last token: a linear probe reads it off in one
pass, where steps of Adam find it slowly. So a neuron's gate row becomes that probe (its activation is then about 0 for
benign prompts and at other tokens), its up row tells prompts' last tokens from all others, and its column of down
points where the safe answers' loss falls. The steps that follow begin there, and change these weights as all others.

    min over w, b:  sum_n s_n log(1 + exp(-y_n (w . x_n / rms + b c . x_n + gate's bias))) + RIDGE |w|^2

x: the MLP's input. y = 1 at the last token of harmful prompts, -1 at that of benign ones and at other tokens of both;
each of the three has a share s of the whole: 1/2, 1/2 and OTHERS_SHARE. Tokens that all sequences begin with, a
template's, are none of them. c . x is about 1 at last tokens and 0 at
others (ridge regression): the intercept stands there, since most MLPs have no biases, and those that there are stay as
they are.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pke_fast.batches import Batch
from pke_fast.columns import Columns
from pke_fast.config import PKEConfig
from pke_fast.kernels.glu_score import ACTIVATIONS
from pke_fast.memory import is_out_of_memory
from pke_fast.module_calls import hooks
from pke_fast.placement import stored_weight
from pke_fast.ranks import ALONE, Ranks
from pke_fast.structure import Structure
from pke_fast.tape import in_beginning

LEAST = 16  # sequences on either side: fewer say too little of what tells the sides apart
LAYERS = 6  # detectors at most, in the middle of the edited layers: below, less is known; above, less can follow
OTHERS = 2  # tokens of a sequence besides its prompt's last
OTHERS_SHARE = 1.0
RIDGE = 1e-3
CONSTANT_RIDGE = 1e-3  # of the mean square of the inputs
SOLVER: dict[str, Any] = {
    "max_iter": 500,
    "tolerance_grad": 1e-9,
    "tolerance_change": 1e-14,
    "line_search_fn": "strong_wolfe",
}
GAINS = (0.0, 0.25, 0.5, 1.0, 2.0)  # mean outputs of the MLP that a detected prompt moves the stream by
LESS = (0.125, 0.0625, 0.03125)  # where the least of these is too much: false alarms cost more than it brings

FIT_BYTES = 16  # of a layer's input while it is fitted: in fp32 once or twice, in fp64
GRAM_BYTES = 24  # of d^2: the inputs' products and what they are solved with, in fp64

Side = dict[tuple[int, int], Tensor]
Fitted = tuple[int, Tensor, Tensor, Tensor]
"""MLP inputs by minibatch and row: [layers, 1 + OTHERS, d], at the prompt's last token and at others."""


@dataclass(eq=False)
class _Detector:
    """One layer's: its projections' columns, and which of the hot spots."""

    gate: Columns
    up: Columns | None
    down: Columns
    act: str


class Detectors:
    """Collects MLP inputs while losses are measured, and then makes the detectors.

    Args:
        columns: what the edit changes; a layer can have a detector if all its projections are among them, and its
            activation is known.
        common: tokens at the beginning of every row that all sequences share: they are none of the others.
    """

    def __init__(
        self,
        structure: Structure,
        columns: Sequence[Columns],
        config: PKEConfig,
        ranks: Ranks = ALONE,
        common: int = 0,
    ) -> None:
        by_layer: dict[int, dict[str, Columns]] = {}
        for column in columns:
            by_layer.setdefault(column.layer, {})[column.projection] = column
        able = {}
        for layer, parts in by_layer.items():
            mlp = structure.mlps[layer]
            if mlp.act is not None and set(parts) == set(mlp.kinds):
                able[layer] = _Detector(parts["gate"], parts.get("up"), parts["down"], mlp.act)
        skipped = max(0, len(able) - LAYERS) // 2
        chosen = sorted(able)[skipped : skipped + LAYERS] if wanted(config) else []
        self._seed, self._ranks, self._common = config.seed, ranks, common
        self._detectors = [able[layer] for layer in chosen]
        self._sides: tuple[Side, Side] = ({}, {})

    def __bool__(self) -> bool:
        return bool(self._detectors)

    @property
    def stages(self) -> int:
        """How often `begin` advances."""
        return len(self._detectors) + len(GAINS)

    @contextmanager
    def watching(self, batch: Batch, benign: bool, minibatch: int) -> Iterator[None]:
        """While the upper layers run on a micro-batch, keeps what enters the MLPs at a few tokens of every row."""
        if not self._detectors:
            yield
            return
        width = batch.input_ids.shape[1]
        lengths = batch.attention_mask.sum(1).tolist()
        last = batch.positions[batch.nth == 0].tolist()
        places = [row * self._ranks.size + self._ranks.rank for row in batch.rows]  # the same for any number of ranks
        spots = []
        for row, (end, length) in enumerate(zip(last, lengths, strict=True)):
            others = [row * width + t for t in range(self._common, length) if row * width + t != end]
            draw = random.Random(f"{self._seed} {minibatch} {places[row]}")
            spots += [end, *(draw.choice(others or [end]) for _ in range(OTHERS))]
        index, kept = torch.tensor(spots), []

        def keep(_module: Any, args: Any) -> None:
            if in_beginning():
                return
            flat = args[0].detach().flatten(0, -2)
            kept.append(flat.index_select(0, index.to(flat.device)).cpu())

        with hooks(*(d.gate.place.module.register_forward_pre_hook(keep) for d in self._detectors)):
            yield
        inputs = torch.stack(kept).unflatten(1, (len(last), 1 + OTHERS))
        for row, place in enumerate(places):
            self._sides[benign][minibatch, place] = inputs[:, row].clone()

    @torch.no_grad()
    def begin(
        self,
        towards: Callable[[Pull], None],
        loss: Callable[[], float],
        advance: Callable[[int], None],
    ) -> float:
        """Makes the detectors in the live weights.

        Args:
            towards: runs some requests there and back, each micro-batch while `Pull.watching` it.
            loss: the edit's whole loss on a few minibatches, with the weights as they are.

        Returns:
            the gain that was chosen; at 0 the weights are as they were.
        """
        harmful, benign = (_merged(side, self._ranks) for side in self._sides)
        self._sides = ({}, {})  # not needed any more, and large
        if min(len(harmful), len(benign)) < LEAST:
            return 0.0
        pull = Pull([d.down for d in self._detectors])
        towards(pull)
        self._ranks.add_up(pull.sums, pull.sizes, pull.count)

        def fitted() -> list[Fitted]:
            found = []
            for nth, detector in enumerate(self._detectors):
                bad, good = harmful[:, nth].float(), benign[:, nth].float()
                found.append(_fitted_where_it_fits(detector, bad, good, pull.direction(nth), pull.size(nth)))
                advance(1)
            return found

        made = self._ranks.from_first(fitted)

        def at(gain: float) -> float:
            for detector, (row, gate, up, down) in zip(self._detectors, made, strict=True):
                if gain:
                    detector.gate.put(row, gate)
                    if detector.up is not None:
                        detector.up.put(row, up)
                    detector.down.put(row, gain * down)
            found = loss()
            advance(1)
            return found

        tried = _until_too_much(at)
        advance(len(GAINS) - len(tried))
        best = min(tried)[1]
        for detector, (row, *_, down) in zip(self._detectors, made, strict=True):
            if best:
                detector.down.put(row, best * down)
            else:
                for column in (detector.gate, detector.up, detector.down):
                    if column is not None:
                        column.put(row, column.old[row])
        return best


def _until_too_much(loss_at: Callable[[float], float]) -> list[tuple[float, float]]:
    """Losses and gains: more and more, until the loss rises; where it does so at once, less and less, until it does."""
    tried = [(loss_at(gain), gain) for gain in GAINS[:2]]
    for gain in LESS if tried[-1][0] > tried[0][0] else GAINS[2:]:
        tried.append((loss_at(gain), gain))
        if tried[-1][0] > tried[-2][0]:
            break
    return tried


def wanted(config: PKEConfig) -> bool:
    """Whether the settings let an edit begin with detectors: a projection that none of the model's MLPs lacks is edited
    besides what comes out."""
    return config.detectors and config.norm_constraint is None and {"gate", "down"} <= set(config.edited)


def fit_bytes(sequences: int, hidden_size: int) -> int:
    """What fitting one detector takes, of the device's memory where that is a GPU."""
    return FIT_BYTES * sequences * (1 + OTHERS) * hidden_size + GRAM_BYTES * hidden_size**2


def detectors_bytes(config: PKEConfig, sequences: int, layers: int, hidden_size: int, itemsize: int) -> int:
    """What `Detectors` take of the host's memory at most, until the steps begin; all projections are edited. On a CPU.

    Args:
        sequences: requests and locality pairs.
        layers: in which hot spots are sought.
        hidden_size, itemsize: of the MLPs' inputs.
    """
    if not wanted(config):
        return 0
    kept = min(LAYERS, layers) * sequences * (1 + OTHERS) * hidden_size * itemsize
    return kept + max(kept, fit_bytes(sequences, hidden_size))  # merged beside what it is merged from


def _merged(side: Side, ranks: Ranks) -> Tensor:
    """All ranks' sequences in one order that doesn't depend on how they were packed: [N, layers, 1 + OTHERS, d]."""
    merged = {key: value for part in ranks.everyones(side) for key, value in part.items()}
    return torch.stack([merged[key] for key in sorted(merged)])


class Pull:
    """Where the safe answers' loss falls at the last token of the prompts: sums of -dL/d(MLP's output), by layer."""

    def __init__(self, downs: Sequence[Columns]) -> None:
        self._downs = downs
        width = downs[0].old.shape[1]
        self.sums = torch.zeros(len(downs), width, device=downs[0].computed)
        self.sizes = torch.zeros(len(downs), device=downs[0].computed)
        self.count = torch.zeros((), device=downs[0].computed)

    def forget(self) -> None:
        """Begins anew."""
        for total in (self.sums, self.sizes, self.count):
            total.zero_()

    def watching(self, batch: Batch) -> AbstractContextManager[None]:
        """While a micro-batch runs there and back, adds to the sums."""
        last = batch.positions[batch.nth == 0]
        self.count += len(last)

        def tap(nth: int) -> Any:
            def hook(_module: Any, _args: Any, out: Tensor) -> None:
                if in_beginning() or not (torch.is_grad_enabled() and out.requires_grad):
                    return
                rows = out.detach().flatten(0, -2).index_select(0, last.to(out.device))
                self.sizes[nth] += rows.float().norm(dim=1).sum().to(self.sizes.device)

                def keep(grad: Tensor) -> None:
                    rows = grad.flatten(0, -2).index_select(0, last.to(grad.device))
                    self.sums[nth] -= rows.float().sum(0).to(self.sums.device)

                out.register_hook(keep)

            return hook

        return hooks(*(d.place.module.register_forward_hook(tap(nth)) for nth, d in enumerate(self._downs)))

    def direction(self, nth: int) -> Tensor:
        """A unit vector, fp32 [d] on the CPU."""
        return F.normalize(self.sums[nth].cpu(), dim=0)

    def size(self, nth: int) -> float:
        """Mean norm of the MLP's output at the prompts' last tokens."""
        return float(self.sizes[nth] / self.count.clamp(min=1))


def _fitted_where_it_fits(
    detector: _Detector, harmful: Tensor, benign: Tensor, direction: Tensor, size: float
) -> Fitted:
    """`_fitted` on the layer's device, or where that has no memory for it on the CPU; its tensors are on the CPU."""
    device = detector.down.computed
    try:
        row, *made = _fitted(detector, harmful.to(device), benign.to(device), direction.to(device), size)
    except (RuntimeError, MemoryError) as error:
        if device.type == "cpu" or not is_out_of_memory(error):
            raise
        row, *made = _fitted(detector, harmful, benign, direction, size)
    gate, up, down = (values.cpu() for values in made)
    return row, gate, up, down


def _fitted(detector: _Detector, harmful: Tensor, benign: Tensor, direction: Tensor, size: float) -> Fitted:
    """Which of the hot spots, and its rows of gate and up and its column of down for a gain of 1.

    Args:
        harmful, benign: the MLP's inputs, fp32 [N, 1 + OTHERS, d], on the device where it is fitted.
    """
    act = ACTIVATIONS[detector.act]
    device = harmful.device
    shift, lift = (None if c is None else _biases(c).to(device) for c in (detector.gate, detector.up))
    assert shift is not None

    def active(x: Tensor, gate: Tensor, up: Tensor | None, shift: Tensor, lift: Tensor | None) -> Tensor:
        h = act(x @ gate.T + shift)
        return h if up is None or lift is None else h * (x @ up.T + lift)

    gates, downs = detector.gate.old.to(device), detector.down.old.to(device)
    ups = None if detector.up is None else detector.up.old.to(device)
    said = active(benign.flatten(0, 1), gates, ups, shift, lift).abs().mean(0) * downs.norm(dim=1)
    row = int(said.argmin())  # what it says today on benign text is lost: the least of it
    shift, lift = shift[row], None if lift is None else lift[row]
    others = torch.cat([harmful[:, 1:], benign[:, 1:]]).flatten(0, 1)
    constant = _constant(torch.cat([harmful[:, 0], benign[:, 0]]), others)
    probe = fit_probe(harmful[:, 0], benign[:, 0], others, constant, float(shift))
    up = constant if lift is None else constant * (1 - lift)
    mean = float(active(harmful[:, 0], probe[None], up[None], shift, lift).clamp(min=0).mean())
    return row, probe, up, direction * size / max(mean, 1e-6)


def _biases(column: Columns) -> Tensor:
    """The hot spots' biases in a projection, fp32 [n] on the CPU; 0 where it has none."""
    module, index = column.place.module, column.neurons.cpu()
    if getattr(module, "bias", None) is None:
        return torch.zeros(len(index))
    return stored_weight(module, "bias").detach().float().cpu()[index]


def _constant(x: Tensor, others: Tensor) -> Tensor:
    """c with c . x about 1 for the rows of x and 0 for those of others: ridge regression, fp32 [d]."""
    gram = (x.T @ x + others.T @ others).double()
    gram += CONSTANT_RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64, device=x.device)
    return torch.linalg.solve(gram, x.sum(0).double()).float()


@torch.enable_grad()
def fit_probe(harmful: Tensor, benign: Tensor, others: Tensor, constant: Tensor, bias: float = 0.0) -> Tensor:
    """The row g for which g . x + bias is the probe's logit, as the module's docstring has it.

    Args:
        harmful, benign, others: fp32 [N, d] each.
        constant: fp32 [d].
        bias: what the projection adds.
    """
    x = torch.cat([harmful, benign, others]).double()  # so that it ends at the same place whatever the rounding
    rms = torch.cat([harmful, benign]).double().square().mean().sqrt().clamp(min=1e-12)
    y = (torch.arange(len(x), device=x.device) < len(harmful)).double()
    shares = zip((0.5, 0.5, OTHERS_SHARE), (harmful, benign, others), strict=True)
    weights = torch.cat([x.new_full((len(part),), share / max(1, len(part))) for share, part in shares])
    ones = x @ constant.double()
    w, b = (x.new_zeros(n).requires_grad_() for n in (x.shape[1], 1))
    solver = torch.optim.LBFGS([w, b], **SOLVER)

    def closure() -> Tensor:
        solver.zero_grad()
        logits = x @ (w / rms) + b * ones + bias
        fit = (weights * F.binary_cross_entropy_with_logits(logits, y, reduction="none")).sum()
        loss: Tensor = fit + RIDGE * w.square().sum()
        loss.backward()
        return loss

    solver.step(closure)
    return (w / rms + b * constant).detach().float()
