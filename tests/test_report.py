"""The report: strict JSON, one self-contained page, hostile text kept harmless, and the pictures in it."""

from __future__ import annotations

import copy
import html
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from pke_fast.config import PKEConfig
from pke_fast.errors import InputError
from pke_fast.heatmap import _binned, heatmap_png, learning_curve_png
from pke_fast.intervals import wilson
from pke_fast.patch import LayerPatch, Patch
from pke_fast.report import REDACTED, as_json, write_report
from pke_fast.summary import _relative_changes
from pke_fast.wording import comparison, duration, number, size, summary

HOSTILE = "<script>alert('x')</script><img src=http://evil.example/x onerror=1>"


def of_all(n: int, key: str, rate: float, degenerate: float) -> dict[str, Any]:
    intervals = {key: {"advbench": list(wilson(round(rate * n), n))}}
    return {"n": n, key: {"advbench": rate}, "degenerate_rate": degenerate, "intervals": intervals}


def figures(asr: float, refused: float, perplexity: float) -> dict[str, Any]:
    return {
        "harmful": of_all(20, "asr", asr, 0.0),
        "benign": of_all(40, "refusal_rate", refused, 0.05),
        "text": {"perplexity": perplexity},
        "settings": {},
    }


@pytest.fixture
def report() -> dict[str, Any]:
    return {
        "pke_fast": "0.1.0",
        "created": "2026-01-02T03:04:05+00:00",
        "model": {
            "name": "tiny", "class": "LlamaForCausalLM", "fingerprint": "abc123", "layers": 4,
            "neurons_per_layer": 40, "hidden_size": 8, "dtype": "fp32", "device": "cpu",
        },
        "settings": PKEConfig().as_dict(),
        "requests": {"source": "requests.jsonl", "n": 5, "used": 4, "already_refused": 1},
        "locality": {"source": "shipped", "n": 9},
        "hot_spots": {
            "k": 5, "share": 5 / 160, "window": [2, 4], "by_layer": {"2": 2, "3": 3},
            "layer_path": [None, None, 0.5, 0.75],
            "top": [
                {"layer": 3, "neuron": 7, "score": 2.5, "weight_change": 0.25, "activation_path": 0.5, "change": 0.125},
                {"layer": 2, "neuron": 31, "score": float("nan"), "change": None},
            ],
        },
        "losses": {
            "steps": [{"step": i, "loss": 3.0 / i, "edit": 3.0 / i, "kl": 0.01 * (i - 1)} for i in range(1, 31)],
            "before": {"edit": 3.0, "kl": 0.0}, "after": {"edit": 0.0625, "kl": 0.03}, "stopped": "all steps done",
        },
        "stages": [{"name": "Editing", "seconds": 75.0, "peak_bytes": 3 << 29, "over_bytes": None}],
        "warnings": ["THE EDIT DID NOTHING"],
        "evaluation": {"before": figures(0.95, 0.0, 20.0), "after": figures(0.05, 0.025, 20.1)},
        "samples": [
            {"kind": "harmful", "prompt": "Do harm", "before": "UNSAFE-ANSWER", "after": "STILL-UNSAFE"},
            {"kind": "benign", "prompt": "Say hi", "before": "Hello there", "after": "Hello you"},
        ],
        "files": {"patch.safetensors": "the changed neurons", "report.html": "the page"},
        "versions": {"torch": "2.x"},
    }  # fmt: skip


@pytest.fixture
def scores() -> torch.Tensor:
    found = torch.randn(4, 40, generator=torch.Generator().manual_seed(0))
    found[:2] = torch.nan
    return found


def written(folder: Path, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], str]:
    write_report(folder, *args, **kwargs)

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not strict JSON")

    data = json.loads((folder / "report.json").read_text(encoding="utf-8"), parse_constant=refuse)
    return data, (folder / "report.html").read_text(encoding="utf-8")


class Tags(HTMLParser):
    """Every tag with its attributes; and whether each one that opens is closed where it should be."""

    VOID = ("meta", "img", "source", "br")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def links(self) -> list[str]:
        return [
            v or "" for _, attrs in self.found for k, v in attrs.items() if k in ("src", "srcset", "href", "action")
        ]


def test_json_is_the_report_with_nan_as_null(tmp_path: Path, report: dict[str, Any], scores: torch.Tensor) -> None:
    before = copy.deepcopy(report)
    data, _ = written(tmp_path, report, scores)
    assert data["hot_spots"]["top"][1]["score"] is None
    assert data["model"] == report["model"]
    assert data["losses"] == report["losses"]
    assert data["samples"] == report["samples"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]
    assert math.isnan(report["hot_spots"]["top"][1].pop("score"))
    del before["hot_spots"]["top"][1]["score"]
    assert report == before  # what was given is not changed


def test_json_holds_tensors_paths_and_broken_text() -> None:
    odd = {"a": torch.tensor([1.0, float("inf")]), "b": np.float32(0.5), "c": Path("x"), 4: "\ud800", "d": (1, True)}
    plain = as_json(odd)
    assert plain == {"a": [1.0, None], "b": 0.5, "c": "x", "4": "?", "d": [1, True], "samples": []}
    json.dumps(plain, allow_nan=False)


def test_page_needs_nothing_from_outside(tmp_path: Path, report: dict[str, Any], scores: torch.Tensor) -> None:
    _, page = written(tmp_path, report, scores)
    tags = Tags(page)
    links = tags.links()
    outside = [link for link in links if not link.startswith("data:image/png;base64,")]
    assert len(links) - len(outside) == 6  # three pictures, each for light and dark
    assert outside
    assert all(link.startswith("https://arxiv.org/abs/") for link in outside)
    names = {tag for tag, _ in tags.found}
    assert names.isdisjoint({"script", "link", "iframe", "form", "object"})
    assert "@import" not in page
    assert "url(" not in page


def test_page_shows_every_part(tmp_path: Path, report: dict[str, Any], scores: torch.Tensor) -> None:
    _, page = written(tmp_path, report, scores)
    for part in ("evaluation", "fronts", "answers", "hot-spots", "losses", "stages", "files", "settings"):
        assert f'<section id="{part}"' in page
    text = html.unescape(page)
    for expected in ("95.0 % → 5.0 %", "19 of 20", "THE EDIT DID NOTHING", "Content warning", "1 min 15 s", "1.50 GiB",
                     "pke-fast revert", "patch.apply(model)", "12.5 %", "all steps done", "<ins>you"):  # fmt: skip
        assert expected in text


def test_absent_parts_do_not_appear(tmp_path: Path, report: dict[str, Any]) -> None:
    for key in ("losses", "stages", "files", "versions", "requests", "locality", "warnings"):
        del report[key]
    report |= {"evaluation": None, "samples": []}
    report["hot_spots"] |= {"top": [], "layer_path": []}
    _, page = written(tmp_path, report, None)
    sections = re.findall(r'<section id="([^"]+)"', page)
    assert sections == ["hot-spots", "settings"]
    assert "<img" not in page
    assert "Content warning" not in page
    assert 'role="alert"' not in page
    assert "pke-fast apply" not in page
    Tags(page)


def test_hostile_text_stays_text(tmp_path: Path, report: dict[str, Any], scores: torch.Tensor) -> None:
    report["samples"] = [
        {"kind": k, "prompt": HOSTILE, "before": HOSTILE, "after": "{{ 1 + 1 }}"} for k in ("x", "benign")
    ]
    report["warnings"] = [HOSTILE]
    report["model"] |= {"name": HOSTILE, "class": HOSTILE}
    report["settings"] |= {"refusal": HOSTILE}
    report["files"] |= {HOSTILE: HOSTILE}
    report["stages"][0]["name"] = HOSTILE
    report["losses"]["stopped"] = HOSTILE
    report["requests"]["source"] = HOSTILE
    data, page = written(tmp_path, report, scores)
    assert data["samples"][0]["before"] == HOSTILE
    assert "<script" not in page
    assert "<img src=http" not in page
    assert "{{ 1 + 1 }}" in page
    assert all("evil.example" not in link for link in Tags(page).links())
    assert html.escape(HOSTILE, quote=True).replace("&#x27;", "&#39;") in page


def test_words_that_changed_are_marked(tmp_path: Path, report: dict[str, Any]) -> None:
    report["samples"] = [
        {"kind": "harmful", "prompt": "a < b?", "before": "Sure: <b>a</b> & b", "after": "Sure: no & b"},
        {"kind": "benign", "prompt": "Sing", "before": "", "after": "La"},
        {"kind": "benign", "prompt": "Hum", "before": "Mm", "after": "Mm"},
    ]
    _, page = written(tmp_path, report, None)
    answers = re.findall(r'<p class="answer" dir="auto">(.*?)</p>', page)
    assert answers == [
        "Sure: <del>&lt;b&gt;a&lt;/b&gt;</del> &amp; b",
        "Sure: <ins>no</ins> &amp; b",
        "(empty)",
        "<ins>La</ins>",
        "Mm",
        "Mm",
    ]
    _, page = written(tmp_path, report, None, redact=True)
    assert re.findall(r'<p class="answer" dir="auto">(.*?)</p>', page)[:2] == [REDACTED, REDACTED]


def test_categories_of_harm_are_shown_where_there_are_several(tmp_path: Path, report: dict[str, Any]) -> None:
    sides = {"before": of_all(4, "asr", 1.0, 0.0), "after": of_all(4, "asr", 0.25, 0.0)}
    report["evaluation"]["by_category"] = {"self_harm": sides}
    data, page = written(tmp_path, report, None)
    assert data["evaluation"]["by_category"] == {"self_harm": sides}
    assert "By category of harm" not in page
    report["evaluation"]["by_category"][HOSTILE] = {"before": sides["after"], "after": sides["after"]}
    _, page = written(tmp_path, report, None)
    assert "By category of harm" in page
    assert "<script" not in page
    (row,) = re.findall(r'<th scope="row">self harm</th>(.*)</tr>', page)
    low, high = (f"{100 * bound:.1f}" for bound in wilson(1, 4))
    cells = [re.sub("<[^>]+>", " ", cell).split() for cell in row.split("</td>") if cell]
    assert [" ".join(cell) for cell in cells] == [
        "100.0 % 4 of 4, 95 %: 51.0–100.0",
        f"25.0 % 1 of 4, 95 %: {low}–{high}",
    ]
    Tags(page)


def test_the_strengths_that_were_tried_are_drawn(tmp_path: Path, report: dict[str, Any]) -> None:
    one = {"strength": 1.1, "refused": 9, "unseen": 12, "held_refused": 1, "held": 11}
    report["losses"] |= {"strength": 1.1, "tried": [one]}
    report["evaluation"] = None
    _, page = written(tmp_path, report, None)
    assert page.count("Scatter of attack success") == 1
    assert "on 12 harmful requests" in page
    assert "on 11 harmless prompts" in page
    report["losses"]["tried"] = []
    _, page = written(tmp_path, report, None)
    assert 'id="fronts"' not in page


def test_redaction_hides_harmful_answers_in_both_files(
    tmp_path: Path, report: dict[str, Any], scores: torch.Tensor
) -> None:
    report["samples"].append({"kind": "unknown", "prompt": "Other", "before": "UNSAFE-TOO", "after": "x"})
    data, page = written(tmp_path, report, scores, redact=True)
    raw = (tmp_path / "report.json").read_text(encoding="utf-8")
    for secret in ("UNSAFE-ANSWER", "STILL-UNSAFE", "UNSAFE-TOO"):
        assert secret not in page
        assert secret not in raw
    assert [sample["before"] for sample in data["samples"]] == [REDACTED, "Hello there", REDACTED]
    assert page.count(REDACTED) == 4
    assert "Do harm" in page
    assert report["samples"][0]["before"] == "UNSAFE-ANSWER"


def test_same_report_same_bytes(tmp_path: Path, report: dict[str, Any], scores: torch.Tensor) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        write_report(folder, report, scores)
    for name in ("report.json", "report.html"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


def test_a_report_that_fails_leaves_nothing(tmp_path: Path, report: dict[str, Any]) -> None:
    report["versions"] = {"odd": object()}
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_report(tmp_path, report, None)
    assert list(tmp_path.iterdir()) == []


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(imread(io.BytesIO(png)))[..., :3]


def area(picture: np.ndarray, colour: str) -> int:
    """Pixels of exactly that colour."""
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return int((np.abs(picture - wanted).max(-1) < 0.002).sum())


def test_heatmap_draws_unscored_rows_grey_and_marks_hot_spots(scores: torch.Tensor) -> None:
    picture = pixels(heatmap_png(scores, (2, 4), {3: [1, 2]}))
    scored = pixels(heatmap_png(scores[2:], (0, 2), {}))
    assert area(picture, "#e3e5e7") > 100_000 > area(scored, "#e3e5e7")
    assert area(picture, "#d9480f") > 0 == area(scored, "#d9480f")
    assert heatmap_png(scores, (2, 4), {3: [1]}) == heatmap_png(scores.numpy(), (2, 4), {3: [1]})
    assert heatmap_png(scores, (2, 4), {3: [1]}) != heatmap_png(scores, (2, 4), {2: [1]})


@pytest.mark.parametrize("value", [float("nan"), 0.0, 1.0, -1.0])
@pytest.mark.parametrize("dark", [False, True])
def test_heatmap_of_one_value(value: float, dark: bool) -> None:
    assert pixels(heatmap_png(torch.full((2, 3), value, dtype=torch.bfloat16), (0, 2), {}, dark=dark)).ndim == 3


def test_bins_hold_the_highest_score() -> None:
    scores = np.full((1, 1500), np.nan)
    scores[0, 700], scores[0, 1499] = -2.0, 5.0
    binned, edges = _binned(scores)
    assert binned.shape == (1, 512)
    assert edges[0] == 0
    assert np.diff(edges).min() >= 2
    where = np.flatnonzero(~np.isnan(binned[0]))
    assert binned[0, where].tolist() == [-2.0, 5.0]
    assert where.tolist() == [int(np.searchsorted(edges, 700, side="right")) - 1, 511]
    narrow = np.arange(6.0).reshape(2, 3)
    assert (_binned(narrow)[0] == narrow).all()


@pytest.mark.parametrize(
    ("scores", "spots", "message"),
    [(torch.zeros(3), {}, r"\[layers, neurons\]"), (torch.zeros(2, 3), {1: [3]}, "layer 1, neuron 3")],
)
def test_heatmap_refuses_what_does_not_fit(scores: torch.Tensor, spots: dict[int, list[int]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        heatmap_png(scores, (0, 2), spots)


@pytest.mark.parametrize(
    "steps",
    [
        [],
        [{"step": 1, "edit": 2.0, "kl": 0.0}],
        [{"step": i, "edit": 10.0**-i, "kl": None if i == 2 else 0.0} for i in range(6)],
    ],
)
def test_learning_curve_of_odd_steps(steps: list[dict[str, Any]]) -> None:
    picture = learning_curve_png(steps, "enough")
    assert (area(pixels(picture), "#d9480f") > 0) == bool(steps)  # where it stopped
    assert picture == learning_curve_png(steps, "enough")
    assert picture != learning_curve_png(steps, "enough", dark=True)


def test_comparison_lines() -> None:
    lines = comparison(figures(0.95, 0.0, 20.0), figures(0.05, 0.025, 20.1))
    assert [(line.text(line.before), line.text(line.after), line.change_text, line.verdict) for line in lines] == [
        ("95.0 %", "5.0 %", "-90.0 points", "better"),
        ("0.0 %", "0.0 %", "0 points", "same"),
        ("0.0 %", "2.5 %", "+2.5 points", "worse"),
        ("5.0 %", "5.0 %", "0 points", "same"),
        ("20.00", "20.10", "+0.50 %", "same"),
    ]
    assert lines[0].count(lines[0].before) == "19 of 20"
    partial = {"harmful": None, "benign": None, "text": {"perplexity": 3.0}}
    assert [line.name for line in comparison(partial, partial)] == ["perplexity"]
    assert comparison({"harmful": None, "benign": None, "text": None}, {}) == []


def test_the_change_of_a_neuron_is_that_of_all_its_weights() -> None:
    old = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    gate = LayerPatch(1, "gate", 0, torch.tensor([4, 7]), old, old + torch.tensor([[0.0, 3.0], [0.0, 1.0]]), "gate")
    down = LayerPatch(1, "down", 1, torch.tensor([4]), torch.tensor([[12.0]]), torch.tensor([[16.0]]))
    other = LayerPatch(2, "other", 1, torch.tensor([4]), torch.zeros(1, 1), torch.zeros(1, 1))
    changes = _relative_changes(Patch((gate, down, other), {}))
    assert changes == {(1, 4): pytest.approx(5 / 13), (1, 7): pytest.approx(0.5), (2, 4): 0.0}


def test_summary_is_one_sentence(report: dict[str, Any]) -> None:
    assert summary(report) == (
        "5 of 160 MLP neurons (3.12 %) of tiny were edited, in layers 2 to 3; attack success on 20 harmful prompts went"
        " from 95.0 % to 5.0 %; refusals of 40 harmless prompts went from 0.0 % to 2.5 %;"
        " perplexity went from 20.00 to 20.10."
    )
    report["evaluation"] = None
    assert "the loss of the safe answers went from 3.00 to 0.0625 nats per token; nothing was evaluated." in summary(
        report
    )


def test_figures_in_words() -> None:
    assert [duration(s) for s in (0.01, 4.25, 59.6, 75, 3725)] == [
        "< 0.1 s",
        "4.2 s",
        "1 min 00 s",
        "1 min 15 s",
        "1 h 02 min",
    ]
    assert [size(n) for n in (None, 5 << 20, 3 << 29)] == ["–", "5 MiB", "1.50 GiB"]
    assert [number(x) for x in (None, 0.0, 0.1, 30.0, -2.0, 12345.6)] == ["–", "0", "0.100", "30.0", "-2.00", "12,346"]


def test_the_page_has_the_intervals_of_rates_and_of_changes(tmp_path: Path, report: dict[str, Any]) -> None:
    report["evaluation"]["before"]["harmful"]["intervals"] = {"asr": {"advbench": [0.764, 0.991]}}
    change = {"before": 0.95, "after": 0.05, "difference": -0.9, "interval": [-1.0, -0.75]}
    report["evaluation"]["difference"] = {
        "harmful": {"n": 20, "asr": {"advbench": change}},
        "benign": None,
        "text": None,
    }
    write_report(tmp_path, report, None)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "19 of 20, 95 %: 76.4–99.1" in page
    assert "−90.0 points [−100.0, −75.0]" in page
