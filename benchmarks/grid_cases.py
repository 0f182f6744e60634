"""The grid's cases, each for a process of its own: JSON values in, JSON values out."""

from __future__ import annotations

from typing import Any

from providers import EDITORS, TRACERS
from providers.whole_job import WHOLE, Watch, job_of, run
from random_models import opened

from pke_fast.bench.cases import EDIT, STEPPERS, check_equal, check_equal_steps, first_layer, stepper
from pke_fast.bench.measuring import in_turns, peak_over_now
from pke_fast.bench.subjects import spread_neurons

OURS = "pke_fast"
Times = dict[str, list[float]]
"""Median, low and high seconds by provider."""


def trace_seconds(micro_batches: dict[str, int], rounds: int, **subject: Any) -> dict[str, Any]:
    """Times of tracing, after the scores were found equal to plain hooks', or another tool's where hooks take no part.

    `apart` is None for the tool that the others are compared with, which pke_fast is where it is alone.

    Args:
        micro_batches: tokens in flight by provider.
        subject: as for `random_models.opened`.
    """
    with opened(**subject) as on:
        tracers = {name: TRACERS[name].load().trace for name in micro_batches}
        found = {name: trace(on, micro_batches[name]) for name, trace in tracers.items()}
        truth = next((name for name in ("hooks", *found) if name in found and name != OURS), OURS)
        apart: dict[str, float | None] = {
            name: check_equal(maps, found[truth], on.structure.dtype, name) for name, maps in found.items()
        }
        apart[truth] = None  # with itself only a NaN differs
        runs = {name: lambda n=name, t=trace: t(on, micro_batches[n]) for name, trace in tracers.items()}
        times = in_turns(runs, rounds, on.structure.device, warm_up=False)
        parameters = sum(parameter.numel() for parameter in on.structure.model.parameters())
        return {
            "times": {name: [s.median, s.low, s.high] for name, s in times.items()},
            "tokens": on.tokens,
            "apart": apart,
            "parameters": parameters,
        }


def trace_peak(provider: str, micro_batch: int, device: str = "cpu", **subject: Any) -> int | None:
    """Bytes over the loaded model while tracing."""
    trace = TRACERS[provider].load().trace
    with opened(device=device, **subject) as on:
        return peak_over_now(lambda: trace(on, micro_batch), device)[1]


def step_seconds(share: float, k: int, rounds: int, micro_batch: int, kept: float, **subject: Any) -> Times:
    """Times of an edit step with hot spots from `share` of the depth on, after both were found to do the same.

    Args:
        kept: the share of those layers that keep their graph.
    """
    config = EDIT.replace(micro_batch_tokens=micro_batch)
    with opened(**subject) as on:
        neurons = spread_neurons(on.structure, first_layer(len(on.structure.layers), share), k)
        check_equal_steps(on, neurons, config)
        few = round(kept * len(neurons))
        with (
            stepper(STEPPERS[0], on, neurons, config, few) as ours,
            stepper(STEPPERS[1], on, neurons, config) as theirs,
        ):
            numbers = iter(range(10**6))
            runs = {STEPPERS[0]: lambda: ours(next(numbers)), STEPPERS[1]: lambda: theirs(next(numbers))}
            times = in_turns(runs, rounds, on.structure.device)
        return {name: [s.median, s.low, s.high] for name, s in times.items()}


def step_peak(
    provider: str, share: float, k: int, micro_batch: int, kept: float, device: str = "cpu", **subject: Any
) -> int | None:
    """Bytes over the loaded model while edit steps are made, what they keep included."""
    config = EDIT.replace(micro_batch_tokens=micro_batch)
    with opened(device=device, **subject) as on:
        neurons = spread_neurons(on.structure, first_layer(len(on.structure.layers), share), k)

        def steps() -> None:
            with stepper(provider, on, neurons, config, round(kept * len(neurons))) as step:
                step(0)
                step(1)

        return peak_over_now(steps, device)[1]


def whole(
    provider: str,
    lr: float,
    target: float,
    most_kl: float,
    most_steps: int,
    settings: dict[str, Any],
    **job: Any,
) -> dict[str, Any]:
    """A whole job's curve: (steps, seconds, held-out loss, held-out KL), and whether it reached its target."""
    with job_of(config=WHOLE.replace(**settings), **job) as given:
        watch = Watch(given.held_out, target, most_kl, most_steps=most_steps)
        run(EDITORS[provider].load().edit, given, lr, watch)
        return {"curve": watch.curve, "reached": watch.reached}


class _NotMeasured:
    def measure(self) -> tuple[float, float]:
        return float("inf"), 0.0


def whole_peak(provider: str, lr: float, settings: dict[str, Any], device: str = "cpu", **job: Any) -> int | None:
    """Bytes over the loaded model during a whole job of two steps."""
    with job_of(config=WHOLE.replace(**settings), device=device, **job) as given:
        watch = Watch(_NotMeasured(), 0.0, most_steps=2)  # type: ignore[arg-type]
        return peak_over_now(lambda: run(EDITORS[provider].load().edit, given, lr, watch), device)[1]
