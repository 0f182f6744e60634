"""What all commands share: where tables go, the settings, the summary as JSON."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from typing import Any

from rich.console import Console

from pke_fast.config import PKEConfig, load_config


def console_of(options: Namespace) -> Console:
    """Where tables go: standard output, or standard error where that is for JSON."""
    return Console(stderr=bool(getattr(options, "json", False)))


def finish(options: Namespace, summary: dict[str, Any]) -> None:
    """The summary as JSON, if it was asked for."""
    if options.json:
        json.dump(summary, sys.stdout, indent=1)
        sys.stdout.write("\n")


def settings_of(options: Namespace) -> PKEConfig:
    config = load_config(options.config, options.set)
    seed = getattr(options, "seed", None)
    return config if seed is None else config.replace(seed=seed)
