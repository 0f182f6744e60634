"""Plans that leave layers with the host: as few as must be, within the budget, and the run follows them to the bit."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

import pke_fast
import pke_fast.cli.commands  # here, so that what `pretended` replaces is there to be put back
import pke_fast.cli.planning
from pke_fast import engine, loading, planning
from pke_fast import workbench as workbenches
from pke_fast.budget import parse_bytes
from pke_fast.cli import commands, main
from pke_fast.config import PKEConfig
from pke_fast.errors import InputError
from pke_fast.pace import LEAST_TOKENS
from pke_fast.plan import Load, Residence
from pke_fast.planner import Planner
from pke_fast.planning import Room, plan_loaded, waits_on_host
from pke_fast.rehearsal import NotRehearsed, twin_of
from pke_fast.requests import EditRequest, Pair
from pke_fast.staging import StagedLayer, staging_bytes
from pke_fast.structure import find_structure
from pke_fast.testing import LAYERS, _fill, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("own_cache")

SMALL = {"batch_size": 2, "locality_batch_size": 2, "micro_batch_tokens": 512, "locality_tokens": 3}
CONFIG = PKEConfig(k=10, num_steps=3, window=(0, LAYERS), **SMALL)
OFFLOADS = Residence(offloads=True, pinnable=2**30)
REQUESTS = [EditRequest("Break a lock", ground_truth="Sure"), EditRequest("Steal a car"), EditRequest("Forge a pass")]
LOCALITY = [Pair("Bake a cake", "Take flour"), Pair("Sing a song"), Pair("Plant a tree", "Dig a hole")]


def planner_of(residence=OFFLOADS, config=CONFIG, device="cpu", **more):
    load = Load(12, 12, 12 * 40, 12 * 40, 5, (40,), (40,))
    return Planner(twin_of(tiny_model("llama"), torch.float32), config, load, device, residence=residence, **more)


def least_of(planner):
    with pytest.raises(InputError, match="too small") as told:
        planner.plan(1000)
    return parse_bytes(re.search(r"at least ([0-9.]+ [MG]iB)", str(told.value))[1])


@pytest.mark.parametrize("edits", [True, False])
def test_the_least_with_everything_offloaded_is_enough_and_less_is_not(edits):
    planner, resident = planner_of(edits=edits), planner_of(Residence(), edits=edits)
    twin = twin_of(tiny_model("llama"), torch.float32)
    least = least_of(planner)
    made = planner.plan(least)
    assert made.tokens == LEAST_TOKENS
    assert made.peak <= least
    assert made.layers_offloaded == LAYERS
    assert (made.scoring_kept, made.editing_kept) == (0, 0)
    with pytest.raises(InputError, match="too small"):
        planner.plan(int(0.98 * least))
    sizes = [sum(p.nbytes for p in layer.parameters()) for layer in tiny_model("llama").model.layers]
    assert made.offloaded == sum(sizes)
    assert made.weights == twin.weights - sum(sizes)
    assert (
        made.staging
        == staging_bytes(tiny_model("llama").model.layers)
        == 2 * StagedLayer.of(tiny_model("llama").model.layers[0]).size
    )
    assert made.peak == made.weights + made.staging + max(made.locating, made.editing)
    assert made.room == least - made.weights - made.staging
    assert least_of(resident) > 0


def test_nothing_is_offloaded_where_all_has_room():
    free = planner_of(Residence()).plan(None)
    made = planner_of().plan(free.peak)
    assert made == replace(free, budget=free.peak)
    assert (made.layers_offloaded, made.offloaded, made.staging, made.brought) == (0, 0, 0, 0)


def test_as_few_layers_as_must_be_are_offloaded():
    """Layers so large that two slots are less than what stays away."""
    planner = planner_of()
    twin = planner._twin
    own = twin.weights, list(planner._sizes)
    planner._sizes = [10**8] * 20
    twin.weights = 20 * 10**8
    try:
        offloaded = []
        for share in (0.2, 0.4, 0.6, 0.8, 1.0):
            budget = int(share * 20 * 10**8)
            made = planner.plan(budget)
            assert made.peak <= budget
            assert made.offloaded == made.layers_offloaded * 10**8
            assert made.peak + 10**8 > budget  # one layer fewer has no room
            offloaded.append(made.layers_offloaded)
        assert offloaded == sorted(offloaded, reverse=True)
        assert (offloaded[0], offloaded[-1]) == (17, 1)
    finally:
        twin.weights = own[0]


def test_offloaded_layers_keep_no_graph_and_few_tokens_wait_longer():
    planner = planner_of(device="cuda:0", config=CONFIG.replace(micro_batch_tokens=4096))
    planner._offloaded = 2
    assert planner._most_kept() == (1, 1)
    many, few = (planner._made(tokens, 0, 0, None) for tokens in (4096, 512))
    assert planner._waiting(few) > planner._waiting(many) > 0
    planner._offloaded = 0
    assert planner._waiting(planner._made(512, 0, 0, None)) == 0


def test_what_the_host_can_pin_is_pinned_from_the_uppermost_on():
    size = sum(p.nbytes for p in tiny_model("llama").model.layers[0].parameters())
    for pinnable, pinned in ((0, 0), (size, 1), (2 * size + 5, 2), (10 * size, 3)):
        planner = planner_of(Residence(True, pinnable))
        made = planner.plan(least_of(planner))
        assert made.pinned == pinned
        assert made.as_dict()["layers offloaded"] == {"pinned": pinned, "as they are": LAYERS - pinned}


def test_bytes_that_are_brought():
    planner = planner_of()
    made = planner.plan(least_of(planner))
    layers = made.offloaded
    batches = -(-24 * 40 // LEAST_TOKENS)
    steps = -(-(3 * 4 * 40) // LEAST_TOKENS)
    assert made.brought == batches * 2 * layers + steps * 2 * layers


def room_of(budget, pinnable):
    return lambda structure, twin, _budget, device: Room("cpu", budget, residence=Residence(True, pinnable))


DEPTH = 7


def deep_model(family):
    config = type(tiny_model(family).config).from_dict(
        {**tiny_model(family).config.to_dict(), "num_hidden_layers": DEPTH, "n_layer": DEPTH, "layer_types": None}
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    _fill(model)
    return model


@pytest.mark.parametrize(("family", "more"), [("llama", 0), ("llama", 60_000), ("gpt2", 60_000), ("phi3", 60_000)])
def test_the_run_follows_an_offloading_plan_to_the_bit(family, more, monkeypatch):
    config = CONFIG.replace(window=(0, DEPTH), micro_batch_tokens=64)

    def edited(model):
        return pke_fast.edit(model, tiny_tokenizer(), REQUESTS, config, locality=LOCALITY, samples=1)

    plans, brought = [], []
    own = workbenches.brought_to

    def planned(*args, **named):
        plans.append(plan_loaded(*args, **named))
        return plans[-1]

    def brings(*args):
        brought.append(args[3:])
        return own(*args)

    monkeypatch.setattr(engine, "plan_loaded", planned)
    monkeypatch.setattr(workbenches, "brought_to", brings)
    monkeypatch.setattr(planning, "_room", room_of(1000, 100_000))
    with pytest.raises(InputError, match="too small") as told:
        edited(deep_model(family))
    least = parse_bytes(re.search(r"at least ([0-9.]+ [MG]iB)", str(told.value))[1])
    monkeypatch.setattr(planning, "_room", room_of(least + more, 100_000))
    model, plain = deep_model(family), deep_model(family)
    result = edited(model)
    (plan,) = plans
    assert plan.layers_offloaded == DEPTH if more == 0 else 2 < plan.layers_offloaded < DEPTH
    assert 0 < plan.pinned < plan.layers_offloaded
    assert brought == [(plan.layers_offloaded, plan.pinned)]
    assert result.report["plan"]["bytes"]["offloaded"] == plan.offloaded
    monkeypatch.setattr(engine, "plan_loaded", lambda *_, **__: replace(plan, layers_offloaded=0))
    wanted = edited(plain)
    assert torch.equal(result.located.score_map, wanted.located.score_map)
    for name in ("steps", "before", "after"):
        assert result.report["losses"][name] == wanted.report["losses"][name]
    for ours, theirs in zip(result.patch.layers, wanted.patch.layers, strict=True):
        assert all(torch.equal(getattr(ours, part), getattr(theirs, part)) for part in ("neurons", "old", "new"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    result.revert()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), deep_model(family).parameters(), strict=True))


def test_a_spread_models_plan_counts_what_is_there(tmp_path):
    from accelerate import dispatch_model

    model = tiny_model("llama").requires_grad_(False)
    names = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    away = {f"model.layers.{index}": "disk" if index < 2 else "cpu" for index in range(LAYERS)}
    model = dispatch_model(model, {**dict.fromkeys(names, "cpu"), **away}, main_device="cpu", offload_dir=str(tmp_path))
    structure = find_structure(model)
    twin = twin_of(model, torch.float32)
    load = Load(12, 12, 12 * 40, 12 * 40, 5, (40,), (40,))
    made = plan_loaded(structure, CONFIG, load, 2**33, edits=True)
    there = sum(p.nbytes for p in model.parameters() if not p.is_meta)
    assert (made.weights, made.offloaded) == (there, twin.weights - there)
    assert made.staging == twin.layer_weights
    assert (made.scoring_kept, made.editing_kept) == (1, 1)
    assert made.layers_offloaded == 0  # accelerate's business
    with pytest.raises(InputError, match="too small"):
        plan_loaded(structure, CONFIG, load, 2**20, edits=True)


def test_a_budget_for_several_devices_is_refused(monkeypatch):
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model = tiny_model("llama").requires_grad_(False)
    structure = find_structure(model)
    add_hook_to_module(model.model.layers[1], AlignDevicesHook(torch.device("cpu", 1)))
    load = Load(12, 12, 12 * 40, 12 * 40, 5, (40,), (40,))
    with pytest.raises(InputError, match=r"several devices[\s\S]*cpu, cpu:1"):
        plan_loaded(structure, CONFIG, load, 2**33, edits=True)


def test_which_models_wait_with_the_host(monkeypatch):
    monkeypatch.setattr(planning, "free_bytes", lambda _device: 1000)
    assert not waits_on_host("cpu", 10**9, 1)
    assert waits_on_host("cuda:0", 701, None)
    assert not waits_on_host("cuda:0", 700, None)
    assert waits_on_host("cuda:0", 1, 2000)
    assert planning.offloading() == Residence(offloads=True, pinnable=500)


def test_a_model_of_unknown_size_is_loaded_on_the_card(monkeypatch):
    """Nobody can plan for it; a budget couldn't be kept, and is refused."""
    outline = SimpleNamespace(config=object(), dtype=torch.bfloat16)
    monkeypatch.setattr(loading, "load_outline", lambda *_: outline)
    monkeypatch.setattr(commands, "_load", lambda _options: "loaded")
    options, conditions = SimpleNamespace(model="m", dtype="bf16"), {"device": "cuda:0", "memory_budget": None}
    assert commands._load_for(conditions, options) == "loaded"
    with pytest.raises(NotRehearsed, match="no plan can be made for object"):
        commands._load_for(conditions | {"memory_budget": 2**30}, options)


def test_rates_are_measured():
    assert planning.copy_rate("cpu") > 1e6
    assert planning.matmul_rate("cpu", torch.float32, 64, 64) > 1e6


@pytest.fixture
def pretended(tmp_path, monkeypatch):
    """A GPU, as far as planning and loading go, and a checkpoint with requests."""
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "requests.jsonl").write_text('{"prompt": "Break a lock", "ground_truth": "Sure"}\n' * 3)
    (tmp_path / "benign.jsonl").write_text('{"prompt": "Bake a cake", "answer": "Take flour"}\n')
    monkeypatch.setattr("pke_fast.loading.resolve_device", lambda _name: "cuda:0")
    monkeypatch.setattr("pke_fast.cli.commands.resolve_device", lambda _name: "cuda:0")
    monkeypatch.setattr("pke_fast.cli.planning.matmul_rate", lambda *_: 1e12)
    monkeypatch.setattr("pke_fast.cli.planning.copy_rate", lambda _device: 1000.0)
    files = {"--model": "model", "--requests": "requests.jsonl", "--locality": "benign.jsonl"}
    given = [value for option, name in files.items() for value in (option, tmp_path / name)]
    settings = [v for s in ("k=10", "num_steps=2", "window=[0,3]") for v in ("--set", s)]
    return [str(value) for value in (*given, *settings)]


def test_the_plan_for_a_gpu_tells_what_waits_with_the_host(pretended, capsys):
    assert main(["plan", *pretended, "--memory-budget", "1KB"]) == 2
    least = re.search(r"at least ([0-9.]+ [MG]iB)", capsys.readouterr().err)[1]
    assert main(["plan", *pretended, "--memory-budget", least, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["device"] == "cuda:0"
    assert sum(told["layers offloaded"].values()) == LAYERS
    assert told["bytes"]["staging"] > 0 < told["bytes"]["offloaded"] < told["bytes"]["brought"]
    assert told["bytes"]["peak"] <= told["budget"]
    assert told["seconds"]["bringing"] == told["bytes"]["brought"] / 1000
    assert main(["plan", *pretended, "--memory-budget", least]) == 0
    printed = capsys.readouterr().out
    assert "if bringing the offloaded layers takes longer" in " ".join(printed.split())
    assert f"{LAYERS}, {told['layers offloaded']['pinned']} of them pinned" in printed
    assert "room for offloaded layers in use" in printed
    assert main(["plan", *pretended, "--memory-budget", "1GiB"]) == 0
    assert "wait with the host" not in capsys.readouterr().out


@pytest.mark.parametrize("command", ["edit", "locate"])
@pytest.mark.parametrize(
    ("free", "more", "where"),
    [(2**30, [], "cuda:0"), (2**17, [], "cpu"), (2**30, ["--memory-budget", "1GiB"], "cpu")],
)
def test_a_model_too_large_for_the_gpu_is_loaded_with_the_host(
    command, free, more, where, pretended, tmp_path, monkeypatch
):
    asked = []

    def loads(_name, device, _dtype, **_):
        asked.append(device)
        raise InputError("far enough")

    monkeypatch.setattr("pke_fast.cli.commands.load_model", loads)
    monkeypatch.setattr(planning, "free_bytes", lambda _device: free)
    assert main([command, *pretended, *more, "--device", "cuda:0", "--out", str(tmp_path / "out")]) == 2
    assert asked == [where]
