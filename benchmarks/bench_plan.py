"""What a plan foretells against what the job takes: peak memory of an edit of the embedded model, a process a case.

The peak in all has to agree within 15 %, and to stay within the budget; what it is made of is noted.
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

CASES = {
    "as it comes": [],
    "1,024 tokens at once": ["--set", "micro_batch_tokens=1024"],
    "a tight budget": ["--memory-budget", "1250MiB"],
    "256 requests and pairs": ["--set", "num_steps=2"],
}
FEW, MANY = 32, 256  # requests, and pairs
WITHIN = 0.15


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
    given = ["--requests", requests, "--locality", benign, "--out", files / "out"]
    command = [sys.executable, "-m", "pke_fast", "edit", "--model", "smollm2", "--force", "--json", *given]
    command += ["--set", "num_steps=3", *CASES[case]]
    ours = ("MALLOC_", "OMP_")  # the allocator as users have it: what it keeps of freed memory counts
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}

    def run() -> dict[str, Any]:
        done = subprocess.run([str(part) for part in command], env=environment, check=True, capture_output=True)
        plan: dict[str, Any] = json.loads(done.stdout)["plan"]
        return plan

    plan = benchmark.pedantic(run, rounds=1)
    sizes, measured = plan["bytes"], plan["measured"]
    peak = measured["peak"]
    assert abs(peak / sizes["peak"] - 1) <= WITHIN
    assert plan["budget"] is None or peak <= plan["budget"]
    for name in ("locating", "editing"):
        benchmark.extra_info[f"{name}: foretold MiB"] = sizes[name] / 2**20
        benchmark.extra_info[f"{name}: measured MiB"] = measured[name] / 2**20
    benchmark.extra_info["peak in all: foretold MiB"] = sizes["peak"] / 2**20
    benchmark.extra_info["peak in all: measured MiB"] = peak / 2**20
