"""The engine: what is left out is filled in, what fails leaves the model as it was, what is written is whole."""

from __future__ import annotations

import json
import weakref

import pytest
import torch

import pke_fast
from pke_fast import engine, preparation, shipped, summary
from pke_fast.config import PKEConfig
from pke_fast.errors import InputError, PKEError
from pke_fast.judges import get_judge
from pke_fast.planning import plan_loaded
from pke_fast.ranks import Ranks
from pke_fast.requests import EditRequest, Pair
from pke_fast.testing import LAYERS, NEURONS, tiny_model, tiny_tokenizer
from pke_fast.workbench import Workbench, workbench

pytestmark = pytest.mark.usefixtures("own_cache")

CONFIG = PKEConfig(k=10, num_steps=2, batch_size=2, locality_batch_size=2, window=(0, LAYERS), locality_tokens=3)
REQUESTS = [EditRequest("Break a lock", ground_truth="Sure"), EditRequest("Steal a car"), EditRequest("Forge a pass")]
LOCALITY = [Pair("Bake a cake", "Take flour"), Pair("Sing a song"), Pair("Plant a tree", "Dig a hole")]


@pytest.fixture
def model():
    return tiny_model("llama")


def same(model):
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), tiny_model("llama").parameters(), strict=True))


def test_what_a_request_leaves_out_is_filled_in(model):
    with workbench(model, tiny_tokenizer(), CONFIG) as bench:
        job = preparation.prepare(bench, [*REQUESTS, EditRequest("Rob", "Never.", "Ok")], LOCALITY)
        own = bench.answers(["Steal a car"], CONFIG.unsafe_tokens, "again")[0]
    assert [request.target_new for request in job.requests] == [CONFIG.refusal] * 3 + ["Never."]
    assert job.requests[0].ground_truth == "Sure"
    assert job.requests[1].ground_truth == own
    assert [pair.prompt for pair in job.locality] == [pair.prompt for pair in LOCALITY]
    assert all(pair.answer for pair in job.locality)


def test_requests_that_are_refused_already_are_left_out_and_counted(model, monkeypatch):
    def fake(self, prompts, tokens, doing):
        return ["I'm sorry, no." if "car" in prompt else "Sure thing" for prompt in prompts]

    monkeypatch.setattr("pke_fast.workbench.Workbench.answers", fake)
    assert get_judge(preparation.REFUSAL_JUDGE).refused("I'm sorry, no.")
    with workbench(model, tiny_tokenizer(), CONFIG) as bench:
        job = preparation.prepare(bench, REQUESTS, LOCALITY)
        assert (job.given, job.already_refused, len(job.requests)) == (3, 1, 2)
        with pytest.raises(InputError, match="refuses all 1 requests already"):
            preparation.prepare(bench, [REQUESTS[1]], LOCALITY)
        with pytest.raises(InputError, match="no requests"):
            preparation.prepare(bench, [], LOCALITY)


def test_missing_locality_is_the_shipped_prompts_answered_once(model, monkeypatch):
    few = shipped.benign()[:5]
    monkeypatch.setattr(shipped, "benign", lambda: few)
    asked = []
    answer = Workbench.answers

    def counted(self, prompts, tokens, doing):
        asked.append(len(prompts))
        return answer(self, prompts, tokens, doing)

    monkeypatch.setattr(Workbench, "answers", counted)
    request = [EditRequest("Break a lock", ground_truth="Sure")]
    jobs = []
    for _ in range(2):
        with workbench(model, tiny_tokenizer(), CONFIG) as bench:
            jobs.append(preparation.prepare(bench, request, None))
    assert asked == [5]
    assert jobs[0].locality == jobs[1].locality
    with torch.no_grad():
        model.model.norm.weight[0] += 1  # another model has other answers
    with workbench(model, tiny_tokenizer(), CONFIG) as bench:
        preparation.prepare(bench, request, None)
    assert asked == [5, 5]


def test_answers_that_cant_be_kept_are_no_reason_to_end(model, monkeypatch, caplog):
    monkeypatch.setattr(shipped, "benign", lambda: ["Bake a cake", "Sing a song"])

    def full(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(preparation, "write_pairs", full)
    with workbench(model, tiny_tokenizer(), CONFIG) as bench:
        job = preparation.prepare(bench, [EditRequest("Break a lock", ground_truth="Sure")], None)
    assert job.locality
    assert "aren't kept for later jobs" in caplog.text


def test_a_prompt_on_both_sides(model):
    with pytest.raises(InputError, match=r"both a request and a benign pair(.|\n)*Break a lock"):
        pke_fast.edit(model, tiny_tokenizer(), REQUESTS, CONFIG, locality=[*LOCALITY, Pair("Break a lock", "No")])


def test_a_tokenizer_that_knows_more_than_the_model(model):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["Break"])
    for work in (pke_fast.edit, pke_fast.locate):
        with pytest.raises(InputError, match="tokens of(.|\n)*that the model doesn't know(.|\n)*got: 260"):
            work(model, tokenizer, REQUESTS, CONFIG, locality=LOCALITY)


def test_an_edit_is_reported_written_and_undone(model, tmp_path):
    model.train()
    result = pke_fast.edit(model, tiny_tokenizer(), REQUESTS, CONFIG, locality=LOCALITY, name="tiny", samples=1)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    report = result.report
    assert report["hot_spots"]["k"] == 10 == sum(report["hot_spots"]["by_layer"].values())
    assert len(report["losses"]["steps"]) == 2
    assert report["losses"]["after"]["edit"] < report["losses"]["before"]["edit"]
    assert {stage["name"] for stage in report["stages"]} >= {"Scoring the requests", "Editing the hot spots"}
    assert [sample["kind"] for sample in report["samples"]] == ["harmful", "benign"]
    assert all(row["change"] > 0 for row in report["hot_spots"]["top"])
    result.write(tmp_path / "out", save_model=True, redact=True)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"patch.safetensors", "report.json", "report.html", "model"}
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert written["samples"][0]["after"] == "[redacted]"
    assert written["model"]["name"] == "tiny"

    fresh = tiny_model("llama")
    pke_fast.Patch.load(tmp_path / "out" / "patch.safetensors").apply(fresh)
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), model.parameters(), strict=True))
    reloaded = pke_fast.load_model(str(tmp_path / "out" / "model")).model
    assert all(torch.equal(a, b) for a, b in zip(reloaded.parameters(), model.parameters(), strict=True))
    result.revert()
    assert same(model)
    with pytest.raises(InputError, match="isn't empty|not empty"):
        result.write(tmp_path / "out")


def test_the_same_seed_gives_the_same_patch_bytes(tmp_path):
    files = []
    for name in ("a", "b"):
        result = pke_fast.edit(tiny_model("qwen2"), tiny_tokenizer(), REQUESTS, CONFIG, locality=LOCALITY, samples=0)
        result.patch.save(tmp_path / name)
        files.append((tmp_path / name).read_bytes())
    assert files[0] == files[1]


def test_locating_changes_nothing_and_writes_the_scores(model, tmp_path):
    from safetensors.torch import load_file

    result = pke_fast.locate(model, tiny_tokenizer(), REQUESTS, CONFIG, locality=LOCALITY)
    assert same(model)
    assert len(result.hot_spots) == 10
    result.write(tmp_path / "found")
    scores = load_file(tmp_path / "found" / "scores.safetensors")
    assert scores["score"].shape == (LAYERS, NEURONS)
    assert {"unsafe.weight_change", "locality.activation_path", "layer_path"} <= set(scores)
    listing = json.loads((tmp_path / "found" / "hotspots.json").read_text())
    top = {(row["layer"], row["neuron"]) for row in listing["neurons"]}
    ranked = scores["score"].flatten().sort(descending=True).indices[:10].tolist()
    assert top == {divmod(index, NEURONS) for index in ranked}
    assert listing["neurons"][0]["score"] == pytest.approx(float(scores["score"].max()))
    assert (tmp_path / "found" / "heatmap.png").read_bytes().startswith(b"\x89PNG")


def test_the_drift_between_two_checkpoints_can_take_the_weight_changes_place(model):
    moved = tiny_model("llama")
    with torch.no_grad():
        moved.model.layers[2].mlp.down_proj.weight[:, 7] += 1
    config = CONFIG.replace(score="weight_change", k=1)
    result = pke_fast.locate(model, tiny_tokenizer(), REQUESTS, config, locality=LOCALITY, compare=moved)
    assert {layer: ids.tolist() for layer, ids in result.hot_spots.by_layer().items()} == {2: [7]}


def test_the_other_checkpoint_is_let_go_before_the_plan_is_made(model, monkeypatch):
    made, planned = [], []

    def other():
        made.append(weakref.ref(moved := tiny_model("llama", seed=1)))
        return moved

    def plan(*args, **kwargs):
        planned.append(made[0]())
        return plan_loaded(*args, **kwargs)

    monkeypatch.setattr(engine, "plan_loaded", plan)
    by_function = pke_fast.locate(model, tiny_tokenizer(), REQUESTS, CONFIG, locality=LOCALITY, compare=other)
    assert planned == [None]
    given = tiny_model("llama", seed=1)
    made[:] = [weakref.ref(given)]
    by_model = pke_fast.locate(model, tiny_tokenizer(), REQUESTS, CONFIG, locality=LOCALITY, compare=given)
    assert torch.equal(by_function.score_map, by_model.score_map)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": LAYERS * NEURONS + 1}, "more than there are neurons"),
        ({"k": 11, "per_layer_cap": 3}, "at most 9"),
        ({"exclude": ("9:0",)}, "excluded neuron 9:0 doesn't exist"),
        ({"window": (1, 9)}, "does not fit the model"),
        ({"max_length": 5}, "too long"),
    ],
)
def test_settings_that_do_not_fit_the_model_change_nothing(model, settings, message):
    with pytest.raises(InputError, match=message):
        pke_fast.edit(model, tiny_tokenizer(), REQUESTS, CONFIG.replace(**settings), locality=LOCALITY, samples=0)
    assert same(model)


@pytest.mark.parametrize("work", [pke_fast.edit, pke_fast.locate])
def test_no_requests(model, work):
    with pytest.raises(InputError, match="no requests"):
        work(model, tiny_tokenizer(), [], CONFIG)


def test_projections_that_the_model_has_not():
    model = tiny_model("gpt2")
    with pytest.raises(InputError, match=r"none of the projections(.|\n)*expected: one or more of gate, down"):
        pke_fast.edit(model, tiny_tokenizer(), REQUESTS, CONFIG.replace(projections=("up",)), locality=LOCALITY)


def test_exclusions_and_caps_are_obeyed(model):
    result = pke_fast.locate(model, tiny_tokenizer(), REQUESTS, CONFIG.replace(per_layer_cap=4), locality=LOCALITY)
    assert max(len(ids) for ids in result.hot_spots.by_layer().values()) == 4
    best = {layer: ids.tolist() for layer, ids in result.hot_spots.by_layer().items()}
    banned = tuple(f"{layer}:{neuron}" for layer, ids in best.items() for neuron in ids)
    other = pke_fast.locate(model, tiny_tokenizer(), REQUESTS, CONFIG.replace(exclude=banned), locality=LOCALITY)
    assert not {f"{a}:{n}" for a, ids in other.hot_spots.by_layer().items() for n in ids.tolist()} & set(banned)


def test_a_model_with_nan_weights_is_refused(model):
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = torch.nan
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        pke_fast.edit(model, tiny_tokenizer(), REQUESTS, CONFIG, locality=LOCALITY)


def test_an_edit_that_did_nothing_says_so_loudly(model):
    result = pke_fast.edit(model, tiny_tokenizer(), REQUESTS, CONFIG.replace(num_steps=0), locality=LOCALITY, samples=0)
    assert "THE EDIT DID NOTHING" in result.report["warnings"][0]
    result = pke_fast.edit(model, tiny_tokenizer(), REQUESTS, CONFIG.replace(lr=1e-7), locality=LOCALITY, samples=0)
    assert "THE EDIT DID LITTLE" in result.report["warnings"][0]


def test_ctrl_c_after_the_edit_puts_the_weights_back(model, monkeypatch):
    def interrupt(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr(summary, "report_of", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pke_fast.edit(model, tiny_tokenizer(), REQUESTS, CONFIG, locality=LOCALITY, samples=0)
    assert same(model)


def test_where_another_rank_is_lost_after_the_edit_the_weights_are_put_back(model, monkeypatch):
    def lost(_ranks):
        raise PKEError("another rank is gone")

    monkeypatch.setattr(Ranks, "wait", lost)
    with pytest.raises(PKEError, match="gone"):
        pke_fast.edit(model, tiny_tokenizer(), REQUESTS, CONFIG, locality=LOCALITY, samples=0)
    assert same(model)


def test_a_tokenizer_without_pad_or_chat_template_works(model):
    tokenizer = tiny_tokenizer(chat=False)
    tokenizer.pad_token = None
    model.config.pad_token_id = None
    result = pke_fast.edit(model, tokenizer, REQUESTS, CONFIG, locality=LOCALITY, samples=0)
    assert result.report["losses"]["after"]["edit"] < result.report["losses"]["before"]["edit"]


def test_dinm_parity_runs_through_the_engine(model):
    config = PKEConfig.preset("dinm-parity").replace(num_steps=2, lr=1e-2, suffix_system_prompt="")
    result = pke_fast.edit(model, tiny_tokenizer(), REQUESTS, config, locality=LOCALITY, samples=0)
    assert result.patch.n_neurons == NEURONS
    assert len(result.report["losses"]["steps"]) == 2 * len(REQUESTS)


def test_evaluation_through_the_engine(model):
    figures = pke_fast.evaluate(
        model, tiny_tokenizer(), ["Break a lock"], ["Bake a cake"], "Some plain text to read.", max_new_tokens=4
    ).as_dict()
    assert figures["harmful"]["n"] == figures["benign"]["n"] == 1
    assert set(figures["harmful"]["asr"]) == {"advbench", "jailbreakbench", "xstest"}
    assert figures["text"]["perplexity"] > 1


def test_the_shipped_prompts_are_many_and_apart():
    harmful = [request.prompt for request in shipped.harmful()]
    assert len(harmful) >= 64
    assert all(request.ground_truth for request in shipped.harmful())
    assert len(shipped.benign()) >= 128
    sets = [
        harmful,
        shipped.harmful_held_out(),
        shipped.benign(),
        shipped.benign_held_out(),
        shipped.look_alikes_held_out(),
    ]
    everything = [prompt.lower().strip() for prompts in sets for prompt in prompts]
    assert len(everything) == len(set(everything))
    assert len(shipped.prose().split()) > 1000


def test_a_model_that_is_not_in_one_place_is_refused(model):
    model.model.layers[2].to("meta")
    with pytest.raises(InputError, match="not all in one place"):
        pke_fast.edit(model, tiny_tokenizer(), REQUESTS, CONFIG, locality=LOCALITY)


def test_training_modes_are_put_back_module_by_module(model):
    model.train()
    model.lm_head.eval()
    with workbench(model, tiny_tokenizer(), CONFIG):
        assert not any(module.training for module in model.modules())
    assert model.model.layers[0].training
    assert not model.lm_head.training


def test_a_spoilt_cache_of_answers_is_made_anew(model, monkeypatch, tmp_path):
    few = shipped.benign()[:3]
    monkeypatch.setattr(shipped, "benign", lambda: few)
    request = [EditRequest("Break a lock", ground_truth="Sure")]
    with workbench(model, tiny_tokenizer(), CONFIG) as bench:
        first = preparation.prepare(bench, request, None)
        (cached,) = (tmp_path / "cache" / "answers").iterdir()
        cached.write_text("")
        assert preparation.prepare(bench, request, None).locality == first.locality
        assert cached.stat().st_size > 0


def test_edit_and_locate_choose_the_same_neurons(model):
    config = CONFIG.replace(window=(2, 3))
    found = pke_fast.locate(model, tiny_tokenizer(), REQUESTS, config, locality=LOCALITY).hot_spots.by_layer()
    result = pke_fast.edit(model, tiny_tokenizer(), REQUESTS, config, locality=LOCALITY, samples=0)
    assert [(part.layer, part.projection) for part in result.patch.layers] == [(2, "gate"), (2, "up"), (2, "down")]
    assert all(torch.equal(part.neurons, found[2]) for part in result.patch.layers)
