"""The projections of an MLP, by the field's names."""

from __future__ import annotations

from typing import Literal

Kind = Literal["gate", "up", "down"]
PROJECTIONS: tuple[Kind, ...] = ("gate", "up", "down")  # the order in which a patch has those of a layer
