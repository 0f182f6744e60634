"""Models that accelerate spread: the same scores, losses, patch and answers as in one place, to the bit."""

from __future__ import annotations

import json

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

import pke_fast
from pke_fast import perplexity
from pke_fast.batches import make_batch
from pke_fast.cli import main
from pke_fast.columns import Columns
from pke_fast.config import PKEConfig
from pke_fast.dinm import answer_distances
from pke_fast.encoding import PromptEncoder
from pke_fast.errors import EditError, InputError, PatchError
from pke_fast.evaluating.kept import weights_digest
from pke_fast.fingerprint import fingerprint
from pke_fast.generation import generate
from pke_fast.kernels.sparse_columns import read_columns
from pke_fast.loading import check_finite, load_model
from pke_fast.placement import check_placement, device_of, live_weight, stored_parameters
from pke_fast.rehearsal import _masked
from pke_fast.requests import EditRequest, Pair
from pke_fast.scoring import score_batch
from pke_fast.structure import Structure, find_structure
from pke_fast.testing import LAYERS, tiny_model, tiny_tokenizer
from pke_fast.trainer import Trainer

pytestmark = pytest.mark.usefixtures("own_cache")

CONFIG = PKEConfig(k=10, num_steps=3, batch_size=2, locality_batch_size=2, window=(0, LAYERS), locality_tokens=3)
REQUESTS = [EditRequest("Break a lock", ground_truth="Sure"), EditRequest("Steal a car"), EditRequest("Forge a pass")]
LOCALITY = [Pair("Bake a cake", "Take flour"), Pair("Sing a song"), Pair("Plant a tree", "Dig a hole")]
FAMILIES = ("llama", "gpt2", "phi3")


def device_map(model, away="disk"):
    """Everything on the CPU, but all layers except the first, and the head where it is a weight of its own."""
    names = [name for name, module in model.named_modules() if not any(module.children())]
    base, layers = next((n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.ModuleList))
    names = [name for name in names if not name.startswith(base)]
    tied = model.config.tie_word_embeddings
    places = {name: away if name == "lm_head" and not tied else "cpu" for name in names}
    return places | {f"{base}.{index}": away if index else "cpu" for index in range(len(layers))}


def spread(how, family, tmp_path):
    model = tiny_model(family)
    if how == "all by hooks":
        return cpu_offload(model, "cpu")
    if how == "a folder":
        return dispatch_model(model, device_map(model), main_device="cpu", offload_dir=str(tmp_path / "away"))
    model.save_pretrained(tmp_path / "model")
    return AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map=device_map(model)).eval()


HOW = ("the checkpoint", "a folder", "all by hooks")


def edited(model, **more):
    return pke_fast.edit(model, tiny_tokenizer(), REQUESTS, CONFIG, locality=LOCALITY, samples=1, **more)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_spread_model_is_edited_like_any(family, how, tmp_path, monkeypatch):
    plain, model = tiny_model(family), spread(how, family, tmp_path)
    assert sum(p.is_meta for p in model.parameters()) > LAYERS
    assert find_structure(model).lowest_kept == LAYERS  # a graph of the last layer would hold its weights
    result = edited(model)
    monkeypatch.setattr(Structure, "lowest_kept", LAYERS)  # so that bits can be compared
    wanted = edited(plain)
    assert torch.equal(result.located.score_map, wanted.located.score_map)
    for name in ("steps", "before", "after", "stopped"):
        assert result.report["losses"][name] == wanted.report["losses"][name]
    for ours, theirs in zip(result.patch.layers, wanted.patch.layers, strict=True):
        assert (ours.layer, ours.weight) == (theirs.layer, theirs.weight)
        for part in ("neurons", "old", "new"):
            assert torch.equal(getattr(ours, part), getattr(theirs, part))
    assert result.report["samples"] == wanted.report["samples"]
    assert result.report["model"]["fingerprint"] == wanted.report["model"]["fingerprint"]

    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)  # the edit is what it computes with
    result.revert()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, tiny_model(family)(ids).logits)
    result.patch.apply(model)
    with pytest.raises(PatchError, match="already applied"):
        result.patch.apply(model)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_digest_of_weights_says_nothing_of_where_they_are(how, family, tmp_path):
    model, plain = spread(how, family, tmp_path), tiny_model(family)
    if how == "the checkpoint":  # its configuration says more
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert weights_digest(model) == weights_digest(plain)
    edited(model)
    assert weights_digest(model) != weights_digest(plain)


def test_what_lies_on_disk_is_not_written_to(tmp_path):
    model = spread("the checkpoint", "llama", tmp_path)
    before = load_file(tmp_path / "model" / "model.safetensors")
    result = edited(model)
    after = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    result.write(tmp_path / "out", save_model=True)
    saved = load_file(tmp_path / "out" / "model" / "model.safetensors")
    for part in result.patch.layers:
        assert torch.equal(read_columns(saved[part.weight], part.axis, part.index), part.new)


@pytest.mark.parametrize("how", HOW)
def test_an_exception_puts_a_spread_models_weights_back(how, tmp_path, monkeypatch):
    model = spread(how, "llama", tmp_path)
    wanted = {name: p.detach().clone() for name, p in tiny_model("llama").named_parameters()}
    made = []

    def fails(self, number, **_):
        made.append(number)
        self.update(number)
        raise EditError("no")

    monkeypatch.setattr(Trainer, "step", lambda self, n, **_: self.gradients(n) is None or fails(self, n))
    with pytest.raises(EditError):
        edited(model)
    assert made
    found = dict(stored_parameters(model))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert all(p.requires_grad for name, p in model.named_parameters())


def test_evaluation_of_a_spread_model(tmp_path):
    plain, model = tiny_model("llama"), spread("the checkpoint", "llama", tmp_path)
    tokenizer = tiny_tokenizer()
    encoder = PromptEncoder(tokenizer, CONFIG, 512)
    prompts = ["Sing", "Break a lock"]
    answers = [generate(m, tokenizer, encoder, prompts, max_new_tokens=5) for m in (plain, model)]
    assert answers[0] == answers[1]
    windows = [list(range(20)), list(range(40, 50))]
    assert perplexity.windows_losses(plain, windows) == perplexity.windows_losses(model, windows)
    assert fingerprint(plain) == fingerprint(model)


def test_weights_on_disk_are_checked_too(tmp_path):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[3, 3] = float("nan")
    model = dispatch_model(model, device_map(model), main_device="cpu", offload_dir=str(tmp_path / "away"))
    with pytest.raises(InputError, match=r"model\.layers\.2\.mlp\.up_proj\.weight"):
        check_finite(model)


def test_the_live_weight_is_in_memory_from_then_on(tmp_path):
    model = spread("the checkpoint", "llama", tmp_path)
    name = "model.layers.1.mlp.down_proj.weight"
    weight = live_weight(model, name)
    assert live_weight(model.model.layers[1], "mlp.down_proj.weight") is weight
    assert live_weight(model, "model.norm.weight") is model.model.norm.weight
    weight[2, 3] = 7.0
    assert dict(stored_parameters(model))[name][2, 3] == 7.0
    with pytest.raises(AttributeError):
        live_weight(model, "model.nothing")


@pytest.fixture
def files(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "map.json").write_text(json.dumps(device_map(model)))
    (tmp_path / "requests.jsonl").write_text('{"prompt": "Break a lock", "ground_truth": "Sure"}\n')
    (tmp_path / "benign.jsonl").write_text('{"prompt": "Bake a cake", "answer": "Take flour"}\n')
    return tmp_path


def run(files, command, *more):
    given = ["--model", files / "model", "--requests", files / "requests.jsonl", "--locality", files / "benign.jsonl"]
    settings = [v for s in ("k=10", "num_steps=2", "window=[0,3]") for v in ("--set", s)]
    return main([str(value) for value in (command, *given, *settings, *more)])


def test_device_map_on_the_command_line(files, capsys, monkeypatch):
    monkeypatch.setattr(Structure, "lowest_kept", LAYERS)
    for name, more in (
        ("plain", ()),
        ("auto", ("--device-map", "auto")),
        ("map", ("--device-map", files / "map.json")),
    ):
        assert run(files, "edit", "--out", files / name, *more) == 0
    plain, auto, spread = (load_file(files / name / "patch.safetensors") for name in ("plain", "auto", "map"))
    assert all(torch.equal(plain[name], auto[name]) and torch.equal(plain[name], spread[name]) for name in plain)
    assert run(files, "locate", "--out", files / "located", "--device-map", files / "map.json") == 0
    assert run(files, "locate", "--out", files / "wanted") == 0
    wanted, found = (load_file(files / name / "scores.safetensors") for name in ("wanted", "located"))
    assert torch.equal(wanted["score"], found["score"])
    capsys.readouterr()
    given = ["--model", str(files / "model"), "--prompt", "Sing", "--max-new-tokens", "3", "--json"]
    answers = []
    for more in ([], ["--device-map", str(files / "map.json")]):
        assert main(["chat", *given, "--patch", str(files / "map" / "patch.safetensors"), *more]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != ""


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such device_map"), ("[1]", "holds no device_map"), ('{"model": 1.5}', "holds no device_map")],
)
def test_bad_device_maps(files, content, message, capsys):
    path = files / "bad.json"
    if content is not None:
        path.write_text(content)
    assert run(files, "edit", "--out", files / "out", "--device-map", path) == 2
    told = capsys.readouterr().err
    assert message in told
    assert "auto, balanced" in told
    assert not (files / "out").exists()


def test_device_map_excludes_a_device_ranks_and_gguf(files, capsys, monkeypatch):
    assert run(files, "edit", "--out", files / "out", "--device-map", "auto", "--device", "cpu") == 2
    assert "one of them" in capsys.readouterr().err
    (files / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match="can't be spread by device_map"):
        load_model(str(files / "model.gguf"), device_map="auto")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(files, "edit", "--out", files / "out", "--device-map", "auto") == 2
    assert "several processes" in capsys.readouterr().err


class OnTwo(FakeTensorMode):
    """Two devices for a test without any: fake tensors of cpu:0 and cpu:1, which no op mixes, ours included."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "pke_fast":
            leaves = tree_leaves((args, kwargs or {}))
            devices = {leaf.fake_device for leaf in leaves if isinstance(leaf, FakeTensor)}
            assert len(devices) == 1, f"{func} on {devices}"
            OURS.add((func.overloadpacket._qualified_op_name, *devices))
        return super().__torch_dispatch__(func, types, args, kwargs)


OURS = set()  # our ops that ran, and where


def put(module, device):
    """As accelerate's hook does, which doesn't know fake tensors."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = torch.nn.Parameter(parameter.to(device), requires_grad=False)
        for name, buffer in part._buffers.items():
            part._buffers[name] = buffer.to(device)
    add_hook_to_module(module, AlignDevicesHook(device))


@pytest.mark.parametrize("kept", [None, 1])
@pytest.mark.parametrize(("family", "head"), [("llama", 0), ("llama", 1), ("gpt2", 0), ("phi3", 1)])
def test_all_of_a_layer_is_on_the_layers_device(family, head, kept, sequences):
    """Scores, a step and its update on two devices: torch refuses an op whose tensors are on both."""
    one, two = torch.device("cpu", 0), torch.device("cpu", 1)
    top = torch.device("cpu", head)  # GPT-2's is the embedding
    config = tiny_model(family).config
    with OnTwo(), _masked():
        made = AutoModelForCausalLM.from_config(config).eval()
        base = made.base_model
        layers = next(m for m in base.modules() if isinstance(m, torch.nn.ModuleList))
        for module in [m for m in base.children() if m is not layers] + [layers[0]]:
            put(module, one)
        for module in (layers[1], layers[2], getattr(base, "ln_f", None) or base.norm):
            put(module, two)
        put(made.get_output_embeddings(), top)
        model = made.requires_grad_(False)
        structure = find_structure(model, probed=False)
        assert [structure.device_of(layer) for layer in range(LAYERS)] == [one, two, two]
        assert (structure.device, structure.head_device) == (one, top)
        examples = sequences(4)
        sums = score_batch(structure, make_batch(examples, range(4), 259), torch.ones(4), 0, kept)
        assert sums.device == one
        columns = [Columns(structure, layer, torch.arange(3)) for layer in (0, 2)]
        for column, device in zip(columns, (one, two), strict=True):
            state = (column.weight, column.old, column.master, column.moment1, column.neurons, column.chosen)
            assert {tensor.device for tensor in state} == {device}
        config = CONFIG.replace(lr=1e-3, micro_batch_tokens=30)  # several micro-batches, so gradients are added up
        trainer = Trainer(structure, columns, examples, examples[:2], config, 259)
        trainer.pace.editing_kept = kept
        losses = trainer.gradients(0)
        assert losses.device == top
        assert [column.grad.device for column in columns] == [one, two]
        trainer.update(0)
        pairs = [(a, b) for a, b in zip(examples[:2], examples[2:], strict=True)]
        assert answer_distances(structure, pairs, pad_id=259, micro_batch_tokens=512).shape == (LAYERS,)
    assert {("pke_fast::column_grad_norm", one), ("pke_fast::column_grad_norm", two)} <= OURS
    assert {("pke_fast::edit_loss", top), ("pke_fast::sparse_column_update", two)} <= OURS


def test_mixing_two_devices_is_noticed():
    with OnTwo(), pytest.raises(RuntimeError, match="same device"):
        torch.ones(2, device=torch.device("cpu", 0)) + torch.ones(2, device=torch.device("cpu", 1))


def test_where_a_module_computes():
    model = tiny_model("llama")
    assert device_of(model) == device_of(torch.nn.Identity()) == torch.device("cpu")
    add_hook_to_module(model.model.layers[1], AlignDevicesHook(torch.device("meta")))
    assert device_of(model.model.layers[1]) == torch.device("meta")
    add_hook_to_module(model.model.layers[2], AlignDevicesHook(3))
    assert device_of(model.model.layers[2]) == torch.device("cuda", 3)


def test_weights_without_data_are_refused():
    model = tiny_model("llama")
    model.model.layers[1].mlp.down_proj.to("meta")
    with pytest.raises(InputError, match=r"one place[\s\S]*layers\.1\.mlp\.down_proj\.weight"):
        check_placement(model)
    with pytest.raises(InputError, match="holds no data"):
        live_weight(model, "model.layers.1.mlp.down_proj.weight")
    patch = edited(tiny_model("llama")).patch
    with pytest.raises(PatchError, match="not in memory"):
        patch.apply(model)


def test_a_layer_that_is_split_is_refused():
    model = tiny_model("llama")
    add_hook_to_module(model.model.layers[1].mlp, AlignDevicesHook(torch.device("meta")))
    with pytest.raises(InputError, match="layer 1 is split"):
        find_structure(model)


@pytest.fixture
def one_process():
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_a_tensor_parallel_model_is_refused():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    model = tiny_model("llama")
    mesh = init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        down = layer.mlp.down_proj
        down.weight = torch.nn.Parameter(distribute_tensor(down.weight.detach(), mesh, [Shard(1)]))
    with pytest.raises(InputError, match=r"tensor parallelism[\s\S]*down_proj\.weight is a DTensor[\s\S]*device_map"):
        edited(model)
    with pytest.raises(InputError, match="tensor parallelism"):
        find_structure(model)


def test_a_model_that_transformers_split_is_refused_though_its_weights_are_plain():
    model = tiny_model("llama")
    model._tp_size = 2
    with pytest.raises(InputError, match=r"tensor parallelism[\s\S]*tp_size=2"):
        pke_fast.locate(model, tiny_tokenizer(), REQUESTS, CONFIG, locality=LOCALITY)
    model._tp_size = 1
    check_placement(model)
