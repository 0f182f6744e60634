"""The model card of an edit: what was done, figures, limits, how to use it. Never prompts, never answers."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import pke_fast
from pke_fast.config import PKEConfig
from pke_fast.errors import InputError
from pke_fast.patch import Patch
from pke_fast.wording import Measure, comparison, number, percent

LOG = logging.getLogger(__name__)

PATCH, REPORT = "patch.safetensors", "report.json"
TAGS = ("pke_fast", "model-editing", "precision-knowledge-editing", "safety", "refusal")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_CACHED = re.compile(r"models--([\w.-]+)--([\w.-]+)")  # a folder of the hub's cache
_LICENCE_KEYS = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class Shared:
    """What is told of an edit.

    Attributes:
        patch: the edit.
        report: what report.json of its run holds, or None.
        evaluation: dicts as in eval.json, before and after; either may be None.
        base: hub id of the model that was edited; None where it is not known.
        licence: ``license``, ``license_name``, ``license_link`` as the hub's metadata have them; may be empty.
    """

    patch: Patch
    report: Mapping[str, Any] | None = None
    evaluation: tuple[Mapping[str, Any] | None, Mapping[str, Any] | None] = (None, None)
    base: str | None = None
    licence: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def gather(
    source: str | Path, evaluations: Sequence[str | Path] = (), base: str | None = None, licence: str | None = None
) -> Shared:
    """Reads what there is to tell of an edit.

    Args:
        source: the folder that ``pke-fast edit`` wrote, or a patch alone.
        evaluations: one or two eval.json of ``pke-fast eval``, of the model without the patch and with it; they go
            before what report.json has.
        base: hub id of the model that was edited; None: as the patch names it, if that is one.
        licence: its name, such as ``apache-2.0``; None: the base's where that is known on this machine.

    Raises:
        InputError: no such folder, no patch in it, or a file that isn't what it should be.
    """
    path = Path(source)
    patch = Patch.load(_patch_of(path))
    report = _report_of(path / REPORT, patch) if path.is_dir() else None
    evaluated = (report or {}).get("evaluation") or {}
    evaluation = (evaluated.get("before"), evaluated.get("after"))
    if evaluations:
        evaluation = read_evaluations(evaluations, patch)
    if base is not None and not re.fullmatch(rf"{_HUB_ID.pattern}|[\w-][\w.-]*", base):
        raise InputError(f"{base!r} is no model of the hub", expected="an id such as owner/name", do="check --base")
    name = _mapping(patch.meta.get("base")).get("name")
    stated: Mapping[str, Any] = {"license": licence} if licence else licence_of(name)
    return Shared(patch, report, evaluation, base or hub_id(name), stated)


def _patch_of(path: Path) -> Path:
    if path.is_dir():
        if not (path / PATCH).is_file():
            raise InputError(
                f"there is no patch in {path}",
                expected=f"a folder of pke-fast edit, with {PATCH}",
                got=", ".join(sorted(file.name for file in path.iterdir())[:6]) or "an empty folder",
                do="name the folder that was given as --out, or the patch itself",
            )
        return path / PATCH
    if not path.exists():
        raise InputError(f"no such folder or patch: {path}", expected="what pke-fast edit wrote", do="check the path")
    return path


def _report_of(file: Path, patch: Patch) -> dict[str, Any] | None:
    if not file.exists():
        return None
    report = _read(file, "report of pke-fast edit", ("model", "hot_spots", "requests"))
    made = _mapping(patch.meta.get("base")).get("fingerprint")
    counts = {str(layer): len(neurons) for layer, neurons in patch.by_layer().items()}
    edited = {layer: count for layer, count in _mapping(report["hot_spots"].get("by_layer")).items() if count}
    if report["model"].get("fingerprint") != made or edited != counts:
        raise InputError(
            f"{file} belongs to another edit than the patch beside it",
            expected=f"a report on {made}, with {sum(counts.values()):,} neurons",
            got=f"{report['model'].get('fingerprint')}, with {sum(edited.values()):,}",
            do="name the patch alone, or put its own report beside it",
        )
    return report


def read_evaluations(files: Sequence[str | Path], patch: Patch) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """One or two eval.json as (before, after): with the patch it is after, without one before.

    Raises:
        InputError: not such a file; of another model or patch; two of one kind; or two that were measured in different
            ways.
    """
    found: dict[bool, dict[str, Any]] = {}
    for file in files:
        content = _read(Path(file), "eval.json of pke-fast eval", ("patch", "harmful", "benign", "settings"))
        _check_measured(file, content, patch)
        patched = content["patch"] is not None
        if patched in found:
            kind = "with a patch" if patched else "without a patch"
            raise InputError(f"{file} is a second evaluation {kind}", expected="one without and one with the patch")
        found[patched] = content
    before, after = found.get(False), found.get(True)
    if before and after and _measured(before) != _measured(after):
        raise InputError(
            "the two evaluations can't be compared",
            expected="the same model, settings, prompts and text",
            got="others",
            do="run pke-fast eval twice, without --patch and with it, all else the same",
        )
    return before, after


def _check_measured(file: str | Path, figures: Mapping[str, Any], patch: Patch) -> None:
    """Refuses figures of another model, or with another patch; of those that don't tell, it warns."""
    asked = {"model": (_mapping(patch.meta.get("base")).get("fingerprint"), figures.get("fingerprint"))}
    if figures["patch"] is not None:
        asked["patch"] = patch.digest(), figures.get("patch_sha256")
    for what, (expected, got) in asked.items():
        if not expected or not got:
            where = file if expected else "the patch"
            LOG.warning("can't check that %s has figures of this %s: %s doesn't say its digest", file, what, where)
        elif got != expected:
            raise InputError(
                f"{file} has figures of another {what}",
                expected=f"the {what} of this edit, {expected[:16]}",
                got=f"{figures.get(what)}, {str(got)[:16]}",
                do="run pke-fast eval on the model that was edited, in its dtype: without --patch, and with this one",
            )


def _measured(figures: Mapping[str, Any]) -> tuple[Any, ...]:
    """What figures are of; those of earlier versions have no digests of their prompts."""
    parts = [_mapping(figures.get(part)) for part in ("harmful", "benign", "text")]
    return figures.get("model"), figures["settings"], *((part.get("n"), part.get("sha256")) for part in parts)


def _read(file: Path, what: str, keys: Sequence[str]) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        got = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(f"can't read {file}", expected=f"the {what}", got=got, do="check the path") from error
    missing = [key for key in keys if not isinstance(content, dict) or key not in content]
    if missing:
        raise InputError(f"{file} is not the {what}", got=f"nothing called {', '.join(missing)} in it")
    return dict(content)


def hub_id(name: Any) -> str | None:
    """The hub id that a model's name stands for: of the embedded model, of a folder of the hub's cache, or itself."""
    from pke_fast.smollm2 import HUB_ID

    if not isinstance(name, str):
        return None
    if name == "smollm2":
        return HUB_ID
    cached = [found for part in Path(name).parts if (found := _CACHED.fullmatch(part))]
    if cached:
        return "/".join(cached[-1].groups())
    return name if _HUB_ID.fullmatch(name) and not os.path.exists(name) else None


def licence_of(name: Any) -> dict[str, Any]:
    """The licence of a model, where this machine knows it: the embedded one's, or what a folder's README.md states."""
    if name == "smollm2":
        return {"license": "apache-2.0"}
    card = Path(name) / "README.md" if isinstance(name, str) else None
    if card is None or not card.is_file():
        return {}
    from huggingface_hub import ModelCard

    try:
        data = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    except ValueError:  # front matter that is no YAML object: it states nothing
        return {}
    return {key: data[key] for key in _LICENCE_KEYS if data.get(key)}


def model_card(shared: Shared, repo: str | None = None, merged: bool = False) -> str:
    """README.md with the hub's YAML front matter.

    Args:
        shared: what is told. Of the report only numbers, settings and warnings are: no prompts and no answers.
        repo: where it will be, for the commands in it.
        merged: it goes with a whole edited model, not with the patch alone.
    """
    from huggingface_hub import ModelCardData
    from jinja2 import Environment, StrictUndefined

    data = ModelCardData(
        base_model=shared.base,
        base_model_relation="finetune" if merged else "adapter",
        library_name="transformers" if merged else "pke_fast",
        pipeline_tag="text-generation",
        tags=list(TAGS),
        **shared.licence,
    )
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)  # Markdown, no HTML
    environment.filters.update(percent=percent, number=number, code=_code, cell=_cell)
    source = resources.files("pke_fast").joinpath("card.md.j2").read_text(encoding="utf-8")
    base = _mapping(shared.patch.meta.get("base"))
    description = shared.patch.describe()
    report = shared.report or {}
    before, after = shared.evaluation
    text = environment.from_string(source).render(
        version=pke_fast.__version__,
        repo=repo or "OWNER/NAME",
        merged=merged,
        embedded=base.get("name") == "smollm2",
        base=shared.base,
        base_name=shared.base or Path(str(base.get("name") or "the model")).name,
        facts=base,
        patch=description,
        share=_share(shared.patch, base),
        layers=len(shared.patch.by_layer()),
        weights=_weights(shared.patch),
        requests=shared.patch.meta.get("requests"),
        locality=shared.patch.meta.get("locality"),
        losses=_mapping(shared.patch.meta.get("losses")),
        parts=len(_mapping(shared.patch.meta.get("made_from")).get("patches") or ()),
        how=_mapping(shared.patch.meta.get("made_from")).get("how"),
        settings=_settings(shared.patch.meta.get("settings")),
        measures=_measures(before, after),
        judged=_mapping((after or before or {}).get("settings")),
        before=before is not None,
        warnings=list(report.get("warnings") or []),
        versions=_mapping(shared.patch.meta.get("versions")),
        licence=shared.licence.get("license"),
    )
    return f"---\n{data.to_yaml().strip()}\n---\n\n{text.strip()}\n"


def _measures(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> list[Measure]:
    return comparison(before or {}, after or {}) if before or after else []


def _share(patch: Patch, base: Mapping[str, Any]) -> float | None:
    layers, neurons = base.get("layers"), base.get("neurons_per_layer")
    return patch.n_neurons / (layers * neurons) if isinstance(layers, int) and isinstance(neurons, int) else None


def _weights(patch: Patch) -> str:
    """Which of the neurons' weights it changes."""
    kinds = {part.projection for part in patch.layers}
    return " and ".join(word for word, has in (("input", kinds - {"down"}), ("output", "down" in kinds)) if has)


def _settings(found: Any) -> dict[str, tuple[str, bool]]:
    """Every setting as code, and whether it is another than the method's preset has."""
    settings = dict(_mapping(found))
    try:
        preset = PKEConfig.preset(str(settings.get("method"))).as_dict()
    except InputError:  # a method of another version
        preset = settings
    return {key: (_code(value), value != preset.get(key)) for key, value in settings.items()}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _code(value: Any) -> str:
    """A value as Markdown code that stays within its cell of a table."""
    text = value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
    return "`" + _cell(text).replace("`", "'") + "`"


def _cell(text: Any) -> str:
    line = " ".join(str(text).split())
    return "".join(sign for sign in line if sign.isprintable()).replace("|", "\\|").replace("<", "&lt;")
