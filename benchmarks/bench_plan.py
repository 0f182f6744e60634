"""What a plan foretells against what the job takes: memory and time of an edit of the embedded model, a process a case.

The peak in all has to agree within 15 %, and to stay within the budget. Most of it is Python and the weights, so the
peaks of locating and of editing over those are looked at too: glibc holds more or less of what is freed, so they were
0.55 to 1.03 of what is foretold (docs/measured.md), and may be 0.4 to 1.15. The time is noted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pke_fast import shipped
from pke_fast.editing import STEPS
from pke_fast.locating import SCORING

CASES = {
    "as it comes": [],
    "1,024 tokens at once": ["--set", "micro_batch_tokens=1024"],
    "a tight budget": ["--memory-budget", "1250MiB"],
    "256 requests and pairs": ["--set", "num_steps=2"],
}
FEW, MANY = 32, 256  # requests, and pairs
WITHIN = 0.15
LEAST, MOST = 0.4, 1.15  # of what is foretold over process and weights
TIMED = {"locating": (SCORING, "Scoring the benign pairs"), "editing": ("Running the layers below, once", STEPS)}


@pytest.fixture(scope="module")
def files(tmp_path_factory: Any) -> Path:
    folder: Path = tmp_path_factory.mktemp("plan")
    asked = [
        {"prompt": r.prompt, "target_new": "I can't help with that.", "ground_truth": "Sure"} for r in shipped.harmful()
    ]
    pairs = [{"prompt": prompt, "answer": "Here is an answer to that:"} for prompt in shipped.benign()]
    for name, rows in (("requests", asked), ("benign", pairs)):
        for count in (FEW, MANY):
            (folder / f"{name}-{count}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:count]))
    return folder


@pytest.mark.benchmark(group="a plan's memory and the job's")
@pytest.mark.parametrize("case", CASES)
def bench_plan_agrees_with_the_job(benchmark: Any, case: str, files: Path) -> None:
    count = MANY if case.startswith(str(MANY)) else FEW
    requests, benign = (files / f"{name}-{count}.jsonl" for name in ("requests", "benign"))
    job = ["--model", "smollm2", "--requests", requests, "--locality", benign, "--json"]
    job += ["--set", "num_steps=3", *CASES[case]]
    ours = ("MALLOC_", "OMP_")  # the allocator as users have it: what it keeps of freed memory counts
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}

    def run(command: str, *more: object) -> dict[str, Any]:
        words = [sys.executable, "-m", "pke_fast", command, *map(str, [*job, *more])]
        done = subprocess.run(words, env=environment, check=True, capture_output=True)
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    report = benchmark.pedantic(run, args=("edit", "--force", "--out", files / "out"), rounds=1)
    plan = report["plan"]
    sizes, measured = plan["bytes"], plan["measured"]
    peak = measured["peak"]
    assert abs(peak / sizes["peak"] - 1) <= WITHIN
    assert plan["budget"] is None or peak <= plan["budget"]
    for name in ("locating", "editing"):
        benchmark.extra_info[f"{name}: foretold MiB"] = sizes[name] / 2**20
        benchmark.extra_info[f"{name}: measured MiB"] = measured[name] / 2**20
        benchmark.extra_info[f"{name}: measured of foretold"] = measured[name] / sizes[name]
        assert LEAST <= measured[name] / sizes[name] <= MOST, name
    foretold, taken = run("plan")["seconds"], {stage["name"]: stage["seconds"] for stage in report["stages"]}
    for name, stages in TIMED.items():
        benchmark.extra_info[f"{name}: foretold s"] = foretold[name]
        benchmark.extra_info[f"{name}: measured s"] = sum(taken[stage] for stage in stages)
    benchmark.extra_info["peak in all: foretold MiB"] = sizes["peak"] / 2**20
    benchmark.extra_info["peak in all: measured MiB"] = peak / 2**20
