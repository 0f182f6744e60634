"""The report of a run: report.json for programs, and report.html, one page that needs nothing else, for people."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pke_fast.changed import changed_words
from pke_fast.files import atomic_write
from pke_fast.wording import (
    by_group,
    commands,
    comparison,
    duration,
    headlines,
    not_drawn,
    number,
    percent,
    size,
    summary,
)

if TYPE_CHECKING:
    from torch import Tensor

    from pke_fast.wording import Measure

REDACTED = "[redacted]"


def write_report(
    folder: Path,
    report: Mapping[str, Any],
    score_map: Tensor | None = None,
    hot_spots: Mapping[int, Sequence[int]] | None = None,
    *,
    redact: bool = False,
) -> None:
    """Writes report.json and report.html into a folder that exists; a file is complete or isn't there.

    Args:
        folder: where to.
        report: what `edit` found out (docs/design.md lists the keys); `evaluation`, `samples`, `losses`, `stages`,
            `warnings` and `files` may be missing or empty and are then left out of the page.
        score_map: [L, D] scores that the hot spots are the highest of, NaN where not scored; None: no heatmap.
        hot_spots: neurons by layer, to be marked on it.
        redact: put "[redacted]" for every answer to a harmful prompt, in both files.
    """
    plain = as_json(report, redact)
    pictures = _pictures(plain, score_map, hot_spots or {})
    page = render_page(plain, pictures, redact)
    data = json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    for name, text in (("report.json", data), ("report.html", page)):
        with atomic_write(folder / name) as path:
            path.write_text(text, encoding="utf-8", newline="\n")


def as_json(report: Mapping[str, Any], redact: bool = False) -> dict[str, Any]:
    """What report.json holds: values of strict JSON; with `redact`, no answers to harmful prompts."""
    plain: dict[str, Any] = strict({**report, "samples": redacted(report.get("samples") or [], redact)})
    return plain


def redacted(samples: Sequence[Mapping[str, Any]], redact: bool) -> list[dict[str, Any]]:
    """Copies of the samples; with `redact`, answers are hidden unless the prompt is known to be benign.

    Refusals are hidden too: telling them apart is the judges' work, and judges err.
    """
    hidden = {"before": REDACTED, "after": REDACTED}
    return [{**s, **hidden} if redact and s.get("kind") != "benign" else dict(s) for s in samples]


def strict(value: Any) -> Any:
    """The value as strict JSON can hold it: NaN and infinities as None, tensors as lists, lone surrogates as "?"."""
    if isinstance(value, Mapping):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    if isinstance(value, str | Path):
        return str(value).encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return strict(value.tolist()) if hasattr(value, "tolist") else value


def render_page(report: Mapping[str, Any], pictures: Mapping[str, tuple[str, str]], redact: bool) -> str:
    """report.html as text. `report` holds plain values only (`strict`)."""
    from jinja2 import Environment, StrictUndefined

    # Prompts, answers and names come from files and models: autoescape makes text of whatever is in them.
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(percent=percent, number=number, duration=duration, size=size)
    source = resources.files("pke_fast").joinpath("report.html.j2").read_text(encoding="utf-8")
    model, samples = report["model"], report.get("samples") or []
    data = report.get("evaluation")
    page = environment.from_string(source).render(
        report=report,
        title=f"pke_fast report: {model['name']}",
        summary=summary(report),
        figures=_figures(report),
        comparison=by_group(_compared(data)) if data else {},
        categories=_by_category(data) if data else {},
        pictures=pictures,
        layers=_layers(report["hot_spots"]),
        has_paths=any(path is not None for path in report["hot_spots"].get("layer_path") or []),
        neurons=_neurons(report["hot_spots"].get("top") or []),
        changed_words=changed_words,
        harmful=[sample for sample in samples if sample["kind"] != "benign"],
        harmless=[sample for sample in samples if sample["kind"] == "benign"],
        redact=redact,
        facts=_facts(report),
        settings={key: _setting(value) for key, value in report["settings"].items()},
        commands=commands(model["name"], "patch.safetensors"),
        snippet=_SNIPPET.format(model=model["name"], dtype=model["dtype"]),
    )
    return page.strip() + "\n"


_SNIPPET = """\
import pke_fast
from pke_fast.loading import load_model

model = load_model({model!r}, dtype={dtype!r}).model
patch = pke_fast.Patch.load("patch.safetensors")
patch.apply(model)     # refuses other values in the edited neurons
patch.revert(model)    # exact to the bit"""


def _compared(data: Mapping[str, Any]) -> list[Measure]:
    return comparison(data["before"], data["after"], data.get("difference"))


def _by_category(data: Mapping[str, Any]) -> dict[str, Measure]:
    """The first judge's attack success by category of harm, where there is more than one."""
    found = data.get("by_category") or {}
    if len(found) < 2:
        return {}
    return {
        name: comparison({"harmful": sides["before"]}, {"harmful": sides["after"]})[0] for name, sides in found.items()
    }


def _figures(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The key figures: (label, value, note)."""
    model, hot, data, losses = report["model"], report["hot_spots"], report.get("evaluation"), report.get("losses")
    total = model["layers"] * model["neurons_per_layer"]
    found = [("Neurons edited", f"{hot['k']:,}", f"{percent(hot['share'], 2)} of {total:,}")]
    if data:
        labels = {
            "harmful prompts": "Attack success",
            "harmless prompts": "Harmless refused",
            "plain text": "Perplexity",
        }
        for line in headlines(_compared(data)):
            note = f"{line.prompts:,} {line.group}, {line.name.split(', ')[-1]}" if line.prompts else line.change_text
            found.append((labels[line.group], f"{line.text(line.before)} → {line.text(line.after)}", note))
    elif losses:
        for key, label in (("edit", "Loss of safe answers"), ("kl", "KL on harmless prompts")):
            value = f"{number(losses['before'][key])} → {number(losses['after'][key])}"
            found.append((label, value, "nats per token"))
    stages = report.get("stages") or []
    if stages:
        peaks = [stage["peak_bytes"] for stage in stages if stage["peak_bytes"] is not None]
        note = f"peak memory {size(max(peaks))}" if peaks else ""
        found.append(("Time", duration(sum(stage["seconds"] for stage in stages)), note))
    return found


def _pictures(
    report: Mapping[str, Any], score_map: Tensor | None, hot_spots: Mapping[int, Sequence[int]]
) -> dict[str, tuple[str, str]]:
    """Pictures by name, each as data URIs for a light and for a dark page."""
    from pke_fast.fronts import before_after_png, strengths_png
    from pke_fast.heatmap import heatmap_png, learning_curve_png

    draw: dict[str, Callable[[bool], bytes | None]] = {}
    losses = report.get("losses") or {}
    if score_map is not None:
        window = report["hot_spots"]["window"]
        draw["heatmap"] = lambda dark: heatmap_png(score_map, window, hot_spots, dark=dark)
    if steps := losses.get("steps"):
        draw["curve"] = lambda dark: learning_curve_png(steps, losses.get("stopped"), dark=dark)
    if data := report.get("evaluation"):
        draw["front"] = lambda dark: before_after_png(data, dark=dark)
    if tried := losses.get("tried"):
        draw["strengths"] = lambda dark: strengths_png(tried, losses["strength"], dark=dark)
    drawn = {name: (make(False), make(True)) for name, make in draw.items()}
    return {name: (_uri(light), _uri(dark)) for name, (light, dark) in drawn.items() if light and dark}


def _uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


def _layers(hot: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Layers that were scored or hold hot spots, the uppermost first, with lengths of bars in percent."""
    counts = {int(layer): int(count) for layer, count in hot["by_layer"].items()}
    paths = dict(enumerate(hot.get("layer_path") or []))
    most, longest = max(counts.values(), default=0) or 1, max((p or 0.0 for p in paths.values()), default=0) or 1
    rows = []
    for layer in sorted({*counts, *(layer for layer, path in paths.items() if path is not None)}, reverse=True):
        count, path = counts.get(layer, 0), paths.get(layer)
        bars = {"bar": 100 * count / most, "path_bar": 100 * max(0.0, path or 0.0) / longest}
        rows.append({"layer": layer, "count": count, "path": path, **bars})
    return rows


def _neurons(top: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The table of neurons, with each score's bar in percent of the highest."""
    unknown = dict.fromkeys(("score", "weight_change", "activation_path", "change"))
    rows = [{**unknown, **neuron} for neuron in top]
    best = max((row["score"] or 0.0 for row in rows), default=0.0) or 1.0
    return [{**row, "bar": min(100.0, 100 * max(0.0, row["score"] or 0.0) / best)} for row in rows]


def _facts(report: Mapping[str, Any]) -> dict[str, str]:
    """The model and the data, label by label."""
    model, requests, locality = report["model"], report.get("requests") or {}, report.get("locality") or {}
    facts = {"model": f"{model['name']} ({model['class']})", "fingerprint": str(model["fingerprint"])}
    facts["shape"] = (
        f"{model['layers']} layers, {model['neurons_per_layer']:,} neurons each, width {model['hidden_size']:,}"
    )
    facts["numbers and device"] = f"{model['dtype']} on {model['device']}"
    if requests:
        facts["requests"] = (
            f"{requests['source']}: {requests['n']:,}, of which {requests['used']:,} used"
            f" and {requests['already_refused']:,} left out as refused already"
        )
        if others := not_drawn(requests):
            facts["requests"] += f"; {others:,} were not drawn"
    if locality:
        facts["locality pairs"] = f"{locality['source']}: {locality['n']:,}"
    return facts


def _setting(value: Any) -> str:
    if value is None or value == "" or value == []:
        return "none"
    return ", ".join(str(item) for item in value) if isinstance(value, list) else str(value)
