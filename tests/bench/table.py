"""Readings as a table on a terminal, and as one in markdown. Both read what the JSON file has."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

HEADER = ("", "measured", "rounds", "goal", "")


def number(value: float, unit: str = "") -> str:
    """Three digits, grouped: more would not be the same the next time."""
    if value == 0:
        text = "0"
    elif abs(value) >= 100:
        text = f"{float(f'{value:.3g}'):,.0f}"
    else:
        text = f"{value:#.3g}".rstrip("." if abs(value) >= 10 else "")
    return f"{text} {unit}".strip()


def cells(reading: Mapping[str, Any]) -> tuple[str, str, str, str, str]:
    """A reading's row."""
    value, unit, rounds = reading["value"], reading["unit"], reading["rounds"]
    shown = "-" if value is None else number(value, unit)
    spread = f"{number(min(rounds))} to {number(max(rounds))}" if len(rounds) > 1 else ""
    goal = ""
    if reading["goal"]:
        verdict = {True: "met", False: "NOT met", None: "not measured"}[reading["met"]]
        goal = f"{reading['goal']}: {verdict}"
    return reading["what"], shown, spread, goal, reading["note"]


def show(console: Console, title: str, readings: Sequence[Mapping[str, Any]]) -> None:
    """On a terminal: what is not met in red, what is missing in yellow."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column, name in enumerate(HEADER):
        table.add_column(name, justify="right" if column in (1, 2) else "left", overflow="fold")
    for reading in readings:
        style = "red" if reading["met"] is False else "yellow" if reading["value"] is None else ""
        table.add_row(*cells(reading), style=style)
    console.print(table)
    console.print()


def markdown(header: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of a document."""
    head = list(header)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
