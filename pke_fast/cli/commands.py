"""What each command does: read, call the engine, write, print."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from pke_fast import shipped, terminal
from pke_fast.budget import parse_bytes
from pke_fast.cli.common import console_of, finish, settings_of, tell_another_base
from pke_fast.cli.outputs import check_out, write_edit
from pke_fast.cli.reading import read_for
from pke_fast.cli.unseen import HELD_OUT, MOST, Unseen, harmless, hold_out
from pke_fast.config import PKEConfig
from pke_fast.drawn import Drawn, draw_for, drawn_of
from pke_fast.errors import InputError
from pke_fast.evaluating.shown import foretold
from pke_fast.files import check_room
from pke_fast.loading import LoadedModel, load_model, resolve_device
from pke_fast.ranks import ALONE, Ranks, joined, local_device, ranks_started
from pke_fast.readers import text_or_none
from pke_fast.report import as_json
from pke_fast.requests import EditRequest, Pair
from pke_fast.stages import Stages


def _load(options: Namespace) -> LoadedModel:
    if options.device_map and ranks_started() > 1:
        raise InputError(
            "--device-map and several processes",
            expected="each process with the whole model on a device of its own, or one process with a spread model",
            do="leave out --device-map, or torchrun",
        )
    device = local_device(options.device)
    return load_model(options.model, device, options.dtype, device_map=options.device_map)


def _conditions(options: Namespace) -> dict[str, Any]:
    """How a job is run, as the engine takes it."""
    budget = None if options.memory_budget is None else parse_bytes(options.memory_budget)
    device = None if options.device_map else resolve_device(local_device(options.device))
    return {
        "memory_budget": budget,
        "device": device,
        "offload_folder": options.offload_folder,
        "resume": options.resume,
        "resume_minutes": options.resume_minutes,
    }


def _load_for(conditions: dict[str, Any], options: Namespace) -> LoadedModel:
    """The model on the job's device, or with the host where it is so large that the job may have to offload it.

    Raises:
        NotRehearsed: a budget can't be kept, since nobody can tell how large the model is before it is loaded.
    """
    from pke_fast.loading import load_outline
    from pke_fast.planning import waits_on_host
    from pke_fast.rehearsal import NotRehearsed, twin_of_config

    device, budget = conditions["device"], conditions["memory_budget"]
    if device and device.startswith("cuda"):
        outline = load_outline(options.model, device, options.dtype)
        try:
            weights = twin_of_config(outline.config, outline.dtype).weights
        except NotRehearsed:
            if budget is not None:
                raise
            return _load(options)
        if waits_on_host(device, weights, budget):
            return load_model(options.model, "cpu", options.dtype)
    return _load(options)


def _clock(device: str, ranks: Ranks = ALONE) -> Stages:
    """A clock for the job proper: it counts memory over the loaded model. Of several ranks one talks."""
    if not ranks.first:
        logging.getLogger("pke_fast").setLevel(logging.ERROR)
        warnings.simplefilter("ignore")
    return Stages(device=device, show=None if ranks.first else False)


def edit(options: Namespace) -> None:
    from pke_fast import engine

    config = settings_of(options)
    check_out(options)
    requests, locality = read_for(options, config, edits=True, beside=MOST)
    conditions = _conditions(options)
    loaded = _load_for(conditions, options)
    console = console_of(options)
    requests, held = hold_out(requests, _share_held_out(options, conditions, loaded), config.seed)
    if options.dry_run:
        would = _would_do(loaded, config, requests, locality, conditions, len(held))
        terminal.facts(console, "Nothing was changed. This would be done:", would)
        finish(options, would)
        return
    if options.save_model:
        weights = sum(parameter.nbytes for parameter in loaded.model.parameters())
        check_room(options.out, weights, "free some space, or leave out --save-model: pke-fast apply writes it later")
    with joined(conditions["device"] or loaded.device) as ranks:
        stages = _clock(conditions["device"] or loaded.device, ranks)
        categories = {request.prompt: request.category for request in held if request.category}
        prompts = [request.prompt for request in held]
        unseen = Unseen(loaded, config, stages, prompts, harmless(), shipped.prose(), categories)
        if held and ranks.first:
            unseen.measure("before")
        result = engine.edit(
            loaded.model,
            loaded.tokenizer,
            requests,
            config,
            locality=locality,
            stages=stages,
            name=loaded.name,
            source=str(options.requests),
            ranks=ranks,
            held_out=prompts,
            **conditions,
        )
    if not ranks.first:
        return
    try:
        if held:
            unseen.measure("after")
            result.report["evaluation"] = unseen.compared()
            result.report["requests"]["held_out"] = len(held)
            result.report["stages"] = [dataclasses.asdict(stage) for stage in stages.done]
    except BaseException:  # an edit isn't lost because it couldn't be measured
        write_edit(result, options, options.save_model)
        print(f"pke-fast: the edit is in {options.out}; only its measurement is missing", file=sys.stderr)
        raise
    write_edit(result, options, options.save_model)
    terminal.edit_summary(console, result.report, Path(options.out), redact=options.redact)
    finish(options, as_json(result.report, options.redact))


def _share_held_out(options: Namespace, conditions: dict[str, Any], loaded: LoadedModel) -> float:
    """As it was asked for. By default nothing where measuring, which no plan counts, could need more memory than there
    is, or where the model waits with the host."""
    if options.held_out is not None:
        return float(options.held_out)
    planned = conditions["memory_budget"] is not None or conditions["device"] not in (None, loaded.device)
    return 0.0 if planned else HELD_OUT


def _would_do(
    loaded: LoadedModel,
    config: PKEConfig,
    requests: Drawn[EditRequest],
    locality: Drawn[Pair] | None,
    conditions: dict[str, Any],
    held: int,
) -> dict[str, Any]:
    """What an edit would do, after all that can be checked without doing it."""
    from pke_fast.locating import check_fits
    from pke_fast.plan import Load
    from pke_fast.planning import plan_loaded
    from pke_fast.preparation import lengths
    from pke_fast.workbench import workbench

    requests, locality = draw_for(config, requests, locality, edits=True)  # those beside were for holding out
    with workbench(loaded.model, loaded.tokenizer, config, name=loaded.name) as bench:
        structure = bench.structure
        for prompt in [r.prompt for r in requests] + [p.prompt for p in locality or []]:
            bench.encoder.prompt_ids(prompt)
        check_fits(bench.structure, bench.config)
        first, end = config.layer_window(len(structure.layers))
        load = Load.of(*lengths(bench.encoder, config, requests, locality))
        budget, device = conditions["memory_budget"], conditions["device"]
        plan = plan_loaded(structure, config, load, budget, edits=True, device=device)
        return {
            "model": loaded.name,
            "device": loaded.device,
            "dtype": loaded.dtype,
            "layers": len(structure.layers),
            "neurons": len(structure.layers) * structure.neurons,
            "window": [first, end],
            "k": config.k if config.method == "pke" else structure.neurons,
            "requests given": drawn_of(requests) + held,
            "requests": len(requests),
            "without unsafe answer": sum(not request.ground_truth for request in requests),
            "locality": len(locality) if locality is not None else "the shipped prompts",
            "method": config.method,
            "num_steps": config.num_steps,
            "peak memory foretold, MiB": None if plan is None else round(plan.peak / 2**20),
            "held out": held,
        }


def locate(options: Namespace) -> None:
    from pke_fast import engine

    config = settings_of(options)
    check_out(options)
    requests, locality = read_for(options, config, edits=False)
    conditions = _conditions(options)
    loaded = _load_for(conditions, options)
    with joined(conditions["device"] or loaded.device) as ranks:
        result = engine.locate(
            loaded.model,
            loaded.tokenizer,
            requests,
            config,
            locality=locality,
            compare=_other(options) if options.compare else None,
            stages=_clock(conditions["device"] or loaded.device, ranks),
            name=loaded.name,
            ranks=ranks,
            **conditions,
        )
    if not ranks.first:
        return
    files = result.write(options.out, force=options.force)
    console = console_of(options)
    by_layer = {str(layer): len(ids) for layer, ids in result.hot_spots.by_layer().items()}
    summary = {"hot_spots": {"k": len(result.hot_spots), "window": list(result.window), "by_layer": by_layer}}
    terminal.hot_spots(console, {**summary, "model": {"neurons_per_layer": result.score_map.shape[1]}})
    foretold(console, result.probe)
    terminal.stages(console, [vars(stage) for stage in result.stages.done])
    terminal.plan(console, result.plan)
    terminal.files(console, Path(options.out), files)
    counts = {"given": result.given, "requests": result.requests}
    counts |= {"already_refused": result.already_refused, "locality": result.locality}
    finish(options, {**summary, **counts, "probe": result.probe, "plan": result.plan, "files": files})


def _other(options: Namespace) -> Callable[[], Any]:
    """Loads the checkpoint to compare with, in the host's memory: it is no part of what a plan counts on the device."""
    return lambda: load_model(options.compare, "cpu", options.dtype).model


def chat(options: Namespace) -> None:
    from pke_fast.generation import generate
    from pke_fast.judges import verdicts
    from pke_fast.patch import Patch
    from pke_fast.report import REDACTED
    from pke_fast.workbench import workbench

    patch = Patch.load(options.patch) if options.patch else None
    config = settings_of(options)
    loaded = _load(options)
    console = console_of(options)
    if patch is not None:
        tell_another_base(patch, loaded)
    with workbench(loaded.model, loaded.tokenizer, config, name=loaded.name) as bench:

        def answer(prompt: str) -> str:
            tokens = options.max_new_tokens
            return generate(bench.model, bench.tokenizer, bench.encoder, [prompt], max_new_tokens=tokens)[0]

        for prompt in _prompts(options, console):
            try:
                text_or_none(prompt, "the prompt")  # half a character, of bytes that aren't UTF-8
                before = answer(prompt)
            except InputError as error:  # one prompt that is too long doesn't end the conversation
                terminal.warnings(console, [str(error)])
                continue
            after = None
            if patch is not None:
                patch.apply(bench.model)
                after = answer(prompt)
                patch.revert(bench.model)
            refused = {"before": verdicts(before), "after": None if after is None else verdicts(after)}
            if options.redact:  # whether a prompt is harmful is not known: what can be told is how the judges judge
                before, after = REDACTED, None if after is None else REDACTED
                terminal.facts(console, "Refused", {key: found for key, found in refused.items() if found})
            terminal.exchange(console, prompt, before, after)
            if options.json:  # an exchange a line: there may be many
                print(json.dumps({"prompt": prompt, "before": before, "after": after, "refused": refused}), flush=True)


def _prompts(options: Namespace, console: Console) -> Any:
    """The prompt that was given, else those that are typed or piped in, to the end of the input."""
    if options.prompt is not None:
        yield options.prompt
        return
    if sys.stdin.isatty():
        console.print("Type a prompt; an empty line ends.", style="dim")
    while True:
        try:
            prompt = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise InputError("the prompts are not UTF-8", got=str(error), do="convert them to UTF-8") from error
        if not prompt:
            return
        yield prompt


def doctor(options: Namespace) -> None:
    from pke_fast.cli.doctor import examine

    found = examine()
    terminal.doctor(console_of(options), found)
    finish(options, found)


def demo(options: Namespace) -> None:
    from pke_fast.cli.demo import run

    run(options)
