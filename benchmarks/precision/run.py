"""The order in which all is measured: the defaults first, so that the table is there even where the run is cut."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pke_fast.combine import scale
from pke_fast.config import PKEConfig
from pke_fast.encoding import PromptEncoder
from pke_fast.loading import context_length, load_model
from precision import fronts
from precision import measure as measures
from precision.cells import Cells, Missing
from precision.edits import edit
from precision.kinds import folds, held_out
from precision.lab import Lab
from precision.pictures import draw
from precision.sequential import sequential
from precision.sets import Sizes, read_sets
from precision.settings import DEFAULT, DRAFT, SETTINGS, Setting
from precision.tables import generated, put
from precision.yardstick import yardstick

ROOT = Path(__file__).resolve().parent.parent.parent
DOC = ROOT / "docs" / "precision.md"
EQUAL_QUESTIONS = {"openbook_qa": 250}  # at the point of equal attack success
QUESTIONS: dict[str, int | None] = {"openbook_qa": None, "winogrande": None}
VANILLA = "vanilla"


def measure(
    data: Path,
    out: Path,
    only: Sequence[str],
    sizes: Sizes,
    *,
    model: str = "smollm2",
    device: str = "auto",
    dtype: str = "auto",
    doc: Path = DOC,
    settings: Mapping[str, Setting] = SETTINGS,
    kinds: bool = False,
    say: Callable[[str], None] = print,
) -> Lab:
    """Makes all cells that aren't there yet and writes the generated part of a document after each group of them.

    Args:
        data: the folder of public files.
        out: keeps the cells.
        only: parts of names of cells; others are taken if they are there.
        settings: what is compared, the default among them.
        kinds: hold kinds of harm out in turn too.

    Raises:
        InputError: a public file is missing, or the document has no markers; or as the parts do.
    """
    put(doc, None)  # a document without its markers is told now
    loaded = load_model(model, device, dtype)
    context = context_length(loaded.model) or 4096
    sets = read_sets(data, PromptEncoder(loaded.tokenizer, PKEConfig(max_length=context), context), sizes)
    out.mkdir(parents=True, exist_ok=True)
    lab = Lab(loaded, sets, Cells(out, _commit(), only, say))
    for part in _parts(lab, settings, kinds):
        try:
            part()
        except Missing as missing:
            say(f"left out: {missing}")
        put(doc, generated(lab.cells.found, settings, sets))
    for path in draw(lab.cells.found, settings, doc.parent / "images"):
        say(f"drawn: {path}")
    return lab


def _parts(lab: Lab, settings: Mapping[str, Setting], kinds: bool) -> list[Callable[[], object]]:
    plain = PKEConfig()
    default = settings[DEFAULT]
    others = {name: setting for name, setting in settings.items() if name != DEFAULT}
    parts: list[Callable[[], object]] = [
        lambda: measures.answers(lab, VANILLA, None, "", default.config(lab.structure, 0), whole=True)
    ]
    parts += [lambda s=seed: _answered(lab, DEFAULT, default, s) for seed in default.seeds]
    parts += [lambda: measures.damage(lab, VANILLA, None, "", plain, QUESTIONS)]
    parts += [lambda s=seed: _damaged(lab, DEFAULT, default, s) for seed in default.seeds]
    parts += [lambda: yardstick(lab, default.config(lab.structure, 0))]
    parts += [lambda: _compared(lab, DEFAULT, default, default.seeds[0])]
    for name, setting in others.items():
        for seed in setting.seeds:
            if setting.thorough:
                parts.append(lambda n=name, st=setting, s=seed: _answered(lab, n, st, s))
                parts.append(lambda n=name, st=setting, s=seed: _damaged(lab, n, st, s))
        parts.append(lambda n=name, st=setting: _compared(lab, n, st, st.seeds[0]))
    parts.append(lambda: sequential(lab, settings.get(DRAFT, default).config(lab.structure, 0)))
    if kinds:
        parts += [lambda f=fold: held_out(lab, default.config(lab.structure, 0), f) for fold in range(len(folds()))]
    return parts


def called(name: str, seed: int) -> str:
    """What a setting's cells are called."""
    return f"{name}-{seed}"


def _answered(lab: Lab, name: str, setting: Setting, seed: int) -> None:
    value, patch = edit(lab, called(name, seed), setting, seed)
    config = setting.config(lab.structure, seed)
    measures.answers(lab, called(name, seed), patch, value["sha"], config, whole=seed == setting.seeds[0])


def _damaged(lab: Lab, name: str, setting: Setting, seed: int) -> None:
    value, patch = edit(lab, called(name, seed), setting, seed)
    config = setting.config(lab.structure, seed)
    measures.damage(lab, called(name, seed), patch, value["sha"], config, QUESTIONS)


def _compared(lab: Lab, name: str, setting: Setting, seed: int) -> None:
    """The front, and what is broken where it has the attack success at which all are compared."""
    value, patch = edit(lab, called(name, seed), setting, seed)
    config = setting.config(lab.structure, seed)
    found = fronts.front(lab, called(name, seed), patch, value["sha"], config)
    point = fronts.point_at(found["scales"])
    if point is None:
        return
    scaled = scale(patch, point.scale)
    measures.damage(
        lab, f"{called(name, seed)} at equal ASR", scaled, f"{value['sha']} {point.scale!r}", config, EQUAL_QUESTIONS
    )


def _commit() -> str:
    """The commit of the code, with a mark where files differ from it."""
    found = []
    for command in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]):
        run = subprocess.run(["git", *command], capture_output=True, text=True, cwd=ROOT, check=False)
        found.append(run.stdout.strip() if run.returncode == 0 else "")
    return found[0] + ("+changes" if found[1] else "")
