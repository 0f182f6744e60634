"""Times every op on a GPU beside torch and the card's own ceilings, at Llama-3-8B's shapes. Run by `make gpu`.

    python benchmarks/gpu_kernels.py [--ops edit_loss ...] [--quick] [--without compile] [--out FILE]

Each result is compared with the reference before anything is timed: ours by the relative rule (at most 3 times eager
torch's error), torch's own within 2 %. A fault leaves the case untimed and the script fails in the end. Until then the
figures so far are in FILE.part. What the columns mean stands in docs/kernels.md. `--device cpu --tiny` tries the script
without a GPU; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parent))  # Python may have been told not to look beside a script
import gpu_cases_editing
import gpu_cases_scoring
from gpu_cases import EAGER, OURS, QUICK, TINY, Case, Inputs, Result, Sizes, normal
from gpu_results import Ceilings, add_rows, text, usual_path
from gpu_timing import CpuTimer, CudaTimer, Timer, time_all
from results_csv import machine

from pke_fast import choice
from pke_fast.ops import OPS

TIMES, FLOOR = 3, 1e-5  # ours: so many times eager torch's error, and roundings of fp32 where that happens to be none


def copies(inputs: Inputs, convert: Callable[[Tensor], Tensor] = Tensor.clone) -> Inputs:
    return tuple(convert(x) if isinstance(x, Tensor) else x for x in inputs)


def in_fp32(x: Tensor) -> Tensor:
    return x.float() if x.is_floating_point() and x.dtype != torch.float32 else x.clone()


def faults(case: Case, inputs: Inputs) -> list[str]:
    """What is wrong with the providers' results, in words. The inputs stay as they are."""
    truth = case.reference(*copies(inputs, in_fp32))
    errors = {}
    wrong = []
    for name, run in case.providers.items():
        results = run(*copies(inputs))
        if case.exact:
            if not _same_choice(case, results, truth):
                wrong.append(f"{case.op} {case.shape}: {name} chose others than the reference")
            continue
        errors[name] = [_error(x, true) for x, true in zip(results, truth, strict=False)]  # unscored ones return less
    for name, of in errors.items():
        limits = [TIMES * e + FLOOR for e in errors.get(EAGER, [])] if name == OURS else []
        for i, error in enumerate(of):
            limit = limits[i] if limits else case.within
            if not error <= limit:
                wrong.append(
                    f"{case.op} {case.shape}: result {i} of {name} is off by {error:.2g}, {limit:.2g} is allowed"
                )
    return wrong


def _error(result: Tensor, truth: Tensor) -> float:
    if result.shape != truth.shape:
        return float("inf")
    size = float(torch.linalg.vector_norm(truth, dtype=torch.float64))
    difference = float(torch.linalg.vector_norm(result.float() - truth, dtype=torch.float64))
    return difference / size if size else difference


def _same_choice(case: Case, results: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> bool:
    """Ours to the bit; torch.topk's flat indices as a set."""
    layer_ptr, neurons = truth
    if len(results) == 2:
        return torch.equal(results[0], layer_ptr) and torch.equal(results[1], neurons)
    width = int(case.shape.split("D=")[1].split()[0])
    layers = torch.arange(len(layer_ptr) - 1, device=neurons.device).repeat_interleave(layer_ptr.diff())
    return torch.equal(results[0].sort().values, layers * width + neurons)


def measured(case: Case, timer: Timer, rounds: int, ceilings: Ceilings, inputs: Inputs) -> dict[str, Result]:
    seed = torch.Generator(timer.device).manual_seed(1)
    size = sum(x.numel() * x.element_size() for x in inputs if isinstance(x, Tensor))
    sets = [inputs, *(case.make(seed) for _ in range(timer.sets_for(size) - 1))]
    times = time_all(timer, case.providers, sets, rounds, case.waits)
    peaks = {name: timer.peak_extra(lambda run=run: run(*inputs)) for name, run in case.providers.items()}
    return {name: Result(t.y20, t.y50, t.y80, ceilings.share(case, t.y50), peaks[name]) for name, t in times.items()}


def ceiling_cases(sizes: Sizes) -> tuple[Case, Case]:
    """The two ceilings of the same card in the same run, on random data: zeros would be faster."""
    side, half = sizes.product, torch.bfloat16
    count = sizes.copy_bytes // 2

    def copy(source: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        return (target.copy_(source),)

    def product(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        return (a @ b,)

    def two(generator: torch.Generator, *shape: int) -> Inputs:
        return normal(generator, *shape, dtype=half), normal(generator, *shape, dtype=half)

    worked = {"bytes": 3 * 2 * side**2, "flops": 2 * side**3}
    return (
        Case("copy", f"n={count}", half, lambda g: two(g, count), {EAGER: copy}, copy, bytes=4 * count),
        Case(
            "matmul", f"{side}x{side}x{side}", half, lambda g: two(g, side, side), {EAGER: product}, product, **worked
        ),
    )


def measure_ceilings(sizes: Sizes, timer: Timer, rounds: int) -> tuple[Ceilings, list[tuple[Case, str, Result]]]:
    rows = []
    rates = []
    for case in ceiling_cases(sizes):
        sets = [case.make(torch.Generator(timer.device).manual_seed(0))]
        t = time_all(timer, case.providers, sets, rounds, case.waits)[EAGER]
        rates.append((case.flops or case.bytes) / t.y50 * 1e3)
        rows.append((case, EAGER, Result(t.y20, t.y50, t.y80, 1.0, None)))
    return Ceilings(*rates), rows


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ops", nargs="+", choices=list(OPS), default=list(OPS), metavar="OP", help=", ".join(OPS))
    parser.add_argument("--quick", action="store_true", help="fewer shapes and rounds")
    parser.add_argument("--tiny", action="store_true", help="shapes for a machine without a GPU")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--without", nargs="+", default=[], metavar="WORD", help="no provider with it in its name")
    parser.add_argument("--backend", default="auto", choices=("auto", *choice.BACKENDS), help="what `ours` runs in")
    parser.add_argument("--rounds", type=int, help="samples of each provider (50; --quick and --tiny: 10)")
    parser.add_argument("--out", type=Path, help="the CSV (default: benchmarks/results/<gpu>-<date>.csv)")
    return parser.parse_args()


def main() -> int:
    wanted = arguments()
    if wanted.device == "cuda" and not torch.cuda.is_available():
        print("error: no GPU found: torch sees no CUDA device. --device cpu --tiny tries the script", file=sys.stderr)
        return 2
    timer: Timer = CudaTimer() if wanted.device == "cuda" else CpuTimer()
    sizes = TINY if wanted.tiny else QUICK if wanted.quick else Sizes()
    rounds = wanted.rounds or (10 if wanted.quick or wanted.tiny else 50)

    where = machine(timer.device)
    print(", ".join(f"{name} {value}" for name, value in where.items() if value))
    ceilings, rows = measure_ceilings(sizes, timer, rounds)
    print(f"ceilings: copy {ceilings.copy / 1e12:.2f} TB/s, matmul {ceilings.product / 1e12:.0f} TFLOP/s\n")

    path = wanted.out or usual_path(where["gpu"], datetime.date.today().isoformat())
    part = path.with_name(path.name + ".part")
    part.unlink(missing_ok=True)
    add_rows(part, rows, where)

    judged = wanted.device == "cuda" and not wanted.tiny
    wrong: list[str] = []
    verdicts: list[str] = []
    with ExitStack() as stack:
        stack.enter_context(choice.using(wanted.backend))
        for case in (*gpu_cases_scoring.cases(sizes), *gpu_cases_editing.cases(sizes)):
            if case.op not in wanted.ops:
                continue
            for name in [name for name in case.providers if any(word in name for word in wanted.without)]:
                del case.providers[name]
            torch.compiler.reset()  # a shape a compilation, as many as there are
            inputs = case.make(torch.Generator(timer.device).manual_seed(0))
            try:
                found = faults(case, inputs)
                results = {} if found else measured(case, timer, rounds, ceilings, inputs)
            except RuntimeError as error:  # too large, or not to be compiled: the others' figures are worth having
                found, results = [f"{case.op} {case.shape}: {error}"], {}
            del inputs
            wrong += found
            if found:
                print("\n".join(f"fault: {fault}" for fault in found), "", sep="\n")
                continue
            new = [(case, name, result) for name, result in results.items()]
            add_rows(part, new, where)
            rows += new
            verdicts += [f"{case.op}  {case.shape}  {target.verdict(results, judged)}" for target in case.targets]
            print(text(case, results, ceilings, judged), flush=True)

    part.replace(path)
    print("targets", *verdicts, "", sep="\n")
    print(f"{len(rows)} rows in {path}; {len(wrong)} faults")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
