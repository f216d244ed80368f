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


def copy_seconds(dsn: str, tables: Sequence[str]) -> float:
    """tables: of KEYS; each is copied in a transaction of its own. Columns with a default are left to it."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("set search_path to billing")
        return sum(_copy(connection, table) for table in tables)


def _copy(connection: psycopg.Connection, table: str) -> float:
    reference = sql.Identifier(f"reference_{table}")
    names = sql.SQL(", ").join(
        sql.Identifier(name)
        for (name,) in connection.execute(
            "select attname from pg_attribute where attrelid = %s::regclass and attnum > 0 and not attisdropped "
            "and not atthasdef order by attnum",
            [table],
        )
    )
    with connection.cursor().copy(sql.SQL("copy {} ({}) to stdout").format(sql.Identifier(table), names)) as out:
        data = b"".join(bytes(block) for block in out)
    connection.execute(
        sql.SQL("create table {} (like {} including defaults including constraints, primary key ({}))").format(
            reference, sql.Identifier(table), sql.SQL(KEYS[table])
        )
    )
    for statement in FACT_INDEXES if table == "usage_facts" else ():
        connection.execute(statement)
    connection.execute("checkpoint")
    started = time.perf_counter()
    with connection.cursor().copy(sql.SQL("copy {} ({}) from stdin").format(reference, names)) as copy:
        for start in range(0, len(data), PIECE_BYTES):
            copy.write(data[start : start + PIECE_BYTES])
    seconds = time.perf_counter() - started
    connection.execute(sql.SQL("drop table {}").format(reference))
    return seconds
