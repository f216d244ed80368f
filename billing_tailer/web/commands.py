"""What an operator types about an exception or a dead letter: commands to copy into a shell, ids quoted for it.

A call id may come from anybody: what is not printable is written as an escape, so that it acts neither in the terminal
nor in the shell (tests/test_pages.py::test_commands_are_quoted).
"""

import shlex
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from billing_tailer.model import ExceptionKind

_PROGRAM = "billing-tailer"
_WHY = "--reason 'WHY'"


def exception_commands(row: Mapping[str, Any]) -> list[str]:
    """What decides an open exception, the likeliest first; capitals are to be replaced. Nothing for a closed one."""
    if row["closed_at"] is not None:
        return []
    call = shell_word(row["call_id"])
    release = f"{_PROGRAM} exceptions release {_WHY}"
    close = f"{_PROGRAM} exceptions close {_WHY} -- {call} {row['kind']}"
    explain = f"{_PROGRAM} explain -- {call}"
    match row["kind"]:
        case ExceptionKind.HELD_ZERO_COST | ExceptionKind.HELD_BAD_COST | ExceptionKind.OVERDUE:
            return [f"{release} --cost-usd USD -- {call}", close, explain]
        case ExceptionKind.UNATTRIBUTED | ExceptionKind.CONFLICT:
            return [f"{release} --account ACCOUNT -- {call}", close, explain]
        case ExceptionKind.COST_MISMATCH:
            return [f"{_PROGRAM} adjust {_WHY} --cost-usd={_difference(row)} -- {call}", close, explain]
        case _:
            return [explain, close]


def _difference(row: Mapping[str, Any]) -> str:
    """What is not applied, where the exception says it as a number."""
    found = (row["detail"] or {}).get("delta_cost_usd")
    try:
        return f"{Decimal(found):f}" if isinstance(found, str) else "USD"
    except ArithmeticError:
        return "USD"


def letter_commands(row: Mapping[str, Any]) -> list[str]:
    """What shows and decides an open dead letter."""
    number = row["dead_letter_id"]
    show = f"{_PROGRAM} dead-letters show {number}"
    if row["resolved_at"] is not None:
        return [show]
    return [
        show,
        f"{_PROGRAM} dead-letters retry {number} {_WHY}",
        f"{_PROGRAM} dead-letters discard {number} {_WHY}",
    ]


def shell_word(text: str) -> str:
    """A word for bash."""
    if text.isascii() and text.isprintable():
        return shlex.quote(text)
    return "$'" + "".join(map(_escaped, text)) + "'"


def _escaped(character: str) -> str:
    if character in "'\\":
        return "\\" + character
    if character.isascii() and character.isprintable():
        return character
    return f"\\U{ord(character):08x}"
