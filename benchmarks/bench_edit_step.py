"""One edit step on the embedded model: with hot spots in the upper half of the layers against the whole model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pke_fast import shipped
from pke_fast.columns import Columns
from pke_fast.config import PKEConfig
from pke_fast.editing import Trainer
from pke_fast.encoding import PromptEncoder
from pke_fast.loading import load_model, pad_token_id
from pke_fast.structure import find_structure

WINDOWS = {"whole model": 0.0, "upper half": 0.5, "last quarter": 0.75, "last tenth": 0.9}
CONFIG = PKEConfig(batch_size=16, locality_batch_size=16, locality_tokens=8)


@pytest.fixture(scope="module")
def loaded() -> Any:
    return load_model("smollm2", device="cpu", dtype="fp32")


@pytest.mark.benchmark(group="edit step, k = 1,000")
@pytest.mark.parametrize("window", WINDOWS)
def bench_edit_step(benchmark: Any, window: str, loaded: Any) -> None:
    structure = find_structure(loaded.model)
    encoder = PromptEncoder(loaded.tokenizer, CONFIG)
    requests = [encoder.encode(r.prompt, CONFIG.refusal, end=True) for r in shipped.harmful()[:16]]
    locality = [encoder.encode(prompt, "Here is an answer to that:") for prompt in shipped.benign()[:16]]
    first = round(WINDOWS[window] * len(structure.layers))
    layers = range(first, len(structure.layers))
    spread = torch.linspace(0, structure.neurons - 1, 1000 // len(layers)).long()
    columns = [Columns(structure, layer, spread) for layer in layers]
    trainer = Trainer(structure, columns, requests, locality, CONFIG, pad_token_id(loaded.tokenizer, loaded.model))
    benchmark.pedantic(trainer.step, args=(0,), rounds=5, warmup_rounds=1)
    for column in columns:
        column.restore()
