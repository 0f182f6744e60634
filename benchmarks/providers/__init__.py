"""The tools that are compared, one file each. One that isn't installed is skipped, and it is said which and why."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any


@dataclass(frozen=True)
class Provider:
    """One way of doing a job.

    Attributes:
        module: the file in this folder.
        package: the distribution that it needs; empty where pke_fast's own needs are enough.
        locates: whether its whole job locates neurons by requests and pairs.
    """

    module: str
    package: str = ""
    locates: bool = False

    @property
    def missing(self) -> str:
        """Why it can't run, in a line; empty where it can."""
        if not self.package or find_spec(self.package):
            return ""
        return f"{self.package} is not installed: pip install pke_fast[compare]"

    @property
    def version(self) -> str:
        """The version of what it needs, where that is installed."""
        return version(self.package) if self.package and not self.missing else ""

    def load(self) -> Any:
        """Its module, with `trace(subject, micro_batch_tokens)`, or with `edit(job, lr, after)` and `LRS`, or both."""
        return import_module(f"providers.{self.module}")


TRACERS = {
    "pke_fast": Provider("by_pke_fast"),
    "hooks": Provider("by_hooks"),
    "hooks, few logits": Provider("by_tuned_hooks"),
    "nnsight": Provider("by_nnsight", "nnsight"),
    "pyvene": Provider("by_pyvene", "pyvene"),
}
EDITORS = {
    "pke_fast": Provider("by_pke_fast", locates=True),
    "DINM": Provider("by_dinm"),
    "dense masked Adam": Provider("by_dense_adam", locates=True),
    "LoRA": Provider("by_lora"),
}
