"""What the proofs ask Postgres: short reads in pages, which cannot write and hold no snapshot for longer than
STATEMENT_TIMEOUT_SECONDS."""

import sys
from array import array
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from psycopg.rows import dict_row, tuple_row

from billing_tailer.ledger import settlement
from billing_tailer.ledger.connection import Connection, connect, query, require_schema, wrapped
from billing_tailer.ledger.writer import position_of
from billing_tailer.model import Position
from billing_tailer.settle import CallState

STATEMENT_TIMEOUT_SECONDS = 5
PAGE_ROWS = 1000
OddCalls = Literal["unreceipted", "odd_details", "odd_adjustments"]
_POSITION_FIELDS = tuple(Position.__dataclass_fields__)


@dataclass(frozen=True, slots=True)
class Tile:
    """A committed range with its hash and counts, or a gap (both None; `end_offset` None: nobody knows)."""

    start_offset: int
    end_offset: int | None
    sha256: bytes | None = None
    counts: Mapping[str, int] | None = None


@dataclass(frozen=True, slots=True)
class Generation:
    """A generation at one moment. last: its last committed range then, which may grow. rewound_to: the lowest byte that
    an operator ever moved its offset back to; resets: how often one was moved; fact_beyond, batch_beyond: rows behind
    the offset. letters_open: dead letters that nobody has decided."""

    position: Position
    source_id: str
    last: Tile | None
    rewound_to: int | None
    resets: int
    fact_beyond: int | None
    batch_beyond: int | None
    letters_open: int


@dataclass(frozen=True, slots=True)
class PlacedRows:
    """What is recorded of a byte range, ordered by place. fact_starts and fact_ends: one of each per fact; hashes: of
    the lines of facts without a request id, by their start; letters: (start, end, sha256); conflicts: (start, end)."""

    fact_starts: "array[int]"
    fact_ends: "array[int]"
    hashes: Mapping[int, bytes]
    letters: list[tuple[int, int, bytes]]
    conflicts: list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class ReceiptRow:
    """A receipt's key and what stands beside it. call: everything about the call, None without an audit line.
    is_touched: a record has come that was not looked at yet. is_second: another receipt has the same call id."""

    source_system: str
    source_reference: str
    call_id: str
    has_fact: bool
    has_details: bool
    is_touched: bool
    is_second: bool
    call: CallState | None


class Proofs:
    """A connection that reads what is to be proven of one source, and of what was read into it by `backfill`."""

    def __init__(self, connection: Connection, source_id: str) -> None:
        self._connection = connection
        self._source_id = source_id

    # --- the log

    def generations(self) -> list[Generation]:
        """Every generation, oldest first."""
        found: list[Generation] = []
        while True:
            after = found[-1].position.file_id if found else 0
            with wrapped(), self._connection.transaction():
                self._connection.execute("set transaction isolation level repeatable read read only")
                page = self._rows("proof_files", source_id=self._source_id, after=after, limit=PAGE_ROWS)
                beyond = self._rows("proof_beyond", file_ids=[row["file_id"] for row in page])
            first = {row["file_id"]: row["fact_beyond"] for row in beyond}
            found += [_generation({**row, "fact_beyond": first.get(row["file_id"])}) for row in page]
            if len(page) < PAGE_ROWS:
                return found

    def tiles(self, generation: Generation) -> Iterator[Tile]:
        """Committed ranges and gaps below the generation's offset, in order, the last range as it was then."""
        before = generation.position.committed_offset
        after, kind = -1, 0
        while True:
            page = self._rows(
                "proof_tiles",
                file_id=generation.position.file_id,
                after=after,
                kind=kind,
                before=before,
                limit=PAGE_ROWS,
            )
            for row in page:
                is_last = generation.last is not None and row["start_offset"] == generation.last.start_offset
                tile = Tile(**row)
                yield generation.last if is_last and tile.sha256 is not None and generation.last else tile
            if len(page) < PAGE_ROWS:
                return
            after, kind = page[-1]["start_offset"], 0 if page[-1]["sha256"] is not None else 1

    def placed(self, file_id: int, start: int, end: int) -> PlacedRows:
        """What is recorded of lines that begin in [start, end)."""
        words = {"file_id": file_id, "start": start, "end": end}
        with wrapped(), self._connection.cursor(row_factory=tuple_row, binary=True) as cursor:
            facts = cursor.execute(query("proof_facts"), words).fetchone()
            assert facts is not None
            letters = cursor.execute(query("proof_letters"), words).fetchall()
            conflicts = cursor.execute(query("proof_conflicts"), words).fetchall()
        return PlacedRows(
            _offsets(facts[0]),
            _offsets(facts[1]),
            dict(zip(facts[2], facts[3], strict=True)),
            letters,
            conflicts,
        )

    # --- the money

    def money_keys(self) -> set[str]:
        """Tables of money whose key is there and keeps a call from standing in them twice."""
        return {row["name"].rpartition(".")[2] for row in self._rows("proof_keys")}

    def receipts(self) -> Iterator[list[ReceiptRow]]:
        """Every receipt with all that is committed about its call, in pages, each of one moment."""
        system, after = "", ""
        while True:
            with wrapped(), self._connection.transaction():
                self._connection.execute("set transaction isolation level repeatable read read only")
                page = self._rows("proof_receipts", system=system, after=after, limit=PAGE_ROWS)
                calls = {call.fact.call_id: call for call in self._calls([row["call_id"] for row in page])}
            yield [ReceiptRow(**row, call=calls.get(row["call_id"])) for row in page]
            if len(page) < PAGE_ROWS:
                return
            system, after = page[-1]["source_system"], page[-1]["source_reference"]

    def _calls(self, call_ids: list[str]) -> list[CallState]:
        # nothing that only time decides changes a receipt
        return settlement.load(self._connection, call_ids, deadline_seconds=0, quiet_seconds=0, is_over=lambda _: False)

    def odd_calls(self, which: OddCalls) -> Iterator[tuple[int, list[str]]]:
        """Page by page, how many were looked at, and the calls that should not be there: facts that nothing waits for
        and that have no receipt; details or adjustments without a receipt."""
        after = ""
        while True:
            page = [next(iter(row.values())) for row in self._rows(f"proof_page_{which}", after=after, limit=PAGE_ROWS)]
            odd = self._rows(f"proof_{which}", call_ids=page) if page else []
            yield len(page), [next(iter(row.values())) for row in odd]
            if len(page) < PAGE_ROWS:
                return
            after = page[-1]

    def _rows(self, name: str, **parameters: Any) -> list[dict[str, Any]]:
        with wrapped(), self._connection.cursor(row_factory=dict_row) as cursor:
            return cursor.execute(query(name), parameters).fetchall()


def _offsets(packed: bytes) -> "array[int]":
    offsets = array("q", packed)
    if sys.byteorder == "little":
        offsets.byteswap()
    return offsets


def _generation(row: Mapping[str, Any]) -> Generation:
    last = None
    if row["last_start"] is not None:
        last = Tile(row["last_start"], row["last_end"], row["last_sha256"], row["last_counts"])
    return Generation(
        position_of({name: row[name] for name in _POSITION_FIELDS}),
        row["source_id"],
        last,
        row["rewound_to"],
        row["resets"],
        row["fact_beyond"],
        row["batch_beyond"],
        row["letters_open"],
    )


@contextmanager
def proofs(dsn: str, schema: str, source_id: str) -> Iterator[Proofs]:
    """Connect to read. Raises LedgerUnavailable, or ConfigError where the schema is not this program's."""
    with connect(dsn, schema, application_name="billing_tailer verify") as connection:
        require_schema(connection, schema)
        with wrapped():
            connection.execute(query("read_only_session"), {"timeout": f"{STATEMENT_TIMEOUT_SECONDS}s"})
        yield Proofs(connection, source_id)
