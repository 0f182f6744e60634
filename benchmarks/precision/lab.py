"""What every part needs: the model, the sets, the cells, and ways to open a bench and to put a patch on for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from pke_fast.config import PKEConfig
from pke_fast.evaluating.kept import weights_digest
from pke_fast.loading import LoadedModel, context_length
from pke_fast.patch import Patch
from pke_fast.shipped import FOLDER
from pke_fast.stages import Stages
from pke_fast.structure import Structure, find_structure
from pke_fast.workbench import Workbench, workbench
from precision.cells import Cells, digest
from precision.sets import Sets

MAX_NEW_TOKENS = 24


@dataclass
class Lab:
    """The model, unedited between any two calls, what is measured on it, and where it is kept."""

    loaded: LoadedModel
    sets: Sets
    cells: Cells
    max_new_tokens: int = MAX_NEW_TOKENS
    memory: dict[Any, Any] = field(default_factory=dict)

    @property
    def model(self) -> Any:
        return self.loaded.model

    @cached_property
    def base(self) -> str:
        """A digest of the unedited weights."""
        return weights_digest(self.model)

    @cached_property
    def edited_on(self) -> str:
        """A digest of what edits are made from besides the settings: the requests, and the shipped prompts."""
        shipped = {path.name: path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.jsonl"))}
        return digest([self.base, [request.as_dict() for request in self.sets.requests], shipped])

    @cached_property
    def structure(self) -> Structure:
        return find_structure(self.model)

    def bench(self, config: PKEConfig, *, long: bool = True) -> AbstractContextManager[Workbench]:
        """A bench.

        Args:
            long: take prompts as long as the model's context, whatever `max_length` says of those of an edit.
        """
        if long:
            config = config.replace(max_length=max(config.max_length, context_length(self.model) or 0))
        stages = Stages(device=self.loaded.device)
        return workbench(self.model, self.loaded.tokenizer, config, stages, self.loaded.name)


@contextmanager
def applied(patch: Patch | None, model: Any) -> Iterator[None]:
    """The model with a patch, then without it again, exact to the bit."""
    if patch is None:
        yield
        return
    patch.apply(model)
    try:
        yield
    finally:
        patch.revert(model)
