"""SafeTune's PKE: rows, losses and weights of a plain dense restatement; its calling convention; bad input."""

from __future__ import annotations

import copy
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from plain_safetune import layer_in, plain_edit, plain_locate
from torch import nn

from pke_fast.errors import EditError, InputError
from pke_fast.frontends import row_editing, row_losses, safetune
from pke_fast.frontends.safetune import PKEConfig, PKEGradientEditor, PKETrainer, ToxicNeuronLocator, apply_pke
from pke_fast.testing import LAYERS, tiny_model, tiny_tokenizer


class Characters:
    """A callable tokenizer of characters, as SafeTune's toy models have."""

    eos_token_id = 2

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": ([1] if add_special_tokens else []) + [3 + ord(c) % 60 for c in text]}


class Mlp(nn.Module):
    def __init__(self, d, width):
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(d, width), nn.Linear(width, d)

    def forward(self, x):
        return self.down_proj(torch.relu(self.up_proj(x)))


class Block(nn.Module):
    def __init__(self, d, width):
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(d), Mlp(d, width)

    def forward(self, x):
        return x + self.mlp(self.norm(x.cumsum(1)))


class Toy(nn.Module):
    """Layers, raw logits, and a forward without attention mask."""

    def __init__(self, seed=0, d=12, width=20, depth=3):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed, self.head = nn.Embedding(64, d), nn.Linear(d, 64)
            self.layers = nn.ModuleList(Block(d, width) for _ in range(depth))

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Masked(Toy):
    def forward(self, input_ids, attention_mask):
        assert attention_mask.shape == input_ids.shape
        return SimpleNamespace(logits=super().forward(input_ids))


def moved(model, scale=0.05, seed=1):
    """A copy of the model with some noise, the same for the same seed."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return other


LOCALITY = ["What is tea?", "Name a colour of the sky at noon"]
TEXTS = ("How do I pick a lock?", "I can't help.", LOCALITY)
MODELS = {
    "toy": lambda: Toy(),
    "masked": lambda: Masked(),
    "llama": lambda: tiny_model("llama"),
    "qwen2": lambda: tiny_model("qwen2"),
}
SETTINGS = {
    "as published": {},
    "two layers": {"target_layers": [1, 2]},
    "a bound": {"max_edit_magnitude": 0.015},
    "no bound": {"max_edit_magnitude": None, "lr": 2e-2},
    "within the norm": {"norm_constraint": True, "lr": 0.3, "num_steps": 3},
    "cut": {"max_len": 24},
    "heavier KL": {"kl_factor": 4.0, "toxicity_weight": 0.5},
    "one step at least": {"num_steps": 0},
}
CASES = [("toy", name) for name in SETTINGS] + [(m, "as published") for m in ("masked", "qwen2")]
CASES += [("llama", name) for name in ("two layers", "a bound", "within the norm", "cut")]


@pytest.mark.parametrize(("kind", "named"), CASES)
def test_rows_losses_and_weights_are_the_published_ones(kind, named):
    model = MODELS[kind]()
    tokenizer = Characters()
    config = PKEConfig(**{"top_k_neurons": 6, "lr": 1e-2, "num_steps": 4, **SETTINGS[named]})
    clean, toxic = model.state_dict(), moved(model).state_dict()
    rows = ToxicNeuronLocator(config).locate_by_weight_change(clean, toxic)
    assert rows == plain_locate(clean, toxic, 6, config.target_layers)
    wanted, losses = plain_edit(model, rows, tokenizer, config, *TEXTS)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    editor = PKEGradientEditor(model, rows, tokenizer, config)
    count = editor.apply_edits(*TEXTS)
    moved_rows = 0
    for (name, p), (_, target) in zip(model.named_parameters(), wanted.named_parameters(), strict=True):
        change, truth = p.detach() - before[name], target.detach() - before[name]
        if not truth.any():
            assert not change.any(), name
            continue
        assert float((change - truth).norm() / truth.norm()) < 1e-3, name
        listed = sorted({row for row in rows[layer_in(name)] if row < len(p)})
        assert change.any(1).nonzero()[:, 0].tolist() == listed
        moved_rows += len(listed)
    assert moved_rows == count > 0
    assert len(editor.last_edit_losses) == len(losses) == max(1, config.num_steps)
    for ours, kl, theirs in zip(editor.last_edit_losses, editor.last_locality_losses, losses, strict=True):
        assert (ours, kl) == pytest.approx(theirs, rel=1e-4, abs=1e-6)


def test_a_transformers_model_is_replayed_from_its_lowest_located_layer_and_a_toy_is_run_whole(monkeypatch):
    used = []
    monkeypatch.setattr(row_losses, "Whole", lambda *a, kind=row_losses.Whole: used.append("whole") or kind(*a))
    replayed = row_losses.Replayed
    monkeypatch.setattr(row_losses, "Replayed", lambda *a: used.append(a[1]) or replayed(*a))
    for model, rows in ((tiny_model("llama"), {2: [1], 1: [0]}), (Toy(), {1: [1]})):
        PKEGradientEditor(model, rows, Characters(), PKEConfig(num_steps=1)).apply_edits(*TEXTS)
    assert used == [1, "whole"]


def test_rows_of_a_spread_model_are_refused():
    from accelerate import cpu_offload

    model = cpu_offload(tiny_model("llama"), "cpu")
    with pytest.raises(InputError, match="rows of a spread model"):
        PKEGradientEditor(model, {1: [0]}, Characters(), PKEConfig(num_steps=1)).apply_edits(*TEXTS)


def test_state_is_kept_for_the_rows_alone():
    model = Toy(d=64, width=32)
    editor = PKEGradientEditor(model, {0: [3, 1], 2: [5]}, Characters(), PKEConfig(num_steps=1))
    assert [(row.old.shape, row.neurons.tolist()) for row in editor._located()] == [((2, 32), [1, 3]), ((1, 32), [5])]
    assert editor.apply_edits(*TEXTS) == 3
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_moves_the_listed_rows_alone(dtype):
    model = tiny_model("llama", dtype=dtype)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    editor = PKEGradientEditor(model, {1: [0, 7]}, tiny_tokenizer(), PKEConfig(lr=1e-2, num_steps=8))
    editor.apply_edits(*TEXTS)
    assert editor.last_edit_losses[-1] < editor.last_edit_losses[0]
    for name, p in model.named_parameters():
        rows = (p != before[name]).flatten(1).any(1).nonzero() if p.dim() > 1 else (p != before[name]).nonzero()
        assert rows.flatten().tolist() == ([0, 7] if name == "model.layers.1.mlp.down_proj.weight" else [])


def test_apply_pke_is_locate_and_edit_and_gives_back_the_same_model():
    model, toxic = Toy(), moved(Toy())
    other = Toy()
    model.train()
    model.head.weight.requires_grad_(False)
    names = dict(zip(("harmful_prompt", "safe_response", "locality_inputs"), TEXTS, strict=True))
    given = apply_pke(model, Toy(), toxic, 5, [0, 2], 0.5, 0.5, tokenizer=Characters(), lr=1e-2, **names, unknown=3)
    assert given is model
    assert model.training
    assert [p.requires_grad for p in model.head.parameters()] == [False, True]
    config = PKEConfig(5, [0, 2], 0.5, 0.5, lr=1e-2)
    locator = ToxicNeuronLocator(config)
    rows = locator.locate_by_weight_change(Toy().state_dict(), toxic.state_dict())
    assert locator.toxic_neurons is rows
    assert sorted(rows) == [0, 2]
    PKEGradientEditor(other, rows, Characters(), config).apply_edits(*TEXTS)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_ties_keep_the_order_of_the_weights(caplog):
    locator = ToxicNeuronLocator(PKEConfig(top_k_neurons=4))
    rows = locator.locate_by_weight_change(Toy().state_dict(), Toy().state_dict())
    assert rows == {layer: [0, 1, 2, 3] for layer in range(LAYERS)}
    assert "have the same weights" in caplog.text


def test_the_batch_and_its_loss_are_as_documented():
    editor = PKEGradientEditor(Toy(), {}, Characters(), PKEConfig(max_len=6))
    ids, labels, mask = editor._build_supervised_batch("abcdefgh", "xy")
    assert ids.tolist() == [[*(3 + ord(c) % 60 for c in "fghxy"), 2]]
    assert labels.tolist() == [[-100] * 3 + ids[0, 3:].tolist()]
    assert mask.tolist() == [[1] * 6]
    logits = torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(0))
    wanted = F.cross_entropy(logits[0, 2:5], ids[0, 3:])
    torch.testing.assert_close(editor._edit_nll(logits, labels), wanted)


def weights_of(model):
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize(
    ("model", "rows", "changes", "message"),
    [
        (Toy, {0: [1]}, {"tokenizer": None}, "no tokenizer"),
        (Toy, {0: [1]}, {"safe": ""}, "safe_response can't be used"),
        (Toy, {0: [1]}, {"safe": None}, "safe_response can't be used"),
        (Toy, {0: [1]}, {"locality": "Bake"}, "locality_inputs can't be used"),
        (Toy, {0: [1]}, {"config": {"num_steps": -1}}, "num_steps can't be used"),
        (Toy, {0: [1]}, {"config": {"lr": 1e38}}, "lr can't be used"),
        (Toy, {0: [1]}, {"config": {"max_len": 0}}, "max_len can't be used"),
        (Toy, {0: [1]}, {"config": {"max_len": 1}}, "no token of the safe response is left"),
        (lambda: nn.ModuleDict({"layers": nn.ModuleList([nn.ParameterDict({"down_proj_weight": torch.ones(2, 2)})])}),
         {0: [1]}, {}, "the weight of a Linear module"),
    ],
)  # fmt: skip
def test_what_cannot_be_edited_is_refused_and_nothing_changes(model, rows, changes, message):
    model, tokenizer = model(), changes.get("tokenizer", Characters())
    before = weights_of(model)
    editor = PKEGradientEditor(model, rows, tokenizer, PKEConfig(**{"num_steps": 1, **changes.get("config", {})}))
    call = ("a", changes.get("safe", "b"), changes.get("locality", ["c"]))
    with pytest.raises(InputError, match=message):
        editor.apply_edits(*call)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    assert editor.last_edit_losses == []


def test_rows_that_the_model_does_not_have_are_passed_over(caplog):
    model = Toy()
    before = weights_of(model)
    assert PKEGradientEditor(model, {0: [12, 99], 7: [1]}, Characters()).apply_edits(*TEXTS) == 0
    assert "nothing was edited" in caplog.text
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def test_checkpoints_that_do_not_compare_are_refused():
    with pytest.raises(InputError, match="differs in shape"):
        apply_pke(Toy(), Toy(), Toy(width=21), tokenizer=Characters())
    with pytest.raises(InputError, match="clean and toxic have the same weights"):
        apply_pke(Toy(), Toy(), Toy(), tokenizer=Characters())
    with pytest.raises(InputError, match="top_k_neurons can't be used"):
        apply_pke(Toy(), Toy(), moved(Toy()), -1, tokenizer=Characters())
    broken = Toy()
    with torch.no_grad():
        broken.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.down_proj\.weight isn't finite"):
        apply_pke(Toy(), Toy(), broken, tokenizer=Characters())


@pytest.mark.parametrize("model", [lambda: Toy().half(), lambda: tiny_model("llama", dtype="fp16")])
def test_a_failure_puts_the_weights_back(model, monkeypatch):
    model = model()
    before = weights_of(model)
    with pytest.raises(EditError, match="put back"):
        PKEGradientEditor(model, {0: [1], 1: [2]}, Characters(), PKEConfig(lr=1e8)).apply_edits(*TEXTS)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    steps = []
    adam = row_editing.Rows.adam

    def interrupted(self, lr):
        steps.append(adam(self, lr))
        if len(steps) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(row_editing.Rows, "adam", interrupted)
    with pytest.raises(KeyboardInterrupt):
        PKEGradientEditor(model, {0: [1], 1: [2]}, Characters(), PKEConfig()).apply_edits(*TEXTS)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def test_the_trainer_applies_what_it_was_given_and_writes_nothing(tmp_path):
    clean, toxic = Toy(), moved(Toy())
    names = dict(zip(("harmful_prompt", "safe_response", "locality_inputs"), TEXTS, strict=True))
    model = Toy()
    trainer = PKETrainer(
        model, clean_model=clean, toxic_model=toxic, top_k_neurons=7, num_steps=2, tokenizer=Characters(), **names,
        model_id="m", results_dir=str(tmp_path),
    )  # fmt: skip
    assert trainer.apply() is model
    wanted = apply_pke(Toy(), clean, toxic, 7, num_steps=2, tokenizer=Characters(), **names)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), wanted.parameters(), strict=True))
    trainer.apply(num_steps=1, top_k_neurons=3, tokenizer=Characters())
    wanted = apply_pke(wanted, clean, toxic, 3, num_steps=1, tokenizer=Characters(), **names)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), wanted.parameters(), strict=True))
    assert list(tmp_path.iterdir()) == []
    for changes, message in (({"toxic_model": None}, "no toxic_model"), ({"model": None}, "no model")):
        arguments = {"model": Toy(), "clean_model": clean, "toxic_model": toxic, "tokenizer": Characters(), **changes}
        with pytest.raises(InputError, match=message):
            PKETrainer(arguments.pop("model"), **arguments).apply()
    with pytest.raises(InputError, match="no tokenizer"):
        PKETrainer(Toy(), clean_model=clean, toxic_model=toxic).apply()


def test_a_trainer_by_name_loads_model_and_tokenizer_once(monkeypatch):
    asked = []
    loaded = SimpleNamespace(model=tiny_model("llama"), tokenizer=tiny_tokenizer())
    monkeypatch.setattr("pke_fast.loading.load_model", lambda name: asked.append(name) or loaded)
    base = tiny_model("llama")
    trainer = PKETrainer(clean_model=base, toxic_model=moved(base), num_steps=1, model_id="some/model")
    assert trainer.apply() is loaded.model
    assert asked == ["some/model"]


def test_registering_makes_a_recovery_method(monkeypatch):
    with pytest.raises(InputError, match="SafeTune can't be imported"):
        safetune.register()

    class RecoverBase:
        METHOD = ""

        def __init__(self, model=None, *, model_id=None, results_dir=None, drift_task=None, **kwargs):
            self.model, self.model_id, self.results_dir, self._extra = model, model_id, results_dir, kwargs

    registry = {}
    tree = {
        "safetune": {},
        "safetune.runner": {},
        "safetune.runner._registry": {"register_recover": registry.__setitem__},
        "safetune.runner.recover": {},
        "safetune.runner.recover._base": {"_RecoverBase": RecoverBase},
        "safetune.runner.utils": {},
        "safetune.runner.utils.model_utils": {"load_tok": lambda name: {"m": Characters()}[name]},
    }
    for name, members in tree.items():
        module = ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)
    trainer = safetune.register()
    assert registry == {"pke-fast": "PKEFastTrainer"}
    assert sys.modules["safetune.runner.recover"].PKEFastTrainer is trainer
    assert issubclass(trainer, RecoverBase)
    assert trainer.METHOD == "PKEFastTrainer"
    model, clean = Toy(), Toy()
    made = trainer(
        model, clean_model=clean, toxic_model=moved(clean), num_steps=1, model_id="m", results_dir="r", other=1
    )
    assert (made.results_dir, made._extra) == ("r", {"other": 1})
    before = weights_of(model)
    assert made.apply() is model
    assert not all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
