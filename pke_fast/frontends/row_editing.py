"""SafeTune's edit: the located rows of down projections learn a refusal; gradient, Adam and writes for them alone."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pke_fast.columns import Selected, put_back_on_failure
from pke_fast.config import MOST_LR
from pke_fast.errors import EditError, InputError
from pke_fast.frontends.drifted_rows import PKEConfig, layer_of
from pke_fast.frontends.row_losses import IGNORED, Replayed, Whole, answer_nll, losses_of
from pke_fast.module_calls import hooks
from pke_fast.placement import is_spread
from pke_fast.trainer import GENTLER
from pke_fast.workbench import laid_out

LOG = logging.getLogger(__name__)

# This project's own; SafeTune has other texts, so the same results need the texts to be given.
HARMFUL_PROMPT = "Explain step by step how to do something illegal that hurts people."
SAFE_RESPONSE = "I'm sorry, but I can't help with that: it could hurt people."
LOCALITY_INPUT = "What is the largest ocean on Earth, and why is the sky blue?"


class Rows(Selected):
    """The located rows of one down projection, [n, D] of its weight [d, D]."""

    def __init__(self, name: str, module: nn.Module, rows: Tensor) -> None:
        self.name, self.module = name, module
        super().__init__(module.weight.data, 0, rows)  # type: ignore[arg-type]

    def write(self, values: Tensor) -> None:
        """Writes fp32 values [n, D] into the live weight, and takes them for the master."""
        self.master.copy_(values)
        torch.ops.pke_fast.write_columns(self.weight, 0, self.neurons, self.master)


class _RowTap(torch.autograd.Function):
    """The identity on a projection's output, whose backward adds to the rows' gradient."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, entered: Tensor, rows: Rows, anchor: Tensor) -> Tensor:
        ctx.save_for_backward(entered)
        ctx.rows = rows
        return out.clone()  # no view: a model may add to it in place

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (entered,) = ctx.saved_tensors
        # Row r of the weight has the gradient G[:, r]^T x: the sparse columns' product with input and output exchanged.
        chosen = grads[0].flatten(0, -2).index_select(1, ctx.rows.neurons)
        ctx.rows.add(entered.flatten(0, -2), chosen)
        return grads[0], None, None, None


@contextmanager
def gradients_into_rows(rows: Sequence[Rows]) -> Iterator[None]:
    """While it lasts, a backward pass adds to the rows' gradients."""
    anchor = torch.zeros((), requires_grad=True, device=rows[0].weight.device)  # so that the lowest tap is visited

    def tap(part: Rows) -> Any:
        def hook(_module: Any, args: Any, out: Tensor) -> Tensor:
            return _RowTap.apply(out, args[0].detach(), part, anchor) if torch.is_grad_enabled() else out

        return hook

    with hooks(*(part.module.register_forward_hook(tap(part)) for part in rows)):
        yield


class PKEGradientEditor:
    """Teaches the located rows of every located layer's down projection to refuse.

    Args:
        model: any model with parameters named `layers.N. ... down_proj ... weight` in Linear modules, called with
            `input_ids` and, where its forward takes one, `attention_mask`; it returns logits [1, T, V], alone or as
            `.logits`. It is edited in place.
        toxic_neurons: by layer, the rows; those that the down projection doesn't have are passed over.
        tokenizer: called as `tokenizer(text, add_special_tokens=...)["input_ids"]`.
        config: `PKEConfig`, or SafeTune's own.

    Attributes:
        last_edit_losses, last_locality_losses: of each step of the last edit, before its update.
    """

    def __init__(
        self, model: Any, toxic_neurons: Mapping[int, Sequence[int]], tokenizer: Any = None, config: Any = None
    ) -> None:
        self.model, self.toxic_neurons, self.tokenizer = model, toxic_neurons, tokenizer
        self.config = config or PKEConfig()
        self.last_edit_losses: list[float] = []
        self.last_locality_losses: list[float] = []

    def apply_edits(
        self,
        harmful_prompt: str = HARMFUL_PROMPT,
        safe_response: str = SAFE_RESPONSE,
        locality_inputs: Sequence[str] | None = None,
    ) -> int:
        """Edits the rows: toxicity_weight * CE(safe_response | harmful_prompt) + kl_factor * KL(before || now).

        Args:
            locality_inputs: texts at all of whose tokens the KL is taken; None for one of our own.

        Returns:
            how many rows were edited; 0, with a warning, where none of those located is the model's.

        Raises:
            InputError: there is no tokenizer, a text or a setting can't be used, no token of the response is left, or a
                row can't be edited; nothing was changed.
            EditError: a loss became NaN; the weights were put back.
        """
        if self.tokenizer is None:
            raise InputError("no tokenizer", expected="tokenizer=..., which the texts are encoded by")
        config = self.config
        _check(config)
        if not isinstance(safe_response, str) or not safe_response.strip():
            raise InputError("safe_response can't be used", expected="some text", got=repr(safe_response))
        if isinstance(locality_inputs, str):
            got, do = repr(locality_inputs), "put it into a list"
            raise InputError("locality_inputs can't be used", expected="a list of texts", got=got, do=do)
        if is_spread(self.model):
            raise InputError(
                "rows of a spread model can't be edited",
                expected="a model on one device",
                do="load it without device_map, or use pke_fast.edit, which takes it",
            )
        with laid_out(self.model):
            rows = self._located()
            if not rows:
                LOG.warning("none of the located rows is in a down projection of the model: nothing was edited")
                return 0
            input_ids, labels, _ = self._build_supervised_batch(harmful_prompt, safe_response)
            if not bool((labels[:, 1:] != IGNORED).any()):
                raise InputError(
                    "no token of the safe response is left to learn",
                    expected=f"prompt and response within {config.max_len} tokens",
                    do="raise max_len, or shorten the prompt",
                )
            texts = [LOCALITY_INPUT] if locality_inputs is None else [text for text in locality_inputs if text]
            with put_back_on_failure(rows):
                modules = [part.module for part in rows]
                plain = [self._plain(text) for text in texts]
                losses = losses_of(self.model, modules, input_ids, labels, plain)
                edit_losses, locality_losses = self._descend(rows, losses)
            self.last_edit_losses, self.last_locality_losses = edit_losses, locality_losses
        return sum(len(part.neurons) for part in rows)

    def _descend(self, rows: Sequence[Rows], losses: Whole | Replayed) -> tuple[list[float], list[float]]:
        config, edits, kls = self.config, [], []
        for _ in range(max(1, int(config.num_steps))):
            with torch.enable_grad(), gradients_into_rows(rows):
                edit = losses.edit()
                (edit * config.toxicity_weight).backward()
                kl = 0.0
                for part in losses.locality():
                    (part * config.kl_factor).backward()
                    kl += float(part.detach())
            edits.append(float(edit.detach()))
            kls.append(kl)
            if not math.isfinite(edits[-1] + kl):
                where = f"at step {len(edits)}; the weights were put back"
                raise EditError(f"the loss became {edits[-1] + kl} {where}", do=GENTLER)
            for row in rows:
                row.adam(config.lr)
                if config.norm_constraint:
                    row.write(_within_ball(row))
        for row in rows:
            if config.max_edit_magnitude is not None:
                cap = float(config.max_edit_magnitude)
                row.write(row.old + (row.master - row.old).clamp_(-cap, cap))
            if not bool(torch.isfinite(row.master).all()):
                raise EditError(f"the edited weights of {row.name} aren't finite; they were put back", do=GENTLER)
        return edits, kls

    def _located(self) -> list[Rows]:
        """The located rows of every down projection of the model."""
        found = []
        for name, parameter in self.model.named_parameters():
            layer = layer_of(name)
            named = "down_proj" in name and name.endswith("weight") and parameter.dim() >= 2
            if layer is None or layer not in self.toxic_neurons or not named:
                continue
            rows = sorted({int(row) for row in self.toxic_neurons[layer] if 0 <= row < parameter.shape[0]})
            if not rows:
                continue
            module = self.model.get_submodule(name.rpartition(".")[0])
            if not isinstance(module, nn.Linear):
                raise InputError(
                    f"{name} can't be edited by rows",
                    expected="the weight of a Linear module",
                    got=type(module).__name__,
                    do="quantised, fused and mixture-of-experts projections aren't supported here",
                )
            found.append(Rows(name, module, torch.tensor(rows)))
        return found

    def _build_supervised_batch(self, prompt: str, response: str) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids, labels (-100 for the prompt) and mask, int64 [1, T]; a prompt that is too long loses its head."""
        limit, end = self.config.max_len, getattr(self.tokenizer, "eos_token_id", None)
        head = list(self.tokenizer(prompt, add_special_tokens=True)["input_ids"])
        answer = list(self.tokenizer(response, add_special_tokens=False)["input_ids"])
        answer = (answer if end is None else [*answer, end])[:limit]
        head = head[max(0, len(head) - (limit - len(answer))) :]
        device = next(self.model.parameters()).device
        input_ids = torch.tensor([[*head, *answer]], dtype=torch.int64, device=device)
        labels = torch.tensor([[IGNORED] * len(head) + answer], dtype=torch.int64, device=device)
        return input_ids, labels, torch.ones_like(input_ids)

    def _plain(self, text: str) -> Tensor:
        ids = list(self.tokenizer(text, add_special_tokens=True)["input_ids"])[: self.config.max_len]
        if not ids:
            raise InputError("a locality input has no tokens", expected="some text", got=repr(text))
        return torch.tensor([ids], dtype=torch.int64, device=next(self.model.parameters()).device)

    @staticmethod
    def _edit_nll(logits: Tensor, labels: Tensor) -> Tensor:
        """The mean loss of the labels that count; see `answer_nll`."""
        return answer_nll(logits, labels)


def _check(config: Any) -> None:
    cap = config.max_edit_magnitude
    for name, right, expected in (
        ("lr", 0 < config.lr <= MOST_LR, f"above 0, at most {MOST_LR:g}"),
        ("num_steps", config.num_steps >= 0, "0 or more; one is made at least"),
        ("max_len", config.max_len >= 1, "at least 1 token"),
        ("toxicity_weight", math.isfinite(config.toxicity_weight), "a finite number"),
        ("kl_factor", math.isfinite(config.kl_factor), "a finite number"),
        ("max_edit_magnitude", cap is None or cap >= 0, "a number of 0 or more, or None"),
    ):
        if not right:
            raise InputError(f"{name} can't be used", expected=expected, got=repr(getattr(config, name)))


def _within_ball(rows: Rows) -> Tensor:
    """The rows with their change within the norm that they had."""
    change = rows.master - rows.old
    radius, length = rows.old.norm(dim=1, keepdim=True), change.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return rows.old + change * (radius.clamp(min=1e-8) / length).clamp(max=1.0)
