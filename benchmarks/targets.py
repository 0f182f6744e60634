"""Whole jobs on 8B models resident on a GPU, beside plain hooks and dense Adam, against their targets. `make targets`.

    python benchmarks/targets.py [--models Llama-3-8B ...] [--limit 24] [--rounds 3] [--out FILE]

Models of published configurations with random weights in bf16; 128 requests of 512 tokens, hot spots in the upper half,
40 steps of 16 requests, within a limit kept by set_per_process_memory_fraction. A plan takes what room there is, so how
little memory locating can do with is measured by a plan of its own, for 1.5 GB over the weights, in all layers. Then,
without the limit, a few requests traced beside plain hooks at the same micro-batch, with every layer's graph kept and
with none (lean), and steps beside dense masked Adam on the same layers, likewise; results are compared before they are
timed. A first job of a few requests, which isn't timed, compiles the kernels. Figures are written as they are made.
`--device cpu --tiny` tries the script without a GPU; its figures mean nothing.
Jobs within 12 and 8 GiB are `benchmarks/offload.py`'s.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parent))  # Python may have been told not to look beside a script
from offload import FEW, GIB, SHARE, limited, put_back, strongest
from random_models import SIZES, opened, random_sequences
from results_csv import RESULTS, Figures, file_name

from pke_fast.bench.cases import EDIT, STEPPERS, check_equal, check_equal_steps, stepper, trace
from pke_fast.bench.hooks import ScoreMaps
from pke_fast.bench.measuring import in_turns, peak_over_now, timed
from pke_fast.bench.subjects import Subject
from pke_fast.config import PKEConfig
from pke_fast.editing import edit_columns
from pke_fast.errors import PKEError
from pke_fast.memory import is_out_of_memory
from pke_fast.pace import Pace
from pke_fast.plan import Load, Plan
from pke_fast.planner import PREFERRED, Planner
from pke_fast.planning import matmul_rate
from pke_fast.rehearsal import twin_of
from pke_fast.scoring import Scores, score
from pke_fast.stages import Stages
from pke_fast.structure import find_structure
from pke_fast.testing import tiny_model
from pke_fast.workbench import laid_out

STEPS = 4
LITTLE = 1.5e9  # bytes over the weights

AT_MOST = {
    "whole job, s": 60.0,
    "locating in little room, bytes over the weights": LITTLE,
    "tracing, time over hooks'": 0.9,
    "lean tracing, time over hooks'": 1.3,
    "lean tracing, memory over hooks'": 0.1,
    "steps, time over dense Adam's": 0.6,
    "steps, memory over dense Adam's": 0.05,
    "lean steps, time over dense Adam's": 0.6,
    "lean steps, memory over dense Adam's": 0.05,
}
AT_LEAST = {
    "locating, share of the measured matmul rate": 0.45,
    "locating in little room, share of the measured matmul rate": 0.45,
}


def measured(
    on: Subject, config: PKEConfig, limit: float, rounds: int, faults: list[str]
) -> Iterator[dict[str, float]]:
    """One model's figures by name, as they are made; the weights are as before.

    Args:
        faults: gains what differed where it should be equal.
    """
    structure, requests = on.structure, on.requests
    device = structure.device
    job = twin_of(structure.model, structure.dtype), config, Load.of(requests, []), str(device)
    plan = Planner(*job).plan(int(SHARE * limit * GIB))
    lean = Planner(*job, edits=False).plan(int(plan.fixed + SHARE * LITTLE))
    first, end = config.layer_window(len(structure.layers))
    examples = [[(sequence, 1.0)] for sequence in requests]

    def locate(by: Plan, first: int) -> Any:
        return timed(lambda: score(structure, examples, pad_id=0, pace=by.pace(), first=first), device)

    few = replace(on, requests=requests[:FEW])
    with limited(int(limit * GIB), device):
        _warm_up(few, config, plan, lean)
        (found, locating), peak = peak_over_now(lambda: locate(plan, first), str(device))
        (leanly, lean_seconds), lean_peak = peak_over_now(lambda: locate(lean, 0), str(device))
        check_equal(_maps(leanly, first), _maps(found, first), structure.dtype, "locating in little room")
        hot_spots = strongest(found.weight_change * found.activation_path, first, end, config.k)
        stages = Stages(str(device), show=False)

        def edit() -> Any:
            more = {"pad_id": 0, "stage": stages.stage, "pace": plan.pace()}
            return timed(lambda: edit_columns(structure, hot_spots, requests, [], config, **more), device)

        (outcome, editing), edit_peak = peak_over_now(edit, str(device))
    put_back(structure, outcome)
    # The rate is measured with the rows that a CPU prefers: wider by so much, the product is as large as a GPU prefers.
    wider = PREFERRED[device.type] // PREFERRED["cpu"]
    rate = matmul_rate(str(device), structure.dtype, structure.hidden_size, structure.neurons * wider)
    yield {
        "whole job, s": locating + editing,
        "locating, s": locating,
        "editing, s": editing,
        "locating, bytes over the weights": float(peak or 0),
        "editing, bytes over the weights": float(edit_peak or 0),
        "locating in little room, s": lean_seconds,
        "locating in little room, bytes over the weights": float(lean_peak or 0),
        "locating in little room, tokens at once": float(lean.tokens),
        "tokens at once": float(plan.tokens),
        "locating, share of the measured matmul rate": plan.scoring_flops / locating / rate,
        "locating in little room, share of the measured matmul rate": lean.scoring_flops / lean_seconds / rate,
    }
    batch = replace(on, requests=requests[: config.batch_size], locality=[])
    stepping = EDIT.replace(batch_size=config.batch_size, micro_batch_tokens=plan.tokens)
    for lean_or_not, kept in (("", None), ("lean ", 0)):
        for what, whose, prepared in (
            ("tracing", "hooks'", partial(_tracing, few, plan.tokens, kept)),
            ("steps", "dense Adam's", partial(_stepping, batch, hot_spots, stepping, kept)),
        ):
            yield _beside(lean_or_not + what, whose, prepared, rounds, device, faults)


def _warm_up(few: Subject, config: PKEConfig, plan: Plan, lean: Plan) -> None:
    """A few requests are located by both plans, and edited in a step: kernels are compiled before anything is timed."""
    structure, examples = few.structure, [[(sequence, 1.0)] for sequence in few.requests]
    found, _ = (score(structure, examples, pad_id=few.pad_id, pace=by.pace()) for by in (plan, lean))
    first, end = config.layer_window(len(structure.layers))
    hot_spots = strongest(found.weight_change * found.activation_path, first, end, config.k)
    more = {"pad_id": few.pad_id, "stage": Stages(str(structure.device), show=False).stage, "pace": plan.pace()}
    put_back(structure, edit_columns(structure, hot_spots, few.requests, [], config.replace(num_steps=1), **more))


def _tracing(on: Subject, tokens: int, kept: int | None) -> dict[str, Callable[[], Any]]:
    """`kept`: how many layers keep their graph, of ours; None: all."""
    examples = [[(sequence, 1.0)] for sequence in on.requests]

    def ours() -> ScoreMaps:
        return _maps(score(on.structure, examples, pad_id=on.pad_id, pace=Pace(tokens, kept)))

    def theirs() -> ScoreMaps:
        return trace("hooks", on, tokens)

    check_equal(ours(), theirs(), on.structure.dtype, "pke_fast")
    return {"pke_fast": ours, "hooks": theirs}


def _maps(scores: Scores, first: int = 0) -> ScoreMaps:
    return scores.weight_change[first:], scores.activation_path[first:]


def _stepping(
    on: Subject, hot_spots: dict[int, Tensor], config: PKEConfig, kept: int | None
) -> dict[str, Callable[[], Any]]:
    """A run of each is a few steps with their set-up: what is kept from step to step counts. `kept` as for tracing."""
    check_equal_steps(on, hot_spots, config)

    def run(provider: str) -> None:
        with stepper(provider, on, hot_spots, config, kept) as step:
            for number in range(STEPS):
                step(number)

    return {provider: partial(run, provider) for provider in STEPPERS}


def _beside(
    what: str,
    whose: str,
    prepared: Callable[[], Mapping[str, Callable[[], Any]]],
    rounds: int,
    device: torch.device,
    faults: list[str],
) -> dict[str, float]:
    """Ours beside theirs; nothing where the card is too small for theirs, or where the two don't agree."""
    try:
        return _ratios(what, whose, prepared(), rounds, device)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        print(f"{what}: not compared, memory ran out beside {whose}", file=sys.stderr)
    except PKEError as error:
        faults.append(f"{what} beside {whose}: {error}")
        print(f"fault: {faults[-1]}", file=sys.stderr)
    return {}


def _ratios(
    what: str, whose: str, runs: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device
) -> dict[str, float]:
    """Ours over theirs, and both."""
    peaks = {name: peak_over_now(run, str(device))[1] or 0 for name, run in runs.items()}
    times = in_turns(runs, rounds, device)
    ours, theirs = runs
    return {
        f"{what}, time over {whose}": times[ours].median / times[theirs].median,
        f"{what}, memory over {whose}": peaks[ours] / max(1, peaks[theirs]),
        **{f"{what}, s, {name}": spread.median for name, spread in times.items()},
        **{f"{what}, bytes, {name}": float(peaks[name]) for name in runs},
    }


def verdict(name: str, value: float) -> str:
    """Whether a figure meets its target; nothing where it has none."""
    if name in AT_MOST:
        return f"{'met' if value <= AT_MOST[name] else 'NOT MET'}: at most {AT_MOST[name]:g}"
    if name in AT_LEAST:
        return f"{'met' if value >= AT_LEAST[name] else 'NOT MET'}: at least {AT_LEAST[name]:g}"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["Llama-3-8B"], choices=list(SIZES))
    parser.add_argument("--limit", type=float, default=24, metavar="GIB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and a few short requests")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    config = PKEConfig(k=1000, num_steps=40, batch_size=16, window=(0.5, 1.0), projections=("down",), stop_loss=0)
    amount = {"requests": 128, "length": 512}
    if options.tiny:
        options.models, amount = ["tiny"], {"requests": 8, "length": 48}
        config = config.replace(k=12, num_steps=2, batch_size=4, micro_batch_tokens=96)
    figures = Figures(options.out or Path("unnamed"), device)
    today = datetime.date.today().isoformat()
    figures.path = options.out or RESULTS / f"targets-{file_name(figures.where['hardware'])}-{today}.csv"
    faults: list[str] = []
    for name in options.models:
        about = {"suite": "targets", "provider": "pke_fast", "mode": f"within {options.limit:g} GiB", "x_name": "model"}
        about |= {"x": name, "model": name, "dtype": "bf16", "device": device.type}
        with _opened(name, device, **amount) as on:
            for found in measured(on, config, options.limit, options.rounds, faults):
                figures.add([{**about, "metric": m, "median": v, "low": v, "high": v} for m, v in found.items()])
                for metric, value in found.items():
                    print(f"{name}, {metric}: {value:.4g}  {verdict(metric, value)}".rstrip(), flush=True)
    print(f"written to {figures.path}; {len(faults)} faults")
    return 1 if faults else 0


@contextmanager
def _opened(name: str, device: torch.device, requests: int, length: int) -> Iterator[Subject]:
    if name in SIZES:
        with opened(name, requests=requests, length=length, dtype="bf16", device=str(device)) as on:
            yield on
        return
    model = tiny_model("llama", dtype="bf16").to(device)
    with laid_out(model):
        structure = find_structure(model)
        yield Subject(structure, random_sequences(len(structure.head.weight), requests, length), [], 0)


if __name__ == "__main__":
    sys.exit(main())
