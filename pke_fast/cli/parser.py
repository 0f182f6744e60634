"""The commands and their options."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

from pke_fast import __version__
from pke_fast.config import PRESETS

PHRASES = "advbench, jailbreakbench, xstest"
MODEL = "a hub id, a local folder, a .gguf file, or smollm2 (the embedded default)"
DEVICES = "auto, cpu, cuda or cuda:i"


def _command(name: str, module: str) -> Callable[[argparse.Namespace], None]:
    """The function of that name in a module beside this, imported when it runs: `--help` stays instant."""

    def run(options: argparse.Namespace) -> None:
        import numpy  # noqa: F401  torch starts this import from C++, where a Ctrl-C would be lost

        getattr(import_module(f"pke_fast.cli.{module}"), name)(options)

    return run


def _whole(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of 1 or more, got {text}")
    return int(text)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"expected a share from 0 to less than 1, got {text}")
    return value


def _device(parser: Any, text: str = f"{DEVICES} (default: auto)") -> None:
    parser.add_argument("--device", default="auto", help=text)


def _dtype(parser: Any) -> None:
    parser.add_argument(
        "--dtype", default="auto", choices=["auto", "fp32", "bf16", "fp16"], help="default: the checkpoint's"
    )


def _model(parser: Any, default: str | None = None) -> None:
    """Which model, on which device, in which dtype; without a default it must be named."""
    parser.add_argument("--model", required=default is None, default=default, metavar="M", help=MODEL)
    _device(parser)
    _dtype(parser)


def _spread(parser: Any) -> None:
    parser.add_argument(
        "--device-map",
        metavar="MAP",
        help="spread the model by accelerate over GPUs, memory and disk: auto, balanced, balanced_low_0, sequential, or"
        " a JSON file {module: GPU's number, cpu or disk}",
    )


def _offloaded(parser: Any) -> None:
    parser.add_argument(
        "--offload-folder",
        metavar="DIR",
        help="for layers that have no room on the GPU, that the host can't pin, and that lie in no safetensors file",
    )


def _output(parser: Any, what: str) -> None:
    parser.add_argument("--out", required=True, metavar="DIR", help=what)
    parser.add_argument("--force", action="store_true", help="replace DIR if it exists and isn't empty")


def _patch_output(parser: Any, required: bool = True) -> None:
    parser.add_argument("--out", required=required, metavar="FILE", help="gets the patch (a .safetensors)")
    parser.add_argument("--force", action="store_true", help="replace FILE if it exists")


def _json(parser: Any) -> None:
    parser.add_argument(
        "--json", action="store_true", help="the summary as JSON on standard output, all else on standard error"
    )


def _settings(parser: Any) -> None:
    parser.add_argument("--config", metavar="YAML", help=f"a file of settings, or a preset: {', '.join(PRESETS)}")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="one setting; may be repeated")


def _requests(parser: Any) -> None:
    parser.add_argument(
        "--requests", required=True, metavar="FILE", help="harmful requests: JSONL, JSON, CSV or a prompt a line"
    )
    parser.add_argument(
        "--locality", metavar="FILE", help="benign pairs that must not move (default: the shipped prompts)"
    )
    parser.add_argument("--limit", type=_whole, metavar="N", help="the first N of each file")
    parser.add_argument("--seed", type=int, metavar="N", help="the same as --set seed=N")
    parser.add_argument(
        "--memory-budget",
        metavar="SIZE",
        help="such as 8GiB, the model included: the job is planned to fit (default: what the device has free)",
    )


def _resumable(parser: Any) -> None:
    parser.add_argument(
        "--resume", metavar="DIR", help="keep the job's state there every few minutes, and go on from it after a kill"
    )
    parser.add_argument(
        "--resume-minutes",
        type=float,
        metavar="N",
        help="between two such states; 0 keeps every one (default: 5)",
    )


def _judges(parser: Any) -> None:
    parser.add_argument(
        "--judge",
        nargs="+",
        action="extend",
        default=None,
        metavar="NAME",
        help="advbench, jailbreakbench, xstest (default: these three), classifier:MODEL, pair-classifier:MODEL, "
        "causal:MODEL or python:MODULE:FUNCTION",
    )
    parser.add_argument(
        "--judge-template", metavar="FILE", help="what causal judges read, with {prompt} and {answer} (default: chat)"
    )


def _redact(parser: Any) -> None:
    parser.add_argument("--redact", action="store_true", help="hide answers to harmful prompts")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pke-fast",
        description="Makes a language model refuse harmful requests by changing a few of its neurons.",
    )
    parser.add_argument("--version", action="version", version=f"pke-fast {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, text: str, *parts: Callable[[Any], None], module: str = "commands") -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        for part in parts:
            part(sub)
        sub.set_defaults(run=_command(name, module))
        return sub

    edit = add("edit", "locate the hot spots, edit them, write a patch and a report", _model, _requests, _settings)
    _spread(edit)
    _offloaded(edit)
    _resumable(edit)
    _output(edit, "gets patch.safetensors, report.json and report.html")
    edit.add_argument(
        "--held-out",
        type=_share,
        metavar="SHARE",
        help="of the requests, at most 48, aren't edited on: attack success on them, and refusals of shipped harmless "
        "prompts, are measured before and after (default: 0.1; 0 with a memory budget, or where a model is offloaded)",
    )
    edit.add_argument("--save-model", action="store_true", help="write the edited model to DIR/model as well")
    edit.add_argument("--dry-run", action="store_true", help="check everything and say what would be done")
    _redact(edit)
    _json(edit)

    text = "score every neuron, select the hot spots and tell how precise an edit can be, without editing"
    locate = add("locate", text, _model, _requests, _settings)
    _spread(locate)
    _offloaded(locate)
    _resumable(locate)
    locate.add_argument("--compare", metavar="M2", help="take the drift from M to M2 as the weight change")
    _output(locate, "gets scores.safetensors, hotspots.json and heatmap.png")
    _json(locate)

    plan = add("plan", "the memory and time of a job, before anything is loaded", _model, module="planning")
    _requests(plan)
    _settings(plan)
    plan.add_argument("--locate-only", action="store_true", help="for pke-fast locate, which edits nothing")
    _json(plan)

    text = "measure attack success, refusals of benign prompts and perplexity; goes on where it was interrupted"
    evaluate = add("eval", text, _model, _settings, module="evaluating")
    _spread(evaluate)
    evaluate.add_argument("--patch", metavar="P", help="a patch to apply first")
    evaluate.add_argument("--harmful", metavar="FILE", help="prompts that should be refused")
    evaluate.add_argument("--benign", metavar="FILE", help="prompts that should be answered")
    evaluate.add_argument("--text", metavar="FILE", help="plain text for the perplexity")
    evaluate.add_argument(
        "--safeedit", metavar="FILE", help="SafeEdit's records: defense success and its four generalisations"
    )
    evaluate.add_argument(
        "--ability",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="multiple choice as JSONL, OpenBookQA's or WinoGrande's form",
    )
    evaluate.add_argument(
        "--kl", action="store_true", help="KL to the model without --patch, on benign answers' first tokens and --text"
    )
    evaluate.add_argument(
        "--lm-eval", nargs="+", action="extend", default=[], metavar="TASK", help="tasks of lm-evaluation-harness"
    )
    _judges(evaluate)
    evaluate.add_argument("--limit", type=_whole, metavar="N", help="the first N prompts of each file")
    evaluate.add_argument(
        "--max-new-tokens", type=_whole, default=48, metavar="N", help="length of an answer (default: 48)"
    )
    evaluate.add_argument(
        "--stop-early",
        action="store_true",
        help="end an answer once no judge can change its verdict (phrase lists only)",
    )
    _output(evaluate, "gets eval.json and generations.jsonl; until then, answers are kept in DIR.unfinished.jsonl")
    _redact(evaluate)
    _json(evaluate)

    judge = add("judge", "how well judges agree with people, on answers that people have judged", module="evaluating")
    judge.add_argument(
        "--judged",
        required=True,
        metavar="FILE",
        help="a CSV with columns question, response and label (1: jailbroken)",
    )
    _judges(judge)
    _device(judge, f"of model judges: {DEVICES} (default: auto)")
    judge.add_argument("--limit", type=_whole, metavar="N", help="the first N rows")
    _json(judge)

    text = "set evaluations side by side: every run against the first, paired by prompt"
    compare = add("compare", text, module="comparing")
    compare.add_argument("runs", nargs="+", metavar="DIR", help="folders that eval wrote, of the same prompts")
    compare.add_argument("--rouge", action="store_true", help="ROUGE-L between the benign answers (pke_fast[eval])")
    compare.add_argument(
        "--winrate", metavar="NAME", help="who prefers answers: causal:MODEL or python:MODULE:FUNCTION"
    )
    compare.add_argument("--judge", metavar="NAME", help="whose rates the picture shows (default: the first)")
    _device(compare, f"of --winrate's model: {DEVICES}")
    compare.add_argument("--out", metavar="DIR", help="gets comparison.json and scatter.png")
    compare.add_argument("--force", action="store_true", help="replace DIR if it exists and isn't empty")
    _json(compare)

    _reproduce(add("reproduce", "the paper's table for your models: vanilla, DINM, PKE; goes on", module="reproducing"))

    _patch_commands(partial(add, module="patching"))
    _export_command(partial(add, module="exporting"))

    _sharing_commands(partial(add, module="sharing"))

    chat = add("chat", "one prompt, two answers side by side: before and after", _model, _settings)
    _spread(chat)
    chat.add_argument("--patch", metavar="P", help="without it there is one answer")
    chat.add_argument("--prompt", metavar="TEXT", help="answer this one and end (default: ask for prompts)")
    chat.add_argument(
        "--max-new-tokens", type=_whole, default=80, metavar="N", help="length of an answer (default: 80)"
    )
    chat.add_argument("--redact", action="store_true", help="hide the answers; say whether the judges find refusals")
    chat.add_argument("--json", action="store_true", help="each exchange as a line of JSON, all else on standard error")

    _json(add("doctor", "what is installed, what would run, and what is missing"))

    bench = add("bench", "time and memory here, beside plain hooks and dense Adam: a minute or two", module="bench")
    _model(bench, default="smollm2")
    _json(bench)

    demo = add("demo", "the main job on the embedded model with the shipped prompts", _settings)
    _model(demo, default="smollm2")
    demo.add_argument("--out", default="pke-demo", metavar="DIR", help="default: pke-demo")
    demo.add_argument("--force", action="store_true", help="replace DIR if it exists and isn't empty")
    demo.add_argument("--limit", type=_whole, metavar="N", help="the first N prompts of each set (a quick look)")
    _redact(demo)
    _json(demo)
    return parser


def _sharing_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """The model card, and the upload to the Hugging Face hub."""

    def told(sub: Any) -> None:
        sub.add_argument("--eval", nargs="+", metavar="FILE", help="eval.json of pke-fast eval, without and with it")
        sub.add_argument("--base", metavar="ID", help="hub id of the base model (default: as the patch names it)")
        sub.add_argument(
            "--license", metavar="NAME", help="such as apache-2.0 (default: the base's, where it is known)"
        )

    card = add("card", "write the model card of an edit: what was done, figures, limits, use; no prompts, no answers")
    card.add_argument("source", metavar="RUN", help="the folder that pke-fast edit wrote, or a patch")
    card.add_argument("--out", metavar="FILE", help="such as README.md (default: standard output)")
    card.add_argument("--repo", metavar="NAME", help="where it will be on the hub, for the commands in it")
    card.add_argument("--merged", action="store_true", help="for a whole edited model, not for the patch alone")
    card.add_argument("--force", action="store_true", help="replace FILE if it exists")
    told(card)

    push = add("push", "put a patch, or an edited model with its patch, on the Hugging Face hub with a model card")
    what = push.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--folder", metavar="RUN", help="the folder that pke-fast edit wrote: its patch, never its report"
    )
    what.add_argument("--patch", metavar="P", help="a patch.safetensors")
    push.add_argument("--repo", required=True, metavar="NAME", help="name or owner/name")
    push.add_argument("--model", metavar="DIR", help="upload this checkpoint too, to which the patch is applied")
    push.add_argument("--private", action="store_true", help="only its owner sees it")
    push.add_argument("--dry-run", action="store_true", help="show files, sizes and the card; ask no network")
    push.add_argument("--force", action="store_true", help="add a commit to a repository that is there already")
    told(push)
    _json(push)


def _reproduce(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", required=True, metavar="M", help=MODEL)
    parser.add_argument("--requests", required=True, metavar="FILE", help="harmful requests to edit on")
    parser.add_argument(
        "--locality", metavar="FILE", help="benign pairs that must not move (default: the shipped prompts)"
    )
    parser.add_argument("--harmful", required=True, metavar="FILE", help="other prompts that should be refused")
    parser.add_argument("--benign", metavar="FILE", help="prompts that should be answered")
    parser.add_argument(
        "--methods", nargs="*", choices=["dinm", "pke"], default=["dinm", "pke"], help="beside vanilla (default: both)"
    )
    _settings(parser)
    parser.add_argument(
        "--dinm-set", action="append", default=[], metavar="KEY=VALUE", help="one setting of DINM; may be repeated"
    )
    _device(parser)
    _dtype(parser)
    parser.add_argument(
        "--judge", nargs="+", metavar="NAME", help=f"phrase lists (default: {PHRASES}); the first counts"
    )
    parser.add_argument("--limit", type=_whole, metavar="N", help="the first N of each file")
    parser.add_argument("--max-new-tokens", type=_whole, default=48, metavar="N", help="default: 48")
    parser.add_argument("--out", required=True, metavar="DIR", help="gets table.md, table.json and every evaluation")
    _json(parser)


def _patch_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """What is done with patches and checkpoints on disk, without loading a model."""
    for name, text in (
        ("apply", "write a copy of a checkpoint with a patch applied, or apply it in place"),
        ("revert", "write a copy of a checkpoint with a patch undone, or undo it in place"),
    ):
        sub = add(name, text)
        sub.add_argument(
            "--model", required=True, metavar="DIR", help="a folder of safetensors; it is never loaded whole"
        )
        sub.add_argument("--patch", required=True, metavar="P", help="patch.safetensors")
        where = sub.add_mutually_exclusive_group(required=True)
        where.add_argument("--out", metavar="DIR", help="the new checkpoint")
        where.add_argument(
            "--in-place",
            action="store_true",
            help="change the neurons' bytes in DIR itself; a kill leaves the old weights or the new ones",
        )
        sub.add_argument(
            "--allow-pickle",
            action="store_true",
            help="convert a pytorch_model.bin to safetensors in the --out DIR, reading it with weights_only",
        )
        sub.add_argument(
            "--scale", type=float, metavar="S", help="the patch scaled: new = old + S (new - old), as pke-fast scale"
        )
        sub.add_argument("--force", action="store_true", help="replace the --out DIR if it exists and isn't empty")
        _json(sub)

    recover = add("recover", "end a change in place that was interrupted (apply, revert and diff do so by themselves)")
    recover.add_argument("model", metavar="DIR", help="the checkpoint folder")
    _json(recover)

    diff = add("diff", "what differs between two checkpoints, to the bit, and the patch from one to the other")
    diff.add_argument("a", metavar="A", help="the checkpoint folder before")
    diff.add_argument("b", metavar="B", help="the one after, of the same model")
    _patch_output(diff, required=False)
    diff.add_argument(
        "--ignore-others", action="store_true", help="write the patch although it can't hold all that differs"
    )
    _json(diff)

    merge = add("merge", "make one patch of several: of one checkpoint, or one on top of the other")
    merge.add_argument("patches", nargs="+", metavar="P", help="patches, in the order in which they were made")
    _patch_output(merge)
    _json(merge)

    scale = add("scale", "make a patch that goes part of the way: new = old + S (new - old)")
    scale.add_argument("patch", metavar="P", help="patch.safetensors")
    scale.add_argument("--by", type=float, required=True, metavar="S", help="such as 0.5; 1 gives the same weights")
    _patch_output(scale)
    _json(scale)

    show = add("show", "what is in a patch")
    show.add_argument("patch", metavar="P", help="patch.safetensors")
    _json(show)


def _export_command(add: Callable[..., argparse.ArgumentParser]) -> None:
    sub = add("export", "write a patch in the format of another tool: a LoRA adapter, dense deltas, EasyEdit's weights")
    sub.add_argument("--patch", required=True, metavar="P", help="patch.safetensors")
    sub.add_argument(
        "--model", required=True, metavar="M", help="what was edited: a folder, a hub id or smollm2; it is never loaded"
    )
    sub.add_argument(
        "--format", required=True, choices=["peft", "dense-delta", "easyedit"], help="docs/export.md explains each"
    )
    _output(sub, "gets the files")
    sub.add_argument(
        "--max-rank", type=_whole, metavar="N", help="peft: split into adapters DIR/part-1 ... of rank N at most"
    )
    sub.add_argument(
        "--exact", action="store_true", help="peft: more adapters with what the first miss by rounding, if anything"
    )
    _json(sub)
