"""Prints what a benchmark noted besides time, such as its peak memory, below pytest-benchmark's tables."""

from __future__ import annotations

from typing import Any


def pytest_terminal_summary(terminalreporter: Any, config: Any) -> None:
    session = getattr(config, "_benchmarksession", None)
    noted = [bench for bench in session.benchmarks if bench.extra_info] if session else []
    if noted:
        terminalreporter.section("noted besides time")
    for bench in noted:
        notes = ", ".join(f"{name} {value:,.0f}" for name, value in bench.extra_info.items())
        terminalreporter.write_line(f"{bench.name}: {notes}")
