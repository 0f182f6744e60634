"""`pke-fast plan`: what a job will take, told before anything is loaded."""

from __future__ import annotations

from argparse import Namespace

from pke_fast import terminal
from pke_fast.budget import free_bytes, parse_bytes
from pke_fast.cli.common import console_of, finish, settings_of
from pke_fast.cli.reading import read_for
from pke_fast.encoding import PromptEncoder
from pke_fast.loading import context_length, load_outline
from pke_fast.locating import check_fits
from pke_fast.plan import Load
from pke_fast.planner import Planner
from pke_fast.planning import REACHED, copy_rate, matmul_rate, offloading, waits_on_host
from pke_fast.preparation import lengths
from pke_fast.rehearsal import twin_of_config
from pke_fast.stages import PeakMemory, Stages


def plan(options: Namespace) -> None:
    """Reads the configuration and the tokenizer alone, rehearses, prints."""
    config = settings_of(options)
    requests, locality = read_for(options, config, edits=not options.locate_only)
    outline = load_outline(options.model, options.device, options.dtype)
    encoder = PromptEncoder(outline.tokenizer, config, context_length(outline))
    with Stages().stage("Rehearsing the job without data"):
        load = Load.of(*lengths(encoder, config, requests, locality))
        twin = twin_of_config(outline.config, outline.dtype)
        check_fits(twin.structure, config)
        process = 0 if outline.device.startswith("cuda") else PeakMemory().current() or 0
        budget = None if options.memory_budget is None else parse_bytes(options.memory_budget)
        job = {"edits": not options.locate_only, "process": process, "mapped": twin.weights * outline.mapped}
        if waits_on_host(outline.device, twin.weights, budget):
            job["residence"] = offloading()
        if budget is None and (free := free_bytes(outline.device)) is not None:
            budget = free + process
        made = Planner(twin, config, load, outline.device, **job).plan(budget)
    found = made.as_dict()
    rate = matmul_rate(outline.device, outline.dtype, twin.structure.hidden_size, twin.structure.neurons)
    reached = rate * REACHED["cuda" if outline.device.startswith("cuda") else "cpu"]
    found["seconds"] = {
        "locating": made.scoring_flops / reached,
        "editing": made.editing_flops / reached,
        "measured matmul rate, flop/s": rate,
    }
    if made.brought:
        copying = copy_rate(outline.device)
        found["seconds"] |= {"bringing": made.brought / copying, "measured copy rate, bytes/s": copying}
    console = console_of(options)
    about = {
        "model": options.model,
        "device": outline.device,
        "layers": made.layers,
        "requests": load.requests,
        "locality pairs": load.locality,
        "tokens": load.tokens,
        "longest sequence": load.longest,
    }
    terminal.facts(console, "The job", about)
    terminal.plan(console, found)
    finish(options, {**about, **found})
