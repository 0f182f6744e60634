"""A patch as LoRA adapters of PEFT: A or B picks the changed neurons, the other holds their change; without peft.

For a down projection W [d, D], y = W h, changed by delta [n, d] at the neurons i_1 .. i_n: A [n, D] is 1 at (j, i_j),
else 0; B [d, n] is delta transposed. For gate and up, W [D, d], it is the other way round: A [n, d] is delta, B [D, n]
is 1 at (i_j, j). B A is the change of W exactly: each of its sums has one term that isn't 0. The scaling, alpha / r,
is 1 in every module.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pke_fast
from pke_fast.deltas import LayerDelta
from pke_fast.errors import PatchError
from pke_fast.patch import Patch
from pke_fast.stored import row_bands
from pke_fast.streamed import PIECE, Streamed, write_streamed

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
MOST_SERVED = 512  # the highest max_lora_rank of vLLM
_PREFIX = "base_model.model."  # PeftModel's own path to the model that it wraps


@dataclass(frozen=True, eq=False)
class Module:
    """One module of an adapter.

    Attributes:
        name: in full.
        index: which of its inputs (a down projection's) or outputs (gate's and up's) change, int64 ``[r]``.
        delta: their change, fp32 ``[r, d]``.
        outputs: whether it is outputs.
    """

    name: str
    index: Tensor
    delta: Tensor
    outputs: bool

    @property
    def rank(self) -> int:
        return len(self.index)


def adapters_of(rounds: Sequence[Sequence[LayerDelta]], max_rank: int | None) -> list[list[Module]]:
    """The adapters that a patch needs, in the order in which they are added.

    Args:
        rounds: of every part of the patch, its deltas in order (`deltas.rounds_of`).
        max_rank: modules with more changed neurons than this are split over several adapters; None never splits.

    Raises:
        PatchError: a weight isn't that of a module.
    """
    adapters: list[list[Module]] = []
    for number in range(max(map(len, rounds))):
        modules = _modules([part[number] for part in rounds if number < len(part) and len(part[number].neurons)])
        step = max_rank or max((module.rank for module in modules), default=1)
        for first in range(0, max((module.rank for module in modules), default=0), step):
            cut = slice(first, first + step)
            adapters.append([
                replace(module, index=module.index[cut], delta=module.delta[cut])
                for module in modules
                if module.rank > first
            ])  # fmt: skip
    return adapters


def _modules(deltas: Sequence[LayerDelta]) -> list[Module]:
    """A module for each weight: gate and up are one where they are fused."""
    parts: dict[str, list[LayerDelta]] = {}
    for delta in deltas:
        parts.setdefault(delta.part.weight, []).append(delta)
    return [
        Module(
            module_of(weight),
            torch.cat([delta.index for delta in found]),
            torch.cat([delta.delta for delta in found]),
            outputs=found[0].part.projection != "down",
        )
        for weight, found in parts.items()
    ]


def module_of(weight: str) -> str:
    """The name of the module whose weight it is; PatchError where it isn't one's."""
    module, _, name = weight.rpartition(".")
    if name != "weight" or not module:
        raise PatchError(
            f"{weight} is not the weight of a module, and adapters are added to modules",
            expected="a name such as model.layers.0.mlp.down_proj.weight",
            do="export it with --format dense-delta, or apply it to the checkpoint with pke-fast apply",
        )
    return module


def config_of(adapter: Sequence[Module], patch: Patch, base: str) -> dict[str, Any]:
    """adapter_config.json's content. Modules are named in full, so that peft matches these and no others."""
    # r is the largest rank: what serves adapters with buffers of one size, such as vLLM, reads r alone.
    rank = max(module.rank for module in adapter)
    others = {module.name: module.rank for module in adapter if module.rank != rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": [module.name for module in adapter],
        "fan_in_fan_out": patch.layers[0].transposed,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
    }


def write_adapter(folder: Path, adapter: Sequence[Module], patch: Patch, base: str, widths: Mapping[str, int]) -> None:
    """Writes one adapter into a folder that exists. `widths` has what `index` counts in, by module."""
    tensors: dict[str, Streamed] = {}
    for module in adapter:
        (rank, d), width, path = module.delta.shape, widths[module.name], f"{_PREFIX}{module.name}"
        if module.outputs:
            a = Streamed((rank, d), torch.float32, [module.delta])
            b = Streamed((width, rank), torch.float32, _one_hot_columns(module.index, width))
        else:
            a = Streamed((rank, width), torch.float32, _one_hot_rows(module.index, width))
            b = Streamed((d, rank), torch.float32, [module.delta.T])
        tensors |= {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}
    write_streamed(folder / WEIGHTS, tensors, {"format": "pt", "pke_fast": pke_fast.__version__})
    text = json.dumps(config_of(adapter, patch, base), indent=2) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")


def _one_hot_rows(index: Tensor, width: int) -> Iterator[Tensor]:
    for first, end in row_bands(len(index), 4 * width, PIECE):
        rows = torch.zeros(end - first, width)
        rows[torch.arange(end - first), index[first:end]] = 1.0
        yield rows


def _one_hot_columns(index: Tensor, width: int) -> Iterator[Tensor]:
    for first, end in row_bands(width, 4 * len(index), PIECE):
        rows = torch.zeros(end - first, len(index))
        here = ((index >= first) & (index < end)).nonzero().flatten()
        rows[index[here] - first, here] = 1.0
        yield rows
