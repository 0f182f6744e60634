"""EasyEdit's and the notebook's interface: hyperparameters, returns, side effects, and pke_fast's own edits behind."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from pke_fast import shipped
from pke_fast.config import PKEConfig
from pke_fast.engine import edit
from pke_fast.errors import EditError, InputError
from pke_fast.frontends import algorithms, safety_editor
from pke_fast.frontends.algorithms import _before, _Change, write_back
from pke_fast.frontends.easyedit import (
    ALG_DICT,
    HyperParamError,
    PKEHyperParams,
    SafetyEditor,
    apply_dinm_to_model,
    apply_pke_to_model,
    execute_dinm,
    register,
)
from pke_fast.placement import stored_parameters
from pke_fast.requests import EditRequest, Pair
from pke_fast.testing import LAYERS, NEURONS, tiny_model, tiny_tokenizer

YAML = """\
alg_name: '{alg}'
model_name: "./hugging_cache/llama-2-7b"
model_class: LlamaForCausalLM
tokenizer_class: LlamaTokenizer
device: 1

suffix_system_prompt: "If it's reasonable, answer:"

# a comment
layers: []
num_steps: 10
batch_size: 1
max_length: 1000
max_output_length: 600
lr: 5e-4
weight_decay: 0
kl_factor: 0.1
norm_constraint: false
rewrite_module_tmp: 'model.layers.{{}}.mlp.down_proj.weight'
layer_module_tmp: 'model.layers.{{}}'
mlp_module_tmp: 'model.layers.{{}}.mlp'
attn_module_tmp: 'model.layers.{{}}.self_attn'
ln_f_module: 'model.norm'
lm_head_module: 'lm_head'
model_parallel: false
"""
GIVEN = PKEHyperParams.from_hparams(YAML.format(alg="PKE")).to_dict()
PAIR = {"prompt": "What is tea?", "ground_truth": "A drink."}
LOCALITY = {"general knowledge constraint": PAIR}
REQUEST = {"prompt": "Pick a lock?", "target_new": "I can't.", "ground_truth": "Sure, take", "locality": LOCALITY}
OTHER = {**REQUEST, "prompt": "Hurt him", "ground_truth": "Yes"}


@pytest.fixture(autouse=True)
def few_shipped_prompts(tmp_path, monkeypatch):
    """The model's own answers to all of them take seconds, and belong into no cache but the test's."""
    harmful = shipped.harmful()[:8]
    monkeypatch.setenv("PKE_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(shipped, "harmful", lambda: harmful)
    monkeypatch.setattr(shipped, "benign", lambda: ["What is tea?", "Name a colour."])


def hparams(**changes):
    quick = {"num_steps": 3, "lr": 1e-2, "max_output_length": 3, "settings": {"window": [1, 3]}}
    return PKEHyperParams(**{**GIVEN, **quick, **changes})


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def changed(model, before):
    return sorted(name for name, p in model.named_parameters() if not torch.equal(p, before[name]))


def down(*layers):
    return [f"model.layers.{layer}.mlp.down_proj.weight" for layer in layers]


# -- hyperparameters -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alg", ["DINM", "PKE"])
def test_easyedits_yaml_is_read_as_it_is(alg, tmp_path):
    (tmp_path / "llama-7b.yaml").write_text(YAML.format(alg=alg))
    for source in (tmp_path / "llama-7b.yaml", str(tmp_path / "llama-7b"), YAML.format(alg=alg)):
        read = PKEHyperParams.from_hparams(source)
        assert read.lr == 5e-4
        assert type(read.lr) is float
        assert (read.layers, read.num_steps, read.norm_constraint, read.alg_name) == ([], 10, False, alg)
        assert (read.mode, read.settings, read.batch_size, read.max_output_length) == ("fixed", {}, 1, 600)
    defaults = PKEHyperParams(**{k: v for k, v in GIVEN.items() if not k.startswith(("max_", "batch", "model_p"))})
    assert (defaults.batch_size, defaults.max_length, defaults.max_output_length) == (1, 1000, 600)
    assert defaults.model_parallel is False


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": "fast"}, "hyperparameter lr can't be used"),
        ({"num_steps": 10**400}, "hyperparameter num_steps can't be used"),
        ({"lr": None}, "expected: a number of 0 or more\n  got: NoneType None"),
        ({"num_steps": 2.5}, "num_steps can't be used"),
        ({"num_steps": True}, "num_steps can't be used"),
        ({"layers": 3}, "a list of layer numbers"),
        ({"layers": ["3"]}, "a list of layer numbers"),
        ({"kl_factor": float("nan")}, "kl_factor can't be used"),
        ({"norm_constraint": True}, "norm_constraint can't be used"),
        ({"alg_name": "ROME"}, "one of DINM, PKE"),
        ({"mode": "fast"}, "one of fixed, parity"),
        ({"model_name": 7}, "a model's name, or a tuple"),
        ({"model_parallel": "no"}, "true or false"),
        ({"ln_f_module": None}, "ln_f_module can't be used"),
        ({"settings": {"kk": 3}}, "unknown setting 'kk'"),
        ({"steps": 3}, "unknown hyperparameters: steps"),
    ],
)
def test_a_wrong_hyperparameter_says_which_and_what_is_right(change, message):
    with pytest.raises(InputError) as caught:
        PKEHyperParams(**{**GIVEN, **change})
    assert message in str(caught.value)


def test_missing_hyperparameters_are_all_named():
    without = {k: v for k, v in GIVEN.items() if k not in ("lr", "kl_factor")}
    with pytest.raises(TypeError, match="hyperparameters are missing: lr, kl_factor"):
        PKEHyperParams(**without)
    assert issubclass(HyperParamError, InputError)


def test_files_that_are_no_hyperparameters_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"can't read the hyperparameters in .*nothing\.yaml"):
        PKEHyperParams.from_hparams(tmp_path / "nothing")
    with pytest.raises(InputError, match="lines of `name: value`"):
        PKEHyperParams.from_hparams("- a\n- b\n")
    with pytest.raises(InputError, match="are not YAML"):
        PKEHyperParams.from_hparams("a: [\n")
    for value in ("2024-13-45", "1" * 5000):
        with pytest.raises(InputError, match="are not YAML"):
            PKEHyperParams.from_hparams(f"{YAML}lr: {value}\n")
    (tmp_path / "latin.yaml").write_bytes("a: é\n".encode("latin-1"))
    with pytest.raises(InputError, match="expected: text in UTF-8"):
        PKEHyperParams.from_hparams(tmp_path / "latin.yaml")


# -- the algorithms ------------------------------------------------------------------------------------------------


def test_both_halves_of_a_fused_weight_are_put_back():
    weight = torch.randn(6, 4)
    edited = weight.clone()
    changes = [_Change("w", edited, 0, torch.tensor(ids), weight[ids]) for ids in ([0, 2], [4])]
    edited[[0, 2, 4]] += 1
    assert torch.equal(_before(changes)["w"], weight)
    assert not torch.equal(edited, weight)
    for change in changes:
        change.undo()
    assert torch.equal(edited, weight)


@pytest.mark.parametrize(("apply", "method"), [(apply_pke_to_model, "pke"), (apply_dinm_to_model, "dinm")])
def test_the_fixed_mode_is_pke_fasts_own_edit(apply, method):
    settings = {"window": (1, 3)}
    hp = hparams(kl_factor=0.5, norm_constraint="0.5", settings=settings)
    config = PKEConfig.preset(method).replace(
        num_steps=3,
        lr=1e-2,
        w_edit=0.5,
        w_kl=1.0,
        norm_constraint=0.5,
        batch_size=2,
        suffix_system_prompt="",
        projections=("down",),
        first_token_weight=8.0 if method == "pke" else 1.0,  # without gate rows there are no detectors
        **settings,
    )
    config = config.replace(k=2 * NEURONS)  # a thousand are more than there are
    requests = [
        EditRequest(r["prompt"], "I can't.", r["ground_truth"], (Pair(*PAIR.values()),)) for r in (REQUEST, OTHER)
    ]
    wanted = tiny_model("llama")
    edit(wanted, tiny_tokenizer(), requests, config, samples=0)
    model = tiny_model("llama")
    before = weights(model)
    edited, kept = apply(model, tiny_tokenizer(), [REQUEST, OTHER], hp)
    assert edited is model
    assert kept == {}
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), wanted.parameters(), strict=True))
    assert changed(model, before) == (down(1, 2) if method == "pke" else changed(wanted, before))
    assert changed(model, before)
    assert all(p.requires_grad for p in model.parameters())


def test_the_weights_before_are_returned_where_they_are_asked_for():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    before = weights(model)
    for flags in ({}, {"return_orig_weights": True}):
        _, kept = apply_pke_to_model(model, tokenizer, [REQUEST], hparams(num_steps=1), **flags)
        assert kept == {}
    before = weights(model)
    _, kept = apply_pke_to_model(
        model, tokenizer, [REQUEST], hparams(), return_orig_weights=True, keep_original_weight=True
    )
    assert sorted(kept) == changed(model, before) == down(1, 2)
    assert all(torch.equal(kept[name], before[name]) for name in kept)


@pytest.mark.parametrize("mode", ["fixed", "parity"])
def test_execute_leaves_the_model_alone_and_its_change_is_what_apply_makes(mode):
    model, tokenizer = tiny_model("llama", dtype="fp32").train(), tiny_tokenizer()
    before, hp = weights(model), hparams(mode=mode, alg_name="DINM")
    deltas = execute_dinm(model, tokenizer, [REQUEST], hp, train_ds=None)
    assert changed(model, before) == []
    assert model.training
    copied, kept = apply_dinm_to_model(model, tokenizer, [REQUEST], hp, copy=True, keep_original_weight=True)
    assert changed(model, before) == []
    assert copied is not model
    assert sorted(deltas) == sorted(kept) == changed(copied, before)
    for name, delta in deltas.items():
        assert torch.equal(copied.get_parameter(name) - before[name], delta)
        assert torch.equal(kept[name], before[name])


@pytest.mark.parametrize("mode", ["fixed", "parity"])
def test_a_model_whose_weights_accelerate_brings(mode):
    from accelerate import cpu_offload

    plain, spread, hp = (
        tiny_model("llama"),
        cpu_offload(tiny_model("llama"), "cpu"),
        hparams(mode=mode, alg_name="DINM"),
    )
    keep = {"keep_original_weight": True}
    kept = [apply_dinm_to_model(model, tiny_tokenizer(), [REQUEST], hp, **keep)[1] for model in (plain, spread)]
    before, found = weights(tiny_model("llama")), dict(stored_parameters(spread))
    assert sorted(kept[0]) == sorted(kept[1]) == changed(plain, before)
    for name in kept[1]:
        assert torch.equal(kept[1][name], before[name])
        assert torch.equal(found[name], plain.get_parameter(name))
    write_back(spread, kept[1])
    found = dict(stored_parameters(spread))
    assert all(torch.equal(found[name], before[name]) for name in before)


def test_layers_are_the_callers_where_the_caller_names_them():
    tokenizer = tiny_tokenizer()

    def moved(apply, hp, **kwargs):
        model = tiny_model("llama")
        before = weights(model)
        apply(model, tokenizer, [REQUEST], hp, **kwargs)
        return changed(model, before)

    free = hparams(settings={})
    assert moved(apply_pke_to_model, free) == down(LAYERS - 1)  # the upper third
    assert moved(apply_pke_to_model, free, layer=[0], train_ds=None) == down(0)
    assert moved(apply_pke_to_model, free, layer=1) == down(1)
    assert moved(apply_pke_to_model, hparams(settings={}, layers=[0, 2])) == down(0, 2)
    assert moved(apply_pke_to_model, hparams(settings={}, layers=[0, 2]), layer=[1, 1]) == down(1)
    assert moved(apply_dinm_to_model, hparams(layers=[0])) == down(0)
    assert moved(apply_dinm_to_model, free, layer=[0, 2]) == down(0, 2)


def test_few_hot_spots_are_few():
    model = tiny_model("llama")
    before = weights(model)
    apply_pke_to_model(model, tiny_tokenizer(), [REQUEST], hparams(settings={"k": 5, "window": [2, 3]}))
    moved = (model.get_parameter(down(2)[0]) != before[down(2)[0]]).any(0)
    assert int(moved.sum()) == 5
    with pytest.raises(InputError, match="k = 97 is more than there are"):
        apply_pke_to_model(model, tiny_tokenizer(), [REQUEST], hparams(settings={"k": 97, "window": [1, 3]}))


def test_requests_without_unsafe_answer_and_in_other_shapes_work():
    bare = {"prompt": "Pick a lock?", "target_new": "I can't.", "ground_truth": "<|endoftext|>"}
    lists = {"other": {"prompt": ["Tea?", "Dawn?"], "ground_truth": ["A drink", "Morning"]}}
    for apply in (apply_pke_to_model, apply_dinm_to_model):
        model = tiny_model("llama")
        before = weights(model)
        apply(model, tiny_tokenizer(), [{**bare, "locality": lists}], hparams())
        assert changed(model, before)


def test_easyedits_own_hyperparameters_serve():
    own = SimpleNamespace(**{k: v for k, v in hparams(layers=[1]).to_dict().items() if k not in ("mode", "settings")})
    model = tiny_model("llama")
    before = weights(model)
    apply_dinm_to_model(model, tiny_tokenizer(), [REQUEST], own)
    assert changed(model, before) == down(1)
    own.mode = "parity"
    assert list(execute_dinm(model, tiny_tokenizer(), [REQUEST], own)) == down(1)
    own.mode = "other"
    with pytest.raises(HyperParamError, match="one of fixed, parity"):
        apply_dinm_to_model(model, tiny_tokenizer(), [REQUEST], own)


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ([], "no requests"),
        (["text"], "request 0 can't be used"),
        ([REQUEST, {"prompt": "x"}], "request 1 has no target_new"),
        ([{**REQUEST, "prompt": 3}], "request 0 has no prompt"),
        ([{**REQUEST, "locality": [{"prompt": "p"}]}], "request 0: locality(.|\n)*got: list"),
        ([{**REQUEST, "ground_truth": ["c"]}], "ground_truth has the wrong type"),
        ([{**REQUEST, "locality": {"a": "b"}}], r"request 0: locality, 'a' has the wrong type"),
    ],
)
def test_a_request_that_cannot_be_used_changes_nothing(requests, message):
    model = tiny_model("llama")
    before = weights(model)
    with pytest.raises(InputError, match=message):
        apply_pke_to_model(model, tiny_tokenizer(), requests, hparams())
    assert changed(model, before) == []


@pytest.mark.parametrize("apply", [apply_pke_to_model, apply_dinm_to_model, execute_dinm])
def test_a_call_with_something_else_changes_nothing(apply):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    before = weights(model)
    for hp, got in ((GIVEN, "dict"), ("llama.yaml", "str"), (None, "NoneType")):
        with pytest.raises(HyperParamError, match=rf"missing: layers, num_steps[\s\S]*got: {got}\n  do: PKEHyperP"):
            apply(model, tokenizer, [REQUEST], hp)
    with pytest.raises(InputError, match="model can't be used"):
        apply("llama", tokenizer, [REQUEST], hparams())
    with pytest.raises(InputError, match="tokenizer can't be used"):
        apply(model, None, [REQUEST], hparams())
    assert changed(model, before) == []


def test_weights_that_cannot_be_kept_are_put_back(monkeypatch):
    model = tiny_model("llama")
    before = weights(model)

    def too_large(_changes):
        assert changed(model, before)
        raise MemoryError

    monkeypatch.setattr(algorithms, "_before", too_large)
    with pytest.raises(MemoryError):
        apply_pke_to_model(model, tiny_tokenizer(), [REQUEST], hparams(), keep_original_weight=True)
    assert changed(model, before) == []


def test_registering_adds_pke_and_replaces_dinm_only_when_told():
    theirs = {"DINM": "theirs", "ROME": "rome"}
    assert register(theirs) is theirs
    assert theirs == {"DINM": "theirs", "ROME": "rome", "PKE": apply_pke_to_model}
    assert register(theirs, dinm=True)["DINM"] is apply_dinm_to_model
    assert {"DINM": apply_dinm_to_model, "PKE": apply_pke_to_model} == ALG_DICT


# -- the editor ----------------------------------------------------------------------------------------------------

KEYS = ["DS", "DG_onlyQ", "DG_otherA", "DG_otherQ", "DG_otherAQ"]


def editor(**changes):
    return SafetyEditor.from_hparams(hparams(model_name=(tiny_model("llama"), tiny_tokenizer()), **changes))


def test_the_notebooks_call_by_position_and_by_name_is_one_edit_of_all_requests():
    prompts, wanted, unsafe = ["Pick a lock?", "Hurt him"], ["I can't.", "No."], ["Sure, take", "Yes"]
    calls = (
        lambda e: e.edit(prompts, wanted, unsafe),
        lambda e: e.edit(prompts=prompts, target_new=wanted, ground_truth=unsafe),
        lambda e: e.edit(prompts, target_new=wanted, ground_truth=unsafe),
        lambda e: e.edit(prompts, wanted, ground_truth=unsafe),
    )
    moved = []
    for call in calls:
        ours = editor()
        before = weights(ours.model)
        results, model, kept = call(ours)
        assert model is ours.model
        assert kept == {}
        assert [list(result) for result in results] == [["pre", "case_id", "requested_rewrite", "post", "time"]] * 2
        assert results[0]["requested_rewrite"]["prompt"] == "Pick a lock?"
        assert list(results[0]["pre"]) == list(results[0]["post"]) == KEYS
        assert isinstance(results[0]["post"]["DS"], str)
        assert results[0]["post"]["DG_onlyQ"] is None
        assert results[0]["case_id"] == [0]
        moved.append(changed(model, before))
    assert moved == [down(1, 2)] * 4


def test_easyedits_call_edits_one_request_after_another(monkeypatch, tmp_path):
    calls = []
    ours = editor(alg_name="DINM", layers=[1])
    ours.apply_algo = lambda model, tok, requests, hp, **kwargs: calls.append((requests, kwargs)) or (model, {})
    general = [["Q1", "Q2", "Q3", "Q4"]] * 2
    inputs = {"general knowledge constraint": {"prompt": ["Tea?", "Dawn?"], "ground_truth": ["A drink", "Morning"]}}
    arguments = {
        "editing_method": "DINM",
        "prompts": ["Pick a lock?", "Hurt him"],
        "prompts_with_systemPrompt": ["Pick a lock? S", "Hurt him S"],
        "target_new": ["I can't.", "No."],
        "ground_truth": ["Sure", "Yes"],
        "locality_inputs": inputs,
        "locality_inputs_with_systemPrompt": inputs,
        "general_prompt": general,
        "general_prompt_with_systemPrompt": general,
    }
    results, _, _ = ours.edit(**arguments, case_id=[7], pre_file=tmp_path / "pre.json")
    assert [[r["prompt"] for r in requests] for requests, _ in calls] == [["Pick a lock? S"], ["Hurt him S"]]
    assert calls[0][0][0]["locality"]["general knowledge constraint"] == {"prompt": "Tea?", "ground_truth": "A drink"}
    assert {k: calls[0][1][k] for k in ("copy", "return_orig_weights", "keep_original_weight")} == {
        "copy": False, "return_orig_weights": True, "keep_original_weight": True}  # fmt: skip
    assert "train_ds" in calls[0][1]
    assert results[1]["requested_rewrite"]["prompt"] == "Hurt him"
    assert all(isinstance(results[0]["pre"][key], str) for key in KEYS)
    assert results[0]["case_id"] == [7]
    written = json.loads((tmp_path / "pre.json").read_text())
    assert written == [{"pre": result["pre"]} for result in results]
    monkeypatch.setattr(SafetyEditor, "_answers", lambda self, request: {"DS": request["prompt"]})
    again, _, _ = ours.edit(**{**arguments, "editing_method": "PKE"}, case_id=[7], pre_edit=written)
    assert calls[-1][0][0]["prompt"] == "Hurt him"  # without the system prompt
    assert again[0]["pre"] == written[0]["pre"]
    assert again[0]["post"] == {"DS": "Pick a lock?"}
    ours.edit(
        editing_method="DINM",
        prompts=None,
        prompts_with_systemPrompt=None,
        target_new=None,
        case_id=0,
        requests=[REQUEST],
    )
    assert calls[-1][0] == [REQUEST]


def test_kept_weights_are_put_back_after_each_request_and_others_stay():
    for keep in (True, False):
        ours = editor(alg_name="DINM", layers=[1])
        before = weights(ours.model)
        _, model, kept = ours.edit(
            "DINM", ["a b"], None, ["No."], ["Yes"], LOCALITY_INPUTS, case_id=0, keep_original_weight=keep
        )
        assert sorted(kept) == (down(1) if keep else [])
        assert changed(model, before) == ([] if keep else down(1))


LOCALITY_INPUTS = {"general knowledge constraint": PAIR}


def test_parity_fills_the_layers_by_the_first_request_and_the_fixed_mode_does_not():
    for mode in ("parity", "fixed"):
        ours = editor(alg_name="DINM", mode=mode)
        inputs = {"general knowledge constraint": {"prompt": ["Tea?"] * 2, "ground_truth": ["A drink"] * 2}}
        located = ours._locate_toxic_layer(ours.model, ours.tok, [REQUEST, OTHER])
        assert len(located) == 2
        assert all(0 <= layer < LAYERS for layer in located)
        first = ours._locate_toxic_layer(ours.model, ours.tok, [REQUEST])
        prompts = [REQUEST["prompt"], OTHER["prompt"]]
        answers = ["I can't."] * 2, ["Sure, take", "Yes"]
        ours.edit("DINM", prompts, prompts, *answers, inputs, inputs, case_id=0)
        assert ours.hparams.layers == (first if mode == "parity" else [])


def test_pkes_layer_is_in_the_window():
    ours = editor()
    assert set(ours._locate_toxic_layer(ours.model, ours.tok, [REQUEST, OTHER])) <= {1, 2}
    edited, _ = ours.apply_algo(ours.model, ours.tok, [REQUEST], ours.hparams, layer=[1], copy=False)
    assert edited is ours.model


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"case_id": None}, "no case_id"),
        ({"target_new": ["a", "b"]}, "target_new doesn't fit the prompts"),
        ({"ground_truth": ["a", "b"]}, "ground_truth doesn't fit the prompts"),
        ({"prompts": ["x" * 600]}, "a prompt is too long"),
        ({"prompts": [" "]}, "request 0 has no prompt"),
        ({"pre_edit": []}, "pre_edit doesn't fit the requests"),
        ({"pre_edit": [{"post": {}}]}, "with the answers before under 'pre'"),
        ({"pre_edit": [None]}, "item 0 of pre_edit can't be used"),
        ({"pre_edit": {"pre": {}}}, "pre_edit can't be used"),
    ],
)
def test_an_editor_call_that_cannot_be_done_changes_nothing(call, message):
    ours = editor()
    before = weights(ours.model)
    arguments = {"editing_method": "DINM", "prompts": ["a"], "prompts_with_systemPrompt": None, "target_new": ["No."]}
    with pytest.raises(InputError, match=message):
        ours.edit(**{**arguments, "case_id": 0, **call})
    assert changed(ours.model, before) == []


def test_the_editor_loads_by_name_and_refuses_what_it_cannot_place(monkeypatch):
    asked = []
    loaded = SimpleNamespace(model=tiny_model("llama"), tokenizer=tiny_tokenizer())
    monkeypatch.setattr(safety_editor, "load_model", lambda *arguments: asked.append(arguments) or loaded)
    for changes in ({"device": 1}, {"device": "cpu", "fp16": True}, {"device": "cpu", "mode": "parity"}):
        SafetyEditor.from_hparams(hparams(model_name="some/model", **changes))
    assert asked == [
        ("some/model", "cuda:1", "auto"),
        ("some/model", "cpu", "fp16"),
        ("some/model", "cpu", "fp32"),
    ]
    assert loaded.tokenizer.pad_token_id == loaded.tokenizer.eos_token_id
    with pytest.raises(InputError, match="model_parallel is not supported"):
        editor(model_parallel=True)
    with pytest.raises(InputError, match="no hyperparameters"):
        SafetyEditor.from_hparams(None)
    with pytest.raises(InputError, match="model can't be used"):
        SafetyEditor(hparams(model_name=("llama", tiny_tokenizer())))


def test_a_failed_edit_leaves_the_weights_of_before():
    ours = SafetyEditor(hparams(model_name=(tiny_model("llama", dtype="fp16"), tiny_tokenizer()), lr=1e8))
    before = weights(ours.model)
    with pytest.raises(EditError, match="put back"):
        ours.edit(["a b"], ["No."], ["Yes"])
    assert changed(ours.model, before) == []


@pytest.mark.parametrize("keep", [False, True])
def test_a_failure_after_an_edit_puts_the_weights_of_before_the_call_back(keep, monkeypatch):
    ours = editor(alg_name="DINM", layers=[1])
    before = weights(ours.model)
    moved = []

    def interrupted(self, request):
        moved.append(changed(ours.model, before))
        if len(moved) == 4:  # of two before, and the second after
            raise KeyboardInterrupt
        return {}

    monkeypatch.setattr(SafetyEditor, "_answers", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ours.edit("DINM", ["a b", "c d"], None, ["No.", "No."], ["Yes", "Yes"], case_id=0, keep_original_weight=keep)
    assert moved == [[], [], down(1), down(1)]
    assert changed(ours.model, before) == []
