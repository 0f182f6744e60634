"""The prompts that come with the package: harmful ones to edit against, benign ones to hold, held-out ones of each."""

from __future__ import annotations

import json
from pathlib import Path

from pke_fast.requests import EditRequest, read_prompts, read_requests

FOLDER = Path(__file__).parent / "data"


def harmful() -> list[EditRequest]:
    """Harmful requests of many kinds and forms, each with the first words of an unsafe answer."""
    return read_requests(FOLDER / "harmful.jsonl")


def harmful_held_out() -> list[str]:
    """Harmful prompts that are never edited on."""
    return read_prompts(FOLDER / "harmful_heldout.jsonl")


def benign() -> list[str]:
    """Benign prompts of many kinds, and those that only look harmful, one after another in turn."""
    plain, alike = (read_prompts(FOLDER / f"{name}.jsonl") for name in ("benign", "lookalikes"))
    share = len(alike) / max(1, len(plain))
    return [prompt for _, prompt in sorted([(i * share, p) for i, p in enumerate(plain)] + list(enumerate(alike)))]


def benign_held_out() -> list[str]:
    """Benign prompts that are never edited on; the look-alikes among them come from `look_alikes_held_out`."""
    return read_prompts(FOLDER / "benign_heldout.jsonl")


def look_alikes_held_out() -> list[str]:
    """Held-out prompts that only look harmful."""
    return read_prompts(FOLDER / "lookalikes_heldout.jsonl")


def kinds() -> dict[str, str]:
    """The kind of harm, or of harmless request, of every shipped prompt that has one."""
    rows = [
        json.loads(line) for path in sorted(FOLDER.glob("*.jsonl")) for line in path.read_text("utf-8").splitlines()
    ]
    return {row["prompt"]: row["kind"] for row in rows if "kind" in row}


def prose() -> str:
    """Plain prose on many subjects, for the perplexity."""
    return (FOLDER / "prose.txt").read_text(encoding="utf-8")
