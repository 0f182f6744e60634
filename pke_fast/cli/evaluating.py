"""The commands that measure: eval and judge."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pke_fast import terminal
from pke_fast.cli.common import console_of, finish, settings_of, tell_another_base
from pke_fast.cli.outputs import check_out
from pke_fast.encoding import Encoded
from pke_fast.errors import InputError
from pke_fast.evaluating import shown
from pke_fast.evaluating.ability import Question, measure_ability, read_questions
from pke_fast.evaluating.defense import read_safeedit
from pke_fast.evaluating.divergence import FIRST_TOKENS, divergence_from_base, windows_as_sequences
from pke_fast.evaluating.harness import check_harness, run_harness
from pke_fast.evaluating.kept import unfinished
from pke_fast.evaluating.outputs import alpaca_eval, harmbench, write_json
from pke_fast.evaluating.verdicts import AnswerJudge, open_judges
from pke_fast.evaluation import Evaluation, evaluate_model, identity, redacted, write_evaluation
from pke_fast.files import atomic_folder, remove
from pke_fast.judges import JUDGES
from pke_fast.loading import load_model
from pke_fast.patch import Patch
from pke_fast.perplexity import text_windows
from pke_fast.requests import Pair, read_pairs, read_prompts, read_requests
from pke_fast.stages import Stages
from pke_fast.workbench import Workbench, workbench

KL_TOKENS = 4096  # of the running text: each window is read twice


def eval(options: Namespace) -> None:
    config = settings_of(options)
    ability = _questions(options.ability, options.limit)
    judges = _judges(options, options.device)
    given = options.harmful, options.benign
    harmful, benign = (read_prompts(path, options.limit) if path else None for path in given)
    requests = read_requests(options.harmful, options.limit) if options.harmful else []
    ids = {request.prompt: request.case_id for request in requests if request.case_id is not None}
    defense = read_safeedit(options.safeedit, options.limit) if options.safeedit else None
    if options.lm_eval:
        check_harness()
    if options.kl and not (options.patch and (options.benign or options.text)):
        raise InputError("--kl has nothing to compare", expected="--patch, and --benign or --text", do="give them too")
    pairs = read_pairs(options.benign, options.limit) if options.kl and options.benign else []
    text = read_text(options.text) if options.text else None
    check_out(options)
    patch = Patch.load(options.patch) if options.patch else None
    loaded = load_model(options.model, options.device, options.dtype, device_map=options.device_map)
    measured = identity(loaded.model, patch)
    if patch is not None:
        tell_another_base(patch, loaded)
        patch.apply(loaded.model)
    kept = unfinished(options.out)
    with (
        workbench(loaded.model, loaded.tokenizer, config, Stages(device=loaded.device), loaded.name) as bench,
        _kept_is_told(kept),
    ):
        result = evaluate_model(
            loaded.model,
            loaded.tokenizer,
            bench.encoder,
            harmful,
            benign,
            text,
            judges=judges,
            max_new_tokens=options.max_new_tokens,
            stages=bench.stages,
            keep=kept,
            stop_early=options.stop_early,
            defense=defense,
            only_more=bool(ability or options.lm_eval),
        )
        for name, questions in ability.items():
            count = sum(len(question.options) for question in questions)
            with bench.stages.stage(f"Answering {name}", count) as advance:
                found = measure_ability(loaded.model, loaded.tokenizer, questions, advance=advance)
            result.more.setdefault("ability", {})[name] = found
        if patch is not None and options.kl:
            result.more["divergence"] = _divergence(bench, patch, pairs, text)
        if options.lm_eval:
            result.more["lm_eval"] = run_harness(loaded.model, loaded.tokenizer, options.lm_eval, options.limit)
        result.more.update(measured)
        with atomic_folder(Path(options.out), force=options.force) as folder:
            if options.redact:
                result.generations[:] = redacted(result.generations)
            write_evaluation(folder, result, loaded.name, options.patch)
            files = _outputs(folder, result, options, loaded.name, ids)
    remove(kept)
    console = console_of(options)
    terminal.evaluation(console, result.as_dict())
    shown.further(console, result.as_dict())
    terminal.files(console, Path(options.out), files)
    finish(options, {"model": loaded.name, "patch": options.patch, **result.as_dict()})


def _questions(paths: list[str], limit: int | None) -> dict[str, list[Question]]:
    """The questions of each file, under its name without the suffix."""
    names = [Path(path).stem for path in paths]
    if len(set(names)) < len(names):
        raise InputError(
            "the files of --ability can't be told apart",
            expected="names that differ, without folder and suffix",
            got=", ".join(paths),
            do="rename them, or evaluate them apart",
        )
    return {name: read_questions(path, limit) for name, path in zip(names, paths, strict=True)}


def _outputs(folder: Path, result: Evaluation, options: Namespace, model: str, ids: dict[str, str]) -> dict[str, str]:
    """Writes the answers in the forms of other tools too; says what is in the folder."""
    files = {"eval.json": "the figures", "generations.jsonl": "every answer and how it was judged"}
    if result.benign is not None:
        name = f"{model}+{Path(options.patch).stem}" if options.patch else model
        write_json(folder / "alpaca_eval.json", alpaca_eval(result.generations, name, Path(options.benign).stem))
        files["alpaca_eval.json"] = "the benign answers, as AlpacaEval takes them"
    if result.harmful is not None:
        write_json(folder / "harmbench.json", harmbench(result.generations, ids, result.settings["judges"][0]))
        files["harmbench.json"] = "the harmful answers by behaviour, as HarmBench has them"
    return files


def _divergence(bench: Workbench, patch: Patch, pairs: list[Pair], text: str | None) -> dict[str, Any]:
    """KL to the base at the first tokens of benign answers and on running text."""
    found = {}
    encoded = [bench.encoder.encode(p.prompt, p.answer, answer_tokens=FIRST_TOKENS) for p in pairs if p.answer]
    bare = [p.prompt for p in pairs if not p.answer]
    # Without an answer the first position alone counts: any one token may stand behind it.
    encoded += [Encoded((*ids, ids[-1]), len(ids)) for ids in map(bench.encoder.prompt_ids, bare)]
    windows = text_windows(bench.model, bench.tokenizer, text, max_tokens=KL_TOKENS) if text is not None else []
    parts = {"benign answers": encoded, "text": windows_as_sequences(windows)}
    for name, sequences in parts.items():
        if sequences:
            with bench.stages.stage(f"Comparing with the base on {name}", len(sequences)) as advance:
                found[name] = divergence_from_base(bench.model, patch, sequences, advance=advance)
    return found


def _judges(options: Namespace, device: str) -> list[AnswerJudge]:
    from pke_fast.evaluating.model_judges import read_template

    template = read_template(options.judge_template) if options.judge_template else None
    return open_judges(options.judge or list(JUDGES), device=device, template=template)


def judge(options: Namespace) -> None:
    from pke_fast.evaluating.agreement import agreement, read_judged

    judged = read_judged(options.judged, options.limit)
    found = agreement(judged, _judges(options, options.device), Stages(device="cpu"))
    shown.agreement(console_of(options), found)
    finish(options, found)


@contextmanager
def _kept_is_told(kept: Path) -> Iterator[None]:
    """Where the work doesn't end well, says what is kept of it."""
    try:
        yield
    except BaseException:
        if kept.exists():
            print(
                f"pke-fast: the answers so far are kept in {kept}; the same command goes on from there",
                file=sys.stderr,
            )
        raise


def read_text(path: str) -> str:
    """A text file as it is.

    Raises:
        InputError: it can't be read, or isn't UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"can't read the text {path}", got=error.strerror, do="check --text") from error
    except UnicodeDecodeError as error:
        raise InputError(f"the text {path} is not UTF-8", got=str(error), do="convert it to UTF-8") from error
