"""What figures were measured on: those of other texts or questions can't be paired."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def digest(content: Any) -> str:
    """SHA-256 of what can be written as JSON, such as windows of token ids or questions."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def why_unpaired(before: Mapping[str, Any], after: Mapping[str, Any]) -> str | None:
    """Why two figures can't be paired; None where both have the `digest` of what they were measured on, the same one.

    Args:
        before, after: figures of one kind as in eval.json, with their digest as "sha256".
    """
    one, other = before.get("sha256"), after.get("sha256")
    if one is None or other is None:
        return "an older evaluation doesn't say what it was measured on; run pke-fast eval again"
    return None if one == other else "they were measured on other texts, tokens or questions"
