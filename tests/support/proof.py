"""The proof that nothing is missing: ranges tile each file, hashes match the bytes, counts match the rows."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import psycopg
from psycopg.rows import dict_row

from billing_tailer.ledger.sqlfile import QUERIES


def rows(dsn: str, statement: str, *parameters: object, **named: object) -> list[dict[str, Any]]:
    """All rows of a query in schema billing."""
    with psycopg.connect(dsn, autocommit=True, row_factory=dict_row) as connection:
        connection.execute("set search_path to billing")
        return connection.execute(statement, named or parameters).fetchall()


def count(dsn: str, table: str) -> int:
    """Number of rows of a table."""
    return int(rows(dsn, f"select count(*) as n from {table}")[0]["n"])


def outcomes(dsn: str) -> dict[str, int]:
    """Lines by outcome, summed over all batches."""
    found = rows(
        dsn,
        "select key, sum(value::int)::int as n from tail_batches, jsonb_each_text(counts) group by key order by key",
    )
    return {row["key"]: row["n"] for row in found}


def are_read(dsn: str, paths: Iterable[Path]) -> bool:
    """Whether every byte of these files is committed."""
    committed = {
        row["path"]: row["committed_offset"] for row in rows(dsn, "select path, committed_offset from tail_files")
    }
    return all(committed.get(str(path), 0) >= path.stat().st_size for path in paths)


def retried_facts(dsn: str) -> int:
    """Facts that `dead-letters retry` has made."""
    return len(rows(dsn, "select 1 from usage_facts join dead_letters using (file_id, start_offset)"))


def assert_sound(dsn: str, contents: Mapping[int, bytes] | None = None) -> None:
    """Every committed byte has exactly one outcome. contents: file_id -> the bytes that generation had."""
    tiles_of: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for tile in rows(
        dsn,
        "select file_id, start_offset, end_offset, sha256, counts from tail_batches union all "
        "select file_id, start_offset, end_offset, null, null from log_gaps join tail_files using (file_id) "
        "where start_offset < committed_offset order by 1, 2",
    ):
        tiles_of[tile["file_id"]].append(tile)
    for file in rows(dsn, "select * from tail_files order by file_id"):
        tiles = tiles_of[file["file_id"]]
        at = 0
        for tile in tiles:
            assert tile["start_offset"] == at, f"{file['path']}: a hole or an overlap at byte {at}: {tile}"
            at = tile["end_offset"]
        assert at == file["committed_offset"], f"{file['path']}: tiles end at {at}, not at {file['committed_offset']}"
        if contents is not None and file["file_id"] in contents:
            _assert_bytes(contents[file["file_id"]], tiles, file)
    _assert_counts(dsn)
    calls = [row["call_id"] for row in rows(dsn, "select call_id from usage_facts")]
    assert rows(dsn, QUERIES["proof_unreceipted"], call_ids=calls) == [], "facts that nobody will look at again"


def _assert_bytes(content: bytes, tiles: list[dict[str, Any]], file: dict[str, Any]) -> None:
    for tile in tiles:
        part = content[tile["start_offset"] : tile["end_offset"]]
        if tile["sha256"] is not None:
            assert hashlib.sha256(part).digest() == tile["sha256"], f"{file['path']}: other bytes in {tile}"
            lines = part.count(b"\n") + (not part.endswith(b"\n"))  # the end of a finished file may have no newline
            assert sum(tile["counts"].values()) == lines, f"{file['path']}: other lines in {tile}"
    assert content[: min(1024, file["committed_offset"])] == file["head"]
    frontier = content[file["committed_offset"] - file["frontier_bytes"] : file["committed_offset"]]
    assert hashlib.sha256(frontier).digest() == file["frontier_sha256"]


def _assert_counts(dsn: str) -> None:
    found = outcomes(dsn)
    if not rows(dsn, "select 1 from log_gaps where reason = 'skipped'"):  # an operator may skip what was read before
        assert found.get("fact", 0) + found.get("replayed", 0) >= count(dsn, "usage_facts") - retried_facts(dsn)
    assert found.get("fact", 0) <= count(dsn, "usage_facts")
    # a letter stays one in the counts of its range, whatever is decided of it; a rewind leaves the decided ones
    open_letters = rows(dsn, "select count(*) as n from dead_letters where resolved_at is null")[0]["n"]
    assert open_letters <= found.get("dead_letter", 0) <= count(dsn, "dead_letters")
