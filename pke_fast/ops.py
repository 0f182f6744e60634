"""The ops: a schema each and several implementations; `choice` decides between them.

An implementation is a function in `kernels/`, beside the op's plain fp32 reference, which is the truth that the others
are tested against. They are called as `torch.ops.pke_fast.<op>`; the reference's docstring describes the arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from pke_fast import choice
from pke_fast.errors import InputError


@dataclass(frozen=True)
class Op:
    """One op: its torch.library schema, the shapes of what it returns, and `backend -> module:function`."""

    schema: str
    fake: Callable[..., Any]
    implementations: dict[str, str]

    @property
    def written(self) -> list[int]:
        """Which of its arguments it writes to, as the schema marks them: `Tensor(a!)`."""
        arguments = self.schema.split("->")[0].split(",")
        return [index for index, argument in enumerate(arguments) if "!" in argument]


def _fake_fwd(
    gate: Tensor, up: Tensor | None, act: str, offsets: Tensor, mask: Tensor | None = None, fused: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, width = gate.shape
    neurons = width // 2 if fused else width
    statistics = gate.new_empty(offsets.shape[0] - 1, neurons, dtype=torch.float32)
    return gate.new_empty(tokens, neurons), statistics, torch.empty_like(statistics)


def _fake_bwd(
    dh: Tensor,
    gate: Tensor,
    up: Tensor | None,
    act: str,
    offsets: Tensor,
    mask: Tensor | None = None,
    fused: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    path = gate.new_empty(offsets.shape[0] - 1, dh.shape[1], dtype=torch.float32)
    return gate.new_empty(gate.shape), gate.new_empty(0) if up is None else up.new_empty(up.shape), path


def _forms(op: str, function: str, *backends: str) -> dict[str, str]:
    """The reference in `kernels/<op>.py`, and the function in `kernels/<op>_<backend>.py` for every other backend."""
    return {"reference": f"{op}:reference_{function}", **{b: f"{op}_{b}:{function}" for b in backends}}


_ADAM = "int step, float lr, float beta1, float beta2, float eps, float weight_decay, float bound"
_COLUMNS = "Tensor(a!) weight, int axis, Tensor neurons"
_STATE = "Tensor old, Tensor(b!) master, Tensor(c!) moment1, Tensor(d!) moment2"

OPS: dict[str, Op] = {
    "glu_score_fwd": Op(
        "(Tensor gate, Tensor? up, str act, Tensor offsets, Tensor? mask=None, bool fused=False)"
        " -> (Tensor, Tensor, Tensor)",
        _fake_fwd,
        _forms("glu_score", "fwd", "native", "triton"),
    ),
    "glu_score_bwd": Op(
        "(Tensor dh, Tensor gate, Tensor? up, str act, Tensor offsets, Tensor? mask=None, bool fused=False)"
        " -> (Tensor, Tensor, Tensor)",
        _fake_bwd,
        _forms("glu_score", "bwd", "native", "triton"),
    ),
    "column_grad_norm": Op(
        "(Tensor grad_out, Tensor h, Tensor offsets, int? longest=None) -> Tensor",
        lambda grad_out, h, offsets, longest=None: h.new_empty(offsets.shape[0] - 1, h.shape[1], dtype=torch.float32),
        {
            "reference": "column_grad_norm:reference",
            "native": "column_grad_norm_native:column_grad_norm",
            "triton": "column_grad_norm_triton:column_grad_norm",
        },
    ),
    "select_hotspots": Op(
        "(Tensor scores, int k, int first, int end, int per_layer_cap, Tensor? exclude, float minimum)"
        " -> (Tensor, Tensor, Tensor)",
        lambda scores, k, *_: (
            scores.new_empty((*scores.shape[:-2], scores.shape[-2] + 1), dtype=torch.int64),
            scores.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64),
            scores.new_empty(scores.shape[:-2], dtype=torch.int64),
        ),
        {"reference": "select_hotspots:reference", "native": "select_hotspots_native:select_hotspots"},
    ),
    "sparse_column_grad": Op(
        "(Tensor grad_out, Tensor h, Tensor(a!) into) -> ()",
        lambda *_: None,
        _forms("sparse_columns", "grad", "native", "triton"),
    ),
    "sparse_column_update": Op(
        f"({_COLUMNS}, {_STATE}, Tensor grad, {_ADAM}) -> ()",
        lambda *_: None,
        _forms("sparse_columns", "update", "native", "triton"),
    ),
    "sparse_column_step": Op(
        f"({_COLUMNS}, {_STATE}, Tensor grad_out, Tensor h, {_ADAM}) -> ()",
        lambda *_: None,
        _forms("sparse_columns", "step", "native", "triton"),
    ),
    "write_columns": Op(
        f"({_COLUMNS}, Tensor values) -> ()",
        lambda *_: None,
        _forms("sparse_columns", "write", "native", "triton"),
    ),
    "edit_loss": Op(
        "(Tensor hidden, Tensor head, Tensor? bias, Tensor? targets, Tensor? base_hidden, Tensor weights, float scale,"
        " float soft_cap) -> (Tensor, Tensor)",
        lambda hidden, *_: (hidden.new_empty(hidden.shape[0], dtype=torch.float32), torch.empty_like(hidden)),
        {"reference": "edit_loss:reference", "triton": "edit_loss_triton:edit_loss"},
    ),
}


@cache
def implementation(op: str, backend: str) -> Callable[..., Any]:
    """The function that does `op` in one backend.

    Raises:
        InputError: the op has no such backend.
    """
    known = OPS[op].implementations
    if backend not in known:
        raise InputError(f"op {op} has no backend {backend!r}", expected="one of " + ", ".join(known))
    module, function = known[backend].split(":")
    found: Callable[..., Any] = getattr(import_module(f"pke_fast.kernels.{module}"), function)
    return found


def chosen_backend(op: str, *args: Any) -> str:
    """The backend that `op` runs in on these arguments; see `choice.choose`."""
    return choice.choose(op, OPS[op].implementations.__contains__, args)


def explanation(op: str, device: torch.device) -> str:
    """What would run for `op` on a device, and why, for people; see `choice.explain`."""
    return choice.explain(op, device, OPS[op].implementations.__contains__)


def _changed(tensor: Tensor) -> None:
    """Counts a change that a form made in raw memory, as torch's in-place operations do: a graph that has saved the
    tensor says so, and where a model's weights are copies (`offloading`), it is seen which were written to."""
    if not tensor.is_inference():  # which has no version
        torch.autograd.graph.increment_version(tensor)


def _register() -> torch.library.Library:
    library = torch.library.Library("pke_fast", "DEF")
    for name, op in OPS.items():
        library.define(name + op.schema)

        def call(*args: Any, _name: str = name, _written: list[int] = op.written, **named: Any) -> Any:
            form = implementation(_name, chosen_backend(_name, *args))
            with torch.cuda.device_of(args[0]):  # Triton launches on the current device
                result = form(*args, **named)
            for index in _written:
                _changed(args[index])
            return result

        library.impl(name, call, "CompositeExplicitAutograd")
        torch.library.register_fake(f"pke_fast::{name}", op.fake, lib=library)
    return library


_LIBRARY = _register()
