"""The command that makes the paper's table."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from rich.console import Console

from pke_fast import terminal
from pke_fast.cli.common import console_of, finish, settings_of
from pke_fast.config import load_config
from pke_fast.errors import InputError
from pke_fast.evaluating.reproduce import (
    METHODS,
    PUBLISHED,
    Table,
    check_models,
    read_table,
    reproduce_model,
    write_table,
)
from pke_fast.judges import JUDGES, get_judge
from pke_fast.loading import load_model
from pke_fast.requests import read_pairs, read_prompts, read_requests
from pke_fast.stages import Stages


def reproduce(options: Namespace) -> None:
    judges = [get_judge(name).name for name in options.judge or JUDGES]
    config = settings_of(options)
    if config.method != "pke":
        raise InputError(
            f"the settings are for method {config.method}",
            expected="settings of PKE",
            do="DINM has its own: --dinm-set",
        )
    same = {"system_prompt": config.system_prompt, "max_length": config.max_length}  # DINM's own suffix stays
    set_by_user = {text.partition("=")[0].strip() for text in options.dinm_set}
    dinm = load_config("dinm", options.dinm_set)
    dinm = dinm.replace(**{name: value for name, value in same.items() if name not in set_by_user})
    configs = {"dinm": dinm, "pke": config}
    benign = read_prompts(options.benign, options.limit) if options.benign else None
    table = Table(
        read_requests(options.requests, options.limit),
        read_prompts(options.harmful, options.limit),
        benign,
        {name: configs[name] for name in configs if name in options.methods},
        config,
        judges,
        options.max_new_tokens,
        read_pairs(options.locality, options.limit) if options.locality else None,
    )
    out = Path(options.out)
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file", expected="a folder, new or of an earlier table")
    models = list(dict.fromkeys(options.models))
    rows, inputs = read_table(out, table)
    check_models(models, options.device, options.dtype, out)
    for name in models:
        loaded = load_model(name, options.device, options.dtype)
        row, earlier = reproduce_model(loaded, table, out, Stages(device=loaded.device)), rows.get(name, {})
        if earlier.get("vanilla", {}).get("inputs") == row["vanilla"]["inputs"]:  # the same weights
            row = {**earlier, **row}
        rows[name] = {method: row[method] for method in METHODS if method in row}
        del loaded  # before the next one is loaded
        # After every model, so that an interrupted table shows what there is.
        text, summary = write_table(out, rows, table, inputs)
    console: Console = console_of(options)
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    shown = {model: " / ".join(f"{value:g} %" for value in figures.values()) for model, figures in PUBLISHED.items()}
    terminal.facts(console, "Published (other prompts, another judge): vanilla / DINM / PKE", shown)
    files = {"table.md": "the table", "table.json": "the same as data", "MODEL/METHOD": "every evaluation"}
    terminal.files(console, out, files)
    finish(options, summary)
