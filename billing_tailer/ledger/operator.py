"""What an operator asks and decides about calls and money, in a session of its own beside the daemon's.

Its writes go the settler's way: one transaction from loading a call to writing the decision, alone among everybody who
decides (`settlement.deciding`), so that no receipt is made twice and no correction is computed from a sum that changes
(tests/test_money_cli.py::test_a_release_races). Receipts are never updated: a correction is a row of its own.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from psycopg.rows import dict_row

from billing_tailer.errors import Overlap, TailerError
from billing_tailer.ledger import settlement
from billing_tailer.ledger.connection import Connection, connect, query, require_schema, wrapped
from billing_tailer.ledger.letters import decide_letter
from billing_tailer.ledger.news import announce
from billing_tailer.ledger.runs import WINDOW_COUNTS
from billing_tailer.model import CallException, PlacedFact, PlacedRecord, Skip
from billing_tailer.settle import CallState, Decision

HOUR = timedelta(hours=1)
NEWEST_WITHIN = (HOUR, timedelta(days=1), timedelta(days=30))
HELD_UP_SECONDS_MAX = 3
"""So long may a verb that was stopped in the middle hold up the daemon's settlement."""


@dataclass(frozen=True, slots=True)
class Told:
    """Everything that is committed about one call, as rows. fact: None for a spend record without an audit line."""

    fact: dict[str, Any] | None
    records: list[dict[str, Any]]
    receipt: dict[str, Any] | None
    details: dict[str, Any] | None
    adjustments: list[dict[str, Any]]
    exceptions: list[dict[str, Any]]
    conflicts: list[dict[str, Any]]
    state: CallState | None


class Operator:
    """An operator's connection to the money of all sources."""

    def __init__(self, connection: Connection, schema: str, quiet_seconds: int, deadline_seconds: int) -> None:
        self._connection = connection
        self._schema = schema
        self._quiet_seconds = quiet_seconds
        self._deadline_seconds = deadline_seconds

    # --- reading

    def told(self, call_id: str) -> Told | None:
        """Everything about a call, at one moment; None where nothing is known of it."""
        with wrapped(), self._connection.transaction():
            self._connection.execute("set transaction isolation level repeatable read read only")
            one = {
                name: self._rows(f"explain_{name}", call_id=call_id)
                for name in ("fact", "records", "receipt", "details", "adjustments", "exceptions", "conflicts")
            }
            state = self.load(call_id)
        if not one["fact"] and not one["records"]:
            return None
        return Told(
            fact=next(iter(one["fact"]), None),
            records=one["records"],
            receipt=next(iter(one["receipt"]), None),
            details=next(iter(one["details"]), None),
            adjustments=one["adjustments"],
            exceptions=one["exceptions"],
            conflicts=one["conflicts"],
            state=state,
        )

    def receipts(
        self, *, run_id: str | None, account: str | None, since: datetime | None, limit: int
    ) -> list[dict[str, Any]]:
        """Receipts with model, tokens and what was adjusted, the newest first."""
        if since is None and run_id is None:  # the newest of many are looked for among the last ones first
            now = self.now()
            for back in NEWEST_WITHIN:
                rows = self._rows("receipts", run_id=None, account=account, since=now - back, limit=limit)
                if len(rows) == limit:
                    return rows
        return self._rows("receipts", run_id=run_id, account=account, since=since, limit=limit)

    def exceptions(self, *, kind: str | None, include_closed: bool, limit: int) -> list[dict[str, Any]]:
        """Exceptions with their call's run and account, the newest first."""
        return self._rows("exceptions", kind=kind, all=include_closed, limit=limit)

    def now(self) -> datetime:
        """Postgres' clock."""
        moment: datetime = self._rows("server_time")[0]["now"]
        return moment

    def window_counts(self, start: datetime, end: datetime) -> dict[str, Any]:
        """How many calls that ended from `start` to before `end` stand where, and what they cost."""
        total: dict[str, Any] = {}
        while True:  # hour by hour: no snapshot is held for long
            until = min(start + HOUR, end)
            with wrapped(), self._connection.cursor(row_factory=dict_row) as cursor:
                row = cursor.execute(WINDOW_COUNTS, {"start": start, "end": until}).fetchone()
            assert row is not None
            total = {name: value + total.get(name, 0) for name, value in row.items()}
            if until == end:
                return total
            start = until

    def window_calls(self, start: datetime, end: datetime) -> list[dict[str, Any]]:
        """Each call of a window: where it stands and what it costs."""
        return self._rows("reconcile_calls", start=start, end=end)

    def known(self, call_ids: Collection[str]) -> set[str]:
        """Those of the calls that have an audit line."""
        return {row["call_id"] for row in self._rows("known_calls", call_ids=list(call_ids))}

    # --- deciding

    @contextmanager
    def deciding(self) -> Iterator[None]:
        """One transaction in which nobody else decides anything. Keep it short: the daemon waits."""
        try:
            with settlement.deciding(self._connection, self._schema):
                yield
        except Overlap as error:
            raise TailerError("the call was settled meanwhile", "look at it again with `explain`") from error

    def load(self, call_id: str) -> CallState | None:
        """Everything that is committed about a call; None without an audit line. Its deadline counts as running: only
        the daemon knows whether anybody is left to ask."""
        calls = settlement.load(
            self._connection,
            [call_id],
            deadline_seconds=self._deadline_seconds,
            quiet_seconds=self._quiet_seconds,
            is_over=lambda _: False,
        )
        return calls[0] if calls else None

    def write(self, call_id: str, decision: Decision) -> None:
        """Write what was decided, and tell who waits for the run; a settled call leaves the list of unsettled ones.
        Within `deciding`."""
        # nothing counts as looked at: a record that comes at this moment must be looked at by the settler
        settlement.write(self._connection, {call_id: decision})
        with wrapped():
            announce(self._connection, self._schema, call_id)

    def close(self, closed: CallException) -> None:
        """Close an exception, and have the settler look at its call again; where the call stands is not for a verb to
        say: a settled one waits for nothing. Within `deciding`."""
        settlement.close(self._connection, closed)
        with wrapped():
            announce(self._connection, self._schema, closed.call_id)

    def give_up(self, call_id: str) -> None:
        """Take a call that will not be charged off the list of unsettled ones. A later record brings it back."""
        with wrapped():
            self._connection.execute(query("forget_unsettled"), {"call_ids": [call_id]})

    def decide_letter(
        self,
        dead_letter_id: int,
        becomes: PlacedFact | PlacedRecord | Skip | None,
        *,
        by: str,
        reason: str,
        dry_run: bool,
    ) -> str:
        """Resolve an open dead letter with what its line is today (None: discard it); returns its resolution."""
        return decide_letter(
            self._connection, self._schema, dead_letter_id, becomes, by=by, reason=reason, dry_run=dry_run
        )

    def _rows(self, name: str, **parameters: Any) -> list[dict[str, Any]]:
        with wrapped(), self._connection.cursor(row_factory=dict_row) as cursor:
            return cursor.execute(query(name), parameters).fetchall()


@contextmanager
def operator(dsn: str, schema: str, *, quiet_seconds: int, deadline_seconds: int) -> Iterator[Operator]:
    """Connect for one verb. Raises LedgerUnavailable, or ConfigError where the schema is not this program's."""
    with connect(dsn, schema, application_name="billing_tailer cli") as connection:
        require_schema(connection, schema)
        with wrapped():
            connection.execute(
                "select set_config('idle_in_transaction_session_timeout', %s, false)", (f"{HELD_UP_SECONDS_MAX}s",)
            )
        yield Operator(connection, schema, quiet_seconds, deadline_seconds)
