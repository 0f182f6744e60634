"""What is measured on: a model laid out for work, harmful requests with safe answers, and benign pairs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pke_fast import shipped
from pke_fast.config import PKEConfig
from pke_fast.encoding import Encoded, PromptEncoder
from pke_fast.loading import LoadedModel, context_length, load_model, pad_token_id
from pke_fast.structure import Structure, find_structure
from pke_fast.workbench import laid_out

BENIGN_ANSWER = "Here is an answer to that:"  # what the pairs of a timing are answered with; any text does


@dataclass(frozen=True, eq=False)
class Subject:
    """A frozen model and its sequences.

    Attributes:
        requests: harmful prompts with the safe answer.
        locality: benign prompts with the beginning of an answer.
    """

    structure: Structure
    requests: list[Encoded]
    locality: list[Encoded]
    pad_id: int

    @property
    def tokens(self) -> int:
        """Tokens of the requests, padding not counted."""
        return sum(len(sequence.ids) for sequence in self.requests)


@contextmanager
def subject_of(loaded: LoadedModel, requests: int, locality: int = 0) -> Iterator[Subject]:
    """The shipped prompts on a loaded model; where more are asked for than there are, they come again."""
    config = PKEConfig()
    encoder = PromptEncoder(loaded.tokenizer, config, context_length(loaded.model))
    harmful = [encoder.encode(r.prompt, config.refusal, end=True) for r in shipped.harmful()[:requests]]
    benign = [
        encoder.encode(prompt, BENIGN_ANSWER, answer_tokens=config.locality_tokens)
        for prompt in shipped.benign()[:locality]
    ]
    with laid_out(loaded.model):
        structure = find_structure(loaded.model)
        pad_id = pad_token_id(loaded.tokenizer, loaded.model)
        yield Subject(structure, repeated(harmful, requests), repeated(benign, locality), pad_id)


@contextmanager
def loaded_subject(
    model: str, requests: int, locality: int = 0, *, device: str = "cpu", dtype: str = "fp32"
) -> Iterator[Subject]:
    """The same on a model by name."""
    with subject_of(load_model(model, device=device, dtype=dtype), requests, locality) as subject:
        yield subject


def repeated(sequences: list[Encoded], count: int) -> list[Encoded]:
    return [sequences[i % len(sequences)] for i in range(count)]


def spread_neurons(structure: Structure, first: int, k: int) -> dict[int, Tensor]:
    """k neurons, as many in each layer from `first` on, evenly spread: where they lie doesn't change a step's cost."""
    layers = range(first, len(structure.layers))
    count = max(1, min(k // len(layers), structure.neurons))
    ids = torch.linspace(0, structure.neurons - 1, count).long().unique()
    return dict.fromkeys(layers, ids)


def describe(structure: Structure) -> dict[str, Any]:
    """What of a model matters for its cost."""
    return {
        "layers": len(structure.layers),
        "hidden_size": structure.hidden_size,
        "neurons_per_layer": structure.neurons,
        "parameters": sum(parameter.numel() for parameter in structure.model.parameters()),
        "dtype": str(structure.dtype).removeprefix("torch."),
    }
