"""The prompts that come with the package: harmful ones to edit against, benign ones to hold, held-out ones of each.

An edit learns whatever separates the two sides. So harm is all that does: in `pairs.jsonl` each harmful request has a
harmless twin of the same form, length and topic, and the frames are put around prompts of both sides alike.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pke_fast.requests import EditRequest, read_prompts, read_requests

T = TypeVar("T")

FOLDER = Path(__file__).parent / "data"


def harmful() -> list[EditRequest]:
    """Harmful requests of many kinds and forms, each with the first words of an unsafe answer."""
    twins = [EditRequest(pair["harmful"], ground_truth=pair["ground_truth"]) for pair in _records("pairs")]
    return [*read_requests(FOLDER / "harmful.jsonl"), *twins]


def harmful_held_out() -> list[str]:
    """Harmful prompts that are never edited on."""
    return read_prompts(FOLDER / "harmful_heldout.jsonl")


def benign() -> list[str]:
    """Benign prompts of many kinds, those that only look harmful and the twins of harmful ones, evenly mixed."""
    parts = [read_prompts(FOLDER / f"{name}.jsonl") for name in ("benign", "lookalikes")]
    parts.append([pair["harmless"] for pair in _records("pairs")])
    longest = max(map(len, parts))
    placed = [(i * longest / len(part), n, prompt) for n, part in enumerate(parts) for i, prompt in enumerate(part)]
    return [prompt for _, _, prompt in sorted(placed)]


def some(items: Sequence[T], most: int) -> list[T]:
    """So many of the items at most, evenly chosen, in their order."""
    count = min(len(items), most)
    return [items[i * len(items) // count] for i in range(count)]


def framed(prompts: Sequence[str], share: float) -> list[str]:
    """A share of the prompts, evenly chosen, each within one of the shipped frames, which are taken in turn."""
    frames = [record["text"] for record in _records("frames")]
    chosen = some(prompts, int(len(prompts) * share))
    return [frames[i % len(frames)].replace("[PROMPT]", prompt) for i, prompt in enumerate(chosen)]


def benign_held_out() -> list[str]:
    """Benign prompts that are never edited on; the look-alikes among them come from `look_alikes_held_out`."""
    return read_prompts(FOLDER / "benign_heldout.jsonl")


def look_alikes_held_out() -> list[str]:
    """Held-out prompts that only look harmful."""
    return read_prompts(FOLDER / "lookalikes_heldout.jsonl")


def kinds() -> dict[str, str]:
    """The kind of harm, or of harmless request, of every shipped prompt; twins share theirs."""
    names = [path.stem for path in FOLDER.glob("*.jsonl") if path.stem not in ("pairs", "frames")]
    found = {record["prompt"]: record["kind"] for name in sorted(names) for record in _records(name)}
    return found | {pair[side]: pair["kind"] for pair in _records("pairs") for side in ("harmful", "harmless")}


def prose() -> str:
    """Plain prose on many subjects, for the perplexity."""
    return (FOLDER / "prose.txt").read_text(encoding="utf-8")


def _records(name: str) -> list[dict[str, Any]]:
    lines = (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]
