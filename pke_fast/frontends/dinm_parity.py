"""EasyEdit's DINM, number for number: its tokens, its layer, its losses and its steps, quirks included.

What it does that the method doesn't ask for: the answers are compared without their prompts, padding included; the safe
answer's tokens are those of the text alone, so that a tokenizer's begin token is learnt as well; two blanks stand
before it; of several requests only the first prompt and the last answer are learnt; the KL term has no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pke_fast.batches import Batch
from pke_fast.columns import Columns, Selected, gradients_into, put_back_on_failure
from pke_fast.dinm import PARITY_STOP_LOSS
from pke_fast.errors import EditError, InputError
from pke_fast.frontends.hyperparams import HyperParamError
from pke_fast.module_calls import hooks
from pke_fast.objective import answer_loss, locality_loss
from pke_fast.structure import Structure
from pke_fast.tape import record
from pke_fast.trainer import GENTLER

LOCALITY = "general knowledge constraint"


@dataclass(frozen=True)
class PublishedStep:
    """One step's losses before its update; loss = kl_factor * edit + kl."""

    loss: float
    edit: float
    kl: float


@torch.no_grad()
def toxic_layers(structure: Structure, tokenizer: Any, requests: Sequence[dict[str, Any]]) -> list[int]:
    """For each request, the layer after which its two answers are furthest apart, read without the prompt.

    All answers are padded to the longest; the distance is the Frobenius norm over all positions, padding included.
    """
    answers = [request[name] for request in requests for name in ("target_new", "ground_truth")]
    ids, mask = _padded(structure, tokenizer, answers, truncation=True)
    found = []
    for row in range(0, len(answers), 2):
        pair = slice(row, row + 2)
        out = structure.base(input_ids=ids[pair], attention_mask=mask[pair], use_cache=False, output_hidden_states=True)
        distances = [float(torch.dist(hidden[0], hidden[1])) for hidden in out.hidden_states[1:]]
        found.append(distances.index(max(distances)))
    return found


def published_edit(
    structure: Structure, tokenizer: Any, requests: Sequence[dict[str, Any]], hparams: Any, layers: Sequence[int]
) -> tuple[list[tuple[str, Selected]], list[PublishedStep]]:
    """Edits the layers' down projections (and biases, where `rewrite_module_tmp` names them too) in place.

    Args:
        structure: of a model that is laid out for work.
        requests: with prompt, target_new and a locality pair each.

    Returns:
        what was edited, by parameter name, and the losses of every step.

    Raises:
        InputError: a request or a hyperparameter can't be used; the model is unchanged.
        EditError: the loss became NaN; the weights were put back.
    """
    edit_batch = _edit_batch(structure, tokenizer, requests)
    kl_batch, kl_weights = _locality_batch(structure, tokenizer, requests)
    edited = _edited_parameters(structure, hparams, layers)
    everything = [selected for _, selected in edited]
    bound = hparams.norm_constraint if type(hparams.norm_constraint) is float else math.inf
    first = min(selected.layer for selected in everything if isinstance(selected, Columns))
    steps: list[PublishedStep] = []
    with put_back_on_failure(everything):
        edit_tape, kl_tape = (record(structure, batch, first) for batch in (edit_batch, kl_batch))
        edit_weights = torch.full((len(edit_batch.positions),), 1 / len(edit_batch.positions), device=structure.device)
        with torch.no_grad():
            base = kl_tape.supervised(kl_tape.run())
        for _ in range(hparams.num_steps):
            with torch.enable_grad(), _gradients(structure, edited):
                hidden = edit_tape.supervised(edit_tape.run())
                edit = answer_loss(structure, hidden, edit_tape.batch, edit_weights)
                with torch.no_grad():
                    kl = locality_loss(structure, kl_tape.supervised(kl_tape.run()), base, kl_weights)
                steps.append(_step(edit, kl, hparams.kl_factor))
                if steps[-1].loss < PARITY_STOP_LOSS:
                    break
                (edit * hparams.kl_factor).backward()
            for selected in everything:
                if hparams.weight_decay:  # torch's Adam adds it to the gradient
                    selected.grad.add_(selected.master, alpha=hparams.weight_decay)
                selected.adam(hparams.lr, bound=bound)
        if not all(bool(torch.isfinite(selected.master).all()) for selected in everything):
            raise EditError("the edited weights aren't finite; the weights were put back", do=GENTLER)
    return edited, steps


def _step(edit: Tensor, kl: Tensor, kl_factor: float) -> PublishedStep:
    loss = kl_factor * float(edit.detach()) + float(kl)
    if not math.isfinite(loss):
        raise EditError(f"the loss became {loss}; the weights were put back", do=GENTLER)
    return PublishedStep(loss, float(edit.detach()), float(kl))


def _edited_parameters(structure: Structure, hparams: Any, layers: Sequence[int]) -> list[tuple[str, Selected]]:
    """The parameters that `rewrite_module_tmp` names in the layers: down projections, and their biases."""
    names = [hparams.rewrite_module_tmp.format(layer) for layer in layers]
    by_id = {id(parameter): name for name, parameter in structure.model.named_parameters()}
    known: dict[str, Selected] = {}
    for layer, mlp in enumerate(structure.mlps):
        if any(name in mlp.weight for name in names):
            known[mlp.weight] = Columns(structure, layer, torch.arange(structure.neurons))
        bias = getattr(mlp.down, "bias", None)
        if bias is not None and any(name in by_id[id(bias)] for name in names):
            known[by_id[id(bias)]] = Selected(bias.detach().view(1, -1), 0, torch.zeros(1, dtype=torch.int64))
    matched = [name for name, _ in structure.model.named_parameters() if any(part in name for part in names)]
    if set(matched) != set(known) or not any(isinstance(selected, Columns) for selected in known.values()):
        raise HyperParamError(
            f"rewrite_module_tmp {hparams.rewrite_module_tmp!r} doesn't name down projections in layers {list(layers)}",
            expected=f"a template such as {structure.mlps[0].weight.replace('.0.', '.{}.', 1)!r}",
            got=", ".join(matched[:4]) or "no parameter of the model",
            do='set it right, or take mode "fixed", which needs none',
        )
    return list(known.items())


@contextmanager
def _gradients(structure: Structure, edited: Sequence[tuple[str, Selected]]) -> Iterator[None]:
    """While it lasts, a backward pass adds to the gradients of the weights and of the biases."""
    columns = [selected for _, selected in edited if isinstance(selected, Columns)]
    modules = {mlp.weight.removesuffix(".weight"): mlp.down for mlp in structure.mlps}
    biases = [(modules[name.removesuffix(".bias")], bias) for name, bias in edited if not isinstance(bias, Columns)]

    def tap(bias: Selected) -> Any:
        def hook(_module: Any, _args: Any, out: Tensor) -> None:
            if out.requires_grad:
                out.register_hook(
                    lambda grad: bias.add(grad.flatten(0, -2), torch.ones_like(grad.flatten(0, -2)[:, :1]))
                )

        return hook

    with gradients_into(columns), hooks(*(module.register_forward_hook(tap(bias)) for module, bias in biases)):
        yield


def _padded(
    structure: Structure, tokenizer: Any, texts: Sequence[str], truncation: bool = False
) -> tuple[Tensor, Tensor]:
    """Token ids and mask, int64 [B, T], padded on the tokenizer's side."""
    from pke_fast.loading import pad_token_id

    rows = [list(ids) for ids in tokenizer(list(texts), truncation=truncation)["input_ids"]]
    if not all(rows):
        raise InputError(
            "a text has no tokens", expected="some text", got=repr(texts[[bool(r) for r in rows].index(False)])
        )
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), pad_token_id(tokenizer, structure.model))
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        start = longest - len(row) if getattr(tokenizer, "padding_side", "right") == "left" else 0
        ids[index, start : start + len(row)] = torch.tensor(row)
        mask[index, start : start + len(row)] = 1
    return ids.to(structure.device), mask.to(structure.device)


def _edit_batch(structure: Structure, tokenizer: Any, requests: Sequence[dict[str, Any]]) -> Batch:
    """The first prompt with its answer; its last positions should predict the last answer's own tokens."""
    answers = [_spaced(request["target_new"]) for request in requests]
    texts = [f"{request['prompt']} {answer}" for request, answer in zip(requests, answers, strict=True)]
    ids, mask = _padded(structure, tokenizer, texts)
    (labels,), _ = _padded(structure, tokenizer, answers[-1:])
    count, length = len(labels), ids.shape[1]
    if count >= length:
        raise InputError(
            "a prompt is shorter than parity needs",
            expected=f"prompt and answer of more than {count} tokens, those of the answer alone",
            got=f"{length} tokens",
            do='give a longer prompt, or take mode "fixed"',
        )
    positions = torch.arange(length - 1 - count, length - 1, device=labels.device)
    pad = tokenizer.pad_token_id
    counted = torch.ones_like(labels).bool() if pad is None else labels != pad
    return _batch(ids[:1], mask[:1], positions[counted], labels[counted])


def _locality_batch(structure: Structure, tokenizer: Any, requests: Sequence[dict[str, Any]]) -> tuple[Batch, Tensor]:
    """The locality pairs, with weights fp32 [N] at the last positions: as many as the longest answer alone has."""
    pairs = [request["locality"][LOCALITY] for request in requests]
    ids, mask = _padded(
        structure, tokenizer, [f"{pair['prompt']} {pair['ground_truth']}" for pair in pairs], truncation=True
    )
    _, answers = _padded(structure, tokenizer, [pair["ground_truth"] for pair in pairs], truncation=True)
    length, count = ids.shape[1], answers.shape[1]
    if count > length:
        raise InputError("a locality prompt has no tokens", expected="some text", got=repr(pairs[0]["prompt"]))
    rows = torch.arange(len(pairs), device=ids.device)[:, None] * length
    positions = (rows + torch.arange(length - count, length, device=ids.device)).flatten()
    counted = answers.flatten() == 1
    weights = torch.full((int(counted.sum()),), 1 / int(counted.sum()), device=ids.device)
    return _batch(ids, mask, positions[counted], ids.flatten()[positions[counted]]), weights


def _batch(ids: Tensor, mask: Tensor, positions: Tensor, targets: Tensor) -> Batch:
    rows = tuple(range(len(ids)))
    owners, nth = positions // ids.shape[1], torch.arange(len(positions), device=ids.device)
    return Batch(ids, mask, rows, rows, positions, targets, owners, nth)


def _spaced(answer: str) -> str:
    return answer if answer == " " else f" {answer}"
