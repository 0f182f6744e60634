"""The tables in which settings, kinds of harm and edits in a row are compared."""

from __future__ import annotations

from collections.abc import Mapping

from precision import fronts
from precision.figures import NONE, Found, ability, kl, minutes, percent, perplexity, rate, table
from precision.sequential import FIRST, states
from precision.sets import ALIKE, ATTACKS, BENIGN, DOLLY, SAFE, UNSAFE
from precision.settings import Setting


def ablation_table(found: Found, settings: Mapping[str, Setting]) -> str:
    """Every setting as it was edited."""
    sets = (ATTACKS, UNSAFE, DOLLY, SAFE, ALIKE, BENIGN)
    rows = []
    for name, setting in settings.items():
        run = f"{name}-{setting.seeds[0]}"
        edit, front = found.get(f"edit, {run}"), found.get(f"front, {run}")
        if edit is None:
            continue
        refused = fronts.rates(front["scales"]["1"]) if front else {}
        cells = [percent(refused[part]) if refused else NONE for part in sets]
        changed = [f"{edit['neurons']:,} ({percent(edit['share'])})", f"{edit['change']:.2f}"]
        rows.append([run, *cells, *changed, minutes(edit["seconds"])])
    return table(["refused by", *sets, "neurons", "norm of the change", "time"], rows)


def equal_table(found: Found, settings: Mapping[str, Setting]) -> str:
    """Every setting scaled to the same attack success: what it breaks there."""
    rows = []
    for name, setting in settings.items():
        run = f"{name}-{setting.seeds[0]}"
        front = found.get(f"front, {run}")
        if front is None:
            continue
        point = fronts.point_at(front["scales"])
        if point is None:
            best = max(fronts.rates(verdicts)[ATTACKS] for verdicts in front["scales"].values())
            rows.append([run, f"not reached: {percent(1 - best)} at best", *[NONE] * 8])
            continue
        refused = [percent(point.refused[part]) for part in (UNSAFE, DOLLY, SAFE, ALIKE, BENIGN)]
        equal = f"{run} at equal ASR"
        broken = [perplexity(found, equal), kl(found, equal), ability(found, equal, "openbook_qa")]
        rows.append([run, f"{point.scale:.2f}", *refused, *(value[1] if value else NONE for value in broken)])
    sets = [f"refused, {part}" for part in (UNSAFE, DOLLY, SAFE, ALIKE, BENIGN)]
    return table(["setting", "scale", *sets, "perplexity", "KL", "openbook_qa"], rows)


def kinds_table(found: Found) -> str:
    """What an edit refuses of a kind that it hasn't seen, and what a probe that hasn't either finds of it."""
    cells = [value for name, value in found.items() if name.startswith("kind, ")]
    if not cells:
        return ""
    names = list(cells[0]["benign"])
    n = sum(cell["n"] for cell in cells)
    rows = []
    for cell in cells:
        beside = [cell["benign"][name] for name in names]
        shown = [f"{percent(part['refused'] / part['n'])}; {percent(part['probe'])}" for part in beside]
        rows.append([cell["kind"], rate(cell["refused"], cell["n"]), *shown])
    means = []
    for name in names:
        parts = [(cell["n"], cell["benign"][name]) for cell in cells]
        refused = sum(part["refused"] for _, part in parts) / sum(part["n"] for _, part in parts)
        means.append(f"{percent(refused)}; {percent(sum(count * part['probe'] for count, part in parts) / n)}")
    rows.append(["all", rate(sum(cell["refused"] for cell in cells), n), *means])
    return table(["kind", "refused", *(f"{name} refused; the probe finds there" for name in names)], rows)


def sequential_table(found: Found) -> str:
    """What is refused after each edit, and the perplexity."""
    if not (made := states(found)):
        return ""
    names = (FIRST, ATTACKS, UNSAFE, DOLLY, SAFE, ALIKE)
    rows = [
        [str(number), *(percent(state["refused"][name]) for name in names), f"{state['perplexity']:.2f}"]
        for number, state in enumerate(made)
    ]
    return table(["edits", *(f"refused, {name}" for name in names), "perplexity"], rows)
