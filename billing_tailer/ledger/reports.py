"""What the verbs ask Postgres: short reads, and the writes that an operator orders."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from psycopg.rows import dict_row

from billing_tailer.errors import ConfigError
from billing_tailer.ledger.connection import Connection, connect, query, require_schema, wrapped
from billing_tailer.ledger.resets import Reset, Ruling, apply_reset, apply_ruling, range_start
from billing_tailer.ledger.runs import WINDOW_COUNTS
from billing_tailer.ledger.writer import position_of
from billing_tailer.model import Position


class Reports:
    """An operator's connection to one source."""

    def __init__(self, connection: Connection, source_id: str) -> None:
        self._connection = connection
        self._source_id = source_id

    def positions(self) -> list[Position]:
        """Every generation of the source, oldest first."""
        return [position_of(row) for row in self._rows("positions", after_file_id=0)]

    def totals(self) -> dict[str, int]:
        """Counts of facts, conflicts, open dead letters, gaps and known gap bytes."""
        return dict(self._rows("totals")[0])

    def settlement(self) -> dict[str, Any]:
        """Pending calls and receipts of the source, and its open exceptions by kind."""
        kinds = {row["kind"]: row["n"] for row in self._rows("settlement_exceptions")}
        return {**self._rows("settlement_totals")[0], "exceptions_open": kinds}

    def closed_window(self, closed_seconds: int) -> dict[str, Any]:
        """How many calls of the last quarter of an hour that is over for so long stand where, of all sources."""
        window = self._rows("closed_window", closed=closed_seconds)[0]
        with wrapped(), self._connection.cursor(row_factory=dict_row) as cursor:
            row = cursor.execute(WINDOW_COUNTS, window).fetchone()
        assert row is not None
        return row

    def dead_letters(self, *, include_resolved: bool, limit: int) -> list[dict[str, Any]]:
        """The newest dead letters first, without their bytes."""
        return self._rows("dead_letters", all=include_resolved, limit=limit)

    def dead_letter(self, dead_letter_id: int) -> dict[str, Any] | None:
        """One dead letter with its bytes. Raises ConfigError where it is another source's."""
        rows = self._rows("dead_letter", dead_letter_id=dead_letter_id)
        if not rows:
            return None
        row = rows[0]
        theirs = row.pop("source_id")
        if theirs not in (self._source_id, f"{self._source_id}.backfill"):
            raise ConfigError(
                f"dead letter {dead_letter_id} is of source {theirs}, and SOURCE_ID is {self._source_id}",
                "run the verb with the variables of that source's tailer: its files are on another volume",
            )
        return row

    def range_start(self, position: Position, offset: int) -> int:
        """Where the committed range that contains `offset` begins."""
        return range_start(self._connection, position, offset)

    def reset(self, reset: Reset) -> None:
        """Apply an operator's reset. Raises PositionMoved if the tailer was faster."""
        apply_reset(self._connection, self._source_id, reset)

    def rule(self, ruling: Ruling) -> None:
        """Apply what an operator decides of a generation. Raises PositionMoved if the tailer was faster."""
        apply_ruling(self._connection, self._source_id, ruling)

    def gaps(self) -> dict[int, list[dict[str, Any]]]:
        """Every gap of the source, in order, by `file_id`."""
        found: dict[int, list[dict[str, Any]]] = {}
        for row in self._rows("gaps"):
            found.setdefault(row.pop("file_id"), []).append(row)
        return found

    def active_owner(self) -> str | None:
        """The application name of the session that holds the source's lock, None where no tailer is active."""
        rows = self._rows("owner", application=f"billing_tailer {self._source_id}")
        return rows[0]["application_name"] if rows else None

    def _rows(self, name: str, **parameters: Any) -> list[dict[str, Any]]:
        with wrapped(), self._connection.cursor(row_factory=dict_row) as cursor:
            return cursor.execute(query(name), {"source_id": self._source_id, **parameters}).fetchall()


@contextmanager
def reports(dsn: str, schema: str, source_id: str) -> Iterator[Reports]:
    """Connect for one verb. Raises LedgerUnavailable, or ConfigError where the schema is not this program's."""
    with connect(dsn, schema, application_name="billing_tailer cli") as connection:
        require_schema(connection, schema)
        yield Reports(connection, source_id)
