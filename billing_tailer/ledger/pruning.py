"""Removes spend records that nobody will ask for: those of calls without an audit line, when they are old.

Under the owner's role, since the daemon's may delete nothing of this. In bounded batches, each in a transaction of its
own with its row of `prunes`: whatever ends it in the middle, the row says what is gone, and the next prune goes on. A
call whose line is committed at this very moment keeps its records: no fact is committed during a batch
(tests/test_prune.py::test_a_line_that_is_just_being_committed_keeps_its_records).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any, LiteralString

from psycopg import IsolationLevel
from psycopg.rows import dict_row

from billing_tailer.errors import ConfigError
from billing_tailer.ledger.connection import Connection, connect, query, require_schema, wrapped

DAYS = 30
"""A call's records go so long after the last of them was received."""
BATCH_ROWS = 5000
LOCK_SECONDS_MAX = 5
"""So long a batch waits for a daemon that commits facts; others that commit wait behind it."""


@dataclass(frozen=True, slots=True)
class Pruned:
    """What was removed, or would be. prune_id: None where nothing was to be changed. cost_usd: of the records."""

    prune_id: int | None
    received_before: datetime
    calls: int
    records: int
    cost_usd: Decimal


def prune(dsn: str, schema: str, *, dsn_name: str, reason: str, person: str, dry_run: bool) -> Pruned:
    """Remove the spend records of calls without an audit line whose last record is older than DAYS. dsn_name: where
    the DSN comes from.

    Raises ConfigError where the role may not, LedgerUnavailable where a batch cannot get its turn.
    """
    with connect(dsn, schema, application_name="billing_tailer prune") as connection:
        require_schema(connection, schema)
        connection.isolation_level = IsolationLevel.READ_COMMITTED  # a batch sees what was committed before its turn
        with wrapped():
            [allowed] = _rows(connection, query("may_prune"), days=DAYS)
            if not (allowed["may_delete"] or dry_run):
                raise ConfigError(
                    f"role {allowed['role']} of {dsn_name} may not remove spend records from schema {schema}, and "
                    "should not if it is the daemon's",
                    f"set BILLING_TAILER_MIGRATE_DATABASE_URL to a DSN of {allowed['owner']}, who owns them",
                )
            words = {"before": allowed["before"], "reason": reason, "person": person}
            prune_id = None if dry_run else _rows(connection, query("begin_prune"), **words)[0]["prune_id"]
            total = _walk(connection, prune_id, allowed["before"])
            if prune_id is not None:
                connection.execute(query("end_prune"), {"prune_id": prune_id})
    return Pruned(prune_id, allowed["before"], **total)


def _walk(connection: Connection, prune_id: int | None, before: datetime) -> Mapping[str, Any]:
    """Every spend record once, in the order of call ids."""
    total: dict[str, Any] = {"calls": 0, "records": 0, "cost_usd": Decimal(0)}
    after = ""
    while True:
        [page] = _rows(connection, query("prune_page"), after=after, before=before, rows=BATCH_ROWS)
        if page["last"] is None:
            return total
        after = page["last"]
        if page["call_ids"]:
            found = _batch(connection, prune_id, {"call_ids": page["call_ids"], "before": before})
            total = {name: total[name] + found[name] for name in total}


def _batch(connection: Connection, prune_id: int | None, words: Mapping[str, Any]) -> dict[str, Any]:
    unaudited = query("old_unaudited")
    if prune_id is None:
        return _rows(connection, query("count_unaudited").format(unaudited=unaudited), **words)[0]
    with connection.transaction():
        connection.execute("select set_config('lock_timeout', %s, true)", (f"{LOCK_SECONDS_MAX}s",))
        connection.execute(query("hold_facts"))
        gone = _rows(connection, query("delete_unaudited").format(unaudited=unaudited), **words)
        found = {
            "calls": len({row["call_id"] for row in gone}),
            "records": len(gone),
            "cost_usd": sum((row["cost_usd"] for row in gone if row["cost_usd"] is not None), Decimal(0)),
        }
        connection.execute(query("count_prune"), {"prune_id": prune_id, **found})
    return found


def _rows(connection: Connection, statement: LiteralString, **parameters: Any) -> list[dict[str, Any]]:
    with connection.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(statement, parameters).fetchall()
