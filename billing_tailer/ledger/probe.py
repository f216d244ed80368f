"""What `check` asks Postgres, question by question: one that fails does not keep the others from being answered."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from psycopg.rows import dict_row

from billing_tailer.ledger.connection import (
    Connection,
    connect,
    may_change_money,
    query,
    require_usage,
    schema_version,
    unapplied,
    wrapped,
)
from billing_tailer.ledger.writer import position_of
from billing_tailer.model import Position


@dataclass(frozen=True, slots=True)
class Server:
    """Whom we talk to, as whom. role: what our statements run as; login: who has logged in."""

    server_version: str
    role: str
    login: str
    database: str


class Probe:
    """A connection that looks at an installation. Every method raises LedgerUnavailable, or TailerError."""

    def __init__(self, dsn: str, schema: str, connection: Connection) -> None:
        self._dsn = dsn
        self._schema = schema
        self._connection = connection

    def server(self) -> Server:
        """Version, role and database."""
        return Server(**self._one("probe_server"))

    def compares_bytes(self) -> bool:
        """Whether the database compares texts by their bytes, as the collation "C" does, and not as a language does."""
        by_bytes: bool = self._one("probe_collation")["by_bytes"]
        return by_bytes

    def clock_skew_seconds(self) -> float:
        """How far Postgres' clock is ahead of ours, to half of the time that the question took."""
        before = time.time()
        now: datetime = self._one("server_time")["now"]
        return now.timestamp() - (before + time.time()) / 2

    def shares_sessions(self) -> bool:
        """Whether statements of one session of ours run in several of Postgres', as behind a pool per transaction:
        another one that is in a transaction takes the server's session away then."""

        def backend(connection: Connection) -> object:
            return connection.execute("select pg_backend_pid()").fetchone()

        with wrapped():
            first = backend(self._connection)
        with connect(self._dsn, self._schema, application_name="billing_tailer check") as other, wrapped():
            with other.transaction():
                taken = backend(other)
                second = backend(self._connection)
            return first != second or taken in (first, second)

    def schema_version(self) -> int:
        """The newest applied migration; 0 without a schema. Raises ConfigError where the schema is closed to our role,
        newer than this program, or another one's."""
        require_usage(self._connection, self._schema)
        with wrapped():
            version = schema_version(self._connection)
            if version:
                unapplied(self._connection, self._schema)
        return version

    def missing_grants(self) -> list[str]:
        """What the daemon needs and our role may not, such as `INSERT on usage_facts`."""
        missing: list[str] = self._one("missing_grants", schema=self._schema)["missing"]
        return missing

    def excess_grants(self) -> list[str]:
        """What our role may do with facts and spend records, and the daemon never does."""
        excess: list[str] = self._one("excess_grants", schema=self._schema)["excess"]
        return excess

    def may_change_money(self) -> bool:
        """Whether our role may change or delete receipts, or may become the role that can."""
        return may_change_money(self._connection, self._schema)

    def positions(self, source_id: str) -> list[Position]:
        """Every generation of a source, oldest first."""
        return [position_of(row) for row in self._rows("positions", source_id=source_id, after_file_id=0)]

    def models_seen(self) -> set[str]:
        """Every model group and model that a spend record has named."""
        return {name for row in self._rows("models_seen") for name in row.values() if name is not None}

    def callbacks_between(self, start: datetime, end: datetime) -> int:
        """How many records came by callback in a time."""
        count: int = self._one("callbacks_between", start=start, end=end)["n"]
        return count

    def _one(self, name: str, **parameters: Any) -> dict[str, Any]:
        return self._rows(name, **parameters)[0]

    def _rows(self, name: str, **parameters: Any) -> list[dict[str, Any]]:
        with wrapped(), self._connection.cursor(row_factory=dict_row) as cursor:
            return cursor.execute(query(name), parameters or None).fetchall()


@contextmanager
def probing(dsn: str, schema: str) -> Iterator[Probe]:
    """Connect to look. Raises LedgerUnavailable in the server's or libpq's words, or ConfigError."""
    with connect(dsn, schema, application_name="billing_tailer check") as connection:
        yield Probe(dsn, schema, connection)
