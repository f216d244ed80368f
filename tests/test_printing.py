"""What verbs print: columns for programs, tables for people, and nothing that a terminal would obey."""

import io
import json
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from billing_tailer import printing

NOW = datetime.now(UTC)
PATH = "/billing/audit.jsonl-" + "x" * 90
ROWS: list[dict[str, Any]] = [
    {
        "file_id": 12345,
        "path": PATH,
        "state": "blocked",
        "size": 1234567,
        "seen_at": "",
    },
    {"file_id": 7, "path": "/b", "state": "live", "size": None, "seen_at": None},
]
COLUMNS = ["file_id", "path", "state", "size", "seen_at"]


@pytest.fixture(autouse=True)
def _seen_three_minutes_ago() -> None:
    """Not when this module was read: the session may be half an hour old."""
    ROWS[0]["seen_at"] = (datetime.now(UTC) - timedelta(minutes=3, seconds=5)).isoformat()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def shown(self) -> str:
        """Without bold and dim, which are no colours; with anything else that a terminal would obey."""
        return re.sub(r"\x1b\[[0-2]m", "", self.getvalue())


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Terminal]:
    """Makes standard output a terminal of so many columns; called by the test, since pytest replaces it for each."""

    def make(columns: int = 120, *, colour: bool = False) -> Terminal:
        found = Terminal()
        monkeypatch.setattr("sys.stdout", found)
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.setenv("COLUMNS", str(columns))
        for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "COLORTERM"):
            monkeypatch.delenv(name, raising=False)
        if not colour:
            monkeypatch.setenv("NO_COLOR", "1")
        return found

    return make


def test_columns_where_no_terminal_is(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same in every environment."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "20")
    printing.print_rows(ROWS, COLUMNS, notes=lambda row: ["why"] if row["state"] == "blocked" else [])
    printing.print_pairs({"size": 1234567, "seen_at": NOW.isoformat()})
    printing.print_state("FAIL", " it")
    header, first, note, second, size, seen, state = capsys.readouterr().out.splitlines()
    assert header.split() == COLUMNS
    assert first.split() == [str(value) for value in ROWS[0].values()]
    assert note.split() == ["why"]
    assert second.split() == ["7", "/b", "live", "-", "-"]
    assert (size, seen, state) == ("size     1234567", f"seen_at  {NOW.isoformat()}", "FAIL it")


@pytest.mark.parametrize("rows", [[], ROWS])
def test_json(capsys: pytest.CaptureFixture[str], rows: list[dict[str, Any]]) -> None:
    printing.print_rows(rows, COLUMNS, True)
    assert json.loads(capsys.readouterr().out) == rows


def test_nothing_is_said(terminal: Callable[..., Terminal]) -> None:
    shown = terminal()
    printing.print_rows([], COLUMNS)
    assert shown.getvalue() == "none\n"


def test_a_table_on_a_terminal(terminal: Callable[..., Terminal]) -> None:
    shown = terminal()
    printing.print_rows(ROWS, COLUMNS, notes=lambda row: [f"command for {row['file_id']}"])
    printed = shown.shown()
    assert max(map(len, printed.splitlines())) <= 120
    assert "\x1b" not in printed
    assert "1,234,567" in printed
    assert "12345 " in printed, "an id is no amount"
    assert "(3 min ago)" in printed
    assert (printed.count("x"), "/billing/audit.jsonl-" in printed, "…" in printed) == (90, True, False), "folded"
    ids = [text[:7] for text in printed.splitlines() if "min ago" in text or "/b" in text]
    assert ids == ["  12345", "      7"], "numbers at the right of their column"
    assert printed.endswith("file_id 12345: command for 12345\nfile_id 7: command for 7\n")


def test_a_narrow_terminal(terminal: Callable[..., Terminal]) -> None:
    """Row by row, each value on one line, however long: the terminal folds it, and copies it whole."""
    shown = terminal(40)
    printing.print_rows(ROWS, COLUMNS)
    plain = shown.shown().splitlines()
    assert plain[1] == f"path     {PATH}"
    assert plain[3] == "size     1,234,567"
    assert plain[5] == ""


def test_states_have_colours(terminal: Callable[..., Terminal]) -> None:
    shown = terminal(colour=True)
    printing.print_rows(ROWS, COLUMNS)
    printing.print_state("FAIL", " rest")
    printed = shown.getvalue()
    assert "\x1b[1;31mblocked" in printed
    assert "\x1b[32mlive" in printed
    assert "\x1b[1;31mFAIL\x1b[0m rest" in printed


def test_a_stranger_on_a_terminal(terminal: Callable[..., Terminal]) -> None:
    """Neither escape sequences nor the markup of our own library."""
    shown = terminal()
    poison = "\x1b]0;owned\x07[red]x[/red] :smile: \u202e\r"
    printing.print_rows([{"detail": poison}], ["detail"])
    printing.print_rows([{"detail": poison}], ["detail"], notes=lambda _: [poison])
    printing.print_pairs({"detail": poison, "more": {"a": poison}})
    printed = shown.shown()
    assert "owned" in printed
    assert "[red]x[/red] :smile:" in printed
    assert all(c.isprintable() for c in printed.replace("\n", "").replace("─", ""))


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "just now"),
        (1.9, "just now"),
        (59, "59 s ago"),
        (119, "119 s ago"),
        (185, "3 min ago"),
        (7200, "2 h ago"),
        (200_000, "2 days ago"),
        (-30, "in 30 s"),
    ],
)
def test_age(seconds: float, words: str) -> None:
    assert printing.age(NOW - timedelta(seconds=seconds), NOW) == words
