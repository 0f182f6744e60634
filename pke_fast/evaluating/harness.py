"""lm-evaluation-harness on the live model: nothing is saved or loaded anew. An extra: ``pke_fast[harness]``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pke_fast.errors import InputError
from pke_fast.modes import evaluating
from pke_fast.report import strict


def check_harness() -> None:
    """Raises InputError where lm-evaluation-harness isn't installed."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise InputError(
            "lm-evaluation-harness isn't installed",
            expected="the package lm_eval",
            got=str(error),
            do="pip install 'pke_fast[harness]', or leave out --lm-eval",
        ) from error


def run_harness(model: Any, tokenizer: Any, tasks: Sequence[str], limit: int | None = None) -> dict[str, Any]:
    """The harness's own results by task, as it reports them, standard errors among them; None for what isn't finite.

    Args:
        tasks: as the harness names them.
        limit: the first so many documents of each.

    Raises:
        InputError: the harness isn't installed, or doesn't know a task.
    """
    check_harness()
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    with evaluating(model):
        try:
            found = simple_evaluate(
                model=HFLM(pretrained=model, tokenizer=tokenizer), tasks=list(tasks), limit=limit, log_samples=False
            )
        except (KeyError, ValueError) as error:  # what it raises for a task that isn't there
            raise InputError("the harness can't run these tasks", got=f"{', '.join(tasks)}: {error}") from error
    results: dict[str, Any] = found["results"]
    return {
        task: {key: strict(value) for key, value in row.items() if isinstance(value, int | float | str)}
        for task, row in results.items()
    }
