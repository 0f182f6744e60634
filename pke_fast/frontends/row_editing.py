"""SafeTune's edit: the located rows of down projections learn a refusal; gradient, Adam and writes for them alone."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pke_fast.batches import Batch
from pke_fast.columns import Selected, put_back_on_failure
from pke_fast.config import MOST_LR
from pke_fast.editing import GENTLER
from pke_fast.errors import EditError, InputError
from pke_fast.frontends.drifted_rows import PKEConfig, layer_of
from pke_fast.objective import answer_loss, locality_loss
from pke_fast.structure import Structure, find_structure, hooks
from pke_fast.tape import record
from pke_fast.workbench import laid_out

LOG = logging.getLogger(__name__)
IGNORED = -100  # a label that isn't learnt

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
            InputError: there is no tokenizer, no token of the response is left, or a row can't be edited; nothing was
                changed.
            EditError: a loss became NaN; the weights were put back.
        """
        if self.tokenizer is None:
            raise InputError("no tokenizer", expected="tokenizer=..., which the texts are encoded by")
        config = self.config
        _check(config)
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
                losses = _losses(self.model, rows, input_ids, labels, [self._plain(text) for text in texts])
                edit_losses, locality_losses = self._descend(rows, losses)
            self.last_edit_losses, self.last_locality_losses = edit_losses, locality_losses
        return sum(len(part.neurons) for part in rows)

    def _descend(self, rows: Sequence[Rows], losses: _Whole | _Replayed) -> tuple[list[float], list[float]]:
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
        """Mean negative log-likelihood of the labels, each predicted by the position before it."""
        kept = labels[:, 1:] != IGNORED
        return F.cross_entropy(logits[:, :-1][kept].float(), labels[:, 1:][kept])


def _check(config: Any) -> None:
    cap = config.max_edit_magnitude
    for name, right, expected in (
        ("lr", 0 < config.lr <= MOST_LR, f"above 0, at most {MOST_LR:g}"),
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


class _Whole:
    """The losses by the model's own forward: for any model that gives logits."""

    def __init__(self, model: Any, input_ids: Tensor, labels: Tensor, locality: Sequence[Tensor]) -> None:
        self.model, self.input_ids, self.labels, self._locality = model, input_ids, labels, locality
        takes = inspect.signature(model.forward).parameters
        open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values())
        self._mask = "attention_mask" in takes or open_ended
        self._cache = {"use_cache": False} if "use_cache" in takes else {}
        with torch.no_grad():
            self._base = [self._logits(ids).float().log_softmax(-1) for ids in locality]

    def edit(self) -> Tensor:
        return PKEGradientEditor._edit_nll(self._logits(self.input_ids), self.labels)

    def locality(self) -> Iterator[Tensor]:
        for ids, base in zip(self._locality, self._base, strict=True):
            now = self._logits(ids).float().log_softmax(-1)
            yield F.kl_div(now, base, log_target=True, reduction="none").sum(-1).mean() / len(self._base)

    def _logits(self, ids: Tensor) -> Tensor:
        mask = {"attention_mask": torch.ones_like(ids)} if self._mask else {}
        out = self.model(input_ids=ids, **mask, **self._cache)
        logits: Tensor = out.logits if hasattr(out, "logits") else out
        return logits


class _Replayed:
    """The same losses over the layers from the lowest located one on, with logits in chunks."""

    def __init__(
        self, structure: Structure, first: int, input_ids: Tensor, labels: Tensor, locality: Sequence[Tensor]
    ) -> None:
        self.structure = structure
        learnt = (labels[0, 1:] != IGNORED).nonzero()[:, 0]
        self._edit = record(structure, _batch(input_ids, learnt, labels[0, learnt + 1]), first, upper=False)
        every = [_batch(ids, torch.arange(ids.shape[1], device=ids.device), ids[0]) for ids in locality]
        self._locality = [record(structure, batch, first, upper=False) for batch in every]
        with torch.no_grad():
            self._base = [tape.supervised(tape.run()) for tape in self._locality]

    def edit(self) -> Tensor:
        hidden = self._edit.supervised(self._edit.run())
        return answer_loss(self.structure, hidden, self._edit.batch, _mean(hidden, 1))

    def locality(self) -> Iterator[Tensor]:
        for tape, base in zip(self._locality, self._base, strict=True):
            yield locality_loss(self.structure, tape.supervised(tape.run()), base, _mean(base, len(self._base)))


def _losses(
    model: Any, rows: Sequence[Rows], input_ids: Tensor, labels: Tensor, locality: Sequence[Tensor]
) -> _Whole | _Replayed:
    """By replay where the model is a transformers one whose down projections these are, else by its own forward."""
    if hasattr(model, "config") and hasattr(model, "get_output_embeddings"):
        try:
            structure = find_structure(model)
        except InputError as error:  # a family that can't be replayed still has logits
            LOG.info("the model is run as a whole: %s", error.what)
        else:
            layers = {id(mlp.down): index for index, mlp in enumerate(structure.mlps)}
            if all(id(row.module) in layers for row in rows):
                first = min(layers[id(row.module)] for row in rows)
                return _Replayed(structure, first, input_ids, labels, locality)
    return _Whole(model, input_ids, labels, locality)


def _mean(values: Tensor, parts: int) -> Tensor:
    return torch.full((len(values),), 1 / (len(values) * parts), device=values.device)


def _batch(ids: Tensor, positions: Tensor, targets: Tensor) -> Batch:
    zeros = torch.zeros_like(positions)
    return Batch(ids, torch.ones_like(ids), (0,), (0,), positions, targets, zeros, torch.arange(len(positions)))
