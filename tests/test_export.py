"""Exports: peft's own PeftModel with the adapter against the patched model, full tensors against the patch."""

from __future__ import annotations

import copy
import json
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from neuron_patches import DOWN, PLACES, all_of, part_of
from safetensors.torch import load_file
from torch import Tensor

from pke_fast import InputError, Patch, PatchError, export_patch
from pke_fast.cli import main
from pke_fast.deltas import rounds_of
from pke_fast.patch import LayerPatch
from pke_fast.testing import HIDDEN_SIZE, NEURONS, tiny_model

TOKENS = torch.arange(40).reshape(2, 20)
FAMILIES = ["llama", "phi3", "gpt2", "gpt_neox"]


def patch_of(model: Any, family: str, counts: dict[int, int], change: Any, kinds: tuple[str, ...] = DOWN) -> Patch:
    """A patch of some neurons a projection (always the last one too), `change(old)` their new weights."""
    parts = []
    for layer, count in counts.items():
        for kind in kinds:
            drawn = torch.randperm(NEURONS - 1)[: count - 1]
            ids = torch.cat([drawn, torch.tensor([NEURONS - 1])]).sort().values
            parts.append(part_of(model, family, kind, layer, ids, change))
    return Patch(tuple(parts), {"base": {"name": "tiny"}})


def small(old: Tensor) -> Tensor:
    """As an edit changes weights: by much less than most are, all in one dtype."""
    return (old.float() + 0.08 * torch.randn(old.shape)).to(old.dtype)


def wild(old: Tensor) -> Tensor:
    """New weights of every size, down to 1e-12 of the old ones, and of either sign."""
    return (old.float() * torch.randn(old.shape) * 10.0 ** -torch.randint(0, 13, old.shape)).to(old.dtype)


@pytest.fixture
def saved(tmp_path: Path) -> Any:
    """Saves a tiny model of a family in a dtype: the model, its folder and the family."""
    torch.manual_seed(0)

    def save(family: str = "llama", dtype: str = "fp32") -> tuple[Any, Path, str]:
        model = tiny_model(family, dtype=dtype)
        model.save_pretrained(tmp_path / "model")
        return model, tmp_path / "model", family

    return save


def with_adapters(model: Any, out: Path, done: dict[str, Any], **options: Any) -> Any:
    """peft's model with the adapters of an export, all active in their order."""
    peft = pytest.importorskip("peft")
    places = [out] if len(done["ranks"]) == 1 else [out / f"part-{n + 1}" for n in range(len(done["ranks"]))]
    wrapped = peft.PeftModel.from_pretrained(model, str(places[0]), adapter_name="part-1", **options)
    for number, place in enumerate(places[1:], start=2):
        wrapped.load_adapter(str(place), adapter_name=f"part-{number}")
    wrapped.base_model.set_adapter([f"part-{n + 1}" for n in range(len(places))])
    return wrapped


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits.float()


def same_weights(model: Any, other: Any) -> None:
    theirs = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, theirs[name]), name


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("all_projections", [False, True])
def test_peft_gives_the_patched_model(
    saved: Any, tmp_path: Path, family: str, dtype: str, all_projections: bool
) -> None:
    kinds = all_of(family) if all_projections else DOWN
    model, folder, _ = saved(family, dtype)
    patch, out = patch_of(model, family, {0: 3, 2: 7}, small, kinds), tmp_path / "out"
    done = export_patch(patch, str(folder), out, exact=dtype == "fp32")
    neurons = {(part.layer, neuron) for part in patch.layers for neuron in part.neurons.tolist()}
    rank = 14 if family == "phi3" and len(kinds) > 1 else 7  # gate and up are one module
    assert (done["missed"], done["error"], done["ranks"][0], done["layers"]) == (0, 0.0, rank, 2)
    assert done["neurons"] == len(neurons)
    before = logits(model)
    patch.apply(model)
    patched, truth = logits(model), logits(copy.deepcopy(model).double())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # peft's, of keys that are missing and of a wrong fan_in_fan_out
        wrapped = with_adapters(tiny_model(family, dtype=dtype), out, done)
    adapted = {name for name, module in wrapped.get_base_model().named_modules() if hasattr(module, "lora_A")}
    assert adapted == {part.weight.removesuffix(".weight") for part in patch.layers}
    # The two round at other places, W h + B A h and (W + B A) h: the relative rule, against the patched model in fp64.
    assert float((logits(wrapped) - truth).norm()) < 3 * float((patched - truth).norm())
    assert float((before - truth).norm()) > 3 * float((patched - truth).norm())  # an adapter without effect fails it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of merging several adapters
        merged = wrapped.merge_and_unload()
    same_weights(merged, model)
    assert torch.equal(logits(merged), patched)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])  # an fp32 difference of fp16 weights below 0.5 is exact
def test_exact_gives_every_bit_of_any_patch(saved: Any, tmp_path: Path, dtype: str) -> None:
    model, folder, family = saved(dtype=dtype)
    patch = patch_of(model, family, {0: 5, 1: 20}, wild, all_of(family))
    plain = export_patch(patch, str(folder), tmp_path / "plain")
    assert plain["missed"] > 0
    (message,) = plain["warnings"]
    assert re.search(rf"misses {plain['missed']:,} of {3 * 25 * HIDDEN_SIZE:,} new weights.*--exact", message)
    merged = with_adapters(tiny_model("llama", dtype=dtype), tmp_path / "plain", plain).merge_and_unload()
    patch.apply(model)
    off = [
        (merged.get_parameter(part.weight).double() - model.get_parameter(part.weight).double()).abs().detach()
        for part in patch.layers
    ]
    assert sum(int((each != 0).sum()) for each in off) == plain["missed"]
    assert max(float(each.max()) for each in off) == plain["error"]
    done = export_patch(patch, str(folder), tmp_path / "exact", exact=True)
    assert (done["missed"], done["warnings"], len(done["ranks"])) == (0, [], 2)
    same_weights(with_adapters(tiny_model("llama", dtype=dtype), tmp_path / "exact", done).merge_and_unload(), model)


@pytest.mark.parametrize("exact", [False, True])
def test_parts_of_a_bounded_rank_are_the_patch_together(saved: Any, tmp_path: Path, exact: bool) -> None:
    model, folder, family = saved(dtype="fp32" if exact else "bf16")
    patch = patch_of(model, family, {0: 2, 1: 9, 2: 4}, wild if exact else small, ("gate", "down"))
    out = tmp_path / "out"
    done = export_patch(patch, str(folder), out, max_rank=4, exact=exact)
    assert done["ranks"][:3] == [4, 4, 1]
    assert max(done["ranks"]) == 4
    assert len(done["ranks"]) > 3 if exact else len(done["ranks"]) == 3
    configs = [json.loads((out / f"part-{n}" / "adapter_config.json").read_text()) for n in (1, 2, 3)]
    assert [len(config["target_modules"]) for config in configs] == [6, 2, 2]
    ranks = {f"model.layers.0.mlp.{name}_proj": 2 for name in ("gate", "down")}
    assert configs[0]["rank_pattern"] == configs[0]["alpha_pattern"] == ranks
    wrapped = with_adapters(tiny_model("llama", dtype=patch.dtype), out, done)
    patch.apply(model)
    if exact:
        assert torch.allclose(logits(wrapped), logits(model), rtol=1e-4, atol=1e-4)
    same_weights(wrapped.merge_and_unload(), model)


def test_neurons_that_keep_their_weights_are_left_out(saved: Any, tmp_path: Path) -> None:
    model, folder, family = saved()
    patch = patch_of(model, family, {0: 3, 1: 6, 2: 5}, small)
    first, second, third = patch.layers
    kept = second.new.clone()
    kept[[0, 4]] = second.old[[0, 4]]
    parts = (first, LayerPatch(1, second.weight, 1, second.neurons, second.old, kept),
             LayerPatch(2, third.weight, 1, third.neurons, third.old, third.old))  # fmt: skip
    done = export_patch(Patch(parts, {}), str(folder), tmp_path / "out")
    assert (done["neurons"], done["layers"], done["ranks"]) == (7, 2, [4])
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.1.mlp.down_proj"
    assert sorted(stored) == sorted(f"base_model.model.model.layers.{layer}.mlp.down_proj.lora_{which}.weight"
                                    for layer in (0, 1) for which in "AB")  # fmt: skip
    ids = second.neurons[[1, 2, 3, 5]]
    assert torch.equal(stored[f"{prefix}.lora_A.weight"], torch.eye(NEURONS)[ids])
    assert torch.equal(stored[f"{prefix}.lora_B.weight"], (kept - second.old)[[1, 2, 3, 5]].T)
    old, new = part_of(model, family, "up", 1, [5, 40], small), torch.eye(NEURONS)[[5, 40]]
    done = export_patch(Patch((old,), {}), str(folder), tmp_path / "up")
    stored = load_file(tmp_path / "up" / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.1.mlp.up_proj"
    assert torch.equal(stored[f"{prefix}.lora_A.weight"], old.new - old.old)
    assert torch.equal(stored[f"{prefix}.lora_B.weight"], new.T)
    unchanged = Patch((LayerPatch(2, third.weight, 1, third.neurons, third.old, third.old),), {})
    with pytest.raises(PatchError, match="changes no weight"):
        export_patch(unchanged, str(folder), tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_dense_deltas(saved: Any, tmp_path: Path, family: str) -> None:
    model, folder, _ = saved(family, "bf16")
    patch = patch_of(model, family, {0: 3, 2: 7}, small, all_of(family))
    done = export_patch(patch, str(folder), tmp_path / "out", "dense-delta")
    assert (done["files"], done["missed"]) == (["delta.safetensors"], 0)
    deltas = load_file(tmp_path / "out" / "delta.safetensors")
    assert list(deltas) == list(dict.fromkeys(part.weight for part in patch.layers))
    before = {name: model.get_parameter(name).detach().clone() for name in deltas}
    patch.apply(model)
    for name, delta in deltas.items():
        assert delta.dtype == torch.float32
        assert torch.equal(delta, model.get_parameter(name).float() - before[name].float())
        assert torch.equal((before[name] + delta).bfloat16(), model.get_parameter(name))


@pytest.mark.parametrize(("family", "dtype"), [("llama", "fp32"), ("phi3", "fp16"), ("gpt2", "bf16")])
def test_easyedits_weights(saved: Any, tmp_path: Path, family: str, dtype: str) -> None:
    model, folder, _ = saved(family, dtype)
    patch = patch_of(model, family, {0: 3, 2: 7}, wild, all_of(family))
    export_patch(patch, str(folder), tmp_path / "out", "easyedit")
    copy, edited = (load_file(tmp_path / "out" / f"{name}.safetensors") for name in ("weights_copy", "weights"))
    assert set(copy) == set(edited) == {part.weight for part in patch.layers}
    for name in copy:
        assert torch.equal(copy[name], model.get_parameter(name))
    patch.apply(model)
    for name in copy:
        assert edited[name].dtype == model.get_parameter(name).dtype
        assert torch.equal(edited[name], model.get_parameter(name))


@pytest.mark.parametrize("family", ["gpt2", "phi3"])
def test_a_configuration_alone_is_enough(saved: Any, tmp_path: Path, family: str) -> None:
    model, folder, _ = saved(family)
    patch = patch_of(model, family, {1: 4}, small, all_of(family))
    export_patch(patch, str(folder), tmp_path / "a")
    (folder / "model.safetensors").unlink()
    export_patch(patch, str(folder), tmp_path / "b")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with pytest.raises(InputError, match="has no safetensors to take the weights from"):
        export_patch(patch, str(folder), tmp_path / "c", "easyedit")
    gate, down = patch.layers[0], patch.layers[-1]
    wrong = (
        (replace(gate, projection="down"), "has no down projection"),
        (replace(down, projection="up"), r"has no up projection [\s\S]*got: names such as"),
        (replace(gate, neurons=gate.neurons - 1, offset=1), "that are no neurons"),
    )
    for other, message in wrong:
        with pytest.raises(PatchError, match=message):
            export_patch(Patch((other,), {}), str(folder), tmp_path / "c")


def test_another_model_is_seen(saved: Any, tmp_path: Path) -> None:
    model, folder, family = saved()
    patch = patch_of(model, family, {1: 4}, small)
    (part,) = patch.layers
    patch.apply(model)
    model.save_pretrained(tmp_path / "edited")
    with pytest.raises(PatchError, match="already applied"):
        export_patch(patch, str(tmp_path / "edited"), tmp_path / "out")
    tiny_model("llama", seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(PatchError, match="does not fit"):
        export_patch(patch, str(tmp_path / "other"), tmp_path / "out")
    with pytest.raises(PatchError, match="made in fp32"):
        tiny_model("llama", dtype="bf16").save_pretrained(tmp_path / "other")
        export_patch(patch, str(tmp_path / "other"), tmp_path / "out")
    # Rows of a down projection, as SafeTune edits them: they aren't the output weights of neurons.
    rows = load_file(folder / "model.safetensors")[part.weight][[1, 5]]
    with pytest.raises(PatchError, match="rows of .* that are no neurons"):
        export_patch(
            Patch((LayerPatch(1, part.weight, 0, torch.tensor([1, 5]), rows, rows + 1),), {}),
            str(folder),
            tmp_path / "out",
        )
    columns = load_file(folder / "model.safetensors")[PLACES["llama"]["gate"][0].format(1)].T[[1, 5]]
    with pytest.raises(PatchError, match="columns of .* that are no neurons"):
        turned = LayerPatch(1, PLACES["llama"]["gate"][0].format(1), 1, torch.tensor([1, 5]), columns, columns, "gate")
        export_patch(Patch((replace(turned, new=columns + 1),), {}), str(folder), tmp_path / "out")
    with pytest.raises(PatchError, match="infinity or NaN"):
        export_patch(Patch((LayerPatch(1, part.weight, 1, part.neurons, part.old, part.new * torch.inf),), {}),
                     str(folder), tmp_path / "out")  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_the_command(saved: Any, tmp_path: Path, capsys: Any) -> None:
    model, folder, family = saved()
    patch_of(model, family, {0: 3, 1: 9}, wild).save(tmp_path / "p")
    out = tmp_path / "out"
    common = ["export", "--patch", str(tmp_path / "p"), "--model", str(folder), "--out", str(out)]

    def run(*more: str) -> tuple[int, str, str]:
        return main([*common, *more]), *capsys.readouterr()

    status, text, _ = run("--format", "peft", "--json")
    done = json.loads(text)
    assert (status, done["files"]) == (0, ["adapter_config.json", "adapter_model.safetensors"])
    assert done["bytes"] == sum(file.stat().st_size for file in out.iterdir())
    status, text, error = run("--format", "dense-delta")
    assert (status, text) == (2, "")
    assert "isn't empty" in error
    assert len(list(out.iterdir())) == 2
    status, text, _ = run("--format", "dense-delta", "--force")
    assert status == 0
    assert "delta.safetensors" in text
    assert "pke-fast apply is exact" in " ".join(text.split())
    for option in (["--exact"], ["--max-rank", "4"]):
        status, _, error = run("--format", "easyedit", "--force", *option)
        assert status == 2
        assert "has no meaning" in error
    assert [file.name for file in out.iterdir()] == ["delta.safetensors"]
    status, text, _ = run("--format", "peft", "--max-rank", "4", "--force", "--json")
    assert json.loads(text)["files"] == [
        f"part-{n}/adapter_{name}" for n in (1, 2, 3) for name in ("config.json", "model.safetensors")
    ]
    assert main([*common[:-1], str(folder), "--format", "peft", "--force"]) == 2
    assert "is read itself" in capsys.readouterr().err


def test_what_is_read_is_not_replaced(saved: Any, tmp_path: Path) -> None:
    model, folder, family = saved()
    patch, kept = patch_of(model, family, {0: 3}, small), tmp_path / "run" / "patch.safetensors"
    patch.save(kept)
    with pytest.raises(InputError, match=r"is around .*patch\.safetensors"):
        export_patch(patch, str(folder), kept.parent, force=True, keep=[kept])
    (folder / "model.safetensors").unlink()  # by its configuration alone
    for out, message in ((folder, "is read itself"), (tmp_path, "is around")):
        with pytest.raises(InputError, match=message):
            export_patch(patch, str(folder), out, force=True)
    assert kept.exists()
    assert (folder / "config.json").exists()


def test_a_rank_that_vllm_does_not_serve_is_told(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    name = "model.layers.0.mlp.down_proj.weight"
    old = torch.ones(600, 4)
    save_file({name: old.T.contiguous()}, tmp_path / "model.safetensors")
    patch = Patch((LayerPatch(0, name, 1, torch.arange(600), old, old + 1),), {})
    done = export_patch(patch, str(tmp_path), tmp_path / "out")
    assert done["ranks"] == [600]
    assert "--max-rank 512" in done["warnings"][0]
    done = export_patch(patch, str(tmp_path), tmp_path / "out", max_rank=512, force=True)
    assert (done["ranks"], done["warnings"]) == ([512, 88], [])


def test_what_fails_leaves_the_earlier_result(saved: Any, tmp_path: Path, monkeypatch: Any) -> None:
    from pke_fast import lora

    model, folder, family = saved()
    patch, out = patch_of(model, family, {0: 3}, small), tmp_path / "out"
    export_patch(patch, str(folder), out)
    before = {file.name: file.read_bytes() for file in out.iterdir()}

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lora.json, "dumps", full)
    with pytest.raises(Exception, match="the disk is full"):
        export_patch(patch, str(folder), out, max_rank=2, force=True)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_two_rounds_reach_any_finite_weight(dtype: torch.dtype) -> None:
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    info = torch.iinfo(bits)
    generator = torch.Generator().manual_seed(1)
    old, new = (
        torch.randint(info.min, info.max, (300_000,), dtype=bits, generator=generator).view(dtype) for _ in "ab"
    )
    limit = 1.5e38  # a change from one end of fp32 to the other isn't in it
    fine = (old.float().abs() < limit) & (new.float().abs() < limit)
    assert int(fine.sum()) > 200_000
    old, new = old[fine][None], new[fine][None]
    rounds = rounds_of(LayerPatch(0, "w.weight", 1, torch.tensor([0]), old, new), 2)
    assert len(rounds) == 2
    assert rounds[0].missed > 1000
    assert rounds[1].missed == 0
    now = old
    for each in rounds:
        now = now + each.delta if dtype == torch.float32 else (now.float() + each.delta).to(dtype)
    assert torch.equal(now, new)
