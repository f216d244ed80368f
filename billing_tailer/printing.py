"""How verbs print: JSON for programs, plain columns where a program or a file reads, tables on a terminal. The only
module of the verbs that prints (held by ruff's T20).

- JSON: every field, numbers as numbers, money as decimal strings, times as ISO 8601.
- Where standard output is no terminal: the same words in every environment, columns two blanks apart, no colour.
- On a terminal: numbers grouped and at the right, ages beside times, states in colour (unless NO_COLOR is set). Ids and
  paths are folded, never cut, and a table that would have to fold everything is printed row by row. What is copied into
  commands, ids and offsets, is not grouped.

Never what a stranger's log line tells a terminal (tests/test_cli.py::test_strangers_do_not_write_to_the_terminal).
"""

import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from decimal import Decimal
from enum import Enum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

FOLDED_WIDTH_MIN = 16
"""A column of text is not folded to less than this."""
_COPIED = ("_id", "_offset", "seq", "generation", "status", "attempt")
"""How names of numbers end that are copied or are no amounts."""
_STATES = ("state", "kind", "standing", "result", "resolution", "applied", "active", "outcome")
_STYLES = {
    "ok": "green",
    "True": "green",
    "live": "green",
    "settled": "green",
    "warn": "yellow",
    "missing": "yellow",
    "pending": "yellow",
    "overdue": "yellow",
    "unattributed": "yellow",
    "held_zero_cost": "yellow",
    "held_bad_cost": "yellow",
    "conflict": "yellow",
    "cost_mismatch": "yellow",
    "FAIL": "bold red",
    "DIFFERENCE": "bold red",
    "blocked": "bold red",
    "final": "dim",
    "discarded": "dim",
}


def plain(value: Any) -> Any:
    """A value as JSON carries it without loss: money as decimal strings, times as ISO 8601, bytes as hex."""
    match value:
        case Mapping():
            return {str(key): plain(one) for key, one in value.items()}
        case list() | tuple():
            return [plain(one) for one in value]
        case Decimal():
            return f"{value:f}"
        case datetime():
            return value.isoformat()
        case bytes() | memoryview():
            return bytes(value).hex()
        case Enum():
            return str(value)
        case _:
            return value


def text(value: Any) -> str:
    """A value for people. Escaped where it is not printable: log lines are made by strangers, terminals obey."""
    if isinstance(value, list | tuple):
        return ", ".join(map(text, value)) or "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{text(key)}={text(one)}" for key, one in value.items()) or "none"
    shown = "-" if value is None else str(plain(value))
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in shown)


def age(moment: datetime, now: datetime) -> str:
    """How long ago a moment was, in one unit: `3 min ago`."""
    seconds = (now - moment).total_seconds()
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        if abs(seconds) >= 2 * length:
            count = int(abs(seconds) // length)
            return f"{count} {unit} ago" if seconds > 0 else f"in {count} {unit}"
    return "just now"


# --- what verbs call


def write_escapes() -> None:
    """Of characters that the terminal, the file or the pipe of this process cannot take."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a test may have put something else there
            stream.reconfigure(errors="backslashreplace")


def print_json(value: Any) -> None:
    """One JSON document."""
    print(json.dumps(value))


def print_line(words: str = "", style: str = "") -> None:
    """Words that a verb has made, as they are. style: on a terminal."""
    if style and _is_terminal():
        _console().print(words, style=style, soft_wrap=True)
    else:
        print(words)


def print_title(words: str) -> None:
    """What stands above a part of an answer."""
    print_line()
    print_line(words, "bold")


def print_state(word: str, rest: str) -> None:
    """A line that begins with a state."""
    if _is_terminal():
        console = _console()
        console.print(word, style=_STYLES.get(word.strip(), ""), end="")
        console.print(rest, soft_wrap=True)
    else:
        print(word + rest)


def complain(words: str) -> None:
    """A line on standard error, in its place among those on standard output."""
    sys.stdout.flush()
    print(words, file=sys.stderr)


def print_rows(
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[str],
    as_json: bool = False,
    notes: Callable[[Mapping[str, Any]], Iterable[str]] = lambda _: (),
) -> None:
    """Rows, all of their fields as JSON, or these columns for people, with lines of notes about a row."""
    if as_json:
        print_json(rows)
    elif not rows:
        print("none")
    elif _is_terminal():
        _show_rows(_console(), rows, columns, notes)
    else:
        _write_rows(rows, columns, notes)


def print_pairs(pairs: Mapping[str, Any], as_json: bool = False) -> None:
    """One name and value a line."""
    if as_json:
        print_json(pairs)
        return
    width = max(map(len, pairs))
    if _is_terminal():
        _show_pairs(_console(), pairs, width)
        return
    for key, value in pairs.items():
        print(f"{key:<{width}}  {text(value)}".rstrip())


@contextmanager
def progress_bar(what: str, bytes_total: int | None) -> Iterator[Callable[[int], None]]:
    """A bar on the terminal, to be told how many bytes (None: rows, nobody knows how many) were done; nothing where
    standard error is none."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich import progress  # noqa: PLC0415  # as below
    from rich.console import Console  # noqa: PLC0415  # as below

    of_bytes = (progress.DownloadColumn(), progress.TransferSpeedColumn(), progress.TimeRemainingColumn())
    of_rows = (progress.TextColumn("{task.completed:.0f}"), progress.TimeElapsedColumn())
    columns = (progress.TextColumn(what), progress.BarColumn(), *(of_rows if bytes_total is None else of_bytes))
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=bytes_total)
        yield lambda done: bar.advance(task, done)


# --- where no terminal is


def _write_rows(
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[str],
    notes: Callable[[Mapping[str, Any]], Iterable[str]],
) -> None:
    table = [columns, *([text(row[column]) for column in columns] for row in rows)]
    widths = [max(map(len, cells)) for cells in zip(*table, strict=True)]
    for cells, row in zip(table, (None, *rows), strict=True):
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip())
        for note in () if row is None else notes(row):
            print(f"{'':<{widths[0]}}  {text(note)}")


# --- on a terminal


def _is_terminal() -> bool:
    return sys.stdout.isatty()


def _console() -> "Console":
    from rich.console import Console  # noqa: PLC0415  # most verbs answer programs: 60 ms that those need not wait

    return Console(file=sys.stdout, highlight=False, markup=False, emoji=False)


def _show_rows(
    console: "Console",
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[str],
    notes: Callable[[Mapping[str, Any]], Iterable[str]],
) -> None:
    from rich import box  # noqa: PLC0415  # as above
    from rich.table import Table  # noqa: PLC0415  # as above

    cells = [[_cell(column, row[column]) for column in columns] for row in rows]
    widths = [max(len(name), *map(len, column)) for name, column in zip(columns, zip(*cells, strict=True), strict=True)]
    at_right = [all(_is_number(name, row[name]) for row in rows) for name in columns]
    folds = [
        not right and not name.endswith("_at") and width > FOLDED_WIDTH_MIN
        for name, right, width in zip(columns, at_right, widths, strict=True)
    ]
    least = [FOLDED_WIDTH_MIN if fold else width for fold, width in zip(folds, widths, strict=True)]
    if sum(least) + 2 * len(columns) > console.width:
        _show_row_by_row(console, rows, columns, notes)
        return
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    for name, right, fold, width in zip(columns, at_right, folds, least, strict=True):
        table.add_column(name, justify="right" if right else "left", no_wrap=not fold, overflow="fold", min_width=width)
    for shown in cells:
        table.add_row(*shown)
    console.print(table)
    for row in rows:
        for note in notes(row):
            console.print(f"{columns[0]} {text(row[columns[0]])}: {text(note)}", soft_wrap=True)


def _show_row_by_row(
    console: "Console",
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[str],
    notes: Callable[[Mapping[str, Any]], Iterable[str]],
) -> None:
    width = max(map(len, columns))
    for number, row in enumerate(rows):
        if number:
            console.print()
        _show_pairs(console, {column: row[column] for column in columns}, width)
        for note in notes(row):
            console.print(text(note), soft_wrap=True)


def _show_pairs(console: "Console", pairs: Mapping[str, Any], width: int) -> None:
    """Lines that are too long are left to the terminal, which copies them as the one line that they are."""
    for key, value in pairs.items():
        console.print(f"{key:<{width}}  ", style="dim", end="")
        console.print(_cell(key, value), soft_wrap=True)


def _cell(name: str, value: Any) -> "Text":
    from rich.text import Text  # noqa: PLC0415  # as above

    if isinstance(value, Mapping):
        return Text(", ".join(f"{text(key)}={_cell(str(key), one).plain}" for key, one in value.items()) or "none")
    if name.endswith("_at") and (moment := _moment(value)) is not None:
        return Text(f"{moment:%Y-%m-%d %H:%M:%S} ({age(moment, datetime.now(UTC))})")
    if type(value) is int and not name.endswith(_COPIED):
        return Text(f"{value:,}")
    shown = text(value)
    if value is None:
        return Text(shown, style="dim")
    return Text(shown, style=_STYLES.get(shown, "") if name in _STATES else "")


def _is_number(name: str, value: Any) -> bool:
    """Also of money, which is text, and where there is none."""
    return value is None or (isinstance(value, int | float) and type(value) is not bool) or name.endswith("_usd")


def _moment(value: Any) -> datetime | None:
    try:
        moment = value if isinstance(value, datetime) else datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return None
    return moment.astimezone(UTC) if moment.tzinfo is not None else None
