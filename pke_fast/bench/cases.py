"""The two comparisons that need no other tool: trace and score against hooks, and an edit step against dense Adam."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from pke_fast.bench.dense_adam import DenseAdam
from pke_fast.bench.hooks import ScoreMaps, trace_by_hooks
from pke_fast.bench.measuring import peak_over_now
from pke_fast.bench.plain_loss import PlainLoss
from pke_fast.bench.subjects import Subject, loaded_subject, spread_neurons
from pke_fast.columns import Columns, put_back_on_failure
from pke_fast.config import PKEConfig
from pke_fast.errors import PKEError
from pke_fast.pace import Pace
from pke_fast.scoring import score
from pke_fast.trainer import Trainer

EDIT = PKEConfig(batch_size=16, locality_batch_size=16, locality_tokens=8, lr=2e-3, lr_end=1.0, projections=("down",))
WINDOWS = {"upper half": 0.5, "last quarter": 0.75, "last tenth": 0.9}
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 2e-2}
# Of the weights' changes after a few steps. Adam's first ones go by the gradient's sign, which another rounding turns
# where a half-precision gradient is near 0: 0.07 was seen with tiny models.
CHANGE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.2}
TRACERS = ("pke_fast", "hooks", "hooks, few logits")
STEPPERS = ("pke_fast", "dense masked Adam")

Stepper = Callable[[int], tuple[float, float]]
"""Makes step n (0 for the first); the mean edit loss and the mean KL before it."""


def trace(provider: str, subject: Subject, micro_batch_tokens: int) -> ScoreMaps:
    """Both score maps by one of TRACERS."""
    structure, sequences = subject.structure, subject.requests
    if provider == "pke_fast":
        examples = [[(sequence, 1.0)] for sequence in sequences]
        scores = score(structure, examples, pad_id=subject.pad_id, pace=Pace(micro_batch_tokens))
        return scores.weight_change, scores.activation_path
    return trace_by_hooks(
        structure,
        sequences,
        pad_id=subject.pad_id,
        micro_batch_tokens=micro_batch_tokens,
        few_logits=provider.endswith("few logits"),
    )


def check_equal(found: ScoreMaps, wanted: ScoreMaps, dtype: torch.dtype, provider: str) -> float:
    """The larger relative difference (Frobenius) of two pairs of score maps.

    Raises:
        PKEError: it is more than 1e-3 in fp32, or 2e-2 in bf16 and fp16: nothing is worth timing then.
    """
    # a NaN, which max() of Python's floats may lose, stays one here
    apart = float(torch.stack([(a - b).norm() / b.norm() for a, b in zip(found, wanted, strict=True)]).max())
    if not apart <= TOLERANCE[dtype]:
        expected = f"a relative difference of at most {TOLERANCE[dtype]:g} from plain hooks'"
        raise PKEError(f"the scores of {provider} are others", expected=expected, got=f"{apart:.3g}")
    return apart


@contextmanager
def stepper(
    provider: str, subject: Subject, neurons: dict[int, Tensor], config: PKEConfig, kept: int | None = None
) -> Iterator[Stepper]:
    """Steps of an edit by one of STEPPERS; the weights are put back in the end.

    Args:
        kept: how many layers keep their graph, of pke_fast's; None: all.
    """
    structure = subject.structure
    if provider == "pke_fast":
        columns = [Columns(structure, layer, chosen) for layer, chosen in neurons.items()]
        with put_back_on_failure(columns):
            pace = replace(Pace.unplanned(config), editing_kept=kept)
            sides = subject.requests, subject.locality
            trainer = Trainer(structure, columns, *sides, config, subject.pad_id, pace=pace)

            def sparse(number: int) -> tuple[float, float]:
                step = trainer.step(number)
                return step.edit, step.kl

            yield sparse
            for column in columns:
                column.restore()
        return
    loss = PlainLoss(structure, subject.requests, subject.locality, config, pad_id=subject.pad_id)
    adam = DenseAdam(structure, neurons, config.lr or math.nan)

    def dense(number: int) -> tuple[float, float]:
        with adam.gradients():
            losses = loss.backward(number)
        adam.step()
        return losses

    try:
        yield dense
    finally:
        adam.restore()


def check_equal_steps(subject: Subject, neurons: dict[int, Tensor], config: PKEConfig, steps: int = 3) -> float:
    """Makes some steps by each of STEPPERS; the relative difference of the weights' changes.

    Raises:
        PKEError: a loss or the change of the weights differs by more than rounding.
    """
    structure = subject.structure
    before = {layer: structure.down_weight(layer).detach().clone() for layer in neurons}
    losses, moved = [], []
    for provider in STEPPERS:
        with stepper(provider, subject, neurons, config) as step:
            losses.append(torch.tensor([step(number) for number in range(steps)]))
            changes = [structure.down_weight(layer).detach().float() - old.float() for layer, old in before.items()]
            moved.append(torch.cat([change.flatten() for change in changes]))
    tolerance, change_tolerance = TOLERANCE[structure.dtype], CHANGE_TOLERANCE[structure.dtype]
    apart = float((moved[0] - moved[1]).norm() / moved[1].norm())
    worst = float(((losses[0] - losses[1]).abs() / losses[1].abs().clamp(min=0.1)).max())
    if not (apart <= change_tolerance and worst <= tolerance):
        expected = f"losses within {tolerance:g}, changes of the weights within {change_tolerance:g}"
        raise PKEError("the two edits differ", expected=expected, got=f"losses {worst:.3g}, weights {apart:.3g}")
    return apart


def first_layer(layers: int, share: float) -> int:
    """The lowest layer with hot spots that lie above this share of the depth; the top one is always left."""
    return min(round(share * layers), layers - 1)


def trace_peak(
    provider: str, model: str, requests: int, micro_batch_tokens: int, device: str = "cpu", dtype: str = "fp32"
) -> int | None:
    """Bytes over the loaded model while tracing; for a fresh process."""
    with loaded_subject(model, requests, device=device, dtype=dtype) as subject:
        return peak_over_now(lambda: trace(provider, subject, micro_batch_tokens), device)[1]


def step_peak(
    provider: str, model: str, window: str, k: int, device: str = "cpu", dtype: str = "fp32", steps: int = 2
) -> int | None:
    """Bytes over the loaded model while some edit steps are made, their set-up included; for a fresh process."""
    with loaded_subject(model, 16, 16, device=device, dtype=dtype) as subject:
        neurons = spread_neurons(subject.structure, first_layer(len(subject.structure.layers), WINDOWS[window]), k)

        def run() -> None:
            with stepper(provider, subject, neurons, EDIT) as step:
                for number in range(steps):
                    step(number)

        return peak_over_now(run, device)[1]
