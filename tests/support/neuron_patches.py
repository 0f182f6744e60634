"""Patches of the tiny models' neurons, whichever of their weights: shared by the tests of all that uses patches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pke_fast.patch import LayerPatch
from pke_fast.testing import NEURONS

_LLAMA, _GPT2, _NEOX = (
    "model.layers.{}.mlp.%s.weight",
    "transformer.h.{}.mlp.%s.weight",
    "gpt_neox.layers.{}.mlp.%s.weight",
)
# By family and projection: name, the dimension that counts neurons, where neuron 0 is.
PLACES = {
    "llama": {
        "gate": (_LLAMA % "gate_proj", 0, 0),
        "up": (_LLAMA % "up_proj", 0, 0),
        "down": (_LLAMA % "down_proj", 1, 0),
    },
    "phi3": {
        "gate": (_LLAMA % "gate_up_proj", 0, 0),
        "up": (_LLAMA % "gate_up_proj", 0, NEURONS),
        "down": (_LLAMA % "down_proj", 1, 0),
    },
    "gpt2": {"gate": (_GPT2 % "c_fc", 1, 0), "down": (_GPT2 % "c_proj", 0, 0)},
    "gpt_neox": {"gate": (_NEOX % "dense_h_to_4h", 0, 0), "down": (_NEOX % "dense_4h_to_h", 1, 0)},
}
DOWN = ("down",)


def all_of(family: str) -> tuple[str, ...]:
    """Every projection of a family."""
    return tuple(PLACES[family])


def part_of(
    model: Any, family: str, kind: str, layer: int, neurons: Sequence[int] | Tensor, change: Callable[[Tensor], Tensor]
) -> LayerPatch:
    """Some neurons' weights in one projection of a tiny model, ``change(old)`` the new ones."""
    pattern, axis, offset = PLACES[family][kind]
    ids = torch.as_tensor(neurons)
    weight = model.get_parameter(pattern.format(layer)).detach()
    old = weight[ids + offset] if axis == 0 else weight[:, ids + offset].T
    return LayerPatch(layer, pattern.format(layer), axis, ids, old, change(old), kind, offset)  # type: ignore[arg-type]
