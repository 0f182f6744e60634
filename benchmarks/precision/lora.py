"""LoRA by plain torch on an edit's layers, data and losses, but the KL to the unedited model; merged, it is a patch."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pke_fast.batches import pack
from pke_fast.config import PKEConfig
from pke_fast.editing import STOP_WINDOW
from pke_fast.encoding import Encoded
from pke_fast.errors import EditError
from pke_fast.kernels.sparse_columns import read_columns
from pke_fast.layer_patch import LayerPatch
from pke_fast.module_calls import hooks
from pke_fast.objective import answer_loss, locality_loss
from pke_fast.pace import Pace
from pke_fast.patch import Patch
from pke_fast.preparation import Job
from pke_fast.structure import Place, Structure
from pke_fast.tape import Tape, record
from pke_fast.workbench import Workbench

LR = 1e-3  # where the settings have none: an edit's own follows the weights' size, which B, that begins at 0, hasn't


class _Adapter(nn.Module):
    """out + B A x, B beginning at zero and A as PEFT draws it; fp32, with alpha = rank."""

    def __init__(self, place: Place, rank: int, seed: int) -> None:
        super().__init__()
        weight = place.module.weight
        assert isinstance(weight, Tensor)
        self.transposed = type(place.module).__name__ == "Conv1D"
        out, into = weight.shape[::-1] if self.transposed else weight.shape
        a = torch.empty(rank, into)
        nn.init.kaiming_uniform_(a, a=5**0.5, generator=torch.Generator().manual_seed(seed))
        self.a = nn.Parameter(a.to(weight.device))
        self.b = nn.Parameter(torch.zeros(out, rank, device=weight.device))

    def add(self, _module: Any, args: Any, out: Tensor) -> Tensor:
        return out + F.linear(F.linear(args[0].float(), self.a), self.b).to(out.dtype)

    def merged(self, weight: Tensor) -> Tensor:
        """The weight with the adapter in it, in its own dtype."""
        change = self.b.detach() @ self.a.detach()
        return (weight.float() + (change.T if self.transposed else change)).to(weight.dtype)


@dataclass(frozen=True, eq=False)
class _Minibatch:
    size: int
    tapes: list[Tape]
    base: list[Tensor | None]  # of benign pairs, the unedited model's


def edit(bench: Workbench, job: Job, config: PKEConfig) -> tuple[Patch, dict[str, Any]]:
    """Trains adapters on every projection that an edit would change, in every layer of the window.

    Their rank is the number of hot spots that come to one layer in the mean: the rank of an edit's change.

    Returns:
        the patch of all the window's neurons, which isn't applied, and ``{"rank", "steps", "edit", "kl"}``.

    Raises:
        EditError: the loss isn't finite.
    """
    structure = bench.structure
    window = range(*config.layer_window(len(structure.layers)))
    rank = max(1, config.k // len(window))
    places = {(layer, kind): structure.mlps[layer].place(kind) for layer in window for kind in _kinds(bench, layer)}
    adapters: dict[int, _Adapter] = {}
    modules: dict[int, nn.Module] = {}
    for place in places.values():  # gate and up can be one module
        key = id(place.module)
        if key not in adapters:
            adapters[key], modules[key] = _Adapter(place, rank, config.seed + len(adapters)), place.module
    shuffle = random.Random(config.seed)
    tokens = Pace.unplanned(config).tokens

    def minibatches(sequences: Sequence[Encoded], size: int, held: bool) -> list[_Minibatch]:
        order = shuffle.sample(range(len(sequences)), len(sequences))
        found = []
        for start in range(0, len(order), size):
            chosen = [sequences[i] for i in order[start : start + size]]
            tapes = [record(structure, batch, window.start) for batch in pack(chosen, tokens, bench.pad_id)]
            with torch.no_grad():
                base = [tape.supervised(tape.run()) if held else None for tape in tapes]
            found.append(_Minibatch(len(chosen), tapes, base))
        return found

    requests = minibatches(job.safe(bench, job.edited_on), config.batch_size, held=False)
    locality = minibatches(job.held(bench), config.locality_batch_size, held=True)
    parameters = [parameter for adapter in adapters.values() for parameter in adapter.parameters()]
    adam = torch.optim.Adam(parameters, lr=config.lr or LR)
    curve: list[tuple[float, float]] = []
    taps = (modules[key].register_forward_hook(adapter.add) for key, adapter in adapters.items())
    with bench.stages.stage("Training LoRA", config.num_steps) as advance, hooks(*taps):
        while len(curve) < config.num_steps and not _good_enough(curve, config):
            number = len(curve)
            left = config.lr_end + (1 - config.lr_end) * (1 - number / max(1, config.num_steps - 1))
            for group in adam.param_groups:
                group["lr"] = left * (config.lr or LR)
            edited = _backward(structure, requests[number % len(requests)], config, held=False)
            kl = _backward(structure, locality[number % len(locality)], config, held=True) if locality else 0.0
            if not torch.isfinite(torch.tensor(edited + kl)):
                raise EditError("LoRA's loss isn't finite", do="lower lr")
            adam.step()
            adam.zero_grad()
            curve.append((edited, kl))
            advance(1)
    merged = {key: adapter.merged(modules[key].weight.detach()) for key, adapter in adapters.items()}  # type: ignore[operator]
    parts = tuple(_part(layer, kind, place, merged, structure) for (layer, kind), place in places.items())
    settings = {"base": None, "settings": config.as_dict()}
    last = dict(zip(("edit", "kl"), curve[-1], strict=True)) if curve else {}
    return Patch(parts, settings), {"rank": rank, "steps": len(curve), **last}


def _kinds(bench: Workbench, layer: int) -> list[Any]:
    return [kind for kind in bench.structure.mlps[layer].kinds if kind in bench.config.edited]


def _good_enough(curve: Sequence[tuple[float, float]], config: PKEConfig) -> bool:
    recent = curve[-STOP_WINDOW:]
    means = [sum(values) / STOP_WINDOW for values in zip(*recent, strict=True)] if recent else [0.0, 0.0]
    return len(recent) == STOP_WINDOW and means[0] < config.stop_loss and means[1] < config.stop_kl


def _backward(structure: Structure, minibatch: _Minibatch, config: PKEConfig, *, held: bool) -> float:
    """Adds up a minibatch's gradients; its mean loss."""
    total = 0.0
    for tape, base in zip(minibatch.tapes, minibatch.base, strict=True):
        weights = tape.batch.answer_weights(config.first_token_weight, prompt_weight=config.w_prompt) / minibatch.size

        def loss_of(hidden: Tensor, tape: Tape = tape, base: Tensor | None = base, weights: Tensor = weights) -> Tensor:
            if base is not None:
                return locality_loss(structure, hidden, base, weights)
            return answer_loss(structure, hidden, tape.batch, weights)

        total += float(tape.there_and_back(loss_of, None, config.w_kl if held else config.w_edit))
    return total


def _part(layer: int, kind: Any, place: Place, merged: dict[int, Tensor], structure: Structure) -> LayerPatch:
    weight = place.module.weight
    assert isinstance(weight, Tensor)
    neurons = torch.arange(structure.neurons)
    index = (neurons + place.offset).to(weight.device)
    old, new = (read_columns(values, place.axis, index) for values in (weight.detach(), merged[id(place.module)]))
    return LayerPatch(layer, place.weight, place.axis, neurons, old, new, kind, place.offset)
