"""The probe: its fit against plain forms, states against the model's own, the choice of a layer, what locate says."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pke_fast import engine, foretelling, probe
from pke_fast.cli import main
from pke_fast.config import PKEConfig
from pke_fast.errors import InputError
from pke_fast.requests import EditRequest, Pair
from pke_fast.structure import find_structure
from pke_fast.testing import FAMILIES, LAYERS, tiny_model, tiny_tokenizer
from pke_fast.workbench import workbench


def features(n: int, m: int, d: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two overlapping clouds, the features of unlike size."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.logspace(-2, 2, d)
    side = [torch.randn(count, d, generator=generator) for count in (n, m)]
    return (side[0] + 0.7) * size, side[1] * size


def newton(harmful: Tensor, harmless: Tensor, c: float) -> tuple[Tensor, float]:
    """The same minimum by Newton's method, with the intercept as a column that isn't penalised."""
    x = torch.cat([harmful, harmless]).double()
    x = (x - x.mean(0)) / x.std(0, correction=0)
    x = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], 1)
    y = torch.cat([torch.ones(len(harmful)), torch.zeros(len(harmless))]).double()
    v = torch.where(y > 0, len(y) / (2 * len(harmful)), len(y) / (2 * len(harmless)))
    penalty = torch.eye(x.shape[1], dtype=torch.float64)
    penalty[-1, -1] = 0
    w = torch.zeros(x.shape[1], dtype=torch.float64)
    for _ in range(50):
        p = torch.sigmoid(x @ w)
        gradient = c * x.T @ (v * (p - y)) + penalty @ w
        w = w - torch.linalg.solve(c * x.T @ (x * (v * p * (1 - p))[:, None]) + penalty, gradient)
    return w[:-1], float(w[-1])


@pytest.mark.parametrize("c", [0.01, 1.0])
def test_the_fit_is_the_minimum(c: float) -> None:
    harmful, harmless = features(30, 70, 8)
    found = probe.fit_linear(harmful, harmless, c)
    weights, bias = newton(harmful, harmless, c)
    torch.testing.assert_close(found.weights, weights, rtol=1e-6, atol=1e-8)
    assert found.bias == pytest.approx(bias, rel=1e-6, abs=1e-8)
    again = probe.fit_linear(harmful, harmless, c)
    assert torch.equal(again.weights, found.weights)  # to the bit
    assert again.bias == found.bias


def test_one_feature_in_closed_form() -> None:
    # +1 and -1, one each: standardised the same; w minimises 2 C log(1 + e^-w) + w^2 / 2, so w (1 + e^w) = 2 C.
    found = probe.fit_linear(torch.tensor([[3.0]]), torch.tensor([[1.0]]), 0.5)
    w = float(found.weights)
    assert w * (1 + math.exp(w)) == pytest.approx(1.0, rel=1e-9)
    assert found.bias == pytest.approx(0, abs=1e-9)
    assert found.scores(torch.tensor([[3.0], [1.0], [2.0]])).tolist() == pytest.approx([w, -w, 0], abs=1e-9)


def test_a_constant_feature_is_left_out() -> None:
    harmful, harmless = features(10, 10, 3)
    without = [side[:, [0, 2]] for side in (harmful, harmless)]
    harmful[:, 1] = harmless[:, 1] = 5.0
    found, plain = probe.fit_linear(harmful, harmless, 0.1), probe.fit_linear(*without, 0.1)
    assert found.weights[1] == 0
    torch.testing.assert_close(found.weights[[0, 2]], plain.weights, rtol=1e-7, atol=1e-9)
    moved = harmful + torch.tensor([0.0, 100.0, 0.0])
    assert torch.equal(found.scores(moved), found.scores(harmful))


@pytest.mark.parametrize(
    ("harmful", "harmless", "c"),
    [(torch.ones(0, 2), torch.ones(2, 2), 1.0), (torch.ones(2, 2), torch.ones(2, 2) * math.nan, 1.0),
     (torch.ones(2, 2), torch.ones(2, 2), 0.0)],
)  # fmt: skip
def test_no_fit_of_these(harmful: Tensor, harmless: Tensor, c: float) -> None:
    with pytest.raises(InputError, match="no probe can be fitted"):
        probe.fit_linear(harmful, harmless, c)


@pytest.mark.parametrize("family", FAMILIES)
def test_states_are_the_models_own(family: str) -> None:
    model, tokenizer = tiny_model(family), tiny_tokenizer()
    structure = find_structure(model)
    prompts = [tokenizer(text)["input_ids"] for text in ("Break a lock", "Sing", "Plant a tree in the garden", "A")]
    wanted = [0, LAYERS - 2]
    counted: list[int] = []
    found = probe.last_states(structure, prompts, wanted, pad_id=259, tokens=40, advance=counted.append)
    assert sum(counted) == len(prompts)
    assert len(counted) > 1  # several batches
    with torch.no_grad():
        for row, ids in enumerate(prompts):
            hidden = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
            for layer in wanted:
                torch.testing.assert_close(found[layer][row], hidden[layer + 1][0, -1], rtol=1e-4, atol=1e-5)
    again = probe.last_states(structure, prompts, wanted, pad_id=259, tokens=40)
    assert all(torch.equal(found[layer], again[layer]) for layer in wanted)


def test_layers_above_are_not_run() -> None:
    structure = find_structure(tiny_model("llama"))
    calls: list[int] = []
    for index, layer in enumerate(structure.layers):
        layer.mlp.register_forward_hook(lambda *_, i=index: calls.append(i))
    probe.last_states(structure, [[1, 2, 3]], [1], pad_id=259)
    assert calls == [0, 1]


def test_candidates() -> None:
    assert probe.candidates(30) == [15, 18, 21, 23, 26, 29]
    assert probe.candidates(3) == [1, 2]
    assert probe.candidates(1) == [0]


def test_kinds_stay_together() -> None:
    groups = ["a", "b", None, "a", "c", None, "b", "a", None]
    folds = probe.folds_of(groups, 3, seed=0)
    by_kind = {kind: {f for f, g in zip(folds, groups, strict=True) if g == kind} for kind in "abc"}
    assert all(len(used) == 1 for used in by_kind.values())
    assert len(set().union(*by_kind.values())) == 3
    assert sorted(folds.count(fold) for fold in range(3)) == [3, 3, 3]
    assert folds == probe.folds_of(groups, 3, seed=0)
    assert sorted(probe.folds_of(["a"] * 6, 3, seed=0)) == [0, 0, 1, 1, 2, 2]  # one kind can't be held out


def test_the_layer_that_tells_is_chosen() -> None:
    good, bad = features(40, 40, 6), features(40, 40, 6, seed=1)
    told = probe.fit(
        {3: good[0], 5: torch.cat([bad[0][:20], bad[1][:20]])}, {3: good[1], 5: torch.cat([bad[0][20:], bad[1][20:]])}
    )
    assert told.layer == 3
    assert told.auc_by_layer[3] == told.cross_validated.auc > 0.75
    assert told.auc_by_layer[5] < 0.65
    assert torch.equal(told.linear.weights, probe.fit_linear(*good).weights)  # fitted anew on all


def test_a_kind_is_judged_without_itself() -> None:
    # Each kind of harm has a feature of its own: known when its like was seen, unknown when it is held out.
    eye = torch.eye(4).repeat_interleave(10, 0)
    noise = torch.randn(80, 4, generator=torch.Generator().manual_seed(0)) * 0.05
    harmful, harmless = {0: eye * 3 + noise[:40]}, {0: noise[40:]}
    kinds = [str(i // 10) for i in range(40)]
    seen = probe.fit(harmful, harmless, inverse_penalty=1.0)
    unseen = probe.fit(harmful, harmless, (kinds, [None] * 40), inverse_penalty=1.0)
    assert seen.cross_validated.auc > 0.99 > unseen.cross_validated.auc


def test_too_few_prompts() -> None:
    with pytest.raises(InputError, match="too few prompts"):
        probe.fit({0: torch.ones(1, 2)}, {0: torch.ones(5, 2)})


CONFIG = PKEConfig(k=10, num_steps=1, window=(0, LAYERS), locality_tokens=2, unsafe_tokens=2)
REQUESTS = [EditRequest(f"Break lock number {i}", ground_truth="Sure") for i in range(foretelling.LEAST)]
LOCALITY = [Pair(f"Bake {i} cakes", "Take flour") for i in range(foretelling.LEAST + 2)]


def test_locate_foretells() -> None:
    model = tiny_model("llama")
    result = engine.locate(model, tiny_tokenizer(), REQUESTS, CONFIG, locality=LOCALITY)
    found = result.probe
    assert found is not None
    assert (found["harmful"], found["harmless"]) == (20, 22)
    assert [row["false_alarms"] for row in found["flagged"]] == [0.02, 0.05, 0.15]
    assert found["auc"] == max(found["auc_by_layer"].values()) > 0.9  # the two kinds of prompts differ in every byte
    with workbench(model, tiny_tokenizer(), CONFIG) as bench:
        layers = probe.candidates(LAYERS)
        sides = [[r.prompt for r in REQUESTS], [p.prompt for p in LOCALITY]]
        bad, good = (probe.states_of(bench, side, layers) for side in sides)
        fitted = probe.fit(bad, good)
        assert fitted.cross_validated.auc == pytest.approx(found["auc"], abs=1e-6)
        scores = fitted.scores(bench, sides[0])
        torch.testing.assert_close(scores, fitted.linear.scores(bad[fitted.layer]))
    few = engine.locate(model, tiny_tokenizer(), REQUESTS[:-1], CONFIG, locality=LOCALITY)
    assert few.probe is None


def test_locate_says_and_writes_it(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PKE_FAST_CACHE", str(tmp_path / "cache"))
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"prompt": r.prompt, "ground_truth": "Sure"} for r in REQUESTS]
    (tmp_path / "requests.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "locality.jsonl").write_text("\n".join(json.dumps(vars(pair)) for pair in LOCALITY))
    command = [
        "locate",
        "--model",
        tmp_path / "model",
        "--requests",
        tmp_path / "requests.jsonl",
        "--out",
        tmp_path / "o",
    ]
    command += ["--locality", tmp_path / "locality.jsonl", "--set", "k=10", "--set", "window=[0, 3]", "--force"]
    assert main([str(part) for part in command]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "How precise an edit can be on these requests" in shown
    written = json.loads((tmp_path / "o" / "hotspots.json").read_text())["probe"]
    assert f"A linear probe of layer {written['layer']} finds, of 20 harmful requests," in shown
    assert f"(AUC {written['auc']:.3f}, cross-validated)" in shown
    assert main([str(part) for part in [*command, "--json"]]) == 0
    assert json.loads(capsys.readouterr().out)["probe"] == written
    assert main([str(part) for part in [*command, "--limit", 3]]) == 0
    assert "Too few harmful or harmless prompts to tell." in capsys.readouterr().out
