"""Which tensors of a checkpoint on disk are projections of MLPs, without loading its weights."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pke_fast.errors import InputError
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
        kind: ``down``, or ``input`` (gate, up or both in one).
        weight: its name among the model's parameters; the stored one where the model isn't known.
        axis: of a down projection, the dimension that counts neurons: 1 of ``[d, D]``, 0 of ``[D, d]``.
    """

    layer: int
    kind: str
    weight: str
    axis: int


def find_projections(folder: Path, tensors: Mapping[str, StoredTensor]) -> dict[str, Projection]:
    """The projections of the MLPs by the name of the stored tensor.

    From the model that config.json describes, made without weights; where there is no config.json, or of a model that
    transformers doesn't know, by the usual names and the shapes.

    Raises:
        InputError: the model has no MLPs of a known kind, or nothing is named like a down projection.
    """
    if _is_known(folder):
        return _by_structure(folder, tensors)
    return _by_name(folder, tensors)


def _is_known(folder: Path) -> bool:
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):  # none, not JSON, or not an object
        return False
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def _by_structure(folder: Path, tensors: Mapping[str, StoredTensor]) -> dict[str, Projection]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from pke_fast.pretrained import explained, quiet
    from pke_fast.structure import find_mlps

    with quiet(), explained(str(folder)), torch.device("meta"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model = AutoModelForCausalLM.from_config(config)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, Projection] = {}
    for layer, mlp in enumerate(find_mlps(model)):
        inputs = {id(module): module for module in (mlp.gate, mlp.up) if module is not None}
        wanted = [Projection(layer, "down", mlp.weight, mlp.axis)]
        wanted += [Projection(layer, "input", names[id(m.weight)], 1 - mlp.axis) for m in inputs.values()]
        for projection in wanted:
            stored = names_of(tensors, projection.weight)
            if len(stored) != 1:
                raise InputError(
                    f"the checkpoint {folder} doesn't fit its config.json",
                    expected=f"a tensor {projection.weight}, or one whose name differs only by a prefix",
                    got=f"{len(stored)} such names",
                    do="name the folder of a whole checkpoint",
                )
            found[stored[0]] = projection
    return found


def _by_name(folder: Path, tensors: Mapping[str, StoredTensor]) -> dict[str, Projection]:
    found: dict[str, Projection] = {}
    for name, tensor in tensors.items():
        match = _MLP.search(name)
        if match is None or len(tensor.shape) != 2:
            continue
        kind = "down" if match[2] in _DOWN else "input"
        if kind == "down" and tensor.shape[0] == tensor.shape[1]:
            raise InputError(
                f"can't tell whether neurons are rows or columns of {name}, which is square",
                expected="a config.json of a model that transformers knows",
                do=f"put the checkpoint's config.json into {folder}",
            )
        # An MLP is wider than the model: its neurons are the longer dimension.
        found[name] = Projection(int(match[1]), kind, name, 0 if tensor.shape[0] > tensor.shape[1] else 1)
    downs = [projection.layer for projection in found.values() if projection.kind == "down"]
    if not downs or len(set(downs)) < len(downs):
        raise InputError(
            f"can't tell which tensors of {folder} are down projections",
            expected=f"a config.json of a model that transformers knows, or one of {', '.join(_DOWN)} in every MLP",
            got=f"{len(downs)} such tensors" if downs else f"names such as {next(iter(tensors), None)}",
            do="put the checkpoint's config.json beside it",
        )
    return found
