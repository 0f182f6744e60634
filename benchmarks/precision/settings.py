"""What is compared: a name, and how its settings differ from the defaults."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from pke_fast.config import WITHOUT_DETECTORS, PKEConfig
from pke_fast.structure import Structure

ALL = "all"  # as k: every neuron of the window
DRAFT_PRESET = "pke-fast-draft"


@dataclass(frozen=True)
class Setting:
    """One way to edit.

    Attributes:
        changes: to the preset.
        preset: one of `PRESETS`.
        seeds: it is made once with each; the worst one counts.
        by: who edits: this package, or LoRA by plain torch (`lora`).
        thorough: all is measured on it as it is: answers to every set, the first seed's made whole, ability,
            perplexity and KL. Else the front alone, and what is broken at the point of equal attack success.
    """

    changes: dict[str, Any] = field(default_factory=dict)
    preset: str = DRAFT_PRESET
    seeds: tuple[int, ...] = (0,)
    by: Literal["pke_fast", "lora"] = "pke_fast"
    thorough: bool = False

    def config(self, structure: Structure, seed: int) -> PKEConfig:
        """Its settings for a model."""
        changes = dict(self.changes)
        every = changes.get("k") == ALL
        if every:
            changes.pop("k")
        config = PKEConfig.preset(self.preset).replace(**changes, seed=seed)
        first, end = config.layer_window(len(structure.layers))
        return config.replace(k=(end - first) * structure.neurons, per_layer_cap=None) if every else config


DEFAULT = "default"
DRAFT = "draft"  # edits that are made one after another are made with it

NO_DETECTORS = {"first_token_weight": WITHOUT_DETECTORS}

# The first is what a user gets; the others are the ablation: the draft, what changes one thing in it, with what that
# asks for, and the published method.
SETTINGS: dict[str, Setting] = {
    DEFAULT: Setting(preset="pke", seeds=(0, 1, 2), thorough=True),
    DRAFT: Setting(),
    "down only": Setting({"projections": ["down"]} | NO_DETECTORS),
    "100 neurons": Setting({"k": 100}),
    "1,000 neurons": Setting({"k": 1000}),
    "random neurons": Setting({"score": "random"}),
    "random neurons, 42 steps": Setting({"score": "random", "num_steps": 42}),
    "all neurons of the window": Setting({"k": ALL}),
    "all neurons, a sixth of the rate": Setting({"k": ALL, "lr": 1e-4}),  # it is some 6e-4 after detectors
    "LoRA of equal rank": Setting({"lr": 1e-3} | NO_DETECTORS, by="lora"),
    "dinm": Setting(preset="dinm"),
    "dinm-parity": Setting(preset="dinm-parity"),
}
