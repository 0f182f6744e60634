"""Files of prompts in the formats that people have, recognised by content and read as records, one after another.

Of a file of lines (JSONL, CSV, plain text) no more than a record is held at a time; a JSON array, or an object over
several lines, is read whole.

The suffix only decides what can't be told from the content: a .csv without a known column and a .json that isn't JSON
are errors, where another file would be plain text. `pke_fast.requests` makes requests, pairs and prompts of records.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from pke_fast.errors import InputError


@dataclass(frozen=True)
class Format:
    """One way to name the parts of a request. `keys` maps our names to the format's, in lower case."""

    name: str
    keys: Mapping[str, str]


# A record, be it a JSON object or a CSV row, has the first of these formats whose prompt it has. The order matters:
# JailbreakBench has both Goal (the prompt) and Behavior (a short title).
FORMATS = (
    Format(
        "pke_fast, EasyEdit",
        {
            "prompt": "prompt",
            "answer": "answer",
            "target_new": "target_new",
            "ground_truth": "ground_truth",
            "locality": "locality",
            "case_id": "case_id",
            "category": "category",
        },
    ),
    Format(
        "SafeEdit",
        {
            "prompt": "adversarial prompt",
            "target_new": "safe generation",
            "ground_truth": "unsafe generation",
            "locality": "knowledge constrain",  # so spelt in SafeEdit
            "case_id": "id",
            "category": "unsafety category",
        },
    ),
    Format("AdvBench, JailbreakBench", {"prompt": "goal", "ground_truth": "target", "category": "category"}),
    Format(
        "HarmBench",
        {
            "prompt": "behavior",
            "context": "contextstring",
            "case_id": "behaviorid",
            "category": "semanticcategory",
        },
    ),
)
_HALF = re.compile("[\ud800-\udfff]")  # of a character beyond U+FFFF, in UTF-16
_PROMPT_KEYS = ", ".join(f"{form.keys['prompt']!r} ({form.name})" for form in FORMATS)
_KNOWN = f"a JSON object or a CSV row with one of {_PROMPT_KEYS}, or plain text of one prompt a line"


@dataclass(frozen=True)
class Record:
    """One record of a file: `where` it stands, for messages, its `values` by lower-case key, and its format."""

    where: str
    values: Mapping[str, Any]
    format: Format

    def key(self, name: str) -> str:
        """The format's own key of one of our names, for messages."""
        return self.format.keys.get(name, name)

    def get(self, name: str) -> Any:
        """The raw value by our name; None where the format or the record has none."""
        key = self.format.keys.get(name)  # "" would be pandas' column of row numbers
        return None if key is None else self.values.get(key)

    def text(self, name: str) -> str | None:
        """A text by our name; None where it is missing, null or blank. Raises `InputError` for another type."""
        return text_or_none(self.get(name), f"{self.where}: {self.key(name)!r}")


def text_or_none(value: Any, where: str) -> str | None:
    """The value if it is text, None if it is None or blank. Raises `InputError` for anything else."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise InputError(f"{where} has the wrong type", expected="text", got=f"{type(value).__name__} {value!r:.80}")
    if _HALF.search(value):
        raise InputError(
            f"{where} holds half of a character",
            expected="text that UTF-8 can express",
            got="a lone \\uD800..\\uDFFF escape",
            do="write both halves of the pair, or the character itself",
        )
    return value if value.strip() else None


def read_records(path: str | Path) -> Iterator[Record]:
    """The records of a JSONL, JSON, CSV or plain text file, in order, each checked when its turn comes.

    Raises:
        InputError: the file can't be read, isn't text in UTF-8, is broken, or holds no record that we know.
    """
    path = Path(path)
    lines = _lines(path)
    blank: list[str] = []
    for first in lines:
        if first.strip():
            break
        blank.append(first)
    else:
        raise InputError(f"{path} is empty", expected=_KNOWN, got=f"{path.stat().st_size} bytes without content")
    some = False
    for record in _records(chain(blank, [first], lines), first, path):
        some = True
        yield record
    if not some:
        raise InputError(f"{path} holds no records", expected=_KNOWN, got="no row or line with content")


def _records(lines: Iterable[str], first: str, path: Path) -> Iterator[Record]:
    """The records of a file's lines, of which `first` is the first that isn't blank."""
    suffix, header = path.suffix.lower(), _header(first)
    if first.lstrip()[0] in "{[" or suffix in (".json", ".jsonl"):
        return (_record(where, item) for where, item in _json_items(lines, path))
    if suffix in (".csv", ".tsv") or _is_table(header):
        return _table_records(_cut(lines), path, header)
    numbered = ((n, line.strip()) for n, line in enumerate(_cut(lines), start=1))
    return (Record(f"{path}, line {n}", {"prompt": line}, FORMATS[0]) for n, line in numbered if line)


def _lines(path: Path) -> Iterator[str]:
    """The lines of a text file, each with its newline."""
    if path.is_dir():
        raise InputError(f"{path} is a folder", expected="a file", do="name a file inside it")
    try:
        with path.open("rb") as file:
            begun = 0
            for number, data in enumerate(file, start=1):
                text = _decoded(data, path, number, begun)
                yield text if begun else text.removeprefix("\ufeff")
                begun += len(data)
    except FileNotFoundError as error:
        raise InputError(f"no such file: {path}", expected=_KNOWN, do="check the path") from error
    except OSError as error:
        raise InputError(f"can't read {path}", got=error.strerror or str(error), do="check the file") from error


def _decoded(data: bytes, path: Path, number: int, begun: int) -> str:
    """The text of a line, before which so many bytes of the file have been."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        at = error.start
    else:
        at = data.find(b"\0")  # UTF-16 without a mark decodes as UTF-8 full of NULs
        if at < 0:
            return text
    raise InputError(
        f"{path} is not text in UTF-8",
        expected="a text file in UTF-8, with or without a byte order mark",
        got=f"byte 0x{data[at]:02x} at byte offset {begun + at} (line {number})",
        do="save it as UTF-8",
    )


def _cut(lines: Iterable[str]) -> Iterator[str]:
    """The same lines, cut where a carriage return alone ends one."""
    for line in lines:
        yield from io.StringIO(line, newline="")


def _record(where: str, item: Any) -> Record:
    if not isinstance(item, dict):
        raise InputError(
            f"{where}: a record that is not an object",
            expected='a JSON object such as {"prompt": "..."}',
            got=f"{type(item).__name__} {item!r:.80}",
        )
    values = {key.strip().lower(): value for key, value in item.items()}
    for form in FORMATS:
        if form.keys["prompt"] in values:
            return Record(where, values, form)
    raise InputError(
        f"{where}: a request without a prompt",
        expected=f"one of the keys {_PROMPT_KEYS}",
        got=f"keys {_named(list(item))}",
        do="rename the key that holds the prompt to 'prompt'",
    )


def _json_items(lines: Iterable[str], path: Path) -> Iterator[tuple[str, Any]]:
    """(where, value) of a JSON array's items, of one JSON object, or of each line that isn't blank."""
    # Only \n ends a line of JSONL: JSON strings may hold U+2028 and others at which splitlines() would cut.
    numbered = enumerate(lines, start=1)
    begun, first = next((number, line) for number, line in numbered if line.strip())
    if not first.lstrip().startswith("[") and not _unfinished(first):
        yield f"{path}, line {begun}", _loads(first.rstrip("\n"), path, begun)
        for number, line in numbered:
            if line.strip():
                yield f"{path}, line {number}", _loads(line.rstrip("\n"), path, number)
        return
    try:
        document = _loads("".join([first, *(line for _, line in numbered)]), path, begun)
    except InputError:
        if not first.lstrip().startswith("[") and first.strip() != "{":
            _loads(first.rstrip("\n"), path, begun)  # a line that is cut short, rather: raises for it alone
        raise
    if isinstance(document, list):
        yield from ((f"{path}, record {n}", item) for n, item in enumerate(document, start=1))
    else:
        yield f"{path}, line {begun}", document


def _unfinished(line: str) -> bool:
    """Whether a line is the beginning of an object that goes on in the next one."""
    line = line.rstrip()  # a string can't go on in the next one
    try:
        json.loads(line)
    except json.JSONDecodeError as error:
        return error.pos >= len(line)
    except (ValueError, RecursionError):  # told where the line is read
        pass
    return False


def _loads(text: str, path: Path, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line += error.lineno - 1
        got = f"{error.msg} (column {error.colno})"
    except RecursionError:
        got = "brackets nested too deeply"
    except ValueError as error:  # a number of more digits than Python converts
        got = str(error)
    raise InputError(
        f"{path}, line {line}: broken JSON",
        expected="one JSON object a line (JSONL), or one JSON array of objects",
        got=got,
        do="correct that line; plain text prompts must not begin the file with '{' or '['",
    )


def _header(first: str) -> list[str]:
    """The first line that isn't blank, as the cells of a CSV header, as written."""
    line = next(line.rstrip("\r\n") for line in _cut([first]) if line.strip())
    try:
        return next(csv.reader([line]))
    except csv.Error:  # a line longer than the csv module takes as a cell
        return [line]


def _is_table(header: list[str]) -> bool:
    # A comma in prose is followed by a space, so "Prompt, please" at the head of a text file is no header.
    names = [name.lower() for name in header]
    return any(form.keys["prompt"] in names for form in FORMATS) and not any(name[:1].isspace() for name in names)


def _table_records(lines: Iterable[str], path: Path, header: list[str]) -> Iterator[Record]:
    names = [name.strip().lower() for name in header]
    if not any(form.keys["prompt"] in names for form in FORMATS):
        raise InputError(
            f"{path}: no column that holds prompts",
            expected=f"a CSV with one of the columns {_PROMPT_KEYS}, separated by commas",
            got=f"columns {_named(header)}",
            do="save it with commas between the columns"
            if len(header) == 1 and re.search("[;\t]", header[0])
            else "rename the column that holds the prompts to 'prompt'",
        )
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        raise InputError(f"{path}: a column is there twice", expected="each column once", got=_named(twice))
    rows = csv.reader(lines, strict=True)
    headed = False
    while True:
        line = rows.line_num + 1
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            raise InputError(
                f"{path}, row at line {line}: broken CSV",
                expected='cells with commas, quotes or newlines in "double quotes", a quote inside doubled',
                got=str(error),
                do="look for a quote that is not closed",
            ) from error
        if not any(cell.strip() for cell in row):
            continue
        if not headed:
            headed = True
            continue
        if any(cell.strip() for cell in row[len(names) :]):
            raise InputError(
                f"{path}, row at line {line}: more cells than columns",
                expected=f"{len(names)} cells: {_named(header)}",
                got=f"{len(row)} cells",
                do="put cells that hold commas in double quotes",
            )
        yield _record(f"{path}, row at line {line}", dict(zip(names, row, strict=False)))


def _named(keys: list[str]) -> str:
    shown = ", ".join(repr(key[:40]) for key in keys[:12])
    return (shown or "none") + (f" and {len(keys) - 12} more" if len(keys) > 12 else "")
