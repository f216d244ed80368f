"""Settlement's side of Postgres: what is committed about calls, and the decisions, in one transaction.

Runs in the session that holds the source's lock, after the commit that brought the line or the record, so that it reads
committed rows; an operator's verbs decide beside it, one after the other (`deciding`).
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

import orjson
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

STOPPED = (Standing.OVERDUE, Standing.HELD, Standing.UNATTRIBUTED)
"""Standings that only a record or a person changes: such calls leave the sweep's way."""
ASK_AFTER_MIN, ASK_AFTER_MAX = timedelta(minutes=15), timedelta(days=7)
"""A call that was given up is asked for by name when it is twice as old as the last time, within these bounds."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """One unsettled call's times, on Postgres' clock: since when its fact is committed, when the request began,
    whether SETTLE_DEADLINE_SECONDS have passed since the commit, and when the request ended, where that is known."""

    committed_at: datetime
    started_at: datetime
    deadline_passed: bool
    ended_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class WaitingPage:
    """Some of the calls that time may decide, by call id. end: where the next page begins; None: there is none."""

    calls: Mapping[str, Waiting]
    end: tuple[datetime, str] | None


@dataclass(frozen=True, slots=True)
class ExceptionPage:
    """Some of the calls with an open exception that other settings may decide. overdue: those that are overdue; others:
    all others. end: where the next page begins; None: there is none."""

    overdue: tuple[str, ...]
    others: tuple[str, ...]
    end: tuple[str, str] | None


@dataclass(frozen=True, slots=True)
class Window:
    """What to ask LiteLLM's spend logs for: the time before the question (Postgres' clock), the span of the calls'
    starts and ends, None where none waits, and calls to ask for by name: that earlier polls did not find, with their
    start, and that were given up, with the time since their line's commit."""

    asked_at: datetime
    span: tuple[datetime, datetime, datetime] | None
    late: Mapping[str, datetime]
    given_up: Mapping[str, timedelta]


def touched(connection: Connection, limit: int) -> list[str]:
    """Calls about which records have come that were not looked at yet."""
    with wrapped():
        return [row[0] for row in connection.execute(query("touched"), {"limit": limit}).fetchall()]


def any_unlisted(connection: Connection) -> bool:
    """Whether there are facts that are not on the list of unsettled ones."""
    with wrapped():
        return connection.execute(query("any_unlisted")).fetchone() == (True,)


def list_facts(connection: Connection) -> None:
    """Put what still waits of the oldest unlisted batch on the list of unsettled facts. Within `deciding`: nobody
    settles one of these calls meanwhile."""
    with wrapped(), connection.cursor(row_factory=dict_row) as cursor:
        # a crash takes back both or neither, and no bill depends on which
        cursor.execute("set local synchronous_commit = off")
        cursor.execute(query("go_by_keys"))
        for found in cursor.execute(query("take_unlisted")).fetchall():
            cursor.execute(query("list_facts"), found)


def waiting(
    connection: Connection, after: tuple[datetime, str] | None, limit: int, deadline_seconds: int
) -> WaitingPage:
    """The next calls that time may decide, of all sources, in the order of their start."""
    start, call = after or ("-infinity", "")
    words = {"after_start": start, "after_call": call, "limit": limit, "deadline": deadline_seconds}
    with wrapped():
        rows = connection.execute(query("waiting_calls"), words).fetchall()
    end = (rows[-1][2], rows[-1][0]) if len(rows) == limit else None
    return WaitingPage({row[0]: Waiting(*row[1:]) for row in rows}, end)


def due(
    connection: Connection,
    source_id: str,
    calls: Mapping[str, Waiting],
    *,
    by_header: bool,
    is_over: Callable[[Waiting], bool],
) -> list[str]:
    """Those of the source's waiting calls that can be decided: a crash has come between their records and their
    receipt, their waiting time is over, or, by header, their line says what they cost."""
    over = {call_id for call_id, call in calls.items() if call.deadline_passed and is_over(call)}
    known = set() if by_header else set(with_records(connection, calls))
    decidable = over | known
    own = _own(connection, source_id, calls if by_header else decidable)
    return [call_id for call_id, by_line in own.items() if call_id in decidable or (by_header and by_line)]


def _own(connection: Connection, source_id: str, call_ids: Collection[str]) -> dict[str, bool]:
    """The source's own calls among these, and whether the line says what the call costs."""
    if not call_ids:
        return {}
    with wrapped():
        rows = connection.execute(query("own_calls"), {"source_id": source_id, "call_ids": list(call_ids)}).fetchall()
    return {row[0]: row[1] for row in rows}


def with_records(connection: Connection, call_ids: Collection[str]) -> list[str]:
    """Those of the calls about which there is a spend record."""
    if not call_ids:
        return []
    with wrapped():
        rows = connection.execute(query("with_records"), {"call_ids": list(call_ids)}).fetchall()
    return [row[0] for row in rows]


def open_exceptions(connection: Connection, after: tuple[str, str] | None, limit: int) -> ExceptionPage:
    """The next calls, of all sources, with an exception that other settings may decide: FREE_MODELS, COST_MAX_USD,
    CORRECTIONS, the account, COST_SOURCE."""
    kind, call = after or ("", "")
    words = {"after_kind": kind, "after_call": call, "limit": limit}
    with wrapped():
        rows = connection.execute(query("open_page"), words).fetchall()
    overdue = tuple(row[1] for row in rows if row[0] == ExceptionKind.OVERDUE)
    others = tuple(row[1] for row in rows if row[0] != ExceptionKind.OVERDUE)
    return ExceptionPage(overdue, others, (rows[-1][0], rows[-1][1]) if len(rows) == limit else None)


def doubtful(connection: Connection, source_id: str, page: ExceptionPage, *, by_header: bool) -> list[str]:
    """Those of a page that the settings of now may decide. An overdue call only where its records came while they did
    not count, or where its header counts now and says what the call costs."""
    if by_header:
        own = _own(connection, source_id, page.overdue)
        return [*page.others, *(call_id for call_id in page.overdue if own.get(call_id))]
    return [*page.others, *with_records(connection, page.overdue)]


def resume(connection: Connection, after_call: str, limit: int) -> str | None:
    """Let time decide again those of the next stopped calls that no exception stops: a daemon of before migration 0008,
    which ran on beside it, closes exceptions without. Returns the last of these calls; None: there are no more. Within
    `deciding`."""
    with wrapped():
        rows = connection.execute(query("stopped_page"), {"after_call": after_call, "limit": limit}).fetchall()
        connection.execute(query("resume_calls"), {"call_ids": [row[0] for row in rows]})
    return rows[-1][0] if len(rows) == limit else None


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
        asked = {}
        with connection.pipeline():
            for name in ("records", "receipts", "adjustments", "exceptions"):
                asked[name] = connection.cursor(row_factory=dict_row).execute(query(f"settle_{name}"), ids)
        # not within the pipeline: after one, Postgres' timers stand still until the next statement, and a process that
        # freezes while it decides would hold up everybody who decides
        asked["conflicts"] = cursor.execute(query("settle_conflicts"), ids)
        found = {name: _by_call(answer.fetchall()) for name, answer in asked.items()}
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
    waiting = Waiting(row["committed_at"], row["started_at"], row["deadline_passed"], row["occurred_at"])
    records = found["records"].get(call_id, ())
    receipts = [_receipt(one) for one in found["receipts"].get(call_id, ())]
    return CallState(
        fact=UsageFact(**{name: row[name] for name in UsageFact._fields}),
        records=tuple(record_of(one) for one in records),
        receipt=receipts[0] if receipts else None,
        adjustments=tuple(_adjustment(one) for one in found["adjustments"].get(call_id, ())),
        exceptions=tuple(_exception(one) for one in found["exceptions"].get(call_id, ())),
        conflict_accounts=tuple(one["billing_account_id"] for one in found["conflicts"].get(call_id, ())),
        quiet_over=row["quiet_over"] and all(one["quiet_over"] for one in records),
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
    stopped = [key for key, one in decisions.items() if one.standing in STOPPED or key in reopened]
    with wrapped(), connection.cursor() as cursor:
        with connection.pipeline():
            if receipts:
                cursor.execute(query("insert_receipts"), {"rows": _json(receipts)})
                cursor.execute(query("insert_details"), {"rows": _json(details)})
            for name, rows in (
                ("insert_adjustment", [{**asdict(one), "evidence": Jsonb(one.evidence)} for one in adjustments]),
                ("open_exception", [_exception_row(one) for one in opened]),
                ("close_exception", [_exception_row(one) for one in closed]),
            ):
                if rows:
                    cursor.executemany(query(name), rows)
            if reopened:
                cursor.execute(query("unsettle_calls"), {"call_ids": reopened})
                cursor.execute(query("resume_calls"), {"call_ids": reopened})
            if stopped:
                cursor.execute(query("stop_calls"), {"call_ids": stopped, "seconds": ASK_AFTER_MIN.total_seconds()})
        cursor.execute(query("forget_unsettled"), {"call_ids": done})  # last, and by itself: as in `load`


def close(connection: Connection, closed: CallException) -> None:
    """Close an exception, and note that its call is to be looked at. Within `deciding`."""
    with wrapped():
        connection.execute(query("close_exception"), _exception_row(closed))
        connection.execute(query("touch_calls"), {"call_ids": [closed.call_id]})


def _json(rows: Sequence[Receipt] | Sequence[ChargeDetails]) -> str:
    """An array of objects. Decimals are strings: a number of JSON might be read as a float on its way."""

    def text(value: object) -> str:
        if isinstance(value, Decimal):
            return str(value)
        raise TypeError(f"a receipt has no values of {type(value)}")

    return orjson.dumps(rows, default=text).decode()


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
    connection: Connection,
    source_id: str,
    *,
    started_after: datetime | None,
    late_after: tuple[datetime, str] | None,
    limit: int,
) -> Window:
    """What to ask the spend logs for next: an hour of starts at most, from `started_after` on, and up to `limit` calls
    by name, half of them given up, the others from `late_after` on."""
    words: dict[str, Any] = {"source_id": source_id, "started_after": started_after or "-infinity"}
    with wrapped(), connection.transaction(), connection.cursor(row_factory=dict_row) as cursor:
        cursor.execute(query("go_by_keys"))
        row = cursor.execute(query("poll_window"), words).fetchone()
        assert row is not None
        given_up = cursor.execute(query("stragglers"), {**words, "limit": limit // 2}).fetchall()
        start, call = late_after or ("-infinity", "")
        words |= {"after_start": start, "after_call": call, "limit": limit - len(given_up)}
        late = cursor.execute(query("late_calls"), words).fetchall()
    return Window(
        row["asked_at"],
        None if row["started_from"] is None else (row["started_from"], row["started_to"], row["ended_to"]),
        {one["call_id"]: one["started_at"] for one in late},
        {one["call_id"]: row["asked_at"] - one["committed_at"] for one in given_up},
    )


def asked(connection: Connection, window: Window, *, answered: bool) -> None:
    """Note when calls that were given up are to be asked for again: the older, the later; soon, where there was no
    answer."""
    rows = [
        {"call_id": call_id, "ask_at": window.asked_at + _pause(age if answered else ASK_AFTER_MIN)}
        for call_id, age in window.given_up.items()
    ]
    if rows:
        with wrapped(), connection.transaction(), connection.pipeline(), connection.cursor() as cursor:
            cursor.executemany(query("ask_later"), rows)


def _pause(age: timedelta) -> timedelta:
    return min(max(age, ASK_AFTER_MIN), ASK_AFTER_MAX)


def counts(connection: Connection) -> dict[str, Any]:
    """For the gauges: pending calls, the oldest of them, open exceptions by kind."""
    with wrapped(), connection.cursor(row_factory=dict_row) as cursor:
        row = cursor.execute(query("settle_counts")).fetchone()
        kinds = cursor.execute(query("open_exceptions")).fetchall()
    assert row is not None
    return {**row, "exceptions": {one["kind"]: one["n"] for one in kinds}}
