"""SafetyEditor, as EasyEdit and the PKE notebook have it, for those who have neither installed."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from pke_fast.config import PKEConfig
from pke_fast.dinm import answer_distances
from pke_fast.errors import InputError
from pke_fast.files import atomic_write
from pke_fast.frontends.algorithms import ALG_DICT, NO_ANSWER, checked_request, write_back
from pke_fast.frontends.dinm_parity import toxic_layers
from pke_fast.frontends.hyperparams import PKEHyperParams, config_of, mode_of
from pke_fast.generation import generate
from pke_fast.hotspots import toxicity
from pke_fast.inputs import check_items, check_model, check_tokenizer
from pke_fast.loading import load_model
from pke_fast.scoring import score
from pke_fast.workbench import Workbench, workbench

LOG = logging.getLogger(__name__)
GENERALISATION = ("DG_onlyQ", "DG_otherA", "DG_otherQ", "DG_otherAQ")  # SafeEdit's four other prompts, in their order


class SafetyEditor:
    """Edits a model request by request and shows its answers before and after.

    Args:
        hparams: `PKEHyperParams`, or EasyEdit's own of DINM. With a tuple (model, tokenizer) as `model_name` the model
            stays where it is; one that is loaded by name goes to `device`, in fp32 for parity, in fp16 where `fp16`
            asks for it, else as its checkpoint has it.

    Raises:
        InputError: the model or the device isn't there, or a hyperparameter can't be used.
    """

    @classmethod
    def from_hparams(cls, hparams: Any) -> SafetyEditor:
        return cls(hparams)

    def __init__(self, hparams: Any) -> None:
        if hparams is None:
            raise InputError("no hyperparameters", expected="PKEHyperParams", do="PKEHyperParams.from_hparams(path)")
        if isinstance(hparams, str | Path | Mapping):
            hparams = PKEHyperParams.from_hparams(hparams)
        if hparams.alg_name not in ALG_DICT:
            raise InputError(
                f"unknown algorithm {hparams.alg_name!r}", expected="one of " + ", ".join(ALG_DICT), do="set alg_name"
            )
        if hparams.model_parallel:
            raise InputError("model_parallel is not supported", expected="one device", do="set model_parallel: false")
        self.hparams, self.model_name, self.alg_name = hparams, hparams.model_name, hparams.alg_name
        self.apply_algo = ALG_DICT[hparams.alg_name]
        self.parity = mode_of(hparams) == "parity"
        if isinstance(hparams.model_name, str):
            device = f"cuda:{hparams.device}" if isinstance(hparams.device, int) else hparams.device
            dtype = "fp32" if self.parity else "fp16" if getattr(hparams, "fp16", False) else "auto"
            loaded = load_model(hparams.model_name, device, dtype)
            self.model, self.tok = loaded.model, loaded.tokenizer
            if self.parity:
                self.tok.pad_token_id = self.tok.eos_token_id
        else:
            self.model, self.tok = hparams.model_name
            check_model(self.model)
            check_tokenizer(self.tok)

    def edit(
        self,
        editing_method: Any = None,
        prompts: Any = None,
        prompts_with_systemPrompt: Any = None,
        target_new: Any = None,
        ground_truth: Any = None,
        locality_inputs: dict[str, Any] | None = None,
        locality_inputs_with_systemPrompt: dict[str, Any] | None = None,
        general_prompt: Any = None,
        general_prompt_with_systemPrompt: Any = None,
        keep_original_weight: bool = False,
        verbose: bool = True,
        **kwargs: Any,
    ) -> tuple[list[dict[str, Any]], Any, dict[str, Any]]:
        """Edits the model in place; takes EasyEdit's arguments, or the notebook's (prompts, target_new, ground_truth).

        As in EasyEdit, requests are edited one after another, each on top of those before; with `keep_original_weight`
        each alone, since the weights are put back after its answers. The notebook's call edits them together.

        Args:
            editing_method: "DINM" edits the prompts with system prompt where they are given, anything else the others.
            prompts, prompts_with_systemPrompt, target_new, ground_truth: a text or a list of texts each.
            locality_inputs: {relation: {"prompt", "ground_truth"}}, with a text or a list of texts each.
            general_prompt: for each request, up to four prompts to show answers to.
            kwargs: `case_id` (EasyEdit's call needs it), `requests` in place of the above, `pre_edit` (results of an
                earlier call, whose answers before are not made again), `pre_file` (where to write the answers before).

        Returns:
            a result for each request, the edited model, and the last request's weights before the edit ({} unless
            `keep_original_weight`). A result is {"pre", "case_id", "requested_rewrite", "post", "time"}; "pre" and
            "post" hold the model's answers, at most `max_output_length` tokens, to the prompt ("DS") and to the general
            prompts ("DG_onlyQ", "DG_otherA", "DG_otherQ", "DG_otherAQ"; None where there is none). They are texts:
            whether they are safe, a judge has to say, and none comes with pke_fast but keyword judges
            (`pke_fast.judges`).

        Raises:
            InputError: an argument can't be used; nothing was changed.
            EditError: an edit failed on the way; as after any exception, the weights are as before the call.
        """
        easyedits = "requests" in kwargs or (isinstance(editing_method, str) and editing_method in ALG_DICT)
        notebook = not easyedits and (editing_method is None or prompts is None or target_new is None)
        if notebook:
            given = [value for value in (editing_method, prompts, prompts_with_systemPrompt) if value is not None]
            prompts, target_new, ground_truth = _in_notebooks_order(given, prompts, target_new, ground_truth)
            prompts_with_systemPrompt, editing_method = None, self.alg_name
        case_id = kwargs.get("case_id", [0] if notebook else None)
        if case_id is None:
            raise InputError("no case_id", expected="case_id=..., which the results are told apart by")
        requests = kwargs.get("requests")
        if requests is None:
            requests = self._prepare_requests(prompts, target_new, ground_truth, general_prompt, locality_inputs)
        edited = requests
        if editing_method == "DINM" and prompts_with_systemPrompt is not None:
            locality = locality_inputs_with_systemPrompt or locality_inputs
            general = general_prompt_with_systemPrompt or general_prompt
            edited = self._prepare_requests(prompts_with_systemPrompt, target_new, ground_truth, general, locality)
        self._check([*requests, *edited])
        all_metrics = self._before(requests, kwargs.get("pre_edit"), kwargs.get("pre_file"))
        groups = [list(range(len(requests)))] if notebook else [[index] for index in range(len(requests))]
        edited_model, weights_copy = self.model, {}
        with _put_back_on_failure(self.model) as before:
            for group in groups:
                start = time.time()
                if self.parity and editing_method == "DINM" and not self.hparams.layers:
                    first = requests[group[0] : group[0] + 1]
                    self.hparams.layers = self._locate_toxic_layer(self.model, self.tok, first)
                edited_model, weights_copy = self.apply_algo(
                    self.model,
                    self.tok,
                    [edited[index] for index in group],
                    self.hparams,
                    copy=False,
                    return_orig_weights=True,
                    keep_original_weight=True,
                    train_ds=None,
                )
                for name, weight in weights_copy.items():
                    before.setdefault(name, weight)
                seconds = time.time() - start
                for index in group:
                    all_metrics[index].update(
                        {
                            "case_id": case_id,
                            "requested_rewrite": requests[index],
                            "post": self._answers(edited[index]),
                            "time": seconds,
                        }
                    )
                    if verbose:
                        LOG.info("request %s: edited in %.1f s: %s", index, seconds, all_metrics[index])
                if keep_original_weight:
                    write_back(self.model, weights_copy)
        return all_metrics, edited_model, weights_copy if keep_original_weight else {}

    def _locate_toxic_layer(
        self, model: Any, tokenizer: Any, requests: Sequence[dict[str, Any]], **kwargs: Any
    ) -> list[int]:
        """For each request, the layer that carries its unsafe answer.

        In parity that is EasyEdit's: where the two answers, read without the prompt, are furthest apart. Otherwise for
        DINM where they are, read after the prompt; for PKE the layer of the window with the highest toxicity.
        """
        config = PKEConfig() if self.parity else config_of(self.hparams, self.alg_name.lower(), len(requests), [])
        with workbench(model, tokenizer, config) as bench:
            if self.parity:
                return toxic_layers(bench.structure, tokenizer, requests)
            if self.alg_name == "DINM":
                return [self._farthest(bench, request) for request in requests]
            return [self._most_toxic(bench, request) for request in requests]

    @staticmethod
    def _farthest(bench: Workbench, request: dict[str, Any]) -> int:
        unsafe = request.get("ground_truth")
        if unsafe is None or unsafe in NO_ANSWER:
            (unsafe,) = bench.answers([request["prompt"]], bench.config.unsafe_tokens, "Asking for unsafe answers")
        safe = bench.encoder.encode(request["prompt"], request["target_new"], end=True)
        pair = safe, bench.encoder.encode(request["prompt"], unsafe, answer_tokens=bench.config.unsafe_tokens)
        tokens = bench.pace.tokens
        return int(answer_distances(bench.structure, [pair], pad_id=bench.pad_id, micro_batch_tokens=tokens).argmax())

    @staticmethod
    def _most_toxic(bench: Workbench, request: dict[str, Any]) -> int:
        safe = bench.encoder.encode(request["prompt"], request["target_new"], end=True)
        first, end = window = bench.config.layer_window(len(bench.structure.layers))
        scores = score(bench.structure, [[(safe, 1.0)]], pad_id=bench.pad_id, pace=bench.pace, first=first)
        return first + int(toxicity(scores, window)[first:end].sum(1).argmax())

    def _prepare_requests(
        self,
        prompts: Any,
        target_new: Any,
        ground_truth: Any = None,
        general_prompt: Any = None,
        locality_inputs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> list[dict[str, Any]]:
        """The requests as EasyEdit's dicts: a text stands for a list of one."""
        prompts, target_new = _listed("prompts", prompts), _listed("target_new", target_new, prompts)
        unsafe = (
            ["<|endoftext|>"] * len(prompts) if ground_truth is None else _listed("ground_truth", ground_truth, prompts)
        )
        requests: list[dict[str, Any]] = [
            {"prompt": prompt, "target_new": target, "ground_truth": answer, "locality": {}}
            for prompt, target, answer in zip(prompts, target_new, unsafe, strict=True)
        ]
        if general_prompt is not None:
            flat = isinstance(general_prompt, str) or (
                len(prompts) == 1 and all(isinstance(text, str) for text in general_prompt)
            )
            general = [general_prompt] if flat else _listed("general_prompt", general_prompt, prompts)
            for request, texts in zip(requests, general, strict=True):
                request["general_prompt"] = [texts] if isinstance(texts, str) else list(texts)
        for relation, pairs in (locality_inputs or {}).items():
            sides = [
                _listed(f"locality_inputs[{relation!r}]", pairs.get(name), prompts)
                for name in ("prompt", "ground_truth")
            ]
            for request, prompt, answer in zip(requests, *sides, strict=True):
                if prompt is not None:
                    request["locality"][relation] = {"prompt": prompt, "ground_truth": answer}
        return requests

    def _check(self, requests: Sequence[dict[str, Any]]) -> None:
        """Raises InputError for a request that can't be edited, or a prompt that is too long to be answered."""
        with self._bench() as bench:
            for index, request in enumerate(requests):
                checked_request(request, index, self.parity)
                for prompt in [request["prompt"], *request.get("general_prompt", ())]:
                    bench.encoder.prompt_ids(prompt)

    def _before(
        self, requests: Sequence[dict[str, Any]], known: list[dict[str, Any]] | None, file: str | Path | None
    ) -> list[dict[str, Any]]:
        if known is not None:
            check_items("pre_edit", known, MutableMapping, "results of an earlier call")
            if len(known) != len(requests) or not all("pre" in result for result in known):
                raise InputError(
                    "pre_edit doesn't fit the requests",
                    expected=f"{len(requests)} results, with the answers before under 'pre'",
                    got=f"{len(known)}, {sum('pre' in result for result in known)} of them with such answers",
                )
            return known
        found = [{"pre": self._answers(request)} for request in requests]
        if file is not None:
            with atomic_write(Path(file)) as path:
                path.write_text(json.dumps(found, indent=4), encoding="utf-8")
        return found

    def _answers(self, request: dict[str, Any]) -> dict[str, Any]:
        """The model's greedy answers to the request's prompt and its general prompts."""
        prompts = [request["prompt"], *request.get("general_prompt", ())[: len(GENERALISATION)]]
        tokens = max(1, self.hparams.max_output_length)
        with self._bench() as bench:
            answers = generate(self.model, self.tok, bench.encoder, prompts, max_new_tokens=tokens)
        return {**dict.fromkeys(("DS", *GENERALISATION)), **dict(zip(("DS", *GENERALISATION), answers, strict=False))}

    def _bench(self) -> Any:
        config = config_of(self.hparams, self.alg_name.lower(), 1, [])
        return _rendered(self.model, self.tok, config, not self.parity)


@contextmanager
def _put_back_on_failure(model: Any) -> Iterator[dict[str, Tensor]]:
    """Takes weights as they were, by name, and puts them back into the model where the block fails."""
    before: dict[str, Tensor] = {}
    try:
        yield before
    except BaseException:
        write_back(model, before)
        raise


@contextmanager
def _rendered(model: Any, tok: Any, config: PKEConfig, chat: bool) -> Iterator[Workbench]:
    """A workbench; in parity it gives prompts as they are, without a chat template."""
    with workbench(model, tok, config) as bench:
        bench.encoder.chat = bench.encoder.chat and chat
        yield bench


def _in_notebooks_order(given: list[Any], prompts: Any, target_new: Any, ground_truth: Any) -> tuple[Any, Any, Any]:
    """edit(prompts, target_new, ground_truth), where some by position have filled EasyEdit's names in their order."""
    if prompts is not None and target_new is not None:  # all by name
        return prompts, target_new, ground_truth
    wanted = [None, target_new, ground_truth]
    for value in given:
        if None not in wanted:
            raise InputError("too many arguments", expected="edit(prompts, target_new, ground_truth)", got="more texts")
        wanted[wanted.index(None)] = value
    return wanted[0], wanted[1], wanted[2]


def _listed(name: str, value: Any, beside: Sequence[Any] | None = None) -> list[Any]:
    """A text as a list of one; any other list as it is, checked for its length."""
    texts = [value] if isinstance(value, str) or value is None else list(value)
    if beside is not None and len(texts) != len(beside):
        raise InputError(f"{name} doesn't fit the prompts", expected=f"{len(beside)}, one each", got=str(len(texts)))
    return texts
