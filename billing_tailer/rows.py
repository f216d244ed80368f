"""A usage fact as one row of Postgres' COPY text format, with the empty string for null. Pure.

A row is made once, where the line is read, and travels as text: nothing between there and Postgres looks at its values
(tests/test_rows.py holds that Postgres reads back the same fact).
"""

import re
from datetime import datetime
from decimal import Decimal
from math import floor

from billing_tailer.model import FactRow, PlacedFact, UsageFact

OWN_COLUMNS = (
    "proxy_call_id",
    "call_id",
    "nginx_request_id",
    "request_seconds",
    "header_cost_usd",
    "cache_key",
    "occurred_at",
    "line_sha256",
)
"""Columns whose values differ from call to call."""
SHARED_COLUMNS = tuple(name for name in UsageFact._fields if name not in OWN_COLUMNS)
"""Columns of which many calls have the same values: `fastlane` makes their text once."""
COLUMNS = (*OWN_COLUMNS, *SHARED_COLUMNS)
"""The columns of a row's text, in its order."""
PLACE_COLUMNS = ("file_id", "start_offset", "end_offset")

_ESCAPES = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r", "\b": "\\b", "\f": "\\f", "\v": "\\v"})
_UNESCAPED = {"\\": "\\", "t": "\t", "n": "\n", "r": "\r", "b": "\b", "f": "\f", "v": "\v"}
_ESCAPED = re.compile(r"\\(.)")


def row_of(fact: UsageFact) -> FactRow:
    """The fact as text, without its place."""
    text = "\t".join([_text(getattr(fact, name)) for name in COLUMNS])
    return FactRow(fact.call_id, text, floor(fact.occurred_at.timestamp()))


def placed(row: FactRow, file_id: int, start_offset: int, end_offset: int) -> PlacedFact:
    """The fact with its place, also in its text: COLUMNS and PLACE_COLUMNS."""
    call_id, text, second = row
    text = f"{text}\t{file_id}\t{start_offset}\t{end_offset}"
    # as PlacedFact(...), which takes three times as long
    return tuple.__new__(PlacedFact, (call_id, text, second, file_id, start_offset, end_offset))


def shared_text(fact: UsageFact) -> str:
    """The text of SHARED_COLUMNS."""
    return "\t".join([_text(getattr(fact, name)) for name in SHARED_COLUMNS])


def values_of(text: str) -> list[str | None]:
    """What `row_of` wrote, column by column, as the text that Postgres would read each of them from."""
    return [_unescaped(value) if value else None for value in text.split("\t")]


def identity(row: FactRow | PlacedFact) -> tuple[str, str | None, bytes | None]:
    """Call id, nginx's request id, the line's hash where there is none: what tells a line of a request that is known
    from another request under the same call id."""
    values = dict(zip(OWN_COLUMNS, values_of(row.text), strict=False))
    sha256 = values["line_sha256"]
    digest = None if sha256 is None else bytes.fromhex(sha256.removeprefix("\\x"))
    return row.call_id, values["nginx_request_id"], digest


def _text(value: object) -> str:
    match value:
        case None:
            return ""
        case str():
            return value.translate(_ESCAPES)
        case bool():
            return "t" if value else "f"
        case int() | Decimal():
            return str(value)
        case datetime():
            return value.isoformat(" ")
        case bytes():
            return f"\\\\x{value.hex()}"
    raise AssertionError(f"a fact has no values of {type(value)}")


def _unescaped(value: str) -> str:
    return _ESCAPED.sub(lambda found: _UNESCAPED[found[1]], value)
