"""Measures how precise edits are, and writes the tables and pictures of docs/precision.md.

    python benchmarks/precision DATA [--out FOLDER] [--only PART ...]

Every cell is kept in --out by what it was made from: a killed run goes on where it was, and what is there is shown.
`--only default-0` makes the cells with that in their names and takes the others as they are there.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))  # Python may have been told not to look beside a script
from pke_fast.errors import PKEError
from precision import halves
from precision.run import DOC, measure
from precision.sets import Sizes
from precision.settings import SETTINGS


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the folder with the public files that docs/precision.md lists")
    parser.add_argument("--out", type=Path, default=Path("pke-precision"), help="keeps the cells (pke-precision)")
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help="make cells with this in their names")
    parser.add_argument("--kinds", action="store_true", help="also hold the shipped kinds of harm out in turn")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument(
        "--processes", type=int, choices=(1, 2), default=2, help="at once, where --only isn't given (default: 2)"
    )
    parser.add_argument("--doc", type=Path, default=DOC, help="whose generated part is written")
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    try:
        if options.processes == 2 and not options.only:
            _in_halves(options)
        measure(
            options.data, options.out, options.only, Sizes(),
            kinds=options.kinds, model=options.model, device=options.device, dtype=options.dtype, doc=options.doc,
        )  # fmt: skip
    except PKEError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"written: {options.doc} ({(time.perf_counter() - start) / 60:.0f} minutes)")
    return 0


def _in_halves(options: argparse.Namespace) -> None:
    """Makes all cells in two processes, but the first edit, which is timed, alone."""
    given = [str(options.data), "--out", str(options.out), "--model", options.model]
    given += ["--device", options.device, "--dtype", options.dtype, *(["--kinds"] if options.kinds else [])]
    for together in ([halves.alone(SETTINGS)], halves.chains(SETTINGS)):
        halves.make([[*given, "--only", *names] for names in together], options.out, options.doc)


if __name__ == "__main__":
    sys.exit(main())
