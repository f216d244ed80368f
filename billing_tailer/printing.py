"""How verbs print: JSON for programs, aligned text for people, never what a stranger's log line tells a terminal."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from enum import Enum
from typing import Annotated, Any

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Reason = Annotated[str, typer.Option(help="Why; kept with the change.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")]


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


def print_rows(
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[str],
    as_json: bool,
    notes: Callable[[Mapping[str, Any]], Iterable[str]] = lambda _: (),
) -> None:
    """Rows, all of their fields as JSON, or these columns for people, with lines of notes below a row."""
    if as_json:
        print(json.dumps(rows))
        return
    if not rows:
        print("none")
        return
    # not rich's Table, which cuts paths to fit 80 columns where there is no terminal
    table = [columns, *([text(row[column]) for column in columns] for row in rows)]
    widths = [max(map(len, cells)) for cells in zip(*table, strict=True)]
    for cells, row in zip(table, (None, *rows), strict=True):
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip())
        for note in () if row is None else notes(row):
            print(f"{'':<{widths[0]}}  {text(note)}")


def print_pairs(pairs: Mapping[str, Any]) -> None:
    """One name and value a line."""
    width = max(map(len, pairs))
    for key, value in pairs.items():
        print(f"{key:<{width}}  {text(value)}".rstrip())


def text(value: Any) -> str:
    """A value for people. Escaped where it is not printable: log lines are made by strangers, terminals obey."""
    if isinstance(value, list | tuple):
        return ", ".join(map(text, value)) or "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{text(key)}={text(one)}" for key, one in value.items()) or "none"
    shown = "-" if value is None else str(plain(value))
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in shown)
