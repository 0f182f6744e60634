"""The plan: what is rehearsed is what the run allocates, plans obey their budget, and the least budget is the least."""

from __future__ import annotations

import json
import re
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pke_fast
from pke_fast import budget as limits
from pke_fast import generation, planning
from pke_fast import planner as planners
from pke_fast.batches import make_batch
from pke_fast.budget import parse_bytes
from pke_fast.cli import main
from pke_fast.columns import columns_of
from pke_fast.config import PKEConfig
from pke_fast.detectors import detectors_bytes, fit_bytes
from pke_fast.encoding import Encoded
from pke_fast.errors import InputError
from pke_fast.kinds import PROJECTIONS
from pke_fast.mapped import mapped_bytes
from pke_fast.pace import LEAST_TOKENS, Pace
from pke_fast.plan import Load, Residence
from pke_fast.planner import Planner
from pke_fast.planning import plan_loaded
from pke_fast.prefix import Prefix
from pke_fast.rehearsal import twin_of, twin_of_config
from pke_fast.requests import EditRequest, Pair
from pke_fast.scoring import score_batch
from pke_fast.structure import find_structure
from pke_fast.tape import record
from pke_fast.testing import FAMILIES, LAYERS, tiny_model, tiny_tokenizer
from pke_fast.trainer import Trainer

CONFIG = PKEConfig(k=12, batch_size=4, locality_batch_size=4, window=(1, LAYERS), micro_batch_tokens=512)
LONG, ANSWER = 40, 5
OWN_CACHE = ["gpt2"] if transformers.__version__.startswith("4.") else []


def load_of(n=12, length=LONG):
    return Load(n, n, n * length, n * length, ANSWER, (length,), (length,))


class LiveBytes(TorchDispatchMode):
    """The most bytes of tensors made while it is active, alive at once, in a run with data."""

    def __init__(self, model):
        super().__init__()
        self.known = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
        self.live, self.most = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in self.known | self.live.keys():
                storage = leaf.untyped_storage()
                self.live[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, storage._cdata)
        self.most = max(self.most, sum(self.live.values()))
        return out


def padded(n):
    """Sequences of which every other one is a little shorter: a mask that is all ones would be left out."""
    draw = torch.Generator().manual_seed(n)
    lengths = [LONG - 3 * (i % 2) for i in range(n)]
    return [Encoded(tuple(torch.randint(256, (t,), generator=draw).tolist()), t - ANSWER) for t in lengths]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kept", [0, 2])
def test_a_rehearsed_batch_takes_what_the_real_one_takes(family, kept, monkeypatch):
    """Rehearsed on tensors without data, which also proves that nothing in it waits for the device."""
    model = tiny_model(family).requires_grad_(False)
    twin, structure = twin_of(model, torch.float32), find_structure(model)
    monkeypatch.setattr("pke_fast.rehearsal._WITHIN", {})  # what lies within an op, this test's mode can't see
    made = padded(6)

    def scored(structure):
        score_batch(structure, make_batch(made, range(6), 259), torch.ones(6), 1, kept)

    def stepped(structure):
        columns = columns_of(structure, dict.fromkeys((1, 2), torch.arange(6)), CONFIG.edited)
        config = CONFIG.replace(lr=1e-3)
        trainer = Trainer(structure, columns, made[:4], made[2:], config, 259, pace=Pace(512, None, kept))
        trainer.gradients(0)
        trainer.update(0)

    def gone_on(structure):
        columns = columns_of(structure, dict.fromkeys((1, 2), torch.arange(6)), CONFIG.edited)
        begun = make_batch([Encoded(tuple(range(LONG // 2)), LONG // 2)], [0], 259)
        more = {"pace": Pace(512, None, kept), "beginning": record(structure, begun, 1, begins=True)}
        trainer = Trainer(structure, columns, made[:4], made[2:], CONFIG.replace(lr=1e-3), 259, **more)
        trainer.gradients(0)
        trainer.update(0)

    whole = [scored, stepped] + [gone_on] * (family not in OWN_CACHE)
    for work in whole:
        with LiveBytes(model) as watch:
            work(structure)
        assert watch.most > 4 * 32 * LONG * 6
        assert twin.rehearse(work, 1) == pytest.approx(watch.most, rel=0.03)


def test_a_plan_counts_what_a_request_is_scored_by():
    """Of two answers, which stay together, and of longer ones than are edited on."""
    twin, scored = twin_of(tiny_model("llama"), torch.float32), {}
    config = CONFIG.replace(micro_batch_tokens=LONG, locality_batch_size=1, batch_size=1)
    safe = padded(6)
    longer = [Encoded((*sequence.ids, *[0] * LONG), sequence.prompt_length) for sequence in safe]
    for name, groups in {"safe": (safe,), "both": (safe, safe), "unsafe": (longer,)}.items():
        load = Load.of(safe, safe, [list(group) for group in zip(*groups, strict=True)])
        scored[name] = Planner(twin, config, load).plan(None)
        rows = [sequence for side in groups for sequence in side[:1]]
        assert twin.rehearse(
            lambda structure, rows=rows: score_batch(
                structure, make_batch(rows, range(len(rows)), 0, [0] * len(rows)), torch.ones(len(rows)), 1, LAYERS - 1
            ),
            1,
        ) == pytest.approx(scored[name].scoring / planners._HELD["cpu"], rel=0.02)
    assert scored["both"].scoring > 1.6 * scored["safe"].scoring
    assert scored["unsafe"].scoring > 1.6 * scored["safe"].scoring
    assert scored["both"].scoring_flops > 1.4 * scored["safe"].scoring_flops
    assert scored["safe"] == Planner(twin, config, Load.of(safe, safe)).plan(None)


def test_ranks_of_one_machine_share_its_memory(monkeypatch):
    monkeypatch.setattr(limits, "_available", lambda: 10**9)
    monkeypatch.setattr(limits, "_own_groups", list)
    alone = limits.free_bytes("cpu")
    assert alone == int(limits.SHARE * 10**9)
    pinnable = planning.offloading().pinnable
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert limits.free_bytes("cpu") == alone // 4
    assert planning.offloading().pinnable == pinnable // 4
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (6 * 10**8, 10**9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _device: 10**9)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _device: 6 * 10**8)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda _device: 1.6, raising=False)
    assert limits.free_bytes("cuda:1") == alone  # each rank has a card of its own, and what torch keeps of it unused
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda _device: 0.7)
    assert limits.free_bytes("cuda:1") == int(limits.SHARE * 10**8)  # of what the process may take, the rest


@pytest.mark.parametrize("family", FAMILIES)
def test_what_all_begin_with_counts_once_in_an_edit(family):
    """Its sequences then take less of the cache and of the time; scoring takes less time where it is given many."""
    twin = twin_of(tiny_model(family), torch.float32)
    whole, begun = (Planner(twin, CONFIG, replace(load_of(), begun=n)).plan(None) for n in (0, LONG // 2))
    if family in OWN_CACHE:
        assert begun == whole
        return
    assert 0.4 * whole.cache < begun.cache < 0.7 * whole.cache
    layers, steps = LAYERS - 1, CONFIG.num_steps
    again = (
        2 * twin.layer_weights / 4 * steps * 2 * (LONG // 2) * (3 * layers - begun.editing_kept)
    )  # two micro-batches
    logits = 4 * twin.structure.head.weight.numel() * steps * CONFIG.batch_size * ANSWER
    assert begun.editing_flops == pytest.approx((whole.editing_flops - logits) / 2 + logits + again)
    assert (begun.scoring, begun.scoring_flops) == (whole.scoring, whole.scoring_flops)  # 12 of a side are few
    whole, begun = (Planner(twin, CONFIG, replace(load_of(40), begun=n)).plan(None) for n in (0, LONG // 2))
    saved = 2 * twin.layer_weights / 4 * 80 * (LONG // 2)  # one layer lies below the window
    assert whole.scoring_flops - begun.scoring_flops == pytest.approx(saved)
    low = CONFIG.replace(window=(0, LAYERS))  # with no layers below, nothing is taken off
    assert Planner(twin, low, replace(load_of(), begun=8)).plan(None) == Planner(twin, low, load_of()).plan(None)
    coming = Residence(away=1, kept_from=2)  # and where weights of edited layers come and go, neither
    loads = load_of(), replace(load_of(), begun=LONG // 2)
    one, other = (Planner(twin, CONFIG, load, residence=coming).plan(None) for load in loads)
    assert one == other


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("begins", [False, True])
def test_the_cache_is_what_the_tapes_and_the_unedited_states_take(family, begins):
    model = tiny_model(family)
    structure, begun = find_structure(model), LONG // 2 if begins and family not in OWN_CACHE else 0
    sides = [padded(24), [replace(sequence, held=(LONG // 2 + 1, LONG // 2 + 4)) for sequence in padded(30)]]
    load = replace(Load.of(*sides), begun=begun)
    plan = Planner(twin_of(model, torch.float32), CONFIG, load).plan(None)
    columns = columns_of(structure, {1: torch.arange(4)}, CONFIG.edited)
    beginning = None
    if begun:
        ids = make_batch([Encoded(tuple(range(begun)), begun)], [0], 259)
        beginning = record(structure, ids, 1, begins=True)
    rest = [[sequence.after(begun) for sequence in side] for side in sides]
    trainer = Trainer(
        structure, columns, *rest, CONFIG.replace(lr=1e-3), 259, pace=Pace(plan.tokens), beginning=beginning
    )
    tapes = [tape for side in (trainer.requests, trainer.locality) for minibatch in side for tape in minibatch.tapes]
    states = [state for minibatch in trainer.locality for state in minibatch.base]
    entered = sum(tape.entered.nbytes for tape in tapes)
    taken = sum(tape.nbytes for tape in tapes) + sum(state.nbytes for state in states)
    assert taken > 1.2 * entered
    assert plan.cache == pytest.approx(taken, rel=0.15)


@pytest.mark.parametrize("longer", ["requests", "locality"])
def test_a_plan_counts_the_sides_by_their_own_lengths(longer, monkeypatch):
    """An edit runs half of the one side and all of the other, which is of other lengths."""
    monkeypatch.setattr("pke_fast.trainer.WATCHED", 1)
    monkeypatch.setattr("pke_fast.trainer.SAMPLE", 1)
    config = CONFIG.replace(num_steps=3, score_requests=6, score_pairs=2, detectors=False)  # 12 of each are run
    short, long = ([Encoded((0,) * width, width - 2)] * 24 for width in (10, 90))
    sides = (long, short[:12]) if longer == "requests" else (short, long[:12])
    load = Load.of(*sides)
    assert load.tokens == sum(len(sequence.ids) for side in sides for sequence in side)
    run = Load.of(*(side[:12] for side in sides))
    assert load.reached(12, 12).tokens == run.tokens
    twin = twin_of(tiny_model("llama"), torch.float32)
    plan, least = (Planner(twin, config, given).plan(None) for given in (load, run))
    assert (plan.cache, plan.editing_flops) == (least.cache, least.editing_flops)
    assert plan.scoring_flops == least.scoring_flops  # 6 requests and 2 pairs score of either


def test_last_states_are_counted_again_for_the_pairs_that_steps_hold(monkeypatch):
    """The KL goes on from the model with the detectors, but of no more pairs than steps come to."""
    twin, load = twin_of(tiny_model("llama"), torch.float32), replace(load_of(24), held=240)
    kept = 240 * twin.structure.hidden_size * 4
    plans = {}
    for steps in (0, 3, 6, 9):
        for detectors in (False, True):
            config = CONFIG.replace(num_steps=steps, detectors=detectors)  # 4 pairs a step
            plans[steps, detectors] = Planner(twin, config, load).plan(None)
    more = [plans[steps, True].cache - plans[steps, False].cache for steps in (0, 3, 6, 9)]
    assert more == [0, kept // 2, kept, kept]
    flops = [plans[steps, True].editing_flops - plans[steps, False].editing_flops for steps in (3, 6)]
    assert flops[1] == pytest.approx(2 * flops[0]) != 0


@pytest.mark.parametrize("family", FAMILIES)
def test_what_answers_take_is_known(family):
    """Keys and values at least; and fewer prompts are answered at a time where there is little room."""
    model = tiny_model(family)
    plan = Planner(twin_of(model, torch.float32), CONFIG, load_of()).plan(2**30)
    if plan.answering:
        kept = Prefix.of(find_structure(model).base, range(16), torch.device("cpu"))._kept
        keys_and_values = sum(tensor.nbytes for pair in kept.values() for tensor in pair) / 16
        assert len(kept) == LAYERS
        assert keys_and_values < plan.answering < 20 * keys_and_values
        most = plan.at_once(2**40)
        assert most * plan.answering <= max(plan.locating, plan.editing) < (most + 1) * plan.answering
        assert plan.at_once(3) == 3
    else:
        assert family in OWN_CACHE
    assert replace(plan, answering=0).at_once(8192) == 8192


def test_a_plan_decides_how_many_prompts_are_answered_at_a_time(monkeypatch):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    requests = [EditRequest(f"Break lock {n}", ground_truth="Sure") for n in range(4)]
    locality = [Pair(f"Bake {n}") for n in range(4)]
    rows = []
    real = generation._answer
    monkeypatch.setattr(generation, "_answer", lambda some, *a, **k: rows.append(len(some)) or real(some, *a, **k))
    monkeypatch.setattr("pke_fast.plan.Plan.at_once", lambda _plan, most: 30)
    config = CONFIG.replace(num_steps=1)
    pke_fast.edit(model, tokenizer, requests, config, locality=locality, samples=2, memory_budget=2**32)
    assert rows
    assert max(rows) == 1


def test_layers_that_keep_their_graph_and_tokens_cost_memory():
    twin = twin_of(tiny_model("llama"), torch.float32)
    planner = Planner(twin, CONFIG, load_of())
    for doing in ("scoring", "editing"):
        one, every = (planner._peak(doing, 512, n) for n in (1, LAYERS))
        assert one < every
        assert planner._peak(doing, 64, 1) < one


@pytest.mark.parametrize(("family", "edits"), [("llama", True), ("llama", False), ("gpt2", True)])
def test_plans_obey_their_budget_and_more_memory_is_never_slower(family, edits):
    twin = twin_of(tiny_model(family), torch.float32)
    planner = Planner(twin, CONFIG, load_of(), edits=edits)
    free = planner.plan(None)
    assert (free.tokens, free.scoring_kept) == (512, LAYERS - (1 if edits else 0))
    assert free.editing_kept == LAYERS - 1
    with pytest.raises(InputError, match="too small") as told:
        planner.plan(twin.weights)
    least = parse_bytes(re.search(r"at least ([0-9.]+ [MG]iB)", str(told.value))[1])
    slowness = []
    for budget in [*range(least, free.peak, (free.peak - least) // 6), free.peak]:
        made = planner.plan(budget)
        assert made.peak <= budget == made.budget
        assert made.peak == made.process + made.weights + max(made.locating, made.editing)
        slowness.append(planner._slowness(made))
    assert slowness == sorted(slowness, reverse=True)
    assert slowness[0] > slowness[-1] == planner._slowness(free)


def test_an_edit_counts_what_its_detectors_keep_on_the_cpu():
    twin, load = twin_of(tiny_model("llama"), torch.float32), load_of()

    def kept(config=CONFIG, load=load, **more):
        return Planner(twin, config, load, **more).plan(None)

    plan = kept()
    assert plan.detectors == detectors_bytes(CONFIG, 24, LAYERS - 1, twin.structure.hidden_size, 4) > 0
    assert plan.editing == plan.cache + plan.columns + plan.detectors + plan.step
    assert plan.as_dict()["bytes"]["detectors"] == plan.detectors
    there = Planner(twin, CONFIG, load_of(), "cuda").plan(None)  # where fitting one and a step take turns
    assert there.detectors == max(0, fit_bytes(24, twin.structure.hidden_size) - there.step)
    without = kept(CONFIG.replace(detectors=False))
    assert without.detectors == 0
    assert without.editing == plan.editing - plan.detectors
    assert kept(device="cuda").detectors == 0
    assert kept(edits=False).detectors == 0
    assert kept(load=Load(12, 0, 12 * LONG, 0, ANSWER, (LONG,))).detectors == 0
    for changes in ({"norm_constraint": 1.0}, {"projections": ("up", "down")}, {"method": "dinm"}):
        assert kept(CONFIG.replace(**changes)).detectors == 0
    plain = Planner(twin_of(tiny_model("gpt2"), torch.float32), CONFIG.replace(projections=("gate", "down")), load)
    assert plain.plan(None).detectors > 0  # it has no up


def test_the_columns_of_every_edited_projection_count():
    twin = twin_of(tiny_model("llama"), torch.float32)
    sizes = [Planner(twin, CONFIG.replace(projections=p), load_of()).plan(None) for p in (("down",), PROJECTIONS)]
    assert sizes[0].columns == 20 * CONFIG.k * twin.structure.hidden_size
    assert sizes[1].columns == 3 * sizes[0].columns


def test_logits_of_held_tokens_take_time_in_every_step():
    twin = twin_of(tiny_model("llama"), torch.float32)
    none, two = (Planner(twin, CONFIG, replace(load_of(), held=held)).plan(None) for held in (0, 24))  # 12 pairs
    positions = 2 * CONFIG.locality_batch_size * CONFIG.num_steps
    logits = 2 * twin.structure.head.weight.numel()
    assert two.editing_flops - none.editing_flops == pytest.approx(2 * logits * positions)  # there and back


def test_a_sample_that_scores_takes_less_time():
    twin = twin_of(tiny_model("llama"), torch.float32)
    whole, half = (
        Planner(twin, CONFIG.replace(score_requests=n, score_pairs=n), load_of()).plan(None) for n in (99, 6)
    )
    assert half.scoring_flops == pytest.approx(whole.scoring_flops / 2)
    assert half.editing_flops == whole.editing_flops


@pytest.mark.parametrize("process", [0, 10**8])
def test_the_least_budget_that_is_named_is_enough_and_less_is_not(process):
    twin = twin_of(tiny_model("llama"), torch.float32)
    planner = Planner(twin, CONFIG, load_of(), process=process)
    with pytest.raises(InputError) as told:
        planner.plan(1000)
    least = parse_bytes(re.search(r"at least ([0-9.]+ [MG]iB)", str(told.value))[1])
    made = planner.plan(least)
    assert made.tokens == LEAST_TOKENS
    with pytest.raises(InputError, match="too small"):
        planner.plan(int(0.99 * least))


@pytest.mark.parametrize(("family", "dtype"), [*((family, "fp32") for family in FAMILIES), ("llama", "bf16")])
def test_a_configuration_and_its_loaded_model_have_one_twin(family, dtype, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    tiny_model(family, dtype=dtype).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, **{DTYPE_ARGUMENT: "auto"})
    twins = twin_of(model, model.dtype), twin_of_config(AutoConfig.from_pretrained(tmp_path), model.dtype)
    assert twins[0].weights == twins[1].weights == sum(p.numel() * p.element_size() for p in model.parameters())
    config = CONFIG.replace(window=(0, LAYERS))
    plans = [Planner(twin, config, load_of()).plan(None) for twin in twins]
    assert plans[0] == plans[1]


DTYPE_ARGUMENT = "torch_dtype"  # taken by every version


def test_the_fullest_batch_of_mixed_lengths_counts():
    planner = Planner(twin_of(tiny_model("llama"), torch.float32), CONFIG, load_of())
    assert [len(s.ids) for s in planner._fullest(100, (30, 40, 60), 9)] == [30] * 3
    assert [len(s.ids) for s in planner._fullest(100, (30, 40, 60), 1)] == [60]
    assert [len(s.ids) for s in planner._fullest(20, (30, 40), 9)] == [40]  # one alone may exceed it
    assert planner._fullest(100, (), 0) == []


def test_a_model_that_cant_be_rehearsed_runs_without_a_plan_unless_one_is_asked_for(monkeypatch):
    model = tiny_model("llama").requires_grad_(False)
    structure = find_structure(model)
    twin_of(model, torch.float32).peaks.clear()

    def fails(*_args, **_kwargs):
        raise NotImplementedError("no fake kernel")

    monkeypatch.setattr(planners, "score_batch", fails)
    assert plan_loaded(structure, CONFIG, load_of(), None, edits=True) is None
    with pytest.raises(InputError, match="no plan can be made for LlamaForCausalLM") as told:
        plan_loaded(structure, CONFIG, load_of(), 10**9, edits=True)
    assert "no fake kernel" in str(told.value)


def test_an_error_of_our_own_is_no_reason_to_go_without_a_plan(monkeypatch):
    structure = find_structure(tiny_model("llama").requires_grad_(False))

    def fails(*_args, **_kwargs):
        raise RuntimeError("a bug")

    monkeypatch.setattr(planners.Planner, "plan", fails)
    with pytest.raises(RuntimeError, match="a bug"):
        plan_loaded(structure, CONFIG, load_of(), None, edits=True)


def test_weights_that_are_mapped_stay_on_disk_where_the_rest_doesnt_fit():
    twin = twin_of(tiny_model("llama"), torch.float32)
    structure = twin.structure
    plain = Planner(twin, CONFIG, load_of()).plan(None)
    assert plain.on_disk == 0
    assert Planner(twin, CONFIG, load_of(), mapped=twin.weights).plan(None) == plain  # there is room
    down = structure.neurons * structure.hidden_size * 4
    first, end = CONFIG.layer_window(LAYERS)
    assert Planner(twin, CONFIG, load_of())._held() == 2 * twin.layer_weights + (end - first) * 3 * down
    down_alone = CONFIG.replace(projections=("down",))
    assert Planner(twin, down_alone, load_of())._held() == 2 * twin.layer_weights + (end - first) * down
    assert Planner(twin, CONFIG, load_of(), edits=False)._held() == 2 * twin.layer_weights
    monster = 50 * twin.weights
    twin.weights, own = monster, twin.weights
    try:
        budget = own + plain.peak
        with pytest.raises(InputError, match="budget is too small"):
            Planner(twin, CONFIG, load_of()).plan(budget)
        made = Planner(twin, CONFIG, load_of(), mapped=monster).plan(budget)
        assert made.peak <= budget
        assert made.weights + made.on_disk == monster
        assert made.weights == Planner(twin, CONFIG, load_of())._held()
    finally:
        twin.weights = own


@pytest.mark.skipif(sys.platform != "linux", reason="files are told apart by /proc")
def test_which_weights_lie_in_a_file(tmp_path):
    model = tiny_model("llama")
    save_file({"big": torch.ones(1000, 1000), "small": torch.ones(3)}, tmp_path / "weights.safetensors")
    assert mapped_bytes(model) == (0, 0)
    with safe_open(tmp_path / "weights.safetensors", "pt") as file:
        model.big = torch.nn.Parameter(file.get_tensor("big"), requires_grad=False)
    if "weights.safetensors" not in Path("/proc/self/maps").read_text():
        pytest.skip("this release of safetensors copies")
    assert float(model.big.sum()) == 1e6  # read: now it is in memory
    total, resident = mapped_bytes(model)
    assert total == 4_000_000
    assert resident >= 4_000_000 - 2 * 65536  # whole pages
    model.big = torch.nn.Parameter(model.big.double(), requires_grad=False)
    assert mapped_bytes(model)[0] == 0


def test_what_a_control_group_leaves(tmp_path):
    files = {"memory.max": "1000", "memory.current": "700", "memory.stat": "anon 100\nfile 600\n"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    names = ("memory.max", "memory.current", "file")
    assert limits._left(tmp_path, *names) == 900  # files that were read make room
    (tmp_path / "memory.max").write_text("max\n")
    assert limits._left(tmp_path, *names) is None
    assert limits._left(tmp_path / "nowhere", *names) is None
    assert "." in limits._own_groups()


def test_a_job_finds_the_structure_once(monkeypatch, tmp_path):
    monkeypatch.setenv("PKE_FAST_CACHE", str(tmp_path))
    found = []

    def counted(model):
        found.append(model)
        return find_structure(model)

    monkeypatch.setattr("pke_fast.workbench.find_structure", counted)
    requests = [EditRequest("Break a lock", "Never.", "Sure")]
    pke_fast.locate(tiny_model("llama"), tiny_tokenizer(), requests, CONFIG, locality=[Pair("Sing", "La")])
    assert len(found) == 1


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setenv("PKE_FAST_CACHE", str(tmp_path / "cache"))
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    lines = [{"prompt": f"Break lock {n}" + " now" * (n % 5), "ground_truth": "Sure"} for n in range(6)]
    (tmp_path / "requests.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "benign.jsonl").write_text('{"prompt": "Bake a cake", "answer": "Take flour"}\n{"prompt": "Sing"}\n')
    return tmp_path


def arguments_of(files, *more):
    given = ["--model", files / "model", "--requests", files / "requests.jsonl", "--locality", files / "benign.jsonl"]
    settings = [v for s in ("k=10", "num_steps=2", "batch_size=2", "window=[0,3]") for v in ("--set", s)]
    return [str(value) for value in (*given, *settings, *more)]


@pytest.mark.parametrize("command", ["edit", "locate"])
def test_the_plan_told_before_is_the_reports(command, files, capsys):
    only = ["--locate-only"] if command == "locate" else []
    assert main(["plan", *arguments_of(files, "--json", *only)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert main(["plan", *arguments_of(files, "--set", "k=9999", *only)]) == 2  # what the job refuses, the plan does
    assert "more than there are neurons" in capsys.readouterr().err
    assert main([command, *arguments_of(files, "--json", "--out", files / "out")]) == 0
    report = json.loads(capsys.readouterr().out)["plan"]
    for name in ("process", "peak"):  # what Python and its libraries hold just then
        assert told["bytes"].pop(name) > told["bytes"]["weights"]
        report["bytes"].pop(name)
    for name in ("micro_batch_tokens", "layers that keep their graph", "bytes"):
        assert told[name] == report[name]
    assert (told["layers"], told["requests"], told["locality pairs"]) == (LAYERS, 6, 2)
    assert set(told["seconds"]) == {"locating", "editing", "measured matmul rate, flop/s"}
    assert report["notes"] == []
    taken = report["measured"]
    assert set(taken) == {"locating", "editing", "peak"}
    if sys.platform == "linux":
        assert taken["peak"] >= told["bytes"]["weights"] + max(taken["locating"], taken["editing"] or 0) > 0


def test_time_is_told_by_what_jobs_reach_of_a_products_rate(files, capsys, monkeypatch):
    made, plan = [], Planner.plan
    monkeypatch.setattr(Planner, "plan", lambda self, budget: made.append(plan(self, budget)) or made[-1])
    monkeypatch.setattr("pke_fast.cli.planning.matmul_rate", lambda *_on: 1e6)
    assert main(["plan", *arguments_of(files, "--json")]) == 0
    told = json.loads(capsys.readouterr().out)["seconds"]
    assert told["locating"] == pytest.approx(made[-1].scoring_flops / 0.5e6)  # half of it on a CPU
    assert told["editing"] == pytest.approx(made[-1].editing_flops / 0.5e6)


def test_the_plan_as_a_table(files, capsys):
    assert main(["plan", *arguments_of(files)]) == 0
    out = capsys.readouterr().out
    assert "512" in out
    assert "weights" in out
    (files / "model" / "model.safetensors").unlink()  # not needed
    assert main(["plan", *arguments_of(files)]) == 0


def test_bad_budgets(files, capsys):
    for budget, message in (("lots", "can't read the size"), ("1KB", "memory budget is too small")):
        assert main(["plan", *arguments_of(files, "--memory-budget", budget)]) == 2
        captured = capsys.readouterr()
        assert message in captured.err
        assert not captured.out


def test_an_edit_takes_no_more_for_sequences_that_it_does_not_come_to(monkeypatch):
    monkeypatch.setattr("pke_fast.trainer.WATCHED", 100)
    monkeypatch.setattr("pke_fast.trainer.SAMPLE", 100)
    twin = twin_of(tiny_model("llama"), torch.float32)

    def plan(n, **changes):
        return Planner(twin, CONFIG.replace(**{"num_steps": 10, **changes}), load_of(n), "cpu").plan(None)

    few, many, more = plan(50), plan(100), plan(10_000)
    assert few.cache < many.cache == more.cache
    assert many.editing_flops == pytest.approx(more.editing_flops, rel=0.01)
    assert plan(10_000, num_steps=50).cache == pytest.approx(2 * more.cache, rel=0.01)
