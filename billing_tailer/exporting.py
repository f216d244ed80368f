"""Receipts as CSV (RFC 4180) and as JSON lines.

A spreadsheet takes a cell that begins with one of `= + - @`, a tab or a line break for a formula: such text, which may
come from anybody's log line, gets a quote in front in CSV. Numbers are left alone (tests/test_export.py).
"""

import csv
import io
import json
from collections.abc import Iterable, Mapping
from datetime import datetime
from decimal import Decimal
from typing import Any

from billing_tailer.printing import plain

COLUMNS = (
    "call_id",
    "occurred_at",
    "billing_account_id",
    "run_id",
    "attempt",
    "graph_id",
    "model",
    "provider_model",
    "provider",
    "tokens_in",
    "tokens_out",
    "cached_tokens",
    "reasoning_tokens",
    "cache_hit",
    "latency_ms",
    "provenance",
    "spend_source",
    "markup_factor",
    "provider_cost_usd",
    "adjusted_cost_usd",
    "total_cost_usd",
    "charged_credits",
    "adjusted_credits",
    "total_credits",
    "created_at",
)
_CREDITS = ("charged_credits", "adjusted_credits", "total_credits")
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


def csv_header() -> str:
    """The first line."""
    return _csv([COLUMNS])


def csv_rows(rows: Iterable[Mapping[str, Any]]) -> str:
    """Lines, each with its CRLF."""
    return _csv([_cell(row[name]) for name in COLUMNS] for row in rows)


def json_rows(rows: Iterable[Mapping[str, Any]]) -> str:
    """One JSON object a line: money and credits are decimal strings."""
    return "".join(json.dumps(json_row(row)) + "\n" for row in rows)


def json_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A receipt as plain JSON."""
    return {name: str(row[name]) if name in _CREDITS else plain(row[name]) for name in COLUMNS}


def _csv(rows: Iterable[Iterable[str]]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue()


def _cell(value: object) -> str:
    match value:
        case None:
            return ""
        case bool():
            return "true" if value else "false"
        case Decimal():
            return f"{value:f}"
        case int():
            return str(value)
        case datetime():
            return value.isoformat()
        case _:
            text = str(value)
            return f"'{text}" if text.startswith(_FORMULA) else text
