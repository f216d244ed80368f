"""The limit: raw COPY of the very same rows over one connection, into tables of the same columns and unique keys, and
for facts the same two further indexes."""

import time
from collections.abc import Sequence
from typing import Final

import psycopg
from psycopg import sql

KEYS: Final = {
    "usage_facts": "call_id",
    "spend_records": "call_id, source, record_id",
    "charge_receipts": "source_system, source_reference",
    "llm_charge_details": "source_system, source_reference",
}
FACT_INDEXES: Final = (
    "create index on reference_usage_facts (run_id) where run_id is not null",
    "create index on reference_usage_facts (file_id, start_offset)",
)
PIECE_BYTES: Final = 1 << 16


Rows = dict[str, tuple[sql.Composable, bytes]]
"""By table of KEYS: its columns that have no default, and its rows as COPY has them."""


def rows_of(dsn: str, tables: Sequence[str]) -> Rows:
    """tables: of KEYS."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("set search_path to billing")
        return {table: _rows(connection, table) for table in tables}


def copy_seconds(dsn: str, tables: Sequence[str]) -> float:
    """tables: of KEYS; the rows of each go into a reference table, in a transaction of its own. Columns with a default
    are left to it."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("set search_path to billing")
        return sum(_copy_aside(connection, table) for table in tables)


def append_seconds(dsn: str, rows: Rows) -> float:
    """The rows into the very tables, beside what is in them; each table in a transaction of its own."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("set search_path to billing")
        return sum(_copy(connection, table, names, data) for table, (names, data) in rows.items())


def _rows(connection: psycopg.Connection, table: str) -> tuple[sql.Composable, bytes]:
    names = sql.SQL(", ").join(
        sql.Identifier(name)
        for (name,) in connection.execute(
            "select attname from pg_attribute where attrelid = %s::regclass and attnum > 0 and not attisdropped "
            "and not atthasdef order by attnum",
            [table],
        )
    )
    with connection.cursor().copy(sql.SQL("copy {} ({}) to stdout").format(sql.Identifier(table), names)) as out:
        return names, b"".join(bytes(block) for block in out)


def _copy_aside(connection: psycopg.Connection, table: str) -> float:
    reference = f"reference_{table}"
    names, data = _rows(connection, table)
    connection.execute(
        sql.SQL("create table {} (like {} including defaults including constraints, primary key ({}))").format(
            sql.Identifier(reference), sql.Identifier(table), sql.SQL(KEYS[table])
        )
    )
    for statement in FACT_INDEXES if table == "usage_facts" else ():
        connection.execute(statement)
    connection.execute("checkpoint")
    seconds = _copy(connection, reference, names, data)
    connection.execute(sql.SQL("drop table {}").format(sql.Identifier(reference)))
    return seconds


def _copy(connection: psycopg.Connection, table: str, names: sql.Composable, data: bytes) -> float:
    started = time.perf_counter()
    with connection.cursor().copy(sql.SQL("copy {} ({}) from stdin").format(sql.Identifier(table), names)) as copy:
        for start in range(0, len(data), PIECE_BYTES):
            copy.write(data[start : start + PIECE_BYTES])
    return time.perf_counter() - started
