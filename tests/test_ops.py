"""The registry: every op has a schema, a fake and a reference, and what is asked for is what runs."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from pke_fast import choice, ops
from pke_fast.errors import InputError, PKEError

CPU, META = torch.zeros(2, 2), torch.zeros(2, 2, device="meta")


@pytest.fixture(autouse=True)
def nothing_asked_for(monkeypatch):
    monkeypatch.delenv(choice.BACKEND_VARIABLE, raising=False)


def test_every_op_has_a_schema_a_fake_a_reference_and_a_rule():
    from torch._subclasses import FakeTensorMode

    assert set(choice.TABLE) == set(ops.OPS)
    for name, op in ops.OPS.items():
        assert callable(ops.implementation(name, "reference"))
        assert hasattr(torch.ops.pke_fast, name)
        assert {rule.backend for rule in choice.TABLE[name]} <= set(op.implementations)
        assert choice.NATIVE_ON_CUDA[0] in ops.OPS
    with FakeTensorMode():
        gate, offsets = torch.empty(10, 17, dtype=torch.bfloat16), torch.empty(4, dtype=torch.int64)
        h, mean, _ = torch.ops.pke_fast.glu_score_fwd(gate, gate, "silu", offsets)
        assert (h.shape, h.dtype, mean.shape, mean.dtype) == ((10, 17), torch.bfloat16, (3, 17), torch.float32)
        fused = torch.empty(10, 34, dtype=torch.bfloat16)
        dgate, dup, path = torch.ops.pke_fast.glu_score_bwd(gate, fused, None, "silu", offsets, None, True)
        assert (dgate.shape, dup.shape, path.shape) == ((10, 34), (0,), (3, 17))


@pytest.mark.parametrize("name", ops.OPS)
def test_every_form_can_be_imported(name):
    for backend in ops.OPS[name].implementations:
        assert callable(ops.implementation(name, backend))


def _in_raw_memory(*changed):
    """What stands in for a form on a GPU: it writes to these of its arguments, behind torch's back."""

    def form(*args, **_named):
        for index in changed:
            args[index].detach().numpy()[:] = 7

    return form


@pytest.mark.parametrize("name", ["sparse_column_grad", "sparse_column_update", "sparse_column_step", "write_columns"])
def test_what_a_form_writes_to_is_counted(name, monkeypatch):
    changed = [2] if name == "sparse_column_grad" else [0] if name == "write_columns" else [0, 4, 5, 6]
    monkeypatch.setattr(ops, "implementation", lambda *_: _in_raw_memory(*changed))
    arguments = getattr(torch.ops.pke_fast, name).default._schema.arguments
    kinds = {"Tensor": lambda: torch.zeros(2, 2), "int": lambda: 1, "float": lambda: 0.5}

    def versions_after(args):
        before = [arg._version for arg in args if isinstance(arg, torch.Tensor)]
        getattr(torch.ops.pke_fast, name)(*args)
        after = [arg._version for arg in args if isinstance(arg, torch.Tensor)]
        return [new - old for old, new in zip(before, after, strict=True)]

    args = [kinds[str(argument.type)]() for argument in arguments]
    tensors = [index for index, arg in enumerate(args) if isinstance(arg, torch.Tensor)]
    wanted = [int(index in changed) for index in tensors]
    assert versions_after(args) == wanted
    with torch.no_grad():
        assert versions_after(args) == wanted
    with torch.inference_mode():
        assert versions_after(args) == wanted
        inferred = [arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args]
        getattr(torch.ops.pke_fast, name)(*inferred)  # has no version
    assert all(bool((inferred[index] == 7).all()) for index in changed)


def test_ops_that_write_run_without_data():
    from torch._subclasses import FakeTensorMode

    def write(weight):
        torch.ops.pke_fast.write_columns(weight, 0, torch.empty(2, dtype=torch.int64, device=weight.device), weight)

    write(META)
    with FakeTensorMode():
        write(torch.empty(2, 2))


def test_the_table_decides_and_falls_back(monkeypatch):
    assert ops.chosen_backend("select_hotspots", CPU) == "native"
    assert ops.chosen_backend("edit_loss", CPU) == "reference"
    assert ops.chosen_backend("glu_score_fwd", META) == "reference"  # no rule for such a device
    monkeypatch.setattr(choice, "obstacle", lambda *_: "not here")
    assert ops.chosen_backend("select_hotspots", CPU) == "reference"


def test_a_name_goes_before_the_table_and_an_argument_before_the_variable(monkeypatch):
    monkeypatch.setenv(choice.BACKEND_VARIABLE, "reference")
    assert ops.chosen_backend("select_hotspots", CPU) == "reference"
    with choice.using("native"):
        assert ops.chosen_backend("select_hotspots", CPU) == "native"
        assert ops.chosen_backend("edit_loss", CPU) == "reference"  # it has no native form
        with choice.using("auto"):
            assert choice.asked_for() == "native"
    assert ops.chosen_backend("select_hotspots", CPU) == "reference"


def test_asked_for_by_name_it_runs_or_raises():
    with choice.using("native"), pytest.raises(PKEError, match=r"expected: native on meta[\s\S]*CPU tensors, not meta"):
        ops.chosen_backend("glu_score_fwd", META)
    with choice.using("triton"), pytest.raises(PKEError, match=r"triton on meta[\s\S]*need a CUDA device"):
        ops.chosen_backend("edit_loss", META)


def test_triton_needs_a_c_compiler_on_a_gpu(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    monkeypatch.delenv("CC", raising=False)
    why_not = partial(choice.obstacle.__wrapped__, "edit_loss", "triton", torch.device("cuda", 0))
    monkeypatch.setattr(choice.shutil, "which", lambda name: "/usr/bin/gcc" if name == "gcc" else None)
    assert why_not() is None
    monkeypatch.setattr(choice.shutil, "which", lambda _name: None)
    assert "no C compiler" in why_not()
    monkeypatch.setenv("CC", "cc")
    assert why_not() is None


def test_what_is_no_backend_is_refused(monkeypatch):
    monkeypatch.setenv(choice.BACKEND_VARIABLE, "cuda")
    with pytest.raises(InputError, match="PKE_FAST_BACKEND=cuda names no backend"):
        ops.chosen_backend("edit_loss", CPU)
    with pytest.raises(InputError, match="backend=fast names no backend"), choice.using("fast"):
        pass
    with pytest.raises(InputError, match="has no backend 'native'"):
        ops.implementation("edit_loss", "native")


def test_explanations_name_what_runs_and_what_stands_in_its_way(monkeypatch):
    def explain(op, device):
        return ops.explanation(op, torch.device(device))

    assert explain("select_hotspots", "cpu") == "native: one pass over the scores, nothing sorted"
    assert explain("edit_loss", "cpu") == "reference (no faster form for cpu)"
    monkeypatch.setattr(choice, "obstacle", lambda *_: "not here")
    assert explain("select_hotspots", "cpu") == "reference (native: not here)"
    monkeypatch.setenv(choice.BACKEND_VARIABLE, "native")
    assert explain("select_hotspots", "cpu") == "native, asked for by name: fails, not here"
