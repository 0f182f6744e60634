"""SafeTune's locator: the rows of a layer's weights that differ most between a clean and a toxic checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from pke_fast.errors import InputError

LOG = logging.getLogger(__name__)
BLOCK_ELEMENTS = 1 << 22  # of two fp32 copies at once: 32 MiB, whatever the size of a weight
SAME = 1e-8  # below it two checkpoints count as the same


@dataclass
class PKEConfig:
    """SafeTune's settings of PKE, by its names.

    Attributes:
        top_k_neurons: rows in each layer.
        target_layers: the layers; None or empty for all.
        toxicity_weight, kl_factor: weights of the safe response's loss and of the KL on the locality inputs.
        max_edit_magnitude: most that a weight may have moved in the end; None for no bound.
        num_steps: of Adam, at least one is made.
        lr: Adam's.
        norm_constraint: after every step, keep a row's change within the norm that the row had.
        max_len: most tokens of a sequence.
    """

    top_k_neurons: int = 50
    target_layers: Sequence[int] | None = None
    toxicity_weight: float = 1.0
    max_edit_magnitude: float | None = 1.0
    num_steps: int = 10
    lr: float = 5e-4
    kl_factor: float = 0.1
    norm_constraint: bool = False
    max_len: int = 64


class ToxicNeuronLocator:
    """Finds the rows whose weights drifted most.

    Args:
        config: for `top_k_neurons` and `target_layers`; any object that has them.

    Attributes:
        toxic_neurons: the rows that were located.
        differ: whether the checkpoints did.
    """

    def __init__(self, config: Any = None) -> None:
        self.config = config or PKEConfig()
        self.toxic_neurons: dict[int, list[int]] = {}
        self.differ = True

    def locate_by_weight_change(
        self, clean_state_dict: Mapping[str, Tensor], toxic_state_dict: Mapping[str, Tensor]
    ) -> dict[int, list[int]]:
        """For each layer, the `top_k_neurons` rows with the largest sum of absolute differences, largest first.

        As in SafeTune, the rows of all of a layer's weights (attention, MLP, norms by element) rank together and only
        their index is kept, so one index can come several times. Equal sums keep the order of the state dict.

        Args:
            clean_state_dict, toxic_state_dict: of two checkpoints of one model; names outside `layers.N` are passed
                over, as are names that only one of them has.

        Raises:
            InputError: a weight differs in shape, or isn't finite; or fewer than no rows are wanted.
        """
        if self.config.top_k_neurons < 0:
            got = str(self.config.top_k_neurons)
            raise InputError("top_k_neurons can't be used", expected="a number of 0 or more", got=got)
        drifts: dict[int, list[Tensor]] = {}
        for name, clean in clean_state_dict.items():
            layer = layer_of(name)
            left_out = self.config.target_layers and layer not in self.config.target_layers
            if layer is None or left_out or name not in toxic_state_dict or clean.numel() == 0 or clean.dim() == 0:
                continue
            drifts.setdefault(layer, []).append(_drift(name, clean, toxic_state_dict[name]).cpu())
        self.toxic_neurons = {layer: _highest(parts, self.config.top_k_neurons) for layer, parts in drifts.items()}
        self.differ = not drifts or max(float(part.max()) for parts in drifts.values() for part in parts) >= SAME
        if not self.differ:
            LOG.warning("the clean and the toxic checkpoint have the same weights: the rows located mean nothing")
        return self.toxic_neurons


def layer_of(name: str) -> int | None:
    """The N of the first `layers.N` in a parameter's name."""
    parts = name.split(".")
    for word, number in pairwise(parts):
        if word == "layers" and number.isdigit():
            return int(number)
    return None


def _drift(name: str, clean: Tensor, toxic: Tensor) -> Tensor:
    """Each row's sum of absolute differences, fp32 [rows]; of a vector, each element's difference."""
    if clean.shape != toxic.shape:
        raise InputError(
            f"{name} differs in shape between the two checkpoints",
            expected=str(list(clean.shape)),
            got=str(list(toxic.shape)),
            do="compare two checkpoints of one model",
        )
    rows = max(1, BLOCK_ELEMENTS // max(1, clean[:1].numel()))
    blocks = zip(clean.detach().split(rows), toxic.detach().split(rows), strict=True)
    sums = [(new.to(old.device).float() - old.float()).abs_().flatten(1).sum(1) for old, new in _matrices(blocks)]
    drift = torch.cat(sums)
    if not torch.isfinite(drift).all():
        raise InputError(f"{name} isn't finite", expected="numbers", got="NaN or infinity", do="check the checkpoints")
    return drift


def _matrices(blocks: Any) -> Any:
    for old, new in blocks:
        yield (old[:, None], new[:, None]) if old.dim() == 1 else (old, new)


def _highest(parts: list[Tensor], k: int) -> list[int]:
    rows = torch.cat([torch.arange(len(part)) for part in parts])
    order = torch.cat(parts).sort(descending=True, stable=True).indices
    return [int(row) for row in rows[order[:k]]]
