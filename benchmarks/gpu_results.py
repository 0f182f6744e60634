"""What gpu_kernels.py writes: a CSV, a line a provider and shape; and for people the same, with verdicts on targets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gpu_cases import Case, Result, names
from results_csv import RESULTS, file_name, write_rows

COLUMNS = (
    "op", "provider", "shape", "dtype", "y20", "y50", "y80", "bytes", "flops", "share", "peak_extra_bytes",
    "gpu", "driver", "torch", "triton", "cuda", "pke_fast", "commit",
)  # fmt: skip


@dataclass(frozen=True)
class Ceilings:
    """What the card does at best, measured in the same run: bytes (read and written) and operations a second."""

    copy: float
    product: float

    def floor_ms(self, case: Case) -> float:
        return 1e3 * max(case.bytes / self.copy, case.flops / self.product)

    def share(self, case: Case, ms: float) -> float:
        """What part of the ceiling that binds was reached."""
        return self.floor_ms(case) / ms


def usual_path(gpu: str, date: str) -> Path:
    return RESULTS / f"{file_name(gpu)}-{date}.csv"


def add_rows(path: Path, rows: list[tuple[Case, str, Result]], where: dict[str, str]) -> None:
    """Adds lines to a file. Times in milliseconds; bytes and flops are the least that is needed; an empty field was not
    measured."""
    lines = [
        {
            "op": case.op,
            "provider": provider,
            "shape": case.shape,
            "dtype": names(case.dtype),
            **{name: f"{getattr(result, name):.6g}" for name in ("y20", "y50", "y80")},
            "bytes": case.bytes,
            "flops": case.flops,
            "share": f"{result.share:.4g}",
            "peak_extra_bytes": "" if result.peak_extra_bytes is None else result.peak_extra_bytes,
            **where,
        }
        for case, provider, result in rows
    ]
    write_rows(path, COLUMNS, lines, append=True)


def text(case: Case, results: dict[str, Result], ceilings: Ceilings, judged: bool) -> str:
    """One case for people: the prediction, a line a provider, the targets."""
    lines = [
        f"{case.op}  {case.shape}  {names(case.dtype)}",
        f"  predicted: {case.bytes / 1e6:,.1f} MB, {case.flops / 1e9:,.1f} GFLOP,"
        f" at least {ceilings.floor_ms(case):.4f} ms at this card's ceilings",
        f"  {'':<20}{'y20 ms':>10}{'y50 ms':>10}{'y80 ms':>10}{'GB/s':>8}{'TFLOP/s':>9}{'share':>8}{'extra MB':>10}",
    ]
    for provider, result in results.items():
        seconds = result.y50 / 1e3
        extra = "" if result.peak_extra_bytes is None else f"{result.peak_extra_bytes / 1e6:,.1f}"
        lines.append(
            f"  {provider:<20}{result.y20:>10.4f}{result.y50:>10.4f}{result.y80:>10.4f}"
            f"{case.bytes / seconds / 1e9:>8,.0f}{case.flops / seconds / 1e12:>9,.1f}"
            f"{100 * result.share:>7.1f}%{extra:>10}"
        )
    return "\n".join([*lines, *(f"  {target.verdict(results, judged)}" for target in case.targets), ""])
