"""Merged and scaled patches: the same weights as one patch after another, and conflicts named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from pke_fast.combine import merge, scale
from pke_fast.errors import InputError, PatchError
from pke_fast.patch import LayerPatch, Patch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


class Model(nn.Module):
    """Two down projections of eight neurons of five, columns of the first, rows of the second; a fused gate and up."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in {"w0": (5, 8), "w1": (8, 5), "fused": (16, 5)}.items():
            weight = torch.randn(shape, generator=generator).to(dtype)
            self.register_parameter(name, nn.Parameter(weight))


def patch_of(model: nn.Module, neurons: dict[int, Sequence[int]], by: float = 1.0, **meta: object) -> Patch:
    """Adds to every weight of the neurons, as the model is now."""
    parts = []
    for layer, ids in neurons.items():
        weight = model.get_parameter(f"w{layer}").detach()
        old = (weight if layer else weight.T)[list(ids)].contiguous()
        parts.append(LayerPatch(layer, f"w{layer}", 1 - layer, torch.tensor(ids), old, old + by))
    return Patch(tuple(parts), meta)


def inputs_of(model: nn.Module, neurons: dict[str, Sequence[int]], by: float = 1.0) -> Patch:
    """As `patch_of`, of gate and up of layer 0."""
    parts = []
    for kind, ids in neurons.items():
        offset = 8 if kind == "up" else 0
        old = model.get_parameter("fused").detach()[torch.tensor(ids) + offset]
        parts.append(LayerPatch(0, "fused", 0, torch.tensor(ids), old, old + by, kind, offset))
    return Patch(tuple(parts), {})


def bits(model: nn.Module) -> list[list[int]]:
    return [p.detach().flatten().view(BITS[p.dtype]).tolist() for p in model.parameters()]


def equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(BITS[a.dtype]), b.view(BITS[b.dtype]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_patches_of_other_neurons_unite(dtype: torch.dtype) -> None:
    model = Model(dtype)
    before = bits(model)
    first, second, third = (
        patch_of(model, {0: [1, 6]}),
        patch_of(model, {0: [0, 2, 7], 1: [3]}),
        patch_of(model, {1: [0, 4]}),
    )
    merged = merge([first, second, third], ["a", "b", "c"])
    assert [part.neurons.tolist() for part in merged.layers] == [[0, 1, 2, 6, 7], [0, 3, 4]]
    for patch in (first, second, third):
        patch.apply(model)
    after = bits(model)
    merged.revert(model)
    assert bits(model) == before
    merged.apply(model)
    assert bits(model) == after
    made = merged.meta["made_from"]
    assert made["how"] == "merge"
    assert [(p["name"], p["relation"], p["neurons"]) for p in made["patches"]] == [
        ("a", "first", 2),
        ("b", "disjoint", 4),
        ("c", "disjoint", 2),
    ]


def test_patches_on_top_of_each_other_chain() -> None:
    model = Model()
    before = bits(model)
    patches = []
    for neurons in ({0: [1, 6], 1: [2]}, {0: [1, 3], 1: [2]}, {0: [1, 7]}):
        patches.append(patch_of(model, neurons))
        patches[-1].apply(model)
    after = bits(model)
    merged = merge(patches)
    assert [p["relation"] for p in merged.meta["made_from"]["patches"]] == ["first", "on top", "on top"]
    assert merged.layers[0].neurons.tolist() == [1, 3, 6, 7]
    merged.revert(model)
    assert bits(model) == before
    merged.apply(model)
    assert bits(model) == after
    with pytest.raises(
        PatchError,
        match=r"neither[\s\S]*layer 0's down projection: neuron 1; layer 1's .*: neuron 2\n[\s\S]*exchange them",
    ):
        merge([patches[1], patches[0]])


def test_weights_of_other_projections_are_no_shared_ones() -> None:
    """One neuron's gate, up and down unite; on the same projection they chain or conflict by its name."""
    model = Model()
    before = bits(model)
    gate, up, down = inputs_of(model, {"gate": [1, 3]}), inputs_of(model, {"up": [1, 2]}), patch_of(model, {0: [1, 6]})
    merged = merge([down, up, gate])
    assert [p["relation"] for p in merged.meta["made_from"]["patches"]] == ["first", "disjoint", "disjoint"]
    assert [(p.projection, p.neurons.tolist()) for p in merged.layers] == [
        ("gate", [1, 3]), ("up", [1, 2]), ("down", [1, 6]),
    ]  # fmt: skip
    assert merged.n_neurons == 4
    merged.apply(model)
    after = bits(model)
    on_top = inputs_of(model, {"gate": [3, 5], "up": [2]})
    both = merge([merged, on_top])
    assert both.meta["made_from"]["patches"][1]["relation"] == "on top"
    on_top.apply(model)
    beyond = bits(model)
    both.revert(model)
    assert bits(model) == before
    both.apply(model)
    assert bits(model) == beyond != after
    half = scale(inputs_of(Model(), {"gate": [1], "up": [2]}, by=0.5), 0.5)
    for part in half.layers:
        assert equal(part.new, (part.old.float() + 0.5 * ((part.old + 0.5).float() - part.old.float())).bfloat16())
    with pytest.raises(PatchError, match=r"other new weights in layer 0's up projection: neuron 1\n"):
        merge([merged, inputs_of(Model(), {"gate": [5], "up": [1]}, by=2.0)])
    (part,) = inputs_of(Model(), {"up": [3]}).layers
    with pytest.raises(PatchError, match=r"of other models \(layer 0's up projection\)[\s\S]*offset 8[\s\S]*offset 9"):
        merge([merged, Patch((replace(part, offset=9),), {})])


def test_the_same_change_twice_is_one(tmp_path) -> None:
    model = Model()
    one, other = patch_of(model, {0: [1, 2]}), patch_of(model, {0: [2, 3]})
    merged = merge([one, other])
    assert merged.meta["made_from"]["patches"][1]["relation"] == "same base"
    assert equal(merged.layers[0].new, patch_of(model, {0: [1, 2, 3]}).layers[0].new)
    merged.save(tmp_path / "a")
    merge([one, other]).save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert Patch.load(tmp_path / "a").describe()["made_from"]["how"] == "merge"


def test_a_neuron_that_one_leaves_as_it_was_is_the_other_s() -> None:
    model = Model()
    idle, change = patch_of(model, {0: [1, 2]}, by=0.0), patch_of(model, {0: [2, 3]})
    for order in ([idle, change], [change, idle]):
        merged = merge(order)
        assert merged.layers[0].neurons.tolist() == [1, 2, 3]
        assert equal(merged.layers[0].new[1:], change.layers[0].new)
        assert equal(merged.layers[0].new[:1], idle.layers[0].old[:1])


def test_conflicts_are_named_and_refused() -> None:
    model = Model()
    base = patch_of(model, {0: [1, 2, 5], 1: [0]})
    other = patch_of(model, {0: [2, 5, 6], 1: [1]}, by=2.0)
    with pytest.raises(
        PatchError, match=r"b and a change the same neurons[\s\S]*in layer 0's down projection: neurons 2, 5\n"
    ):
        merge([base, other], ["a", "b"])
    base.apply(model)
    mixed = patch_of(model, {0: [1, 2]})  # on top where it shares neurons with base
    old = torch.cat([base.layers[0].old[:1], mixed.layers[0].old[1:]])  # of the base, and on top
    left = Patch((LayerPatch(0, "w0", 1, torch.tensor([1, 2]), old, mixed.layers[0].new),), {})
    merge([base, mixed])
    with pytest.raises(
        PatchError, match=r"neither from the same weights[\s\S]*layer 0's down projection: neurons 1, 2\n"
    ):
        merge([base, left])
    with pytest.raises(InputError, match=r"two patches or more\n  got: 1"):
        merge([base])


def test_patches_of_other_models_are_refused() -> None:
    model = Model()
    patch = patch_of(model, {0: [1]})
    part = patch.layers[0]
    half = patch_of(Model(torch.float16), {1: [1]})
    renamed = Patch((LayerPatch(0, "m.w0", 1, part.neurons, part.old, part.new),), {})
    moved = Patch((LayerPatch(3, "w0", 1, part.neurons, part.old, part.new),), {})
    narrow = Patch((LayerPatch(0, "w0", 1, part.neurons, part.old[:, :4], part.new[:, :4]),), {})
    for other, got in ((half, "float16"), (renamed, "m.w0"), (moved, "w0 in another layer"), (narrow, "4 weights")):
        with pytest.raises(PatchError, match=rf"of other models[\s\S]*got: .*{got}"):
            merge([patch, other])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("by", [0.5, -1.0, 1.75])
def test_scaled_weights_are_those_of_the_formula(dtype: torch.dtype, by: float) -> None:
    model = Model(dtype)
    before = bits(model)
    patch = patch_of(model, {0: [1, 2], 1: [5]}, by=0.3, base={"name": "tiny"}, losses={"before": 1})
    scaled = scale(patch, by, "p")
    for part, made in zip(patch.layers, scaled.layers, strict=True):
        old, new = part.old.float(), part.new.float()
        assert equal(made.new, (old + by * (new - old)).to(dtype))
        assert equal(made.old, part.old)
        assert not equal(made.new, part.new)
    scaled.apply(model)
    scaled.revert(model)
    assert bits(model) == before
    assert scaled.meta["base"] == {"name": "tiny"}
    assert scaled.meta["made_from"]["by"] == by
    assert scaled.meta["made_from"]["patches"][0]["meta"] == patch.meta
    assert "losses" not in scaled.meta  # those were the unscaled patch's


@pytest.mark.parametrize("dtype", DTYPES)
def test_scaling_by_one_and_zero_is_exact(dtype: torch.dtype) -> None:
    old = torch.tensor([[1.0, -0.0, 3.0, float("nan"), 1e-3]], dtype=dtype)
    new = torch.tensor([[1.1, 2.0, -0.0, float("nan"), 1e4]], dtype=dtype)
    patch = Patch((LayerPatch(0, "w", 1, torch.tensor([4]), old, new),), {})
    assert equal(scale(patch, 1).layers[0].new, new)
    assert equal(scale(patch, 0).layers[0].new, old)
    halved = scale(patch, 0.5).layers[0].new
    assert equal(halved[:, 3], old[:, 3])  # not changed, not even its NaN
    assert halved[0, 1].item() == 1.0
    assert halved[0, 2].item() == 1.5


def test_what_cannot_be_scaled_is_refused() -> None:
    old, new = torch.full((3, 2), 1000.0), torch.full((3, 2), 2000.0)
    new[1] = 4000.0
    part = LayerPatch(2, "w", 1, torch.tensor([4, 6, 9]), old.half(), new.half())
    patch = Patch((part,), {})
    with pytest.raises(
        PatchError, match=r"weights of layer 2's down projection are too large for torch.float16[\s\S]*in neuron 6\n"
    ):
        scale(patch, 30.0)
    for by in (float("nan"), float("inf")):
        with pytest.raises(InputError, match="a finite number"):
            scale(patch, by)
