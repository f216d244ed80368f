"""Deciding dead letters: the row that its line makes today and the letter's resolution, in one transaction.

Goes the way of everybody who decides (`settlement.deciding`), beside a running daemon. No position moves, and the range
keeps its counts: it was read as a dead letter.
"""

from billing_tailer.errors import RowRejected, TailerError
from billing_tailer.ledger.connection import Connection, lock_key, query, wrapped
from billing_tailer.ledger.records import insert_records, known_lines
from billing_tailer.ledger.writer import COLUMNS, copy_text
from billing_tailer.model import Outcome, PlacedFact, PlacedRecord, Skip
from billing_tailer.rows import identity

DISCARDED = "discarded"
_COPY_STAGED = query("copy_staged").format(columns=", ".join(COLUMNS))
_INSERT_STAGED = query("insert_staged").format(columns=", ".join(COLUMNS))


def decide_letter(
    connection: Connection,
    schema: str,
    dead_letter_id: int,
    becomes: PlacedFact | PlacedRecord | Skip | None,
    *,
    by: str,
    reason: str,
    dry_run: bool,
) -> str:
    """Resolve an open letter; returns its resolution, `discarded` or `retried: <outcome>`. becomes: what its line is
    today, None to discard it. dry_run: everything is rolled back. Raises TailerError where it is not open any more, or
    Postgres refuses the row."""
    try:
        with wrapped(), connection.transaction(force_rollback=dry_run):
            connection.execute(query("deciding"), {"key": lock_key("decide", schema)})
            resolution = DISCARDED if becomes is None else f"retried: {_insert(connection, becomes, dead_letter_id)}"
            words = {"dead_letter_id": dead_letter_id, "resolution": resolution, "by": by, "reason": reason}
            if connection.execute(query("resolve_letter"), words).rowcount != 1:
                raise TailerError(f"dead letter {dead_letter_id} was decided meanwhile", "look again with `show`")
    except RowRejected as error:
        raise TailerError(f"Postgres refuses the row of dead letter {dead_letter_id}: {error.message}") from error
    return resolution


def _insert(connection: Connection, becomes: PlacedFact | PlacedRecord | Skip, dead_letter_id: int) -> str:
    """Insert what a line is, as a batch would; returns its outcome."""
    if isinstance(becomes, Skip):
        if becomes.call_id is not None:
            values = {"call_id": becomes.call_id, "dead_letter_id": dead_letter_id}
            connection.execute(query("insert_skipped_letter"), values)
        return becomes.reason
    if isinstance(becomes, PlacedRecord):
        return Outcome.SPEND_RECORD if insert_records(connection, [becomes]) else Outcome.REPLAYED
    connection.execute(query("create_staging"))
    copy_text(connection, _COPY_STAGED, [f"{becomes.text}\t0"])
    inserted = connection.execute(_INSERT_STAGED).fetchall()
    numbers = [0] if inserted else []
    connection.execute(query("unsettle_staged"), {"inserted": numbers})
    if inserted:
        return Outcome.FACT
    if identity(becomes) in known_lines(connection, [becomes.call_id]):
        return Outcome.REPLAYED
    connection.execute(query("insert_conflicts"), {"conflicts": [0]})
    # the call may be settled: nobody else would look at it again
    connection.execute(query("touch_calls"), {"call_ids": [becomes.call_id]})
    return Outcome.CONFLICT
