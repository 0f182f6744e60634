"""benchmarks/gpu_kernels.py, tried on tiny shapes without a GPU, so that it works where there is one."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pke_fast.ops import OPS

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "gpu_kernels.py"
COLUMNS = [
    *("op", "provider", "shape", "dtype", "y20", "y50", "y80", "bytes", "flops", "share", "peak_extra_bytes"),
    *("gpu", "driver", "torch", "triton", "cuda", "pke_fast", "commit"),
]


def run(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *(str(argument) for argument in arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict[str, str]]]:
    path = tmp_path_factory.mktemp("results") / "folder" / "tiny.csv"
    done = run("--device", "cpu", "--tiny", "--rounds", 3, "--without", "compile", "--out", path)
    assert done.returncode == 0, done.stdout + done.stderr
    with path.open(encoding="utf-8", newline="") as file:
        return done.stdout, list(csv.DictReader(file))


def test_a_line_for_every_op_and_provider(tried) -> None:
    _, rows = tried
    assert list(rows[0]) == COLUMNS
    providers: dict[str, set[str]] = {}
    for row in rows:
        providers.setdefault(row["op"], set()).add(row["provider"])
    assert set(providers) == {"copy", "matmul", *OPS}
    assert all("ours" in of for op, of in providers.items() if op in OPS)
    assert {"ours unscored", "eager", "eager unscored"} <= providers["glu_score_bwd"]
    assert {"topk sorted", "topk unsorted"} <= providers["select_hotspots"]


def test_figures_fit_together(tried) -> None:
    _, rows = tried
    copy, product = (next(row for row in rows if row["op"] == op) for op in ("copy", "matmul"))
    bytes_a_ms = int(copy["bytes"]) / float(copy["y50"])
    flops_a_ms = int(product["flops"]) / float(product["y50"])
    for row in rows:
        assert 0 < float(row["y20"]) <= float(row["y50"]) <= float(row["y80"])
        floor = max(int(row["bytes"]) / bytes_a_ms, int(row["flops"]) / flops_a_ms)
        assert row["op"] == "matmul" or float(row["share"]) == pytest.approx(floor / float(row["y50"]), rel=1e-2)
        assert (row["peak_extra_bytes"], row["driver"], row["gpu"][:4]) == ("", "", "none")
        assert row["torch"] == torch.__version__


def test_least_bytes_and_products(tried) -> None:
    _, rows = tried
    of = {(row["op"], row["shape"]): (int(row["bytes"]), int(row["flops"]), row["dtype"]) for row in rows}
    tokens, neurons, hidden, requests, chosen = 64, 96, 64, 4, 10
    glu = f"T={tokens} D={neurons} R={requests}"
    assert of["glu_score_fwd", glu] == (3 * tokens * neurons * 2 + 2 * requests * neurons * 4, 0, "bf16")
    assert of["glu_score_bwd", glu] == (5 * tokens * neurons * 2 + requests * neurons * 4, 0, "bf16")
    norm = of["column_grad_norm", f"T=2x8 d={hidden} D={neurons}"]
    assert norm == (2 * (8 * 160 * 2 + neurons * 4), 2 * 2 * 8 * 8 * 160, "bf16")
    update, *_ = of["sparse_column_update", f"n={chosen} of D={neurons} d={hidden}"]
    sectors = update - 28 * chosen * hidden  # 28 bytes of state an element, and 32 a touched sector of the weight
    assert sectors % (32 * hidden) == 0
    assert chosen * 2 / 32 <= sectors / (32 * hidden) <= chosen
    assert of["edit_loss", "KL N=8 V=320 d=64"][1] == 3 * 2 * 8 * 320 * 64


def test_targets_are_named_but_not_judged_without_a_gpu(tried) -> None:
    printed, _ = tried
    targets = printed.split("targets\n")[1].splitlines()
    assert "edit_loss  CE N=8 V=320 d=64  extra memory beside torch's: not measured (at most 0.125)" in targets
    assert "MISSED" not in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = run()
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: no GPU found")


def test_a_case_that_cannot_run_costs_its_own_figures_alone(tmp_path: Path) -> None:
    """And the file of before stays until there is a new one."""
    program = """
import pathlib, sys
sys.path.append(sys.argv.pop(1))
import gpu_kernels
path, measured = pathlib.Path(sys.argv[-1]), gpu_kernels.measured
def failing(case, *more):
    assert path.read_text() == "of before"
    if case.op == "write_columns":
        raise RuntimeError("no room")
    return measured(case, *more)
gpu_kernels.measured = failing
sys.exit(gpu_kernels.main())
"""
    path = tmp_path / "figures.csv"
    path.write_text("of before")
    options = ["--device", "cpu", "--tiny", "--rounds", "2", "--without", "compile"]
    command = [sys.executable, "-c", program, str(SCRIPT.parent), *options]
    command += ["--ops", "write_columns", "sparse_column_update", "--out", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "no room" in done.stdout
    with path.open(encoding="utf-8", newline="") as file:
        assert {row["op"] for row in csv.DictReader(file)} == {"copy", "matmul", "sparse_column_update"}
    assert [file.name for file in tmp_path.iterdir()] == ["figures.csv"]


def test_variants_take_turns_and_short_ones_are_graphs() -> None:
    program = """
import sys
sys.path.append(sys.argv[1])
from gpu_timing import CpuTimer, quantiles, time_all

class Counting(CpuTimer):  # a call takes 0.06 ms, in a graph 0.03
    graphs = set()
    def sample(self, run):
        before = len(calls)
        run()
        ms = (len(calls) - before) * (0.03 if run in self.graphs else 0.06)
        return lambda: ms
    def as_graph(self, run, warm_up):
        warm_up()
        replay = lambda: run()
        self.graphs.add(replay)
        return replay

calls = []
runs = {name: lambda x, name=name: calls.append(name + x) for name in "abc"}
times = time_all(Counting(), runs, [("1",), ("2",)], 3, waits=("a",))
print(" ".join(calls[-18:]))
print({name: (round(t.y20, 3), round(t.y50, 3)) for name, t in times.items()})
print(quantiles([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]))
"""
    done = subprocess.run([sys.executable, "-c", program, str(SCRIPT.parent)], capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        "a1 a2 b1 b2 c1 c2 b1 b2 c1 c2 a1 a2 c1 c2 a1 a2 b1 b2",
        "{'a': (0.06, 0.06), 'b': (0.03, 0.03), 'c': (0.03, 0.03)}",
        "Times(y20=2.0, y50=3.5, y80=5.0)",
    ], done.stderr


def test_verdicts() -> None:
    program = """
import sys
sys.path.append(sys.argv[1])
from gpu_cases import Result, Target, faster_than, share_of_the_ceiling
from gpu_cases_scoring import scoring_adds
of = {"ours": Result(1, 2.0, 3, 0.86, 10), "topk": Result(1, 5.0, 9, 0.1, 99), "other": Result(1, 1.0, 1, 1, 0)}
print(share_of_the_ceiling(0.85).verdict(of))
print(share_of_the_ceiling(0.87).verdict(of))
print(share_of_the_ceiling(0.87).verdict(of, judged=False))
print(faster_than("times topk's", ("topk", "absent"), 3.0).verdict(of))
print(faster_than("times absent's", ("absent",), 3.0).verdict(of))
of["eager unscored"] = Result(1, 1.96, 3, 0.9, 0)
print(Target("scoring adds", scoring_adds, most=0.05, percent=True).verdict(of))
"""
    done = subprocess.run([sys.executable, "-c", program, str(SCRIPT.parent)], capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        "share of the ceiling: 86.0 % (at least 85.0 %): met",
        "share of the ceiling: 86.0 % (at least 87.0 %): MISSED",
        "share of the ceiling: not measured (at least 87.0 %)",
        "times topk's: 2.5 (at least 3): MISSED",
        "times absent's: not measured (at least 3)",
        "scoring adds: 2.0 % (at most 5.0 %): met",
    ], done.stderr
