"""Settlement's side of Postgres: what is committed about calls, and the decisions, in one transaction.

Runs in the session that holds the source's lock, after the commit that brought the line or the record, so that it reads
committed rows; an operator's verbs decide beside it, one after the other (`deciding`).
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from typing import Any

from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

from billing_tailer.ledger.connection import Connection, lock_key, query, wrapped
from billing_tailer.ledger.records import record_of
from billing_tailer.model import (
    Adjustment,
    CallException,
    ChargeDetails,
    ExceptionKind,
    Provenance,
    Receipt,
    SpendSource,
    UsageFact,
)
from billing_tailer.settle import CallState, Decision, Standing

_RECEIPT_COLUMNS = tuple(field.name for field in fields(Receipt))
_DETAIL_COLUMNS = tuple(field.name for field in fields(ChargeDetails))
_ADJUSTMENT_COLUMNS = tuple(field.name for field in fields(Adjustment))
SETTLED = (Standing.SETTLED, Standing.NOT_CHARGED)
"""Standings that take a call off the list of unsettled facts; a later record brings it back to the table."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """One unsettled call's times, on Postgres' clock: since when its fact is committed, when the request began, and
    whether SETTLE_DEADLINE_SECONDS have passed since the commit."""

    committed_at: datetime
    started_at: datetime
    deadline_passed: bool


@dataclass(frozen=True, slots=True)
class Window:
    """What to ask LiteLLM's spend logs for: the time before the question (Postgres' clock), the span of the calls'
    starts and ends, and calls that earlier polls did not find."""

    asked_at: datetime
    started_from: datetime
    started_to: datetime
    ended_to: datetime
    stragglers: tuple[str, ...]


def due(connection: Connection, source_id: str, limit: int, deadline_seconds: int, *, by_header: bool) -> list[str]:
    """Calls to look at: those about which records have come, those whose waiting time may be over, and, by header,
    those whose header may say what they cost."""
    words = {"source_id": source_id, "limit": limit, "deadline": deadline_seconds, "by_header": by_header}
    with wrapped():
        return [row[0] for row in connection.execute(query("due_calls"), words).fetchall()]


@contextmanager
def deciding(connection: Connection, schema: str) -> Iterator[None]:
    """One transaction from what is known to what is decided of it. The settlers of all sources and the operators' verbs
    take turns, so that nobody decides a call on what another is about to change
    (tests/test_money_cli.py::test_a_release_races).
    """
    with wrapped(), connection.transaction():
        connection.execute(query("deciding"), {"key": lock_key("decide", schema)})
        yield


def take(connection: Connection, call_ids: Collection[str]) -> None:
    """Take calls off the list of touched ones, before they are loaded: a record that comes afterwards puts them back.

    Within `deciding`.
    """
    with wrapped():
        connection.execute(query("forget_touched"), {"call_ids": list(call_ids)})


def doubtful(connection: Connection) -> list[str]:
    """Calls with an exception that other settings may decide: FREE_MODELS, COST_MAX_USD, CORRECTIONS, the account."""
    with wrapped():
        return [row[0] for row in connection.execute(query("doubtful_calls")).fetchall()]


def load(
    connection: Connection,
    call_ids: Collection[str],
    *,
    deadline_seconds: int,
    quiet_seconds: int,
    is_over: Callable[[Waiting], bool],
) -> list[CallState]:
    """Everything that is committed about these calls; those without a fact are left out.

    is_over: whether nobody is left to ask about a call whose deadline has passed.
    """
    ids = {"call_ids": list(call_ids), "deadline": deadline_seconds, "quiet": quiet_seconds}
    with wrapped(), connection.cursor(row_factory=dict_row) as cursor:
        facts = cursor.execute(query("settle_facts"), ids).fetchall()
        if not facts:
            return []
        found = {
            name: _by_call(cursor.execute(query(f"settle_{name}"), ids).fetchall())
            for name in ("records", "receipts", "adjustments", "exceptions", "conflicts")
        }
    return [_state(row, found, is_over) for row in facts]


def _by_call(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    grouped: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        grouped.setdefault(row["key"], []).append(row)
    return grouped


def _state(
    row: Mapping[str, Any],
    found: Mapping[str, Mapping[str, list[Mapping[str, Any]]]],
    is_over: Callable[[Waiting], bool],
) -> CallState:
    call_id = row["call_id"]
    waiting = Waiting(row["committed_at"], row["started_at"], row["deadline_passed"])
    receipts = [_receipt(one) for one in found["receipts"].get(call_id, ())]
    return CallState(
        fact=UsageFact(**{name: row[name] for name in UsageFact._fields}),
        records=tuple(record_of(one) for one in found["records"].get(call_id, ())),
        receipt=receipts[0] if receipts else None,
        adjustments=tuple(_adjustment(one) for one in found["adjustments"].get(call_id, ())),
        exceptions=tuple(_exception(one) for one in found["exceptions"].get(call_id, ())),
        conflict_accounts=tuple(one["billing_account_id"] for one in found["conflicts"].get(call_id, ())),
        quiet_over=row["quiet_over"],
        deadline_over=waiting.deadline_passed and is_over(waiting),
    )


def _receipt(row: Mapping[str, Any]) -> Receipt:
    values = {name: row[name] for name in _RECEIPT_COLUMNS}
    return Receipt(
        **{
            **values,
            "provenance": Provenance(row["provenance"]),
            "spend_source": None if row["spend_source"] is None else SpendSource(row["spend_source"]),
            "record_ids": tuple(row["record_ids"]),
        }
    )


def _adjustment(row: Mapping[str, Any]) -> Adjustment:
    return Adjustment(**{name: row[name] for name in _ADJUSTMENT_COLUMNS})


def _exception(row: Mapping[str, Any]) -> CallException:
    return CallException(
        row["call_id"], ExceptionKind(row["kind"]), row["seq"], row["detail"], row["closed_by"], row["reason"]
    )


def write(connection: Connection, decisions: Mapping[str, Decision]) -> None:
    """Commit decisions by call id, and take what is done off the list of unsettled facts. Within `deciding`."""
    receipts = [d.receipt for d in decisions.values() if d.receipt is not None]
    details = [d.details for d in decisions.values() if d.details is not None]
    adjustments = [d.adjustment for d in decisions.values() if d.adjustment is not None]
    opened = [one for d in decisions.values() for one in d.opened]
    closed = [one for d in decisions.values() for one in d.closed]
    done = [call_id for call_id, decision in decisions.items() if decision.standing in SETTLED]
    # a late record can hold a call that was not to be charged: it waits again
    reopened = [key for key, one in decisions.items() if one.standing not in SETTLED and not one.is_empty]
    with wrapped(), connection.transaction(), connection.pipeline(), connection.cursor() as cursor:
        for name, rows in (
            ("insert_receipt", [_receipt_row(receipt) for receipt in receipts]),
            ("insert_details", [asdict(detail) for detail in details]),
            ("insert_adjustment", [{**asdict(one), "evidence": Jsonb(one.evidence)} for one in adjustments]),
            ("open_exception", [_exception_row(one) for one in opened]),
            ("close_exception", [_exception_row(one) for one in closed]),
        ):
            if rows:
                cursor.executemany(query(name), rows)
        cursor.execute(query("forget_unsettled"), {"call_ids": done})
        if reopened:
            cursor.execute(query("unsettle_calls"), {"call_ids": reopened})


def _receipt_row(receipt: Receipt) -> dict[str, Any]:
    return {
        **asdict(receipt),
        "provenance": str(receipt.provenance),
        "spend_source": None if receipt.spend_source is None else str(receipt.spend_source),
        "record_ids": list(receipt.record_ids),
    }


def _exception_row(one: CallException) -> dict[str, Any]:
    return {
        "call_id": one.call_id,
        "kind": str(one.kind),
        "seq": one.seq,
        "detail": Jsonb(one.detail),
        "closed_by": one.closed_by,
        "reason": one.reason,
    }


def window(
    connection: Connection, source_id: str, *, started_after: datetime | None, straggler_limit: int
) -> Window | None:
    """What to ask the spend logs for next, an hour of starts at most, from `started_after` on; None: nothing waits."""
    words = {"source_id": source_id, "started_after": started_after, "limit": straggler_limit}
    with wrapped(), connection.cursor(row_factory=dict_row) as cursor:
        row = cursor.execute(query("poll_window"), words).fetchone()
        if row is None or row["started_from"] is None:
            return None
        stragglers = tuple(one["call_id"] for one in cursor.execute(query("stragglers"), words).fetchall())
    return Window(row["asked_at"], row["started_from"], row["started_to"], row["ended_to"], stragglers)


def counts(connection: Connection) -> dict[str, Any]:
    """For the gauges: pending calls, the oldest of them, open exceptions by kind."""
    with wrapped(), connection.cursor(row_factory=dict_row) as cursor:
        row = cursor.execute(query("settle_counts")).fetchone()
        kinds = cursor.execute(query("open_exceptions")).fetchall()
    assert row is not None
    return {**row, "exceptions": {one["kind"]: one["n"] for one in kinds}}
