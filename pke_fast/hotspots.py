"""Hot spots: the neurons that rank highest on unsafe requests and low on the locality set, under constraints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

import pke_fast.ops  # noqa: F401  registers torch.ops.pke_fast
from pke_fast.config import PKEConfig
from pke_fast.errors import InputError
from pke_fast.scoring import Scores


@dataclass(frozen=True, eq=False)
class HotSpots:
    """Selected neurons in compressed rows: layer l has neurons[layer_ptr[l] : layer_ptr[l + 1]], ascending.

    Attributes:
        layer_ptr: int64 [L + 1], on the CPU.
        neurons: int64 [k], on the CPU; each counts from 0 within its layer.
    """

    layer_ptr: Tensor
    neurons: Tensor

    def __len__(self) -> int:
        return len(self.neurons)

    def by_layer(self) -> dict[int, Tensor]:
        """The neurons of every layer that has any, int64 ascending."""
        spans = enumerate(pairwise(self.layer_ptr.tolist()))
        return {layer: self.neurons[a:b] for layer, (a, b) in spans if b > a}

    @classmethod
    def from_layers(cls, layers: Mapping[int, Tensor], depth: int) -> HotSpots:
        """Neurons by layer, each int64 ascending, of a model of `depth` layers."""
        counts = torch.tensor([len(layers[i]) if i in layers else 0 for i in range(depth)])
        pointers = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        parts = [layers[layer] for layer in sorted(layers)]
        return cls(pointers, torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64))


def toxicity(scores: Scores, window: tuple[int, int]) -> Tensor:
    """Weight change times activation path [L, D], each relative to its mean over the window's layers."""
    rows = slice(*window)
    parts = [part / part[rows].mean().clamp(min=1e-30) for part in (scores.weight_change, scores.activation_path)]
    return parts[0] * parts[1]


def rank(unsafe: Scores, locality: Scores | None, config: PKEConfig) -> Tensor:
    """The score map [L, D], fp32, that hot spots are the highest of, as `config.score` names it."""
    if config.score == "weight_change":
        return unsafe.weight_change.clone()
    if config.score == "activation_path":
        return unsafe.activation_path.clone()
    if config.score == "random":
        return torch.rand(unsafe.weight_change.shape, generator=torch.Generator().manual_seed(config.seed))
    window = config.layer_window(len(unsafe.weight_change))
    if config.score == "contrast" and locality is not None:
        return toxicity(unsafe, window) - toxicity(locality, window)
    return toxicity(unsafe, window)


def select(score_map: Tensor, config: PKEConfig, device: torch.device | None = None) -> HotSpots:
    """The top `config.k` of a score map [L, D] within the window, the cap and the exclusions.

    Args:
        device: where they are chosen; by default where the map is. All give the same neurons.

    Returns:
        them, on the CPU; equal scores go to the lowest index.

    Raises:
        InputError: the map isn't [L, D] or has a NaN in the window, k is more than there is to choose from, or an
            excluded neuron doesn't exist.
    """
    if score_map.dim() != 2:
        raise InputError("a score map has the wrong shape", expected="[layers, neurons]", got=str([*score_map.shape]))
    depth, width = score_map.shape
    first, end = config.layer_window(depth)
    exclude = torch.zeros(depth, width, dtype=torch.uint8)
    for name in config.exclude:
        layer, neuron = (int(part) for part in name.split(":"))
        if layer >= depth or neuron >= width:
            raise InputError(
                f"excluded neuron {name} doesn't exist", expected=f"layers 0 to {depth - 1}, neurons 0 to {width - 1}"
            )
        exclude[layer, neuron] = 1
    free = (exclude[first:end] == 0).sum(1).clamp(max=min(config.per_layer_cap or width, width))
    if config.k > int(free.sum()):
        raise InputError(
            f"k = {config.k} is more than there are neurons to choose from",
            expected=f"at most {int(free.sum())} (layers {first} to {end - 1}, less the excluded, under the cap)",
            got=str(config.k),
            do="lower k, widen the window or raise per_layer_cap",
        )
    scores = score_map.to(device, torch.float32)
    layer_ptr, neurons, nans = torch.ops.pke_fast.select_hotspots(
        scores, config.k, first, end, min(config.per_layer_cap or 0, width), exclude.to(scores.device), float("-inf")
    )
    if nans:
        raise InputError(
            "scores aren't numbers", expected=f"finite scores in layers {first} to {end - 1}", got=f"{int(nans)} NaN"
        )
    return HotSpots(layer_ptr.cpu(), neurons.cpu())
