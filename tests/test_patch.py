"""Patches: exact to the bit in memory and in the file, refused for other weights, and refused when damaged."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pke_fast import patch as patch_module
from pke_fast import patch_file
from pke_fast.errors import PatchError
from pke_fast.patch import LayerPatch, Patch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BITS = {"fp32": torch.int32, "bf16": torch.int16, "fp16": torch.int16}
META = {
    "base": {"name": "tiny", "fingerprint": "abc"},
    "settings": {"method": "pke", "k": 5},
    "losses": {"after": {"edit": 0.1}},
    "versions": {"torch": "2"},
}


KINDS = [("down",), ("up",), ("gate", "up", "down")]


def tiny(axis: int, dtype: str, seed: int = 0, layers: int = 3) -> nn.Module:
    """Layers of 7 neurons of 4, awkward values among them: as a Linear stores them, or (axis 0) a Conv1D.

    ``weight`` is their down projection, [4, 7] or [7, 4]; ``fused`` is gate's and up's, [14, 4] or [4, 14].
    """
    generator = torch.Generator().manual_seed(seed)
    model = nn.Module()
    model.layers = nn.ModuleList()
    for _ in range(layers):
        layer = nn.Module()
        for name, shape in (("weight", (4, 7)), ("fused", (14, 4))):
            weight = torch.randn(shape if axis == 1 else shape[::-1], generator=generator).to(DTYPES[dtype])
            weight[0, 0], weight[1, 1], weight[2, 2], weight[3, 3] = float("nan"), -0.0, float("inf"), 1e-41
            layer.register_parameter(name, nn.Parameter(weight))
        model.layers.append(layer)
    return model


def make_patch(
    model: nn.Module, axis: int, layers: tuple[int, ...] = (0, 2), meta: Any = META, kinds: Any = ("down",)
) -> Patch:
    """A patch of the projections; `axis` is the down projection's."""
    parts = []
    for layer in layers:
        for kind in kinds:
            name = f"layers.{layer}.{'weight' if kind == 'down' else 'fused'}"
            weight, side = model.get_parameter(name).detach(), axis if kind == "down" else 1 - axis
            ids, offset = torch.tensor([0, 1, 3, 6]), 7 if kind == "up" else 0
            old = weight[ids + offset] if side == 0 else weight[:, ids + offset].T
            new = old * 1.5 + 0.25
            new[0, 0], new[1, 1] = -0.0, float("nan")
            parts.append(LayerPatch(layer, name, side, ids, old, new, kind, offset))
    return Patch(tuple(parts), dict(meta))


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().view(torch.int32 if tensor.element_size() == 4 else torch.int16).clone()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: bits(value) for name, value in model.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def content(patch: Patch) -> tuple[Any, ...]:
    parts = [
        (p.layer, p.weight, p.axis, p.projection, p.offset, p.old.dtype, p.neurons.tolist(), raw(p.old), raw(p.new))
        for p in patch.layers
    ]
    return (*parts, json.dumps(patch.meta, sort_keys=True))


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def test_weights_that_are_not_finite_are_told() -> None:
    patch = make_patch(tiny(1, "bf16"), 1)
    for part in patch.layers:
        part.new.fill_(1)
    patch.check_finite()
    patch.layers[0].new[0, 0] = float("inf")
    with pytest.raises(PatchError, match=r"weights that aren't finite: layer 0's down projection\n"):
        patch.check_finite()
    assert json.loads(json.dumps(patch.describe(), allow_nan=False))["layers"][0]["relative_change"] is None


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kinds", KINDS)
def test_apply_and_revert_are_exact(axis: int, dtype: str, kinds: Any, tmp_path: Path) -> None:
    model = tiny(axis, dtype)
    patch = make_patch(model, axis, kinds=kinds)
    patch.save(tmp_path / "p")
    before = state(model)
    addresses = {name: value.data_ptr() for name, value in model.named_parameters()}
    Patch.load(tmp_path / "p").apply(model)
    expected = {name: value.clone() for name, value in before.items()}
    for part in patch.layers:
        for row, neuron in enumerate(part.neurons.tolist()):
            column = expected[part.weight].select(part.axis, neuron + (7 if part.projection == "up" else 0))
            column.copy_(part.new[row].view(BITS[dtype]))
    assert same(state(model), expected)
    assert not same(expected, before)
    assert {name: value.data_ptr() for name, value in model.named_parameters()} == addresses
    patch.revert(model)
    assert same(state(model), before)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kinds", KINDS)
def test_file_holds_everything_and_is_the_same_every_time(axis: int, dtype: str, kinds: Any, tmp_path: Path) -> None:
    patch = make_patch(tiny(axis, dtype), axis, kinds=kinds)
    patch.save(tmp_path / "a")
    loaded = Patch.load(tmp_path / "a")
    assert content(loaded) == content(patch)
    assert (loaded.dtype, loaded.n_neurons) == (dtype, 8)
    loaded.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_file_is_safetensors_with_the_promised_names(tmp_path: Path) -> None:
    from safetensors import safe_open

    patch = make_patch(tiny(1, "bf16"), 1)
    patch.save(tmp_path / "p")
    with safe_open(tmp_path / "p", framework="pt") as file:
        assert sorted(file.keys()) == [f"layers.{n}.{part}" for n in (0, 2) for part in ("neurons", "new", "old")]
        metadata = file.metadata()
        new = file.get_tensor("layers.2.new")
    assert raw(new) == raw(patch.layers[1].new)
    assert (metadata["format"], metadata["version"]) == ("pke_fast.patch", "1")
    assert json.loads(metadata["meta"]) == META
    digest = hashlib.sha256(b"torch.bfloat16 [4, 4]\n" + raw(new)).hexdigest()
    assert json.loads(metadata["sha256"])["layers.2.new"] == digest


def test_down_projections_alone_are_the_bytes_that_every_pke_fast_reads(tmp_path: Path) -> None:
    old = torch.arange(8.0).reshape(2, 4)
    parts = [
        LayerPatch(n, f"layers.{n}.down.weight", 1, torch.tensor([n, 5]), (old + n).bfloat16(), (old * 2).bfloat16())
        for n in (1, 3)
    ]
    Patch(tuple(parts), {"base": {"name": "tiny"}}).save(tmp_path / "p")
    digest = hashlib.sha256((tmp_path / "p").read_bytes()).hexdigest()
    assert digest == "a4d343a5e2a11900d317c06c8469a691dc0783bafd40b97e80dadb9eae157d8f"  # of the first version


def test_gate_and_up_are_named_in_the_file_and_make_it_version_2(tmp_path: Path) -> None:
    from safetensors import safe_open

    model = tiny(1, "bf16")
    for kinds, version in ((("down",), "1"), (("up",), "2"), (("gate", "down"), "2")):
        make_patch(model, 1, layers=(2,), kinds=kinds).save(tmp_path / "p")
        with safe_open(tmp_path / "p", framework="pt") as file:
            names, metadata = sorted(file.keys()), file.metadata()
        assert metadata["version"] == version
        prefixes = [f"layers.2.{kind}" for kind in sorted(kinds)] if version == "2" else ["layers.2"]
        assert names == sorted(f"{prefix}.{part}" for prefix in prefixes for part in ("neurons", "new", "old"))
    assert json.loads(metadata["layers"]) == [
        {"layer": 2, "weight": "layers.2.fused", "axis": 0, "projection": "gate", "offset": 0},
        {"layer": 2, "weight": "layers.2.weight", "axis": 1, "projection": "down", "offset": 0},
    ]


def test_bytes_do_not_depend_on_the_process(tmp_path: Path) -> None:
    """Another process has another hash seed: sets and maps in chance order would show."""
    patch = make_patch(tiny(1, "fp32"), 1)
    patch.save(tmp_path / "a")
    code = "import sys; from pke_fast.patch import Patch; Patch.load(sys.argv[1]).save(sys.argv[2])"
    subprocess.run([sys.executable, "-c", code, tmp_path / "a", tmp_path / "b"], check=True)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("kinds", [("down",), ("up",)])
def test_every_damaged_byte_is_refused_or_harmless(kinds: Any, tmp_path: Path) -> None:
    patch = make_patch(tiny(1, "fp32"), 1, layers=(2,), meta={"base": {"name": "é"}}, kinds=kinds)
    path = tmp_path / "p"
    patch.save(path)
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    tried = refused = 0
    for position in range(len(data)):
        for flip in {1 << position % 8, 0x20} if position < start else {1 << position % 8}:  # 0x20: upper to lower case
            tried += 1
            path.write_bytes(data[:position] + bytes([data[position] ^ flip]) + data[position + 1 :])
            try:
                loaded = Patch.load(path)
            except PatchError:
                refused += 1
                continue
            assert position < start, f"byte {position} of the tensors was changed and not noticed"
            assert content(loaded) == content(patch), f"byte {position} of the header was changed and not noticed"
    assert refused > 0.97 * tried


def test_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "p"
    make_patch(tiny(1, "bf16"), 1).save(path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(PatchError, match=r"damaged[\s\S]*layers\.2\.new"):
        Patch.load(path)
    data[-1] ^= 1
    position = data.index(b"fingerprint")
    data[position] ^= 1
    path.write_bytes(data)
    with pytest.raises(PatchError, match=r"damaged[\s\S]*metadata"):
        Patch.load(path)


def test_every_cut_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p"
    make_patch(tiny(1, "bf16"), 1).save(path)
    data = path.read_bytes()
    for length in [*range(40), *range(40, len(data), 37), len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(PatchError, match="cut short"):
            Patch.load(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(PatchError, match="damaged"):
        Patch.load(path)


def test_what_is_not_a_patch_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    with pytest.raises(PatchError, match="no such patch"):
        Patch.load(tmp_path / "none")
    with pytest.raises(PatchError, match="can't read"):
        Patch.load(tmp_path)
    (tmp_path / "text").write_text("hello, this is not a patch")
    with pytest.raises(PatchError, match="not a patch"):
        Patch.load(tmp_path / "text")
    for metadata in (None, {"format": "pt"}):
        save_file({"x": torch.zeros(3)}, tmp_path / "other", metadata=metadata)
        with pytest.raises(PatchError, match="is not a patch"):
            Patch.load(tmp_path / "other")


def test_newer_format_says_so(tmp_path: Path) -> None:
    newer = dataclasses.replace(make_patch(tiny(1, "fp32"), 1).content(), version=3)
    patch_file.write(tmp_path / "p", newer)
    with pytest.raises(PatchError, match=r"format version 3[\s\S]*version 1 or 2, which[\s\S]*newer pke_fast"):
        Patch.load(tmp_path / "p")


def test_a_file_that_lacks_a_projection_is_incomplete(tmp_path: Path) -> None:
    content = make_patch(tiny(1, "fp32"), 1, kinds=("gate", "down")).content()
    lacking = {name: value for name, value in content.tensors.items() if name != "layers.2.gate.old"}
    patch_file.write(tmp_path / "p", dataclasses.replace(content, tensors=lacking))
    with pytest.raises(PatchError, match=r"incomplete[\s\S]*layers\.2\.gate\.old"):
        Patch.load(tmp_path / "p")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"neurons": torch.tensor([3, 1])}, "ascending"),
        ({"neurons": torch.tensor([1, 1])}, "ascending"),
        ({"neurons": torch.tensor([-1, 1])}, "ascending"),
        ({"neurons": torch.tensor([], dtype=torch.int64)}, "one or more neuron ids"),
        ({"neurons": torch.tensor([1, 2], dtype=torch.int32)}, "int64"),
        ({"neurons": torch.tensor([1, 2, 3])}, "values of 3 neurons"),
        ({"new": torch.zeros(2, 5)}, r"old \[2, 4\] torch.float32, new \[2, 5\]"),
        ({"new": torch.zeros(2, 4, dtype=torch.bfloat16)}, "both in fp32, bf16 or fp16"),
        ({"old": torch.zeros(2, 4).double(), "new": torch.zeros(2, 4).double()}, "both in fp32, bf16 or fp16"),
        ({"axis": 2}, "axis 0 or 1"),
        ({"layer": -1}, "a layer number"),
        ({"weight": ""}, "a weight's name"),
        ({"projection": "side"}, "gate, up or down"),
        ({"projection": "up", "offset": -1}, "an offset of 0 or more"),
    ],
)
def test_layer_that_contradicts_itself_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = {
        "layer": 0, "weight": "w", "axis": 1, "neurons": torch.tensor([1, 2]),
        "old": torch.zeros(2, 4), "new": torch.ones(2, 4),
    }  # fmt: skip
    LayerPatch(**good)
    with pytest.raises(PatchError, match=message):
        LayerPatch(**{**good, **change})
    part = LayerPatch(**good)  # the same in a file whose checksums are right
    patch = Patch((part,), {})
    for name, value in change.items():
        object.__setattr__(part, name, value)
    if not any(isinstance(value, Tensor) and value.dtype not in patch_file.CODES for value in change.values()):
        patch.save(tmp_path / "p")
        with pytest.raises(PatchError, match=message):
            Patch.load(tmp_path / "p")


def test_patch_needs_ascending_layers_of_one_dtype() -> None:
    patch = make_patch(tiny(1, "fp32"), 1)
    other = make_patch(tiny(1, "bf16"), 1, layers=(1,))
    with pytest.raises(PatchError, match="ascending"):
        Patch(patch.layers[::-1], {})
    with pytest.raises(PatchError, match="ascending"):
        Patch((patch.layers[0], patch.layers[0]), {})
    with pytest.raises(PatchError, match="one or more layers"):
        Patch((), {})
    with pytest.raises(PatchError, match=r"one dtype[\s\S]*bf16, fp32"):
        Patch((patch.layers[0], other.layers[0]), {})


def test_parts_that_touch_each_other_are_refused() -> None:
    patch = make_patch(tiny(1, "fp32"), 1, kinds=("gate", "up", "down"))
    gate, up, down = patch.layers[:3]
    assert (patch.n_neurons, {layer: ids.tolist() for layer, ids in patch.by_layer().items()}) == (
        8, {0: [0, 1, 3, 6], 2: [0, 1, 3, 6]},
    )  # fmt: skip
    other = dataclasses.replace(up, neurons=torch.tensor([1, 2, 4, 5]))
    assert Patch((gate, other), {}).by_layer()[0].tolist() == [0, 1, 2, 3, 4, 5, 6]
    for parts in ((up, gate), (down, gate), (gate, gate)):
        with pytest.raises(PatchError, match="gate, up and down in this order"):
            Patch(parts, {})
    for changes in (
        (gate, dataclasses.replace(up, offset=0)),  # the same rows
        (gate, dataclasses.replace(up, layer=1)),
        (gate, dataclasses.replace(up, axis=1)),
        (gate, dataclasses.replace(down, weight=gate.weight, axis=0, offset=7)),
    ):
        with pytest.raises(PatchError, match=r"a weight of its own[\s\S]*layers\.0\.fused in layer 0's gate proj"):
            Patch(changes, {})


def test_one_other_bit_is_refused_and_nothing_changes() -> None:
    model = tiny(1, "bf16")
    patch = make_patch(model, 1)
    with torch.no_grad():
        model.layers[2].weight.view(torch.int16)[3, 6] ^= 1
    before = state(model)
    with pytest.raises(
        PatchError,
        match=r"differ in layer 2's down projection \(1 of 4 neurons\)[\s\S]*made from \(tiny, bf16\)[\s\S]*GGUF",
    ):
        patch.apply(model)
    assert same(state(model), before)
    with torch.no_grad():
        model.layers[2].weight.view(torch.int16)[3, 6] ^= 1
        model.layers[2].weight.view(torch.int16)[3, 5] ^= 1  # not one of the patch's neurons
    patch.apply(model)


def test_minus_zero_is_not_zero_and_nan_is_itself() -> None:
    model = tiny(1, "fp32")
    patch = make_patch(model, 1)
    with torch.no_grad():
        model.layers[0].weight[1, 1] = 0.0
    with pytest.raises(PatchError, match=r"layer 0's down projection \(1 of 4 neurons\)"):
        patch.apply(model)


def test_twice_is_said() -> None:
    model = tiny(1, "fp16")
    patch = make_patch(model, 1)
    with pytest.raises(PatchError, match="not applied to the model"):
        patch.revert(model)
    patch.apply(model)
    after = state(model)
    with pytest.raises(PatchError, match="already applied to the model"):
        patch.apply(model)
    assert same(state(model), after)


def test_half_applied_is_refused_by_layer() -> None:
    model = tiny(1, "fp32")
    patch = make_patch(model, 1)
    Patch(patch.layers[:1], {}).apply(model)
    with pytest.raises(PatchError, match=r"differ in layer 0's down projection \(4 of 4 neurons\)\n"):
        patch.apply(model)
    with pytest.raises(PatchError, match=r"differ in layer 2's down projection \(4 of 4 neurons\)\n"):
        patch.revert(model)


def test_what_differs_is_named_by_projection() -> None:
    model = tiny(1, "fp32")
    patch = make_patch(model, 1, kinds=("gate", "up", "down"))
    with torch.no_grad():
        model.layers[2].fused[[0, 7 + 1, 7 + 3]] += 1
        model.layers[0].fused[[2, 7 + 2]] += 1  # none of the patch's neurons
    named = r"layer 2's gate projection \(1 of 4 neurons\), layer 2's up projection \(2 of 4 neurons\)\n"
    with pytest.raises(PatchError, match=rf"differ in {named}[\s\S]*other weights in 2 of 6 projections"):
        patch.apply(model)


def test_other_models_are_refused() -> None:
    patch = make_patch(tiny(1, "bf16"), 1)
    with pytest.raises(PatchError, match=r"no weight layers\.2\.weight"):
        patch.apply(tiny(1, "bf16", layers=2))
    with pytest.raises(PatchError, match=r"another shape[\s\S]*expected: \[4, more than 6\]\n  got: \[7, 4\]"):
        patch.apply(tiny(0, "bf16"))
    fused = make_patch(tiny(1, "bf16"), 1, kinds=("up",))
    with pytest.raises(PatchError, match=r"another shape[\s\S]*expected: \[more than 13, 4\]\n  got: \[4, 14\]"):
        fused.apply(tiny(0, "bf16"))
    with pytest.raises(PatchError, match=r"made in bf16[\s\S]*is in fp32[\s\S]*--dtype bf16"):
        patch.apply(tiny(1, "bf16").float())
    with pytest.raises(PatchError, match="meta device"):
        patch.apply(copy.deepcopy(tiny(1, "bf16")).to("meta"))
    with pytest.raises(PatchError, match="differ in layer 0"):
        patch.apply(tiny(1, "bf16", seed=1))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("at", [1, 4])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("revert", [False, True])
def test_interrupted_writing_is_put_back(
    error: type[BaseException], at: int, after: bool, revert: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(1, "bf16")
    patch = make_patch(model, 1, kinds=("gate", "up"))
    if revert:
        patch.apply(model)
    before = state(model)
    write, calls = patch_module._write, 0

    def interrupted(weight: Tensor, part: LayerPatch, values: Tensor) -> None:
        nonlocal calls
        calls += 1
        if calls != at or after:
            write(weight, part, values)
        if calls == at:
            raise error

    monkeypatch.setattr(patch_module, "_write", interrupted)
    with pytest.raises(error):
        patch.revert(model) if revert else patch.apply(model)
    assert calls > at
    assert same(state(model), before)


def test_shared_weights_that_would_be_written_twice_are_refused() -> None:
    model = tiny(1, "fp32")
    model.layers[2] = model.layers[0]
    patch = make_patch(model, 1)
    part = patch.layers[1]
    patch = Patch((patch.layers[0], LayerPatch(2, part.weight, 1, part.neurons, part.old, part.new + 1)), {})
    before = state(model)
    with pytest.raises(PatchError, match="shared between layers"):
        patch.apply(model)
    assert same(state(model), before)


def test_weights_stay_leaves_that_can_be_trained() -> None:
    model = tiny(1, "fp32")
    make_patch(model, 1).apply(model)
    weight = model.get_parameter("layers.0.weight")
    assert weight.requires_grad
    assert weight.is_leaf
    assert weight.grad_fn is None


def test_tensors_given_to_a_patch_may_be_views_with_gradients() -> None:
    weight = nn.Parameter(torch.randn(4, 7))
    ids = torch.tensor([1, 2])
    part = LayerPatch(0, "w", 1, ids, weight[:, ids].T, weight[:, ids].T * 2)
    assert part.old.is_contiguous()
    assert not part.old.requires_grad


def test_describe() -> None:
    old = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    parts = (
        LayerPatch(1, "a", 1, torch.tensor([0, 5]), old, torch.tensor([[3.0, 4.0], [0.6, 0.8]])),
        LayerPatch(4, "b", 0, torch.tensor([2]), torch.zeros(1, 2), torch.ones(1, 2), "up", 7),
    )
    described = Patch(parts, META).describe()
    assert described == json.loads(json.dumps(described))
    assert (described["method"], described["neurons"], described["dtype"]) == ("pke", 3, "fp32")
    assert described["base"] == META["base"]
    assert described["losses"] == META["losses"]
    first, second = described["layers"]
    assert first.pop("relative_change") == pytest.approx(0.2)
    assert first == {
        "layer": 1, "projection": "down", "weight": "a", "axis": 1, "offset": 0, "neurons": 2, "width": 2,
    }  # fmt: skip
    assert (second["projection"], second["offset"], second["axis"]) == ("up", 7, 0)
    assert second["relative_change"] is None
    assert Patch(parts, {}).describe()["method"] is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_on_a_gpu(axis: int, dtype: str) -> None:
    model = tiny(axis, dtype)
    patch = make_patch(model, axis, kinds=("gate", "up", "down"))
    before = state(model)
    expected = copy.deepcopy(model)
    patch.apply(expected)
    model.to("cuda")
    patch.apply(model)
    assert same(state(model.to("cpu")), state(expected))
    patch.revert(model.to("cuda"))
    assert same(state(model.to("cpu")), before)
