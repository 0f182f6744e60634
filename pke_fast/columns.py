"""The selected neurons' weights: old values, gradient, Adam, writes in place into the live weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import pke_fast.ops  # noqa: F401  registers torch.ops.pke_fast
from pke_fast.config import PKEConfig
from pke_fast.errors import InputError
from pke_fast.kernels.sparse_columns import read_columns
from pke_fast.kinds import Kind
from pke_fast.layer_patch import LayerPatch
from pke_fast.module_calls import hooks
from pke_fast.placement import live_weight
from pke_fast.structure import Structure

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8  # Kingma & Ba 2015


class Selected:
    """The selected rows (axis 0) or columns (axis 1) of a weight: [n, width] each, old values exact, the rest fp32.

    Args:
        weight: the live weight, two-dimensional; it needs no gradient.
        neurons: which rows or columns, int64 [n], ascending.
        computed: where the weight is computed with, and gradients arrive; None: where it is.
    """

    def __init__(self, weight: Tensor, axis: int, neurons: Tensor, computed: torch.device | None = None) -> None:
        self.weight, self.axis = weight.detach(), axis
        self.neurons = neurons.to(self.weight.device)
        self.computed = computed or self.weight.device
        self.exact = read_columns(self.weight, axis, self.neurons)
        self.old = self.exact.float()
        self.master = self.old.clone()
        self._waiting: tuple[Tensor, Tensor] | None = None  # a step's first share, not multiplied yet
        self._sum: Tensor | None = None  # of all shares, from the second on
        self.reset()

    def reset(self) -> None:
        """Forgets the optimiser's state."""
        self.moment1, self.moment2, self.step = torch.zeros_like(self.old), torch.zeros_like(self.old), 0

    def add(self, grad_out: Tensor, h: Tensor) -> None:
        """Adds one micro-batch's share, h^T G, to the gradient.

        A step's only share waits as it came, so that product, Adam and write can be one kernel.

        Args:
            grad_out: G = dL/d(down projection's output) [T, d]. For rows of a weight, its input [T, width].
            h: the columns' activations [T, n]. For rows, dL/d(output) at the rows.
        """
        if self._waiting is None and self._sum is None:
            self._waiting = (grad_out, h)
            return
        torch.ops.pke_fast.sparse_column_grad(grad_out, h, self.grad)

    @property
    def grad(self) -> Tensor:
        """The gradient so far, fp32 [n, d], where it arrives."""
        if self._sum is None:
            self._sum = torch.zeros_like(self.old, device=self.computed)
        if self._waiting is not None:
            torch.ops.pke_fast.sparse_column_grad(*self._waiting, self._sum)
            self._waiting = None
        return self._sum

    def finite(self) -> Tensor:
        """Whether the gradient, or what it is a product of, is finite: a bool on the device, not waited for."""
        parts = self._waiting or (self.grad,)
        return torch.stack([torch.isfinite(part).all() for part in parts]).all()

    def forget_gradient(self) -> None:
        """Begins the gradient anew."""
        self._waiting = self._sum = None

    def adam(self, lr: float, weight_decay: float = 0.0, bound: float = math.inf) -> None:
        """One step of Adam from the gradient, which begins anew after it; see `sparse_columns` for the arguments."""
        self.step += 1
        columns = (self.weight, self.axis, self.neurons)
        state = (self.old, self.master, self.moment1, self.moment2)
        adam = (self.step, lr, BETA1, BETA2, EPS, weight_decay, bound)
        if self._waiting is not None and self.computed == self.weight.device:
            torch.ops.pke_fast.sparse_column_step(*columns, *state, *self._waiting, *adam)
        else:
            torch.ops.pke_fast.sparse_column_update(*columns, *state, self.grad.to(self.weight.device), *adam)
        self.forget_gradient()

    def state(self) -> dict[str, Tensor]:
        """What decides the steps to come: values, masters, moments, number of steps."""
        return {
            "values": read_columns(self.weight, self.axis, self.neurons),
            "master": self.master,
            "moment1": self.moment1,
            "moment2": self.moment2,
            "step": torch.tensor(self.step),
        }

    def set_state(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from what `state` gave, the live values included."""
        for name in ("master", "moment1", "moment2"):
            getattr(self, name).copy_(state[name])
        self.step = int(state["step"])
        torch.ops.pke_fast.write_columns(self.weight, self.axis, self.neurons, state["values"].to(self.weight.device))

    def put(self, nth: int, values: Tensor) -> None:
        """Gives one of the rows or columns other values [width], from which the steps go on."""
        row = slice(nth, nth + 1)
        self.master[row] = values.to(self.master)
        torch.ops.pke_fast.write_columns(
            self.weight, self.axis, self.neurons[row], self.master[row].to(self.weight.device)
        )

    def moved(self) -> tuple[Tensor, Tensor]:
        """The rows or columns whose masters aren't the old values, int64 [m], and these masters, fp32 [m, width]."""
        rows = (self.master != self.old).any(1).nonzero().flatten()
        return rows, self.master[rows]

    def stretch(self, by: float) -> None:
        """Gives the live weights so many times the change from the old values; the masters stay."""
        values = self.master if by == 1 else self.old + (self.master - self.old) * by
        torch.ops.pke_fast.write_columns(self.weight, self.axis, self.neurons, values.to(self.weight.device))

    def amplify(self, rows: Tensor, by: float) -> None:
        """Gives these of the live rows or columns, int64 [m], so many times their masters' values; the masters stay."""
        index, values = rows.to(self.neurons.device), self.master[rows.to(self.master.device)] * by
        torch.ops.pke_fast.write_columns(self.weight, self.axis, self.neurons[index], values.to(self.weight.device))

    def restore(self) -> None:
        """Puts the old values back, bit for bit."""
        torch.ops.pke_fast.write_columns(self.weight, self.axis, self.neurons, self.exact)


class Columns(Selected):
    """The selected neurons' weights in one projection of one layer, [n, d]: down's columns, or gate's or up's rows."""

    def __init__(self, structure: Structure, layer: int, neurons: Tensor, projection: Kind = "down") -> None:
        self.layer, self.projection, self.ids = layer, projection, neurons
        self.place = structure.mlps[layer].place(projection)
        weight, index = live_weight(self.place.module, "weight"), neurons + self.place.offset
        super().__init__(weight, self.place.axis, index, structure.device_of(layer))
        self.chosen = self.neurons.to(self.computed)

    @property
    def name(self) -> str:
        """What tells it from all others of a model."""
        return f"{self.layer}.{self.projection}"

    @property
    def rms(self) -> float:
        """Root mean square of the old values."""
        return float(self.old.square().mean().sqrt())

    def update(self, config: PKEConfig, lr: float) -> None:
        """One step of Adam, as the settings say."""
        bound = math.inf if config.norm_constraint is None else config.norm_constraint
        self.adam(lr, config.weight_decay, bound)

    def patch(self) -> LayerPatch:
        new = read_columns(self.weight, self.axis, self.neurons).cpu()
        old, ids = self.exact.cpu(), self.ids.cpu()
        return LayerPatch(self.layer, self.place.weight, self.axis, ids, old, new, self.projection, self.place.offset)

    def add_from(self, into: Tensor, grad_out: Tensor) -> None:
        """Adds a micro-batch's share, from the projection's input and the gradient of its output.

        Args:
            into: what the weights multiply: of down the selected activations [.., n], else the input [.., d].
            grad_out: dL/d(output) [.., width of the output].
        """
        if self.projection == "down":
            self.add(grad_out.flatten(0, -2), into.flatten(0, -2))
        else:
            chosen = grad_out.index_select(-1, self.chosen)
            self.add(into.flatten(0, -2), chosen.flatten(0, -2))


def columns_of(structure: Structure, hot_spots: Mapping[int, Tensor], projections: Sequence[Kind]) -> list[Columns]:
    """What an edit changes: the named projections of the hot spots, by layer, those that each layer's MLP has.

    Raises:
        InputError: as `kinds_in`.
    """
    kinds = kinds_in(structure, projections)
    return [
        Columns(structure, layer, neurons, kind)
        for layer, neurons in sorted(hot_spots.items())
        for kind in structure.mlps[layer].kinds
        if kind in kinds
    ]


def kinds_in(structure: Structure, projections: Sequence[Kind]) -> list[Kind]:
    """Those of the named projections that the model's MLPs have.

    Raises:
        InputError: they have none of them.
    """
    there = structure.mlps[0].kinds
    found = [kind for kind in there if kind in projections]
    if not found:
        raise InputError(
            "the model's MLPs have none of the projections that are to be edited",
            expected="one or more of " + ", ".join(there),
            got=", ".join(projections),
            do="--set projections=...",
        )
    return found


class _SparseTap(torch.autograd.Function):
    """The identity on a projection's output, whose backward adds to the selected neurons' gradient."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, into: Tensor, column: Columns, anchor: Tensor) -> Tensor:
        ctx.save_for_backward(into)
        ctx.column = column
        return out.clone()  # no view: Falcon adds to it in place

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (into,) = ctx.saved_tensors
        ctx.column.add_from(into, grads[0])
        return grads[0], None, None, None


@contextmanager
def gradients_into(columns: Sequence[Columns]) -> Iterator[None]:
    """While it lasts, a backward pass adds to the selected neurons' gradients."""

    def tap(column: Columns) -> Any:
        # The lowest layer's input depends on nothing that needs a gradient: the anchor does, so its taps are visited.
        anchor = torch.zeros((), requires_grad=True, device=column.computed)

        def hook(_module: Any, args: Any, out: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                return out
            into = args[0].detach()
            if column.projection == "down":
                into = into.index_select(-1, column.chosen)
            return _SparseTap.apply(out, into, column, anchor)

        return hook

    with hooks(*(column.place.module.register_forward_hook(tap(column)) for column in columns)):
        yield


@contextmanager
def put_back_on_failure(columns: Sequence[Selected]) -> Iterator[None]:
    """An exception inside, Ctrl-C too, leaves the weights as they were before."""
    try:
        yield
    except BaseException:
        for column in columns:
            column.restore()
        raise
