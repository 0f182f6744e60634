"""The ops: a schema each, several implementations, and the choice between them.

An implementation is a function in `kernels/`, beside the op's plain fp32 reference, which is the truth that the others
are tested against. They are called as `torch.ops.pke_fast.<op>`; the reference's docstring describes the arguments.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from pke_fast import native
from pke_fast.errors import InputError

BACKEND_VARIABLE = "PKE_FAST_BACKEND"


@dataclass(frozen=True)
class Op:
    """One op: its torch.library schema, the shapes of what it returns, and `backend -> module:function`, best first."""

    schema: str
    fake: Callable[..., Any]
    implementations: dict[str, str]


def _fake_fwd(gate: Tensor, up: Tensor | None, act: str, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    statistics = gate.new_empty(offsets.shape[0] - 1, gate.shape[1], dtype=torch.float32)
    return torch.empty_like(gate), statistics, torch.empty_like(statistics)


def _fake_bwd(dh: Tensor, gate: Tensor, up: Tensor | None, act: str, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    path = gate.new_empty(offsets.shape[0] - 1, gate.shape[1], dtype=torch.float32)
    return torch.empty_like(gate), gate.new_empty(0) if up is None else torch.empty_like(up), path


OPS: dict[str, Op] = {
    "glu_score_fwd": Op(
        "(Tensor gate, Tensor? up, str act, Tensor offsets) -> (Tensor, Tensor, Tensor)",
        _fake_fwd,
        {"reference": "glu_score:reference_fwd"},
    ),
    "glu_score_bwd": Op(
        "(Tensor dh, Tensor gate, Tensor? up, str act, Tensor offsets) -> (Tensor, Tensor, Tensor)",
        _fake_bwd,
        {"reference": "glu_score:reference_bwd"},
    ),
    "column_grad_norm": Op(
        "(Tensor grad_out, Tensor h, Tensor offsets) -> Tensor",
        lambda grad_out, h, offsets: h.new_empty(offsets.shape[0] - 1, h.shape[1], dtype=torch.float32),
        {"reference": "column_grad_norm:reference"},
    ),
    "select_hotspots": Op(
        "(Tensor scores, int k, int first, int end, int per_layer_cap, Tensor? exclude, float minimum)"
        " -> (Tensor, Tensor, Tensor)",
        lambda scores, k, *_: (
            scores.new_empty((*scores.shape[:-2], scores.shape[-2] + 1), dtype=torch.int64),
            scores.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64),
            scores.new_empty(scores.shape[:-2], dtype=torch.int64),
        ),
        {"native": "select_hotspots_native:select_hotspots", "reference": "select_hotspots:reference"},
    ),
    "sparse_column_grad": Op(
        "(Tensor grad_out, Tensor h, Tensor(a!) into) -> ()",
        lambda *_: None,
        {"reference": "sparse_columns:reference_grad"},
    ),
    "sparse_column_update": Op(
        "(Tensor(a!) weight, int axis, Tensor neurons, Tensor old, Tensor(b!) master, Tensor(c!) moment1,"
        " Tensor(d!) moment2, Tensor grad, int step, float lr, float beta1, float beta2, float eps,"
        " float weight_decay, float bound) -> ()",
        lambda *_: None,
        {"reference": "sparse_columns:reference_update"},
    ),
    "edit_loss": Op(
        "(Tensor hidden, Tensor head, Tensor? bias, Tensor? targets, Tensor? base_hidden, Tensor weights, float scale,"
        " float soft_cap) -> (Tensor, Tensor)",
        lambda hidden, *_: (hidden.new_empty(hidden.shape[0], dtype=torch.float32), torch.empty_like(hidden)),
        {"reference": "edit_loss:reference"},
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
        raise InputError(
            f"op {op} has no backend {backend!r}",
            expected="one of " + ", ".join(known),
            do=f"unset {BACKEND_VARIABLE} to let pke_fast choose",
        )
    module, function = known[backend].split(":")
    found: Callable[..., Any] = getattr(import_module(f"pke_fast.kernels.{module}"), function)
    return found


def available(backend: str) -> bool:
    """Whether a backend can run here: native needs the compiled extension."""
    return backend != "native" or native.problem() is None


def chosen_backend(op: str) -> str:
    """The backend that `op` runs in.

    What PKE_FAST_BACKEND names, whether it is available or not, for the ops that have it (the others run in their
    reference); otherwise the first of the op's own list that is available.

    Raises:
        InputError: PKE_FAST_BACKEND names no backend.
    """
    known = OPS[op].implementations
    asked = os.environ.get(BACKEND_VARIABLE)
    if asked is None:
        return next(backend for backend in known if available(backend))
    every = {backend for other in OPS.values() for backend in other.implementations}
    if asked not in every:
        raise InputError(
            f"{BACKEND_VARIABLE}={asked} names no backend", expected="one of " + ", ".join(sorted(every)), do="unset it"
        )
    return asked if asked in known else "reference"


def _register() -> torch.library.Library:
    library = torch.library.Library("pke_fast", "DEF")
    for name, op in OPS.items():
        library.define(name + op.schema)

        def call(*args: Any, _name: str = name) -> Any:
            return implementation(_name, chosen_backend(_name))(*args)

        library.impl(name, call, "CompositeExplicitAutograd")
        torch.library.register_fake(f"pke_fast::{name}", op.fake, lib=library)
    return library


_LIBRARY = _register()
