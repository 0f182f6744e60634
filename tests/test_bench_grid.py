"""The grid on a tiny model: whole cases in the file, none measured twice; table and plots are the file's."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import grid
import grid_cases
import pytest
import report
import torch
from random_models import SIZES, random_sequences, weights_bytes
from results_csv import LONG, ROOT, Figures, read_rows

from pke_fast.bench import cases
from pke_fast.errors import InputError, PKEError
from pke_fast.testing import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A grid that has run in this process, its file, and how many cases were measured."""
    folder = tmp_path_factory.mktemp("grid")
    tiny_model("llama").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    called: list[str] = []

    def here(function: str, *, tight: bool, beside: Path, **arguments):
        called.append(function)
        return getattr(grid_cases, function.split(":")[1])(**arguments)

    path = folder / "tools.csv"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(grid, "in_fresh_process", here)
        patched.setattr(grid, "TRACERS", {name: grid.TRACERS[name] for name in ("pke_fast", "hooks")})

        def run() -> int:
            figures = Figures(path, torch.device("cpu"))
            made = grid.Grid(figures, str(folder / "model"), "fp32", "cpu", 2, 2**30, smallest=True)
            made.out = lambda _text: None
            before = len(called)
            for suite in (grid.micro_batch, grid.tokens, grid.requests, grid.step, grid.whole):
                suite(made)
            return len(called) - before

        counts = [run(), run()]
        cut = path.read_text().splitlines(keepends=True)
        shorter = [line for line in cut if ",peak_bytes,layers_from" not in line]
        path.write_text("".join(shorter))
        counts.append(run())
    return path, counts


def test_a_finished_case_is_not_measured_again(measured) -> None:
    _, counts = measured
    assert counts[0] > 10
    assert counts[1:] == [0, 2]  # the second time nothing; then the two that were taken out


def test_rows_are_long_form(measured) -> None:
    path, _ = measured
    rows = read_rows(path)
    assert list(rows[0]) == list(LONG)
    assert {row["suite"] for row in rows} == {"micro-batch", "tokens", "requests", "step", "whole"}
    for row in rows:
        assert float(row["low"]) <= float(row["median"]) <= float(row["high"])
        assert math.isfinite(float(row["median"]))
        assert row["torch"] == torch.__version__
    by_metric = {row["metric"]: float(row["median"]) for row in rows if row["suite"] == "step"}
    assert set(by_metric) == {"seconds", "peak_bytes"}
    seconds, speed = (
        next(float(r["median"]) for r in rows if (r["suite"], r["metric"]) == ("tokens", metric))
        for metric in ("seconds", "tokens_per_second")
    )
    assert seconds * speed == pytest.approx(128, rel=1e-3)


def test_table_and_plots_come_from_the_file(measured) -> None:
    path, _ = measured
    rows = read_rows(path)
    made = report.table(rows)
    lines = [line.strip("| ").split(" | ") for line in made.splitlines() if line.startswith("| ")][1:]
    others = {line[0]: {other[2].split(":")[0] for other in lines if other[0] == line[0]} for line in lines}
    assert others["trace and score 128 tokens, the same micro-batch"] == {"hooks"}
    assert others["an edit step, hot spots in the last tenth, 128 tokens at once"] == {"dense masked Adam"}
    assert others["locate and edit to a held-out loss of 0.1"] == {"DINM", "dense masked Adam", "LoRA"}
    assert "LoRA: not reached" in made
    plots = report.plots(rows, path.parent, "tiny")
    assert [plot.name for plot in plots] == ["tiny-seconds.png", "tiny-peak-bytes.png", "tiny-front.png"]
    assert all(plot.read_bytes().startswith(b"\x89PNG") for plot in plots)


def row(
    provider: str, metric: str, median: object, *, suite: str = "whole", mode: str = "lr 0.1", at: str = ""
) -> dict[str, str]:
    made = dict.fromkeys(LONG, "")
    x = {"whole": ("target", "0.1"), "step": ("layers_from", "0.9"), "micro-batch": ("micro_batch_tokens", at),
         "requests": ("requests", at), "size": ("weights_bytes", at)}[suite]  # fmt: skip
    return {**made, "suite": suite, "provider": provider, "metric": metric, "mode": mode, "median": str(median),
            "x_name": x[0], "x": x[1]}  # fmt: skip


def test_ratios_and_the_best_learning_rate() -> None:
    rows = [
        row("pke_fast", "seconds", 4.0),
        row("pke_fast", "seconds", 3.0, mode="lr 0.2"),
        row("LoRA", "seconds", 12.0),
        row("LoRA", "seconds", 13.0, mode="lr 0.2"),
        row("DINM", "steps", 60),
        row("pke_fast", "seconds", 1.0, suite="step", mode="last tenth"),
        row("dense masked Adam", "seconds", 4.0, suite="step", mode="last tenth"),
        row("pke_fast", "peak_bytes", 2**20, suite="step", mode="last tenth"),
        row("dense masked Adam", "peak_bytes", 2**24, suite="step", mode="last tenth"),
    ]
    lines = report.table(rows).splitlines()[2:5]
    step, whole = "an edit step, hot spots in the last tenth", "locate and edit to a held-out loss of 0.1"
    assert lines == [
        f"| {step} | 1 s, 1 MiB | dense masked Adam: 4 s, 16 MiB | 0.25, 0.06 |",
        f"| {whole} | lr 0.2, 3 s | LoRA: lr 0.1, 12 s | 0.25 |",
        f"| {whole} | lr 0.2, 3 s | DINM: not reached |  |",
    ]


def test_the_largest_size_that_all_have_and_every_model() -> None:
    rows = [row("pke_fast", "seconds", 3.0, suite="requests", mode="prompts", at=size) for size in ("16", "512", "128")]
    rows += [row("hooks", "seconds", 4.0, suite="requests", mode="prompts", at=size) for size in ("128", "16")]
    for size, model in (("2", "small"), ("7", "large")):
        for provider, seconds in (("pke_fast", 1.0), ("hooks", 2.0)):
            rows.append(row(provider, "seconds", seconds, suite="size", mode="9 tokens", at=size) | {"model": model})
    assert report.table(rows).splitlines()[2:5] == [
        "| trace and score 128 requests, prompts | 3 s | hooks: 4 s | 0.75 |",
        "| trace and score 9 tokens, small with random weights | 1 s | hooks: 2 s | 0.50 |",
        "| trace and score 9 tokens, large with random weights | 1 s | hooks: 2 s | 0.50 |",
    ]


def test_pke_fast_in_half_and_in_a_fifth_of_the_memory_of_hooks() -> None:
    figures = {("hooks", "512"): (9.0, 8), ("hooks", "1024"): (8.0, 16), ("pke_fast", "128"): (9.0, 3),
               ("pke_fast", "512"): (7.0, 6), ("pke_fast", "1024"): (6.0, 8),
               ("pke_fast", "2048"): (4.0, 12)}  # fmt: skip
    rows = []
    for (provider, size), (seconds, mib) in figures.items():
        where = {"suite": "micro-batch", "mode": "4096 tokens", "at": size}
        rows += [row(provider, "seconds", seconds, **where), row(provider, "peak_bytes", mib * 2**20, **where)]
    half, fifth = (f"trace and score 4096 tokens, pke_fast in {s} of hooks' memory" for s in ("half", "a fifth"))
    assert report.table(rows).splitlines()[2:4] == [
        f"| {half} | 1,024 at once, 6 s, 8 MiB | hooks: 1,024 at once, 8 s, 16 MiB | 0.75, 0.50 |",
        f"| {fifth} | 128 at once, 9 s, 3 MiB | hooks: 1,024 at once, 8 s, 16 MiB | 1.12, 0.19 |",
    ]


def test_the_readme_has_the_table_of_the_newest_file() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert report.with_table(readme, report.table(read_rows(report.newest()))) == readme


def test_without_markers_or_figures_nothing_is_made() -> None:
    with pytest.raises(InputError, match="no place for the table"):
        report.with_table("text", "table")
    with pytest.raises(InputError, match="no figures"):
        report.table([])


def test_tokens_without_a_chosen_micro_batch(tmp_path, monkeypatch) -> None:
    empty = grid.Grid(Figures(tmp_path / "none.csv", torch.device("cpu")), "m", "fp32", "cpu", 1, 2**30, True)
    said, modes = [], []
    empty.out = said.append
    monkeypatch.setattr(grid, "trace_cases", lambda _grid, _suite, mode, _name, xs: modes.extend(mode for _ in xs))
    grid.tokens(empty)
    assert modes == ["the same micro-batch"]
    assert "micro-batch wasn't run" in said[0]


def test_only_the_asked_sizes_and_tools_are_measured(tmp_path, monkeypatch) -> None:
    on = grid.Grid(Figures(tmp_path / "none.csv", torch.device("cpu")), "m", "fp32", "cpu", 1, 2**30, False)
    on.at, on.tools = (16, 512, 7), ("pke_fast",)
    asked = []
    monkeypatch.setattr(grid, "trace_cases", lambda _grid, _suite, _mode, _name, xs: asked.extend(xs))
    grid.requests(on)
    assert [(x, list(tools)) for x, tools, _ in asked] == [(16, ["pke_fast"]), (512, ["pke_fast"])]


def test_what_would_exceed_the_limit_takes_no_part(tmp_path, monkeypatch) -> None:
    asked = []

    def fresh(function: str, **arguments):
        if function.endswith("trace_peak"):
            asked.append((arguments["provider"], arguments["requests"] * arguments["length"]))
            return arguments["requests"] * arguments["length"] * (10 if arguments["provider"] == "hooks" else 1)
        times = {name: [1.0, 1.0, 1.0] for name in arguments["micro_batches"]}
        return {"times": times, "tokens": 1}

    monkeypatch.setattr(grid, "in_fresh_process", fresh)
    on = grid.Grid(Figures(tmp_path / "a.csv", torch.device("cpu")), "m", "fp32", "cpu", 1, 4000, False)
    said = []
    on.out = said.append
    both = {"pke_fast": 10**6, "hooks": 10**6}
    grid.trace_cases(on, "tokens", "m", "tokens", iter((x, both, grid.drawn(x)) for x in (128, 256, 512, 1024)))
    assert asked == [(p, x) for x in (128, 256) for p in both] + [("pke_fast", 512), ("pke_fast", 1024)]
    assert sum("left out" in line for line in said) == 2


@pytest.fixture
def checkpoint(tmp_path) -> str:
    tiny_model("llama").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    return str(tmp_path)


def test_scores_are_compared_with_another_tools_or_with_none(checkpoint, monkeypatch) -> None:
    on = {"model": checkpoint, "requests": 2, "length": 16, "device": "cpu", "dtype": "fp32"}

    def apart(*tools: str) -> dict[str, float | None]:
        return grid_cases.trace_seconds(dict.fromkeys(tools, 64), 1, **on)["apart"]

    assert apart("pke_fast") == {"pke_fast": None}
    assert [value is None for value in apart("pke_fast", "hooks, few logits", "hooks").values()] == [False, False, True]
    without = apart("pke_fast", "hooks, few logits")
    assert without["hooks, few logits"] is None
    assert 0 <= without["pke_fast"] < 1e-3

    def other(subject, micro_batch):
        return tuple(2 * scores for scores in cases.trace("hooks", subject, micro_batch))

    by_other = SimpleNamespace(load=lambda: SimpleNamespace(trace=other))
    monkeypatch.setattr(grid_cases, "TRACERS", {**grid_cases.TRACERS, "pyvene": by_other})
    with pytest.raises(PKEError, match="the scores of pke_fast are others"):
        apart("pke_fast", "pyvene")


def test_sizes_count_their_weights() -> None:
    billions = {name: weights_bytes(name, "bf16") / 2e9 for name in SIZES}
    wanted = {"Llama-3.2-1B": 1.24, "Llama-3.2-3B": 3.21, "Llama-3-8B": 8.03, "Llama-2-7B": 6.74, "Mistral-7B": 7.24}
    assert {name: round(billions[name], 2) for name in wanted} == wanted
    first, second = random_sequences(100, 2, 64)
    assert (len(first.ids), first.prompt_length, first != second) == (64, 48, True)
