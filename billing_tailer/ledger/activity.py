"""What the activity page, `GET /v1/activity` and the verb `export` read.

A range of time may hold ten million receipts, and no snapshot may be held for longer than five seconds: ranges are read
in slices, each a statement and a snapshot of its own, which become longer or shorter by how long the last one took or
how many rows it gave. A call ends once, so that it is in one slice; what is settled meanwhile may be missing. What
takes longer than the asker has is refused with TooMuch, never cut (tests/test_activity.py::test_too_much_is_said).

Money is receipts plus adjustments, by the time and the account of the receipt.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, LiteralString

from psycopg.errors import QueryCanceled
from psycopg.rows import dict_row

from billing_tailer import pricing
from billing_tailer.errors import TooMuch
from billing_tailer.ledger.connection import Connection, connect, query, require_schema, wrapped
from billing_tailer.ledger.runs import STATEMENT_TIMEOUT_SECONDS

ORIGIN = datetime(2001, 1, 1, tzinfo=UTC)
"""Buckets of time begin at multiples of their length after this: a Monday."""
FIRST_SLICE = timedelta(hours=1)
SLICE_MIN = timedelta(seconds=1)
SLICE_SECONDS = 1.0
"""A slice is to take so long."""
GROUPS_MAX = 20_000
"""Rows of one slice: buckets by model, then accounts."""
LETTERS_COUNTED_MAX = 10_000
RAW_BYTES = 2000
"""So much of a dead letter is shown."""
NARROWER = "narrow the range of time, or name an account"


@dataclass(frozen=True, slots=True)
class Chosen:
    """Which calls count: all, or those of an account, a model (the model group that was billed), a run."""

    account: str | None = None
    model: str | None = None
    run_id: str | None = None

    def conditions(self) -> LiteralString:
        """To be put behind a statement's own conditions."""
        parts: tuple[tuple[str | None, LiteralString], ...] = (
            (self.account, query("activity_of_account")),
            (self.model, query("activity_of_model")),
            (self.run_id, query("activity_of_run")),
        )
        return "\n".join(text for value, text in parts if value is not None)

    def parameters(self) -> dict[str, str | None]:
        """For these conditions."""
        return {"account": self.account, "model": self.model, "run_id": self.run_id}


@dataclass(slots=True)
class Charged:
    """Receipts plus adjustments, added up. USD before the markup, not rounded."""

    calls: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    cached_tokens: int = 0
    cost_usd: Decimal = Decimal(0)
    credits: int = 0

    def add(self, other: "Charged") -> None:
        """Count another one in."""
        self.calls += other.calls
        self.tokens_in += other.tokens_in
        self.tokens_out += other.tokens_out
        self.cached_tokens += other.cached_tokens
        self.cost_usd = pricing.total([self.cost_usd, other.cost_usd])
        self.credits += other.credits


@dataclass(slots=True)
class Sums:
    """What was charged in a range: by the start of a bucket and the model (None: not known), and by account (None where
    there are more than GROUPS_MAX)."""

    series: dict[tuple[datetime, str | None], Charged] = field(default_factory=dict)
    accounts: dict[str, Charged] | None = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Place:
    """A place in the order of receipts, newest first: what is before it is older. call_id "": all of that moment."""

    occurred_at: datetime
    call_id: str = ""


class Activity:
    """Reads on a connection that cannot write and whose statements end in time. No method is one snapshot."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def sums(self, start: datetime, end: datetime, chosen: Chosen, bucket: timedelta, seconds: float) -> Sums:
        """What was charged for calls that ended from start to before end. Raises TooMuch after `seconds`."""
        sums = Sums()
        statement = query("activity_sums").format(conditions=chosen.conditions())
        words = {"bucket": bucket, "origin": ORIGIN, "limit": GROUPS_MAX + 1, **chosen.parameters()}
        for rows in self._slices(statement, start, end, seconds, words):
            if len(rows) > GROUPS_MAX:
                sums.accounts = None
            _add(sums, rows)
        return sums

    def counts(self, start: datetime, end: datetime, account: str | None, seconds: float) -> dict[str, Any]:
        """Where the calls stand that ended from start to before end, as `reconcile` counts them. Raises TooMuch."""
        calls = query("reconcile_calls")
        if account is not None:
            calls += "\n" + query("activity_calls_of_account")
        total: dict[str, Any] = {}
        statement = query("reconcile_window").format(calls=calls)
        for rows in self._slices(statement, start, end, seconds, {"account": account}):
            total = {name: value + total.get(name, 0) for name, value in rows[0].items()}
        return total

    def _slices(
        self, statement: LiteralString, start: datetime, end: datetime, seconds: float, words: dict[str, Any]
    ) -> Iterator[list[dict[str, Any]]]:
        """The rows of each slice of a range, at least one."""
        deadline = time.monotonic() + seconds
        width = FIRST_SLICE
        while True:
            until = min(end, start + width)
            begun = time.monotonic()
            try:
                rows = self._rows(statement, start=start, end=until, **words)
            except QueryCanceled:
                if width <= SLICE_MIN or time.monotonic() > deadline:
                    raise TooMuch("reading this range takes too long", NARROWER) from None
                width = max(SLICE_MIN, width / 8)
                continue
            yield rows
            if until >= end:
                return
            if time.monotonic() > deadline:
                raise TooMuch(f"reading this range takes longer than {seconds:g} s", NARROWER)
            start = until
            took = time.monotonic() - begun
            width *= 6 if took < SLICE_SECONDS / 8 else 2 if took < SLICE_SECONDS / 2 else 1

    def receipts(
        self, start: datetime, before: Place, chosen: Chosen, limit: int, width: timedelta, seconds: float
    ) -> tuple[list[dict[str, Any]], Place | None, timedelta]:
        """The newest receipts before a place of calls that ended at or after start; where to go on (None: there are no
        more); and how far back to look at first then. Gives what it has after `seconds`. Raises TooMuch."""
        statement = query("activity_receipts").format(
            conditions=chosen.conditions(),
            details=query("activity_with_details") if chosen.model is not None else "",
        )
        if chosen.run_id is not None:
            width = max(width, before.occurred_at - start)  # found by their ids
        deadline = time.monotonic() + seconds
        found: list[dict[str, Any]] = []
        while True:
            since = max(start, before.occurred_at - width)
            place = {"start": since, "end": before.occurred_at, "before": before.call_id}
            try:
                rows = self._rows(statement, **place, limit=limit - len(found), **chosen.parameters())
            except QueryCanceled:
                if width <= SLICE_MIN:
                    raise TooMuch("reading these receipts takes too long", NARROWER) from None
                width = max(SLICE_MIN, width / 8)
                continue
            found += rows
            if len(found) == limit:
                last = found[-1]
                width = max(SLICE_MIN, 2 * (before.occurred_at - last["occurred_at"]))
                return found, Place(last["occurred_at"], last["call_id"]), width
            if since <= start:
                return found, None, width
            before = Place(since)
            width *= 16 if not rows else 4
            if time.monotonic() > deadline:
                return found, before, width

    def exceptions(
        self,
        *,
        kind: str | None,
        include_closed: bool,
        before: tuple[datetime, str, str, int] | None,
        limit: int,
    ) -> list[dict[str, Any]]:
        """Exceptions with their call's run and account, the newest first. before: opened_at, call id, kind and seq of
        the last one that is known."""
        opened_at, call_id, after_kind, seq = before or (None, None, None, None)
        return self._within_time(
            "activity_exceptions",
            all=include_closed,
            kind=kind,
            opened_at=opened_at,
            call_id=call_id,
            after_kind=after_kind,
            seq=seq,
            limit=limit,
        )

    def dead_letters(self, *, include_resolved: bool, before: int | None, limit: int) -> list[dict[str, Any]]:
        """Dead letters of all sources with their first RAW_BYTES bytes, the newest first."""
        return self._within_time(
            "activity_letters", all=include_resolved, before=before, limit=limit, raw_bytes=RAW_BYTES
        )

    def standing(self) -> dict[str, Any]:
        """Open exceptions by kind, open dead letters (LETTERS_COUNTED_MAX: so many or more), Postgres's clock, since
        when calls are not settled (unknown: why that cannot be said), and the files that are not finished."""
        files = self._within_time("activity_files")  # first: what is committed by then is settled or found unsettled
        for file in files:
            place = {"file_id": file["file_id"], "committed_offset": file["committed_offset"]}
            last = self._within_time("activity_last_call", **place)
            file["last_call_at"] = last[0]["occurred_at"] if last else None
        try:
            [unsettled] = self._within_time("activity_unsettled")
        except TooMuch as error:  # millions of them: the rest is worth knowing all the more
            unsettled = {"unsettled_since": None, "waiting_since": None, "unknown": error.message}
        [opened] = self._within_time("activity_open", letters_max=LETTERS_COUNTED_MAX)
        return {"unknown": None, **opened, **unsettled, "files": files}

    def places_of(self, file_id: int) -> dict[int, dict[str, Any]]:
        """The file of a line, by its id, as `call` of the API has it; empty where it is not recorded any more."""
        return {row["file_id"]: row for row in self._rows(query("call_files"), file_ids=[file_id])}

    def _within_time(self, name: str, **parameters: Any) -> list[dict[str, Any]]:
        try:
            return self._rows(query(name), **parameters)
        except QueryCanceled:
            raise TooMuch(f"Postgres needs more than {STATEMENT_TIMEOUT_SECONDS} s for this", "use the verbs") from None

    def _rows(self, statement: LiteralString, **parameters: Any) -> list[dict[str, Any]]:
        with self._connection.transaction(), self._connection.cursor(row_factory=dict_row) as cursor:
            cursor.execute(query("activity_memory"))
            return cursor.execute(statement, parameters).fetchall()


def _add(sums: Sums, rows: list[dict[str, Any]]) -> None:
    for row in rows:
        charged = Charged(
            row["charged_calls"],
            row["tokens_in"],
            row["tokens_out"],
            row["cached_tokens"],
            row["cost_usd"],
            int(row["charged_credits"]),
        )
        if not row["by_account"]:
            sums.series.setdefault((row["bucket"], row["name"]), Charged()).add(charged)
        elif sums.accounts is not None:
            sums.accounts.setdefault(row["name"], Charged()).add(charged)
    if len(sums.series) > GROUPS_MAX:
        raise TooMuch(f"more than {GROUPS_MAX} models and times", NARROWER)
    if sums.accounts is not None and len(sums.accounts) > GROUPS_MAX:
        sums.accounts = None


@contextmanager
def activity_reads(dsn: str, schema: str) -> Iterator[Activity]:
    """Connect for a verb. Raises LedgerUnavailable, or ConfigError where the schema is not this program's."""
    with connect(dsn, schema, application_name="billing_tailer export") as connection:
        require_schema(connection, schema)
        with wrapped():
            connection.execute(query("read_only_session"), {"timeout": f"{STATEMENT_TIMEOUT_SECONDS}s"})
            yield Activity(connection)
