"""The tables in which settings, kinds of harm and edits in a row are compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from precision import fronts
from precision.cells import Value
from precision.figures import NONE, Found, ability, kl, minutes, of_edit, percent, perplexity, rate, table
from precision.kinds import HELD_KINDS, HELD_UNSAFE
from precision.sequential import FIRST, states
from precision.sets import ALIKE, ATTACKS, BENIGN, DOLLY, HELD, SAFE, UNSAFE
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
        verdicts = front["scales"]["1"] if front else {}
        cells = [rate(sum(verdicts[part]), len(verdicts[part])) if verdicts else NONE for part in sets]
        changed = [f"{edit['neurons']:,} ({percent(edit['share'])})", f"{edit['change']:.2f}"]
        rows.append([run, *cells, *changed, minutes(edit["seconds"])])
    return table(["refused by", *sets, "neurons", "norm of the change", "time"], rows)


def equal_table(found: Found, settings: Mapping[str, Setting]) -> str:
    """Every setting scaled to the same attack success: what it breaks there."""
    rows = []
    for run, scales in _fronts(found, settings):
        point = fronts.point_at(scales)
        if point is None:
            best = max(fronts.rates(verdicts)[ATTACKS] for verdicts in scales.values())
            rows.append([run, f"not reached: {percent(1 - best)} at best", *[NONE] * 9])
            continue
        refused = [percent(point.refused[part]) for part in (UNSAFE, DOLLY, SAFE, ALIKE, BENIGN)]
        equal = f"{run} at equal ASR"
        broken = [perplexity(found, equal), kl(found, equal), ability(found, equal, "openbook_qa")]
        broken.append(of_edit(found, run, "change", lambda norm, by=point.scale: f"{by * norm:.2f}"))
        rows.append([run, f"{point.scale:.2f}", *refused, *(value[1] if value else NONE for value in broken)])
    sets = [f"refused, {part}" for part in (UNSAFE, DOLLY, SAFE, ALIKE, BENIGN)]
    return table(["setting", "scale", *sets, "perplexity", "KL", "openbook_qa", "norm of the change"], rows)


def over_refused_table(found: Found, settings: Mapping[str, Setting]) -> str:
    """Every setting scaled until it refuses as many of XSTest's safe prompts: what else it refuses there."""
    shown = (ATTACKS, UNSAFE, HELD, DOLLY, ALIKE, BENIGN)
    rows = []
    for run, scales in _fronts(found, settings):
        point = fronts.point_at(scales, fronts.OVER_REFUSED, SAFE)
        if point is None:
            most = max(fronts.rates(verdicts)[SAFE] for verdicts in scales.values())
            rows.append([run, f"not reached: {percent(most)} at most", *[NONE] * len(shown)])
            continue
        rows.append([run, f"{point.scale:.2f}", *(percent(point.refused[part]) for part in shown)])
    return table(["setting", "scale", *(f"refused, {part}" for part in shown)], rows)


def _fronts(found: Found, settings: Mapping[str, Setting]) -> Iterator[tuple[str, Value]]:
    """Every setting's first seed that has a front, and its scales."""
    for name, setting in settings.items():
        run = f"{name}-{setting.seeds[0]}"
        if f"front, {run}" in found:
            yield run, found[f"front, {run}"]["scales"]


def kinds_table(found: Found) -> str:
    """What an edit refuses of kinds and types that it hasn't seen, and by how much it stands above a probe that hasn't
    either, beside every harmless set."""
    cells = [value for name, value in sorted(found.items()) if name.startswith("kinds, ")]
    names = list(dict.fromkeys(name for cell in cells for beside in cell["probe"].values() for name in beside))
    rows = []
    for cell in cells:
        for bad in cell["probe"]:
            what = cell["type"] if bad == HELD_UNSAFE else ", ".join(cell["kinds"])
            rows.append(_kinds_row(what.replace("_", " "), bad, [cell], names))
    for bad in (HELD_KINDS, HELD_UNSAFE):
        if parts := [cell for cell in cells if bad in cell["probe"]]:
            rows.append(_kinds_row(f"together: {bad}", bad, parts, names))
    return table(["held out", "refused", *(f"{name} refused; above the probe, points" for name in names)], rows)


def _kinds_row(what: str, bad: str, cells: Sequence[Value], names: Sequence[str]) -> list[str]:
    """One row of `kinds_table`: a harmful set of some folds, together."""
    count, n = (sum(cell["refused"][bad][i] for cell in cells) for i in (0, 1))
    shown = []
    for name in names:
        at = [cell for cell in cells if name in cell["probe"][bad]]
        if not at:
            shown.append(NONE)
            continue
        refused, of = (sum(cell["refused"][name][i] for cell in at) for i in (0, 1))
        above = sum(cell["refused"][bad][0] - cell["refused"][bad][1] * cell["probe"][bad][name] for cell in at)
        shown.append(f"{rate(refused, of)}; {100 * above / sum(cell['refused'][bad][1] for cell in at):+.1f}")
    return [what, rate(count, n), *shown]


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
