"""Spend records in and out of Postgres."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from typing import Any

from billing_tailer.ledger.connection import Connection, query
from billing_tailer.model import PlacedRecord, SpendRecord, SpendSource, SpendStatus

FIELDS = tuple(field.name for field in fields(SpendRecord))
_TYPES = {
    "prompt_tokens": "bigint",
    "completion_tokens": "bigint",
    "cached_tokens": "bigint",
    "reasoning_tokens": "bigint",
    "cost_usd": "numeric",
    "cache_hit": "boolean",
    "started_at": "timestamptz",
    "ended_at": "timestamptz",
    "file_id": "bigint",
    "start_offset": "bigint",
}
_COLUMNS = (*FIELDS, "file_id", "start_offset")
_INSERT = query("insert_records").format(
    columns=", ".join(_COLUMNS), arrays=", ".join(f"%({name})s::{_TYPES.get(name, 'text')}[]" for name in _COLUMNS)
)


def record_key(record: SpendRecord) -> tuple[str, str, str]:
    """(call_id, source, record_id)."""
    return (record.call_id, str(record.source), record.record_id)


def insert_records(connection: Connection, records: Sequence[PlacedRecord]) -> set[tuple[str, str, str]]:
    """Insert what is new, and note that these calls are to be looked at; returns the keys of the new ones.

    Within the caller's transaction.
    """
    arrays: dict[str, list[Any]] = {name: [getattr(placed.record, name) for placed in records] for name in FIELDS}
    arrays["source"] = [str(source) for source in arrays["source"]]
    arrays["status"] = [str(status) for status in arrays["status"]]
    arrays["file_id"] = [placed.file_id for placed in records]
    arrays["start_offset"] = [placed.start_offset for placed in records]
    new = {(row[0], row[1], row[2]) for row in connection.execute(_INSERT, arrays).fetchall()}
    if new:
        connection.execute(query("touch_calls"), {"call_ids": sorted({key[0] for key in new})})
    return new


def known_lines(connection: Connection, call_ids: Collection[str]) -> set[tuple[str, str | None, bytes | None]]:
    """The requests that are known under these call ids, by `rows.identity`. Within the caller's transaction."""
    rows = connection.execute(query("known_lines"), {"call_ids": list(call_ids)}).fetchall()
    return {(row[0], row[1], row[2]) for row in rows}


def record_of(row: Mapping[str, Any]) -> SpendRecord:
    """A row of `spend_records`."""
    values = {name: row[name] for name in FIELDS}
    return SpendRecord(**{**values, "source": SpendSource(row["source"]), "status": SpendStatus(row["status"])})
