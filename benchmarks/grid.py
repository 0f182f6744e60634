"""The long grid: every tool against tokens, requests, micro-batch and model size; steps; whole jobs. Resumable.

    python benchmarks/grid.py [--suites tokens step ...] [--model smollm2] [--device cpu] [--dtype fp32] [--out FILE]

Every case runs in a process of its own, time and memory apart; results are compared before they are timed. A case that
is in the file is not measured again, so an interrupted run goes on where it was; what would not fit into
--memory-limit, by the last smaller case, is left out and named. `--smallest` tries each suite at its least size.
`benchmarks/report.py` makes the table of README.md and the plots from the file.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parent))  # Python may have been told not to look beside a script
from providers import EDITORS, TRACERS
from random_models import SIZES, weights_bytes
from results_csv import RESULTS, Figures, file_name, machine

from pke_fast.bench.cases import STEPPERS, WINDOWS
from pke_fast.bench.measuring import in_fresh_process
from pke_fast.budget import parse_bytes
from pke_fast.errors import PKEError

HERE = Path(__file__).resolve().parent
SUITES = ("micro-batch", "tokens", "requests", "size", "step", "whole")
SAME = 1024  # tokens in flight where all have the same micro-batch
LENGTH = 512  # tokens of a sequence at most, where sequences are drawn
WORK = 4096  # tokens on which a micro-batch is chosen
MICRO_BATCHES = (512, 1024, 2048, 4096)
STEP_PACES = ((128, 1.0, ""), (2048, 1.0, ""), (2048, 1 / 3, ", a third of the graph kept"))
TOKENS = tuple(2**i for i in range(7, 16))
REQUESTS = tuple(2**i for i in range(10))
TARGET, MOST_KL, MOST_STEPS = 0.1, 0.5, 60
WHOLE_SIZES = (512, 2048)  # tokens in flight of whole jobs, beside SAME
WHOLE_SCORED = 16  # requests, and pairs, that locating is given in the end, of 64 each
K = 1000


@dataclass
class Grid:
    """What all suites need; `out` says in a line what is done or left out."""

    figures: Figures
    model: str
    dtype: str
    device: str
    rounds: int
    limit: int
    smallest: bool
    at: tuple[int, ...] = ()
    tools: tuple[str, ...] = tuple(TRACERS | EDITORS)
    models: tuple[str, ...] = tuple(SIZES)

    def out(self, text: str) -> None:
        print(text, flush=True)

    def sizes(self, values: tuple[int, ...]) -> tuple[int, ...]:
        """Those of a suite's values that are asked for."""
        asked = tuple(value for value in values if not self.at or value in self.at)
        return asked[:1] if self.smallest else asked

    def key(self, suite: str, provider: str, mode: str, metric: str, x_name: str, x: Any) -> dict[str, Any]:
        on = {"model": self.model, "dtype": self.dtype, "device": self.device}
        return {"suite": suite, "provider": provider, "mode": mode, "metric": metric, "x_name": x_name, "x": x, **on}

    def add(self, at: dict[str, Any], metrics: dict[str, tuple[Any, Any, Any]]) -> None:
        """One case's rows: median, low and high by metric."""
        tool = (TRACERS | EDITORS).get(at["provider"])
        rows = []
        for metric, (median, low, high) in metrics.items():
            rows.append({**at, "metric": metric, "median": median, "low": low, "high": high})
            rows[-1]["provider_version"] = tool.version if tool else ""
        self.figures.add(rows)
        shown = ", ".join(f"{metric} {float(values[0]):.4g}" for metric, values in metrics.items())
        self.out(f"{at['suite']}, {at['mode']}, {at['x_name']} {at['x']}, {at['provider']}: {shown}")

    def fresh(self, function: str, *, tight: bool, **arguments: Any) -> Any:
        on = {"model": self.model, "dtype": self.dtype, "device": self.device}
        return in_fresh_process(f"grid_cases:{function}", beside=HERE, tight=tight, **{**on, **arguments})

    def add_peak(self, at: dict[str, Any], function: str, **arguments: Any) -> None:
        """Measures a case's peak memory, where the file has none."""
        if self.figures.has(**at):
            return
        peak = self.fresh(function, tight=True, provider=at["provider"], **arguments)
        if peak is None:
            raise PKEError("peak memory can't be told on this system", do="run the grid on Linux, or on a GPU")
        self.add(at, {"peak_bytes": (peak, peak, peak)})

    @property
    def tracers(self) -> list[str]:
        return [name for name, provider in TRACERS.items() if not provider.missing and name in self.tools]


def trace_cases(
    grid: Grid, suite: str, mode: str, x_name: str, xs: Iterator[tuple[int, dict[str, int], dict[str, int]]]
) -> None:
    """Tracing at growing sizes: (x, micro-batch by provider, requests and length) each.

    Memory first: who would exceed the limit, going by the last smaller case, takes no part from then on.
    """
    over: dict[str, tuple[int, int]] = {}  # tokens in flight and their peak, by provider
    for x, micro_batches, subject in xs:
        taking_part = {}
        for provider, tokens in micro_batches.items():
            in_flight = min(tokens, in_all(subject))
            before = over.get(provider)
            if before and before[1] * in_flight / before[0] > grid.limit:
                grid.out(f"{suite}, {mode}, {x_name} {x}, {provider}: left out, it would exceed the memory limit")
                continue
            taking_part[provider] = tokens
            at = grid.key(suite, provider, mode, "peak_bytes", x_name, x)
            grid.add_peak(at, "trace_peak", micro_batch=tokens, **subject)
            over[provider] = (in_flight, int(figure(grid, at)))
        if all(grid.figures.has(**grid.key(suite, p, mode, "seconds", x_name, x)) for p in taking_part):
            continue
        rounds = grid.rounds if in_all(subject) <= WORK else 1  # what takes minutes varies less
        found = grid.fresh("trace_seconds", tight=False, micro_batches=taking_part, rounds=rounds, **subject)
        for provider, (median, low, high) in found["times"].items():
            speed = tuple(found["tokens"] / seconds for seconds in (median, high, low))
            at = grid.key(suite, provider, mode, "seconds", x_name, x)
            grid.add(at, {"seconds": (median, low, high), "tokens_per_second": speed})


def in_all(subject: dict[str, int]) -> int:
    """Tokens of a case, about: the shipped prompts, which have no length of their own here, have some 64."""
    return max(subject["length"], 64) * subject["requests"]


def figure(grid: Grid, at: dict[str, Any]) -> float:
    """What the file has for a case."""
    return float(next(row["median"] for row in grid.figures.rows() if all(row[name] == str(at[name]) for name in at)))


def drawn(tokens: int) -> dict[str, int]:
    """So many tokens as sequences of at most LENGTH."""
    length = min(LENGTH, tokens)
    return {"requests": tokens // length, "length": length}


def micro_batch(grid: Grid) -> None:
    work = min(WORK, 2 * MICRO_BATCHES[0]) if grid.smallest else WORK
    sizes = grid.sizes(MICRO_BATCHES)
    trace_cases(
        grid, "micro-batch", f"{work} tokens", "micro_batch_tokens",
        ((size, dict.fromkeys(grid.tracers, size), drawn(work)) for size in sizes),
    )  # fmt: skip


def best(grid: Grid) -> dict[str, int]:
    """Each provider's fastest micro-batch among those of the suite that stay within the memory limit."""
    chosen: dict[str, tuple[float, int]] = {}
    fits = {
        (row["provider"], row["x"])
        for row in grid.figures.rows()
        if row["suite"] == "micro-batch" and row["metric"] == "peak_bytes" and float(row["median"]) <= grid.limit
    }
    for row in grid.figures.rows():
        if row["suite"] == "micro-batch" and row["metric"] == "seconds" and (row["provider"], row["x"]) in fits:
            candidate = (float(row["median"]), int(row["x"]))
            chosen[row["provider"]] = min(chosen.get(row["provider"], candidate), candidate)
    return {provider: size for provider, (_, size) in chosen.items() if provider in grid.tracers}


def tokens(grid: Grid) -> None:
    modes = {"the same micro-batch": dict.fromkeys(grid.tracers, SAME), "its best micro-batch": best(grid)}
    for mode, sizes in modes.items():
        if not sizes:
            grid.out(f"tokens, {mode}: left out, the suite micro-batch wasn't run into this file")
        trace_cases(grid, "tokens", mode, "tokens", ((x, sizes, drawn(x)) for x in grid.sizes(TOKENS) if sizes))


def requests(grid: Grid) -> None:
    sizes = dict.fromkeys((name for name in ("pke_fast", "hooks") if name in grid.tracers), SAME)
    cases = ((x, sizes, {"requests": x, "length": 0}) for x in grid.sizes(REQUESTS))
    trace_cases(grid, "requests", "the shipped prompts", "requests", cases)


def size(grid: Grid) -> None:
    """Random weights at real sizes, the smallest first; those that don't fit are left out."""
    for name in sorted(grid.models, key=lambda name: weights_bytes(name, grid.dtype)):
        if weights_bytes(name, grid.dtype) > grid.limit or grid.smallest:
            grid.out(f"size, {name}: left out, its weights exceed the memory limit")
            continue
        on = replace(grid, model=name, rounds=1)
        at_most = dict.fromkeys((name for name in ("pke_fast", "hooks") if name in grid.tracers), LENGTH)
        weights = weights_bytes(name, grid.dtype)
        trace_cases(on, "size", f"{LENGTH} tokens", "weights_bytes", iter([(weights, at_most, drawn(LENGTH))]))


def step(grid: Grid) -> None:
    windows = dict(list(WINDOWS.items())[-1:]) if grid.smallest else WINDOWS
    for window, share in windows.items():
        for tokens, kept, words in STEP_PACES[: 1 if grid.smallest else None]:
            step_cases(grid, f"{window}, {tokens:,} tokens at once{words}", share, tokens, kept)


def step_cases(grid: Grid, mode: str, share: float, micro_batch: int, kept: float) -> None:
    """An edit step by each; hot spots from a share of the depth on, of which layers ours keeps the graph of a share."""
    k = K if not grid.smallest else 20
    where = {"requests": 16, "locality": 16, "share": share, "k": k, "micro_batch": micro_batch, "kept": kept}
    done = {p: grid.key("step", p, mode, "seconds", "layers_from", share) for p in STEPPERS}
    if not all(grid.figures.has(**at) for at in done.values()):
        times = grid.fresh("step_seconds", tight=False, rounds=grid.rounds, **where)
        for provider, at in done.items():
            grid.add(at, {"seconds": tuple(times[provider])})
    for provider in STEPPERS:
        grid.add_peak(grid.key("step", provider, mode, "peak_bytes", "layers_from", share), "step_peak", **where)


def whole(grid: Grid) -> None:
    """Each tool at each learning rate of its grid and one micro-batch; at the best of them, at other micro-batches, and
    locating by fewer requests and pairs.

    The curves are kept, so that another target can be asked later.
    """
    for provider, tool in EDITORS.items():
        if provider not in grid.tools:
            continue
        rates = tool.load().LRS[: 1 if grid.smallest else None]
        for lr in rates:
            whole_case(grid, provider, lr, f"lr {lr:g}", SAME)
        taken = {lr: whole_seconds(grid, provider, f"lr {lr:g}") for lr in rates}
        best_lr = min(rates, key=taken.__getitem__)
        if not grid.smallest and taken[best_lr] < float("inf"):
            for size in WHOLE_SIZES:
                whole_case(grid, provider, best_lr, f"lr {best_lr:g}, {size:,} at once", size)
            if tool.locates:
                for size in (SAME, *WHOLE_SIZES):
                    mode = f"lr {best_lr:g}, {size:,} at once, located by {WHOLE_SCORED}"
                    whole_case(grid, provider, best_lr, mode, size, WHOLE_SCORED)
        at = grid.key("whole", provider, "two steps", "peak_bytes", "target", TARGET)
        grid.add_peak(at, "whole_peak", lr=rates[0], **whole_job(grid, SAME))


def whole_job(grid: Grid, tokens: int, scored: int | None = None) -> dict[str, Any]:
    settings: dict[str, Any] = {"k": 20 if grid.smallest else K, "micro_batch_tokens": tokens}
    if scored:
        settings |= {"score_requests": scored, "score_pairs": scored}
    return {"requests": 4 if grid.smallest else 64, "held_out": 4 if grid.smallest else 16, "settings": settings}


def whole_seconds(grid: Grid, provider: str, mode: str) -> float:
    """How long a case took; infinite where it didn't reach its target."""
    at = grid.key("whole", provider, mode, "seconds", "target", TARGET)
    return figure(grid, at) if grid.figures.has(**at) else float("inf")


def whole_case(grid: Grid, provider: str, lr: float, mode: str, tokens: int, scored: int | None = None) -> None:
    at = grid.key("whole", provider, mode, "steps", "target", TARGET)
    if grid.figures.has(**at):
        return
    limits = {"target": TARGET, "most_kl": MOST_KL, "most_steps": 2 if grid.smallest else MOST_STEPS}
    found = grid.fresh("whole", tight=False, provider=provider, lr=lr, **limits, **whole_job(grid, tokens, scored))
    for number, seconds, loss, kl in found["curve"]:
        point = grid.key("whole", provider, mode, "", "step", number)
        values = {"seconds_to_step": seconds, "held_out_loss": loss, "held_out_kl": kl}
        grid.add(point, {name: (value, value, value) for name, value in values.items()})
    number, seconds, _, kl = found["curve"][-1]
    if found["reached"]:
        reached = {"seconds": seconds, "held_out_kl": kl}
        grid.add(at, {name: (value, value, value) for name, value in reached.items()})
    else:
        grid.out(f"whole, {provider}, {mode}: not reached in {number} steps")
    grid.add(at, {"steps": (number, number, number)})  # last: the case is whole then


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suites", nargs="+", choices=SUITES, default=SUITES)
    parser.add_argument("--model", default="smollm2", help="a name or folder, or one of " + ", ".join(SIZES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory-limit", default="16GiB", help="over the weights; for `size`, the weights too")
    parser.add_argument("--at", nargs="+", type=int, default=[], help="these of the tokens, requests or micro-batches")
    parser.add_argument("--sizes", nargs="+", choices=[*SIZES], default=[*SIZES], help="models of the suite size")
    parser.add_argument(
        "--tools", nargs="+", choices=[*(TRACERS | EDITORS)], default=[*(TRACERS | EDITORS)], help="but for steps"
    )
    parser.add_argument("--smallest", action="store_true", help="each suite at its least size")
    parser.add_argument("--out", type=Path, help="the file (default: benchmarks/results/tools-HARDWARE.csv)")
    options = parser.parse_args()
    device = torch.device(options.device)
    path = options.out or RESULTS / f"tools-{file_name(machine(device)['hardware'])}.csv"
    limit = parse_bytes(options.memory_limit)
    grid = Grid(
        Figures(path, device), options.model, options.dtype, options.device, options.rounds, limit, options.smallest
    )
    grid.at, grid.tools, grid.models = tuple(options.at), tuple(options.tools), tuple(options.sizes)
    for name, provider in TRACERS.items():
        if provider.missing:
            grid.out(f"{name}: skipped, {provider.missing}")
    suites = {"micro-batch": micro_batch, "tokens": tokens, "requests": requests, "size": size, "step": step}
    suites["whole"] = whole
    faults = 0
    for suite in options.suites:
        try:
            suites[suite](grid)
        except PKEError as error:
            faults += 1
            print(f"error: {suite}: {error}", file=sys.stderr)
    grid.out(f"written: {path}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
