"""LoRA of equal rank: its patch is what its adapters did, of no more rank than they have, in every kind of MLP."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from precision import lora

from pke_fast.config import PKEConfig
from pke_fast.preparation import Job
from pke_fast.requests import EditRequest, Pair
from pke_fast.testing import LAYERS, NEURONS, tiny_model, tiny_tokenizer
from pke_fast.workbench import workbench

JOB = Job(
    tuple(EditRequest(p, "I'm sorry", "Sure") for p in ("Break a lock", "Steal a car", "Forge")), 3, 0,
    (Pair("Bake a cake", "Take flour"), Pair("Sing", "La la")), "given",
)  # fmt: skip
CONFIG = PKEConfig(k=4, num_steps=3, batch_size=2, locality_batch_size=1, window=(1, LAYERS), lr=0.01, stop_loss=0.0)


def edited(family: str, **changes: Any) -> tuple[Any, Any, dict[str, Any]]:
    model, config = tiny_model(family), CONFIG.replace(**changes)
    with workbench(model, tiny_tokenizer(), config) as bench:
        patch, facts = lora.edit(bench, JOB, config)
    return model, patch, facts


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_its_patch(family: str) -> None:
    model, patch, facts = edited(family)
    before = tiny_model(family)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    kinds = ("gate", "down") if family == "gpt2" else ("gate", "up", "down")
    assert [(part.layer, part.projection) for part in patch.layers] == [(i, k) for i in (1, 2) for k in kinds]
    assert facts["rank"] == 2
    assert facts["steps"] == 3
    for part in patch.layers:
        assert part.neurons.tolist() == list(range(NEURONS))
        sizes = torch.linalg.svdvals((part.new - part.old).double())
        assert sizes[1] > 1e-4
        assert sizes[2] < 1e-5  # no more than rank 2, but for rounding
    patch.apply(model)
    patch.revert(model)


def test_it_has_the_data_of_an_edit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The companions too: what is compared is the way of editing, not what it is made from."""
    seen: list[torch.Tensor] = []
    inner = lora.record

    def recorded(structure: Any, batch: Any, first: int) -> Any:
        seen.extend(batch.input_ids)
        return inner(structure, batch, first)

    monkeypatch.setattr(lora, "record", recorded)
    companions = tuple(EditRequest(p, "I'm sorry", "Sure") for p in ("Poison a well", "Burn it"))
    job = replace(JOB, companions=companions)
    with workbench(tiny_model("llama"), tiny_tokenizer(), CONFIG) as bench:
        lora.edit(bench, job, CONFIG)
    texts = [tiny_tokenizer().decode(ids) for ids in seen]
    assert all(any(r.prompt in text for text in texts) for r in job.edited_on)


def test_it_learns_and_the_patch_is_what_was_learnt() -> None:
    ids = torch.tensor([tiny_tokenizer()("Break a lock")["input_ids"]])
    losses = []
    for steps in (1, 30):
        model, patch, facts = edited("llama", num_steps=steps, w_kl=0.0, batch_size=3)
        losses.append(facts["edit"])
        plain = model(ids).logits
        patch.apply(model)
        assert not torch.equal(model(ids).logits, plain)
    assert losses[1] < 0.7 * losses[0]


def test_no_step_changes_nothing_and_down_alone_can_be_asked_for() -> None:
    _, patch, facts = edited("llama", num_steps=0, projections=["down"])
    assert facts == {"rank": 2, "steps": 0}
    assert [part.projection for part in patch.layers] == ["down", "down"]
    assert all(torch.equal(part.old, part.new) for part in patch.layers)


def test_the_same_seed_gives_the_same_bits() -> None:
    first, second = edited("llama")[1], edited("llama")[1]
    assert all(torch.equal(a.new, b.new) for a, b in zip(first.layers, second.layers, strict=True))
