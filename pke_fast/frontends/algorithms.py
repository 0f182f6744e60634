"""EasyEdit's algorithms on pke_fast: PKE and DINM, called as its own are."""

from __future__ import annotations

import copy as copying
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pke_fast import editing
from pke_fast.config import PKEConfig
from pke_fast.errors import InputError
from pke_fast.frontends.dinm_parity import LOCALITY, published_edit, toxic_layers
from pke_fast.frontends.hyperparams import check_hparams, config_of, mode_of
from pke_fast.inputs import check_model, check_tokenizer
from pke_fast.locating import check_fits, locate_hot_spots
from pke_fast.placement import live_weight
from pke_fast.preparation import prepare
from pke_fast.requests import EditRequest, pairs_in
from pke_fast.workbench import Workbench, workbench

NO_ANSWER = ("", "<|endoftext|>")  # what EasyEdit and the notebook put where no unsafe answer was given


def apply_pke_to_model(
    model: Any,
    tok: Any,
    requests: Sequence[dict[str, Any]],
    hparams: Any,
    copy: bool = False,
    return_orig_weights: bool = False,
    keep_original_weight: bool = False,
    **kwargs: Any,
) -> tuple[Any, dict[str, Tensor]]:
    """Precision Knowledge Editing under EasyEdit's calling convention: hot spots' weights, all requests at once.

    Args:
        model: a causal language model of transformers, edited in place where it is.
        tok: its tokenizer.
        requests: each with prompt and target_new; ground_truth and locality are filled in where they are missing.
        hparams: `PKEHyperParams`, or EasyEdit's own of DINM. `k` neurons are chosen (300), or as many as there are in
            the layers allowed.
        copy: edit a deep copy.
        return_orig_weights: for EasyEdit's sake; `keep_original_weight` alone decides.
        keep_original_weight: return the weights as they were.
        kwargs: `layer`, a number or a list: the layers in which hot spots may be, in place of `hparams.layers`; where
            neither names any, the method's own window. Others, as `train_ds`, are accepted and have no effect.

    Returns:
        the edited model, and {parameter name: its full tensor before the edit}, empty unless `keep_original_weight`.

    Raises:
        InputError: a request, a hyperparameter or the model can't be used; nothing was changed.
        EditError: the edit failed on the way; the weights were put back.
    """
    return _apply(model, tok, requests, hparams, "pke", copy, keep_original_weight, kwargs)


def apply_dinm_to_model(
    model: Any,
    tok: Any,
    requests: Sequence[dict[str, Any]],
    hparams: Any,
    copy: bool = False,
    return_orig_weights: bool = False,
    keep_original_weight: bool = False,
    **kwargs: Any,
) -> tuple[Any, dict[str, Tensor]]:
    """DINM: as it was meant, or, where `hparams.mode` is "parity", number for number what EasyEdit computes.

    Arguments, returns and errors are those of `apply_pke_to_model`. `layer` or `hparams.layers` are the layers whose
    down projections are edited; where neither names one, the layer is located on all requests (parity: on the first).
    """
    return _apply(model, tok, requests, hparams, "dinm", copy, keep_original_weight, kwargs)


def execute_dinm(
    model: Any, tok: Any, requests: Sequence[dict[str, Any]], hparams: Any, **kwargs: Any
) -> dict[str, Tensor]:
    """What DINM would change, {parameter name: its full change} in the weights' dtype; the model is left as it was.

    Arguments and errors are those of `apply_dinm_to_model`.
    """
    changes = _edit(model, tok, requests, hparams, "dinm", kwargs)
    try:
        edited = {change.name: change.parameter.detach() for change in changes}
        return {name: edited[name] - before for name, before in _before(changes).items()}
    finally:
        for change in changes:
            change.undo()


def register(alg_dict: MutableMapping[str, Any], *, dinm: bool = False) -> MutableMapping[str, Any]:
    """Adds PKE to EasyEdit's table of algorithms; with `dinm`, replaces its DINM as well.

    EasyEdit's editor then runs PKE for hyperparameters of `alg_name: PKE`. With `editing_method="DINM"` it also locates
    a layer first, and hot spots are sought in that one alone.

    Args:
        alg_dict: `ALG_DICT` of `easyeditor.util.alg_dict`, changed in place.

    Returns:
        the same table.
    """
    alg_dict["PKE"] = apply_pke_to_model
    if dinm:
        alg_dict["DINM"] = apply_dinm_to_model
    return alg_dict


ALG_DICT: dict[str, Any] = {"DINM": apply_dinm_to_model, "PKE": apply_pke_to_model}


@torch.no_grad()
def write_back(model: Any, weights: Mapping[str, Tensor]) -> None:
    """Puts whole parameters back, as `keep_original_weight` returned them."""
    for name, weight in weights.items():
        live_weight(model, name).copy_(weight)


@dataclass(frozen=True, eq=False)
class _Change:
    """Rows or columns of a parameter that were edited, as they were before: index [n], old [n, width]."""

    name: str
    parameter: Tensor
    axis: int
    index: Tensor
    old: Tensor

    def undo(self, whole: Tensor | None = None) -> None:
        """Puts them back into the parameter, or into a copy of it."""
        whole = self.parameter.detach() if whole is None else whole
        matrix = whole.view(1, -1) if whole.dim() == 1 else whole
        index, old = self.index.to(whole.device), self.old.to(whole.device)
        torch.ops.pke_fast.write_columns(matrix, self.axis, index, old)


def _before(changes: Sequence[_Change]) -> dict[str, Tensor]:
    """The whole parameters as they were; gate and up may have changed other rows of one."""
    whole: dict[str, Tensor] = {}
    for change in changes:
        if change.name not in whole:
            whole[change.name] = change.parameter.detach().clone()
        change.undo(whole[change.name])
    return whole


def _apply(
    model: Any,
    tok: Any,
    requests: Sequence[dict[str, Any]],
    hparams: Any,
    method: str,
    copy: bool,
    keep_original_weight: bool,
    kwargs: Mapping[str, Any],
) -> tuple[Any, dict[str, Tensor]]:
    if copy:
        model = copying.deepcopy(model)
    changes = _edit(model, tok, requests, hparams, method, kwargs)
    try:
        return model, _before(changes) if keep_original_weight else {}
    except BaseException:  # as too little memory for them
        for change in changes:
            change.undo()
        raise


def _edit(
    model: Any, tok: Any, requests: Sequence[dict[str, Any]], hparams: Any, method: str, kwargs: Mapping[str, Any]
) -> list[_Change]:
    """Edits the model in place; what was changed."""
    check_model(model)
    check_tokenizer(tok)
    check_hparams(hparams)
    parity = mode_of(hparams) == "parity"
    if parity and method == "pke":
        raise InputError(
            "there is no parity for PKE: its authors published no edit",
            expected="mode fixed",
            got="mode parity",
            do="call apply_dinm_to_model (alg_name DINM): parity is of that",
        )
    wanted = [checked_request(request, index, parity) for index, request in enumerate(requests)]
    if not wanted:
        raise InputError("no requests", expected="at least one request", got="none")
    layers = _layers(kwargs.get("layer"), hparams)
    with workbench(model, tok, PKEConfig() if parity else config_of(hparams, method, len(wanted), layers)) as bench:
        if parity:
            layers = layers or toxic_layers(bench.structure, tok, requests[:1])
            edited, _ = published_edit(bench.structure, tok, requests, hparams, layers)
            return [_Change(n, live_weight(model, n), part.axis, part.neurons, part.exact) for n, part in edited]
        if missing := [layer for layer in layers if layer >= len(bench.structure.layers)]:
            expected = f"0 to {len(bench.structure.layers) - 1}"
            raise InputError("a layer isn't in the model", expected=expected, got=", ".join(map(str, missing)))
        parts = _fixed(bench, wanted, hparams, layers)
        live = {part.weight: live_weight(model, part.weight) for part in parts}
        return [_Change(part.weight, live[part.weight], part.axis, part.index, part.old) for part in parts]


def _fixed(bench: Workbench, requests: Sequence[EditRequest], hparams: Any, layers: Sequence[int]) -> Any:
    """pke_fast's own edit, all requests together; the changed layers, as a patch keeps them."""
    bench = replace(bench, config=_within(bench, hparams, layers))
    structure = bench.structure
    check_fits(bench.structure, bench.config)
    job = prepare(bench, _answered(bench, requests), None)
    if bench.config.method == "dinm" and layers:
        hot_spots = {layer: torch.arange(structure.neurons) for layer in layers}
    else:
        first, _ = bench.config.layer_window(len(structure.layers))
        located = locate_hot_spots(bench, job, first=first if bench.config.method == "pke" else 0)
        hot_spots = located.hot_spots.by_layer()
    outcome = editing.edit_columns(
        structure,
        hot_spots,
        job.safe(bench, job.edited_on),
        job.held(bench),
        bench.config,
        pad_id=bench.pad_id,
        stage=bench.stages.stage,
        unseen=job.safe(bench, job.unseen),
    )
    return outcome.layers


def _within(bench: Workbench, hparams: Any, layers: Sequence[int]) -> PKEConfig:
    """The settings with hot spots in the layers alone, and no more of them than there are."""
    config, given = bench.config, getattr(hparams, "settings", {})
    if config.method != "pke":
        return config
    first, end = config.layer_window(len(bench.structure.layers))
    between = [layer for layer in range(first, end) if layers and layer not in layers]
    width = bench.structure.neurons
    left_out = (f"{layer}:{neuron}" for layer in between for neuron in range(width))
    config = config.replace(exclude=(*config.exclude, *left_out))
    if "k" in given:
        return config
    room = min(width, config.per_layer_cap or width) * (end - first - len(between)) - len(given.get("exclude", ()))
    return config.replace(k=max(1, min(config.k, room)))


def _answered(bench: Workbench, requests: Sequence[EditRequest]) -> list[EditRequest]:
    """The requests with the model's own answers as the unsafe ones where none is given; none is left out."""
    lacking = [request.prompt for request in requests if not request.ground_truth]
    doing = "Asking for unsafe answers"
    own = iter(bench.answers(lacking, bench.config.unsafe_tokens, doing) if lacking else [])
    return [request if request.ground_truth else replace(request, ground_truth=next(own)) for request in requests]


def _layers(asked: Any, hparams: Any) -> list[int]:
    """The layers that the caller names, each once, ascending; none where they are to be located."""
    named = hparams.layers if asked is None else asked if isinstance(asked, list | tuple) else [asked]
    layers = sorted({int(layer) for layer in named})
    if layers and layers[0] < 0:
        raise InputError("a layer isn't in the model", expected="layer numbers of 0 or more", got=str(layers[0]))
    return layers


def checked_request(request: Any, index: int, parity: bool) -> EditRequest:
    """One of EasyEdit's requests. Parity needs all of its parts; the fixed mode fills in what it lacks."""
    where = f"request {index}"
    if not isinstance(request, Mapping):
        raise InputError(f"{where} can't be used", expected="{prompt, target_new, ...}", got=type(request).__name__)
    for name in ("prompt", "target_new"):
        if not isinstance(request.get(name), str) or not request[name].strip():
            raise InputError(f"{where} has no {name}", expected="some text", got=repr(request.get(name)))
    unsafe = request.get("ground_truth")
    relations = request.get("locality") or {}
    if not isinstance(relations, Mapping):
        raise InputError(f"{where}: locality", expected="{relation: pairs}", got=type(relations).__name__)
    if parity:
        pair = relations.get(LOCALITY)
        whole = isinstance(pair, Mapping) and all(isinstance(pair.get(n), str) for n in ("prompt", "ground_truth"))
        if not whole or not isinstance(unsafe, str):
            raise InputError(
                f"{where} lacks what parity needs",
                expected=f"ground_truth, and locality[{LOCALITY!r}] with prompt and ground_truth",
                got=", ".join(request),
                do='give them, or take mode "fixed", which needs neither',
            )
    pairs = tuple(pair for name, value in relations.items() for pair in pairs_in(value, f"{where}: locality, {name!r}"))
    return EditRequest(request["prompt"], request["target_new"], None if unsafe in NO_ANSWER else unsafe, pairs)
