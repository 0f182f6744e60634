"""Which tensors of a checkpoint on disk are projections of MLPs, without loading its weights."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pke_fast.errors import InputError
from pke_fast.kinds import Kind
from pke_fast.layer_patch import LayerPatch
from pke_fast.shards import StoredTensor
from pke_fast.stored import names_of

# Where the configuration doesn't say: modules that hold an MLP, and its last projection in them.
_MLP = re.compile(r"(?:^|\.)(\d+)\.(?:.*\.)?(?:mlp|feed_forward|ffn|ff)\.(\w+)\.weight$")
_DOWN = ("down_proj", "dense_4h_to_h", "c_proj", "fc_out", "fc2", "w2")


@dataclass(frozen=True)
class Projection:
    """A projection of an MLP.

    Attributes:
        layer: number of the decoder layer.
        kind: ``gate`` is also the one projection into a plain MLP.
        weight: its name among the model's parameters; the stored one where the model isn't known.
        axis: the dimension that counts neurons.
        neurons: how many the layer has: D.
        offset: where neuron 0 is along the axis: D for the up half of a fused ``[2D, d]``.
    """

    layer: int
    kind: Kind
    weight: str
    axis: int
    neurons: int
    offset: int = 0

    def holds(self, part: LayerPatch) -> bool:
        """Whether a part of a patch has its neurons here. Which of gate and up it is called doesn't count."""
        sides = (self.kind == "down", self.axis, self.offset)
        return sides == (part.projection == "down", part.axis, part.offset) and int(part.neurons[-1]) < self.neurons


def find_projections(folder: Path, tensors: Mapping[str, StoredTensor]) -> dict[str, list[Projection]]:
    """The projections of the MLPs by the name of the stored tensor: one, or gate and up where they are fused.

    From the model that config.json describes, made without weights; where there is no config.json, or of a model that
    transformers doesn't know, by the usual names and the shapes.

    Raises:
        InputError: the model has no MLPs of a known kind, or nothing is named like a down projection.
    """
    if _is_known(folder):
        return _by_structure(folder, tensors)
    return _by_name(folder, tensors)


def model_without_weights(folder: Path, name: str) -> Any:
    """The model that a folder's config.json describes, on the meta device; `name` is for messages.

    Raises:
        InputError: transformers can't make it.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from pke_fast.pretrained import explained, quiet

    with quiet(), explained(name), torch.device("meta"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return AutoModelForCausalLM.from_config(config)


def projections_of(model: Any) -> list[Projection]:
    """The projections of a model's MLPs by its structure, not probed; also of one on the meta device."""
    from pke_fast.structure import find_mlps

    found = []
    for layer, mlp in enumerate(find_mlps(model)):
        neurons = model.get_parameter(mlp.weight).shape[mlp.axis]
        for kind in mlp.kinds:
            place = mlp.place(kind)
            found.append(Projection(layer, kind, place.weight, place.axis, neurons, place.offset))
    return found


def _inputs(layer: int, weights: Sequence[str], axis: int, neurons: int) -> list[Projection]:
    """Gate, then up where there is one, from the names of their weights; the same name twice is a fused weight."""
    gate = Projection(layer, "gate", weights[0], axis, neurons)
    fused = len(set(weights)) < len(weights)
    up = [replace(gate, kind="up", weight=weight, offset=neurons if fused else 0) for weight in weights[1:]]
    return [gate, *up]


def _is_known(folder: Path) -> bool:
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):  # none, not JSON, or not an object
        return False
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def _by_structure(folder: Path, tensors: Mapping[str, StoredTensor]) -> dict[str, list[Projection]]:
    found: dict[str, list[Projection]] = {}
    for projection in projections_of(model_without_weights(folder, str(folder))):
        stored = names_of(tensors, projection.weight)
        if len(stored) != 1:
            raise InputError(
                f"the checkpoint {folder} doesn't fit its config.json",
                expected=f"a tensor {projection.weight}, or one whose name differs only by a prefix",
                got=f"{len(stored)} such names",
                do="name the folder of a whole checkpoint",
            )
        found.setdefault(stored[0], []).append(projection)
    return found


def _by_name(folder: Path, tensors: Mapping[str, StoredTensor]) -> dict[str, list[Projection]]:
    named = [
        (match, name, t.shape) for name, t in tensors.items() if (match := _MLP.search(name)) and len(t.shape) == 2
    ]
    downs: dict[int, Projection] = {}
    for match, name, shape in named:
        if match[2] not in _DOWN:
            continue
        if shape[0] == shape[1]:
            raise InputError(
                f"can't tell whether neurons are rows or columns of {name}, which is square",
                expected="a config.json of a model that transformers knows",
                do=f"put the checkpoint's config.json into {folder}",
            )
        if int(match[1]) in downs:
            raise _unclear(folder, f"several in one layer, such as {name}")
        # An MLP is wider than the model: its neurons are the longer dimension.
        downs[int(match[1])] = Projection(int(match[1]), "down", name, 0 if shape[0] > shape[1] else 1, max(shape))
    if not downs:
        raise _unclear(folder, f"names such as {next(iter(tensors), None)}")
    found = {down.weight: [down] for down in downs.values()}
    for layer, down in downs.items():
        width, axis = min(tensors[down.weight].shape), 1 - down.axis
        others = {name: shape for match, name, shape in named if int(match[1]) == layer and shape[1 - axis] == width}
        # As in structure.py: of two, the gate is what is named so, else the first.
        whole = [name for name, shape in others.items() if shape[axis] == down.neurons]
        whole.sort(key=lambda name: ("gate" not in name.split(".")[-2], name))
        double = [name for name, shape in others.items() if shape[axis] == 2 * down.neurons]
        weights = whole if whole else double * 2
        for projection in _inputs(layer, weights, axis, down.neurons) if len(weights) in (1, 2) else ():
            found.setdefault(projection.weight, []).append(projection)
    return found


def _unclear(folder: Path, got: str) -> InputError:
    return InputError(
        f"can't tell which tensors of {folder} are down projections",
        expected=f"a config.json of a model that transformers knows, or one of {', '.join(_DOWN)} in every MLP",
        got=got,
        do="put the checkpoint's config.json beside it",
    )
