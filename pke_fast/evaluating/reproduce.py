"""The paper's table for whatever models there are: attack success of each model as it is, after DINM and after PKE.

Every cell is a folder below ``--out``, written whole: ``MODEL/METHOD/`` with eval.json and generations.jsonl, and the
edit's patch beside it. What is there already, of the same inputs, is not made again; so an interrupted table goes on.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pke_fast import engine
from pke_fast.config import PKEConfig
from pke_fast.errors import InputError
from pke_fast.evaluating.kept import unfinished, weights_digest
from pke_fast.evaluating.outputs import write_json
from pke_fast.evaluation import evaluate_model, identity, write_evaluation
from pke_fast.files import atomic_folder, atomic_write, check_output_folder, remove
from pke_fast.loading import LoadedModel, load_outline
from pke_fast.patch import Patch
from pke_fast.requests import EditRequest, Pair
from pke_fast.sources import check_files, find_path
from pke_fast.stages import Stages
from pke_fast.workbench import workbench

METHODS = ("vanilla", "dinm", "pke")
_HEAD = "| model | ASR "  # how table.md begins
Rows = dict[str, dict[str, Any]]  # by model, then by method: figures as in eval.json

# Attack success rates in percent as published (arXiv 2410.03772), on its own prompts and by its own judge.
PUBLISHED: dict[str, dict[str, float]] = {
    "Llama-2-7b": {"vanilla": 67.0, "dinm": 3.0, "pke": 2.0},
    "Llama-3-8b-instruct": {"vanilla": 97.6, "dinm": 87.6, "pke": 8.5},
    "Mistral-7B-Instruct-v0.3": {"vanilla": 73.61, "dinm": 5.0, "pke": 4.3},
}


@dataclass(frozen=True)
class Table:
    """What every model is edited on and measured on.

    Attributes:
        configs: settings by method, "dinm" and "pke"; a method that isn't named is left out.
        plain: settings by which the unedited model is asked: how prompts are put, and how long they may be.
        judges: names of phrase lists; the first one's rate stands in the table.
        locality: benign pairs that must not move; None: those of the requests, else the shipped prompts.
    """

    requests: Sequence[EditRequest]
    harmful: Sequence[str]
    benign: Sequence[str] | None
    configs: Mapping[str, PKEConfig]
    plain: PKEConfig
    judges: Sequence[str]
    max_new_tokens: int
    locality: Sequence[Pair] | None = None

    def inputs(self, method: str, weights: str) -> str:
        """A digest of all that one cell depends on, the model's weights (`weights_digest`) among them."""
        requests = [request.as_dict() for request in self.requests]
        locality = None if self.locality is None else [vars(pair) for pair in self.locality]
        content: list[Any] = [
            [weights, method],
            [requests, locality, self.configs[method].as_dict()] if method in self.configs else _asked(self.plain),
            [list(self.harmful), None if self.benign is None else list(self.benign)],
            [list(self.judges), self.max_new_tokens],
        ]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def of_any_model(self) -> dict[str, str]:
        """`inputs` by method, but for the model: rows may stand in one table where these are the same."""
        return {method: self.inputs(method, "") for method in ("vanilla", *self.configs)}


def check_models(names: Sequence[str], device: str, dtype: str, out: Path) -> None:
    """Checks all that can be told without weights.

    Raises:
        InputError: as `load_outline`; or `out` is in a model's folder, or that in `out`.
    """
    place = out.resolve()
    for name in names:
        load_outline(name, device, dtype)
        path = None if name == "smollm2" else find_path(name)
        if path is None:
            continue
        if path.is_dir():
            check_files(path)
        model = path.resolve()
        if place == model or place in model.parents or model in place.parents:
            raise InputError(
                f"{out} and the model {name} are one in the other",
                expected="a folder of its own",
                do="name another --out",
            )


def read_table(out: Path, table: Table) -> tuple[Rows, dict[str, str]]:
    """The rows of the table that is in a folder already, and the inputs that they are of; none where there is none.

    Raises:
        InputError: table.md or table.json is something else, or of other inputs.
    """
    rows: Rows = {}
    inputs: dict[str, str] = {}
    file = out / "table.json"
    try:
        if file.exists():
            found = json.loads(file.read_text(encoding="utf-8"))
            rows, inputs = dict(found["models"]), dict(found["inputs"])
            as_markdown(rows, found["judge"])
        file = out / "table.md"
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else [_HEAD]
        if not "".join(lines[:1]).startswith(_HEAD) or not all(line.startswith("|") for line in lines):
            raise ValueError("not the table alone")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(
            f"{file} is there already, and isn't what pke-fast reproduce writes",
            expected="no such file, or the one of an earlier run",
            got=error.strerror if isinstance(error, OSError) else "something else",
            do="move it away, or name another --out",
        ) from error
    if any(inputs.get(method, digest) != digest for method, digest in table.of_any_model().items()):
        raise InputError(
            f"the table in {out} was made from other inputs",
            expected="the same requests, prompts, settings and judges as before",
            do="give the same options again, or another --out",
        )
    return rows, inputs


def write_table(out: Path, rows: Rows, table: Table, inputs: Mapping[str, str]) -> tuple[str, dict[str, Any]]:
    """Writes table.json and table.md; returns the table as Markdown, and what is in table.json."""
    judge = table.judges[0]
    summary = {"judge": judge, "models": rows, "published": {name: published(name) for name in rows}}
    summary["inputs"] = {**inputs, **table.of_any_model()}
    write_json(out / "table.json", summary)
    text = as_markdown(rows, judge)
    with atomic_write(out / "table.md") as path:
        path.write_text(text, encoding="utf-8")
    return text, summary


def reproduce_model(loaded: LoadedModel, table: Table, out: Path, stages: Stages) -> dict[str, Any]:
    """One row: the model's evaluations as it is and after each method; the model is as it was afterwards, to the bit.

    Returns:
        ``{method: figures as in eval.json}``.

    Raises:
        InputError: a cell's folder holds something else; nothing in it is changed. Or as `edit` and `evaluate`.
    """
    row = {}
    base = weights_digest(loaded.model)
    place = out / safe_name(loaded.name)
    for method in ("vanilla", *table.configs):
        folder, inputs = place / method, table.inputs(method, base)
        figures = _finished(folder, inputs)
        if figures is None:
            check_output_folder(folder)  # now, not after an edit and an evaluation
            figures = _cell(loaded, table, method, folder, inputs, stages)
        row[method] = figures
    return row


def _cell(loaded: LoadedModel, table: Table, method: str, folder: Path, inputs: str, stages: Stages) -> dict[str, Any]:
    patch = None if method == "vanilla" else _patch(loaded, table, method, folder, inputs, stages)
    config = table.configs.get(method, table.plain)
    kept = unfinished(folder)
    try:
        with workbench(loaded.model, loaded.tokenizer, config, stages, loaded.name) as bench:
            result = evaluate_model(
                loaded.model,
                loaded.tokenizer,
                bench.encoder,
                table.harmful,
                table.benign,
                None,
                judges=table.judges,
                max_new_tokens=table.max_new_tokens,
                stages=stages,
                when=f"{loaded.name}, {method}",
                keep=kept,
            )
    finally:
        if patch is not None:
            patch.revert(loaded.model)
    result.more.update(inputs=inputs, **identity(loaded.model, patch))
    with atomic_folder(folder) as new:
        write_evaluation(new, result, loaded.name, None if patch is None else _patch_file(folder, inputs).name)
    remove(kept)
    return result.as_dict()


def _patch(loaded: LoadedModel, table: Table, method: str, folder: Path, inputs: str, stages: Stages) -> Patch:
    """The method's patch, applied: the one that an interrupted run left, else a new one."""
    file = _patch_file(folder, inputs)
    if file.exists():
        patch = Patch.load(file)
        patch.apply(loaded.model)
        return patch
    edited = engine.edit(
        loaded.model,
        loaded.tokenizer,
        table.requests,
        table.configs[method],
        locality=table.locality,
        stages=stages,
        name=loaded.name,
        samples=0,
    )
    try:
        edited.patch.save(file)
    except BaseException:
        edited.revert()
        raise
    return edited.patch


def _asked(config: PKEConfig) -> list[Any]:
    return [config.system_prompt, config.suffix_system_prompt, config.max_length]


def _patch_file(folder: Path, inputs: str) -> Path:
    return folder.with_name(f"{folder.name}-{inputs[:12]}.safetensors")


def _finished(folder: Path, inputs: str) -> dict[str, Any] | None:
    """The figures of a cell that is complete; None where it isn't there."""
    try:
        figures: dict[str, Any] = json.loads((folder / "eval.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / 'eval.json'} can't be read", got=str(error), do="remove that folder") from error
    if figures.get("inputs") != inputs:
        raise InputError(
            f"{folder} was made from other inputs",
            expected="the same model, requests, prompts, settings and judges as before",
            do="give the same options again, or another --out",
        )
    return figures


def safe_name(model: str) -> str:
    """A model's name as a folder's: distinct names give distinct folders."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", model).strip("._") or "model"
    return plain if plain == model else f"{plain}-{hashlib.sha256(model.encode()).hexdigest()[:6]}"


def published(model: str) -> dict[str, float] | None:
    """The paper's figures of a model of that name, in percent; None where it has none."""
    plain = re.sub(r"[^a-z0-9.]+", "-", model.lower())
    for name, figures in PUBLISHED.items():
        if name.lower() in plain and not (name == "Llama-2-7b" and "chat" in plain):
            return figures
    return None


def as_markdown(rows: Mapping[str, Mapping[str, Any]], judge: str) -> str:
    """The table as Markdown: attack success in percent with its 95 % interval, and the published figures."""
    methods = list(dict.fromkeys(method for row in rows.values() for method in row))
    refusals = any(figures.get("benign") for row in rows.values() for figures in row.values())
    head = ["model", *(f"ASR {method}" for method in methods)]
    head += [f"harmless refused, {method}" for method in methods] if refusals else []
    head += [f"published ASR {' / '.join(METHODS)}"]
    lines = [head, ["---"] * len(head)]
    for model, row in rows.items():
        cells = [model, *(_rate(row.get(method), "harmful", "asr", judge) for method in methods)]
        cells += [_rate(row.get(method), "benign", "refusal_rate", judge) for method in methods] if refusals else []
        known = published(model)
        cells.append(" / ".join(f"{known[method]:g} %" for method in METHODS) if known else "not published")
        lines.append(cells)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _rate(figures: Mapping[str, Any] | None, part: str, key: str, judge: str) -> str:
    found = (figures or {}).get(part)
    if not found:
        return "-"
    low, high = found["intervals"][key][judge]
    return f"{100 * found[key][judge]:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
