"""Whole jobs on a GPU within less memory than the model needs, beside accelerate's offloading. Run by `make offload`.

    python benchmarks/offload.py [--models Llama-3-8B ...] [--limits 24 12 8] [--without accelerate] [--out FILE]

Models of published configurations with random weights in bf16, made in the host's memory; 128 requests of 512 tokens,
hot spots in the upper half, 40 steps of 16 requests. For each limit (GiB, kept by set_per_process_memory_fraction) the
planner decides which layers wait with the host, in nine tenths of it. Scores of all limits are compared: beyond 2e-2
(relative, Frobenius) the script fails. Accelerate offloads the same layers at the same pace. Within 12 and 8 GiB a job
may take 3 and 5 times as long as one whose layers are all resident, if that came first; whether it does is told. A
capped card shows the memory of a smaller one, not its speed. `--device cpu --tiny` tries the script without a GPU; its
figures mean nothing.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parent))  # Python may have been told not to look beside a script
from random_models import SIZES, random_model, random_sequences
from results_csv import RESULTS, Figures, file_name

from pke_fast.config import PKEConfig
from pke_fast.editing import Outcome, edit_columns
from pke_fast.encoding import Encoded
from pke_fast.errors import InputError
from pke_fast.offloading import brought_to
from pke_fast.plan import Load, Plan
from pke_fast.planner import Planner
from pke_fast.planning import offloading
from pke_fast.rehearsal import twin_of
from pke_fast.scoring import score
from pke_fast.stages import PeakMemory
from pke_fast.structure import Structure, find_structure
from pke_fast.testing import tiny_model
from pke_fast.workbench import laid_out

SHARE = 0.9  # of a limit that is planned with: what allocators round up lies between
APART = 2e-2  # scores, relative, in bf16
TIMES = {12: 3.0, 8: 5.0}  # the resident job's time, at most, by limit in GiB
GIB = 2**30
FEW = 8  # requests of a first job, which isn't timed
POOL = 1 << 24  # random numbers that fill all weights: drawing eight thousand million takes minutes


def host_model(name: str) -> Any:
    """A model of one of SIZES with random weights in bf16, in the host's memory."""
    model = random_model(name, "bf16", "meta")
    model.to_empty(device="cpu")
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config=model.config)  # its frequencies are no parameters
    pool = torch.randn(POOL, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    start = 0
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
                continue
            flat = parameter.view(-1)
            for part in flat.split(POOL):
                part.copy_(pool.roll(start)[: len(part)])
                start += 7919  # so that no two weights are alike
    model.tie_weights()
    return model.eval()


@contextmanager
def by_accelerate(model: nn.Module, layers: nn.ModuleList, device: torch.device, lowest: int, _pinned: int) -> Any:
    """The same layers offloaded by accelerate's hooks, the rest moved to the device, and all of it moved back."""
    from accelerate.big_modeling import attach_align_device_hook
    from accelerate.hooks import remove_hook_from_module

    away = list(layers)[:lowest]
    apart = {id(module) for layer in away for module in layer.modules()}
    rest = [module for module in model.modules() if id(module) not in apart and not any(module.children())]
    try:
        for module in rest:
            module.to(device)
        for layer in away:
            attach_align_device_hook(layer, execution_device=device, offload=True)
            for module in layer.modules():  # what holds no weights moves its arguments
                for buffer_name, buffer in module.named_buffers(recurse=False):
                    module._buffers[buffer_name] = buffer.to(device)
        yield
    finally:
        for layer in away:
            remove_hook_from_module(layer, recurse=True)
        model.to("cpu")


PROVIDERS: dict[str, Callable[..., Any]] = {"pke_fast": brought_to, "accelerate": by_accelerate}


class Clock:
    """Seconds of what is done, by name, until the device is done with it."""

    def __init__(self, device: torch.device) -> None:
        self._device, self.seconds = device, dict[str, float]()

    def stage(self, name: str, _total: int = 0) -> Any:
        return self._timed(name)

    @contextmanager
    def _timed(self, name: str) -> Iterator[Callable[[int], None]]:
        start = time.perf_counter()
        yield lambda _n: None
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.seconds[name] = time.perf_counter() - start


def job(
    structure: Structure,
    plan: Plan,
    provider: str,
    device: torch.device,
    requests: Sequence[Encoded],
    config: PKEConfig,
) -> tuple[Tensor, dict[str, float], int]:
    """Scores, seconds and peak bytes of one job; the model's weights are as before."""
    first, end = config.layer_window(len(structure.layers))
    clock, memory = Clock(device), PeakMemory(str(device))
    memory.reset()
    with clock.stage("in all"):
        place = PROVIDERS[provider](structure.model, structure.layers, device, plan.layers_offloaded, plan.pinned)
        with clock.stage("bringing and putting back"), place:
            start = time.perf_counter()
            with clock.stage("locating"):
                examples = [[(sequence, 1.0)] for sequence in requests]
                found = score(structure, examples, pad_id=0, pace=plan.pace(), first=first)
            chosen = found.weight_change * found.activation_path
            hot_spots = strongest(chosen, first, end, config.k)
            with clock.stage("editing"):
                outcome = edit_columns(
                    structure, hot_spots, requests, [], config, pad_id=0, stage=clock.stage, pace=plan.pace()
                )
            at_work = time.perf_counter() - start
        clock.seconds["bringing and putting back"] -= at_work
    peak = memory.peak() or 0
    put_back(structure, outcome)
    names = ("in all", "locating", "editing", "bringing and putting back")
    return chosen, {name: clock.seconds[name] for name in names}, peak


def strongest(scores: Tensor, first: int, end: int, k: int) -> dict[int, Tensor]:
    """The k neurons with the highest scores [L, D] in the layers from `first` to before `end`, by layer."""
    neurons = scores.shape[1]
    ids = torch.topk(scores[first:end].flatten(), k).indices
    by_layer = {first + layer: (ids[ids // neurons == layer] % neurons).sort().values for layer in range(end - first)}
    return {layer: chosen for layer, chosen in by_layer.items() if len(chosen)}


def put_back(structure: Structure, outcome: Outcome) -> None:
    """The weights as they were before the edit."""
    for part in outcome.layers:
        weight = structure.model.get_parameter(part.weight)
        index, old = part.index.to(weight.device), part.old.to(weight.device)
        torch.ops.pke_fast.write_columns(weight, part.axis, index, old)


@contextmanager
def limited(limit: int, device: torch.device) -> Iterator[None]:
    """So many bytes of the GPU's memory and no more; on a CPU nothing is done."""
    if device.type != "cuda":
        yield
        return
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(device).total_memory, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def verdict(provider: str, limit: float, times: float) -> str:
    """Whether ours takes few enough times the resident job's time; nothing where there is no target."""
    if provider != "pke_fast" or limit not in TIMES:
        return ""
    return f", {'met' if times <= TIMES[int(limit)] else 'NOT MET'}: at most {TIMES[int(limit)]:g}"


def planners_of(model: Any, requests: Sequence[Encoded], config: PKEConfig, device: str) -> Planner:
    twin = twin_of(model, next(model.parameters()).dtype)
    return Planner(twin, config, Load.of(requests, []), device, residence=offloading())


def tiny_limits(planner: Planner) -> list[float]:
    """Where everything fits; and the least, where layers are offloaded."""
    free = planner.plan(None).peak
    budget = free
    try:
        while True:
            planner.plan(budget - free // 200)
            budget -= free // 200
    except InputError:
        return [free / SHARE / GIB * 1.01, budget / SHARE / GIB * 1.001]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["Llama-3-8B"], choices=list(SIZES))
    parser.add_argument("--limits", nargs="+", type=float, default=[24, 12, 8], metavar="GIB")
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--without", nargs="*", default=[], choices=["accelerate"])
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and a few short requests")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    config = PKEConfig(k=1000, num_steps=options.steps, batch_size=16, window=(0.5, 1.0), score="toxic", stop_loss=0)
    if options.tiny:
        options.models, options.requests, options.length = ["tiny"], 8, 48
        config = config.replace(k=12, num_steps=2, batch_size=4, micro_batch_tokens=64)
    figures = Figures(options.out or Path("unnamed"), device)
    today = datetime.date.today().isoformat()
    figures.path = options.out or RESULTS / f"offload-{file_name(figures.where['hardware'])}-{today}.csv"
    wrong = 0
    for name in options.models:
        model = tiny_model("llama", dtype="bf16") if options.tiny else host_model(name)
        wrong += measured(model, name, config, options, device, figures)
    print(f"written to {figures.path}")
    return wrong


def measured(model: Any, name: str, config: PKEConfig, options: Any, device: torch.device, figures: Figures) -> int:
    """All limits of one model; how many of them gave other scores than the first."""
    wrong, wanted, resident, warm = 0, None, None, set()
    with laid_out(model):
        structure = find_structure(model)
        requests = random_sequences(structure.head.weight.shape[0], options.requests, options.length)
        planner = planners_of(model, requests, config, str(device))
        for limit in tiny_limits(planner) if options.tiny else options.limits:
            if device.type == "cuda" and limit * GIB > torch.cuda.get_device_properties(device).total_memory:
                print(f"{name}, {limit:.4g} GiB: the card has less")
                continue
            plan = planner.plan(int(SHARE * limit * GIB))
            pace = plan.tokens, plan.scoring_kept, plan.editing_kept  # each has shapes of its own
            for provider in PROVIDERS:
                if provider in options.without or (provider != "pke_fast" and not plan.layers_offloaded):
                    continue
                with limited(int(limit * GIB), device) if not options.tiny else nullcontext():
                    if (
                        pace := (plan.tokens, plan.scoring_kept, plan.editing_kept)
                    ) not in warm:  # kernels are compiled and loaded before anything is timed
                        job(structure, plan, provider, device, requests[:FEW], config.replace(num_steps=1))
                        warm.add(pace)
                    scores, seconds, peak = job(structure, plan, provider, device, requests, config)
                wanted = scores if wanted is None else wanted
                apart = float((scores - wanted).norm() / wanted.norm())
                wrong += not apart <= APART
                told = ", ".join(f"{what} {value:.2f} s" for what, value in seconds.items())
                print(f"{name}, {limit:.4g} GiB, {provider}: {plan.layers_offloaded} layers offloaded, {told},")
                print(f"  peak {peak / GIB:.2f} GiB of {plan.peak / GIB:.2f} foretold; scores apart by {apart:.2g}")
                key = {"suite": "offload", "provider": provider, "x_name": "limit, GiB", "x": limit}
                about = {**key, "model": name, "dtype": "bf16", "device": device.type, "mode": "job"}
                metrics = {f"{what}, s": value for what, value in seconds.items()}
                metrics |= {"peak, bytes": peak, "foretold, bytes": plan.peak, "brought, bytes": plan.brought}
                metrics |= {"layers offloaded": plan.layers_offloaded, "scores apart": apart}
                if not plan.layers_offloaded:
                    resident = seconds["in all"]
                elif resident is not None:
                    times = metrics["time over the resident job's"] = seconds["in all"] / resident
                    print(f"  {times:.3g} times as long as the resident job{verdict(provider, limit, times)}")
                rows = [{**about, "metric": m, "median": v, "low": v, "high": v} for m, v in metrics.items()]
                figures.add(rows)
    return wrong


if __name__ == "__main__":
    sys.exit(main())
