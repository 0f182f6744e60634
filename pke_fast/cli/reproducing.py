"""The command that makes the paper's table."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from rich.console import Console

from pke_fast import terminal
from pke_fast.cli.common import console_of, finish, settings_of
from pke_fast.config import load_config
from pke_fast.errors import InputError
from pke_fast.evaluating.outputs import write_json
from pke_fast.evaluating.reproduce import PUBLISHED, Table, as_markdown, published, reproduce_model
from pke_fast.files import atomic_write
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
    rows = {}
    for name in dict.fromkeys(options.models):
        loaded = load_model(name, options.device, options.dtype)
        stages = Stages(device=loaded.device)
        rows[name] = reproduce_model(loaded, table, out, stages)
        del loaded  # before the next one is loaded
        # After every model, so that an interrupted table shows what there is.
        text = as_markdown(rows, judges[0])
        with atomic_write(out / "table.md") as path:
            path.write_text(text, encoding="utf-8")
        summary = {"judge": judges[0], "models": rows, "published": {name: published(name) for name in rows}}
        write_json(out / "table.json", summary)
    console: Console = console_of(options)
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    shown = {model: " / ".join(f"{value:g} %" for value in figures.values()) for model, figures in PUBLISHED.items()}
    terminal.facts(console, "Published (other prompts, another judge): vanilla / DINM / PKE", shown)
    files = {"table.md": "the table", "table.json": "the same as data", "MODEL/METHOD": "every evaluation"}
    terminal.files(console, out, files)
    finish(options, summary)
