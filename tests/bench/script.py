"""The script that people would write: follow the log, insert in batches of 1,000, remember the offset in a file.

    python -m tests.bench.script LOG DSN OFFSET_FILE

At least once: the offset is written after the COMMIT, so a death between the two inserts lines again, which the key
drops. It knows no rotation, no truncation, no broken line, and not what a call costs.
"""

import json
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import psycopg

BATCH_LINES: Final = 1_000
POLL_SECONDS: Final = 0.02
TABLE: Final = """
create table calls (
    call_id text primary key, run_id text, account text, model text, path text, status int, request_seconds numeric,
    occurred_at timestamptz
)
"""
INSERT: Final = "insert into calls values (%s, %s, %s, %s, %s, %s, %s, %s) on conflict do nothing"


def row(line: bytes) -> tuple[object, ...]:
    """A line's columns."""
    fields = json.loads(line)
    return (
        fields["litellm_call_id"],
        fields["run_id"],
        fields["end_user"],
        fields["requested_model"],
        fields["uri"],
        int(fields["status"]),
        fields["request_time"],
        datetime.fromtimestamp(float(fields["msec"]), UTC),
    )


def follow(log: Path, dsn: str, offset_path: Path) -> None:
    """Never ends by itself."""
    offset = int(offset_path.read_text("ascii")) if offset_path.exists() else 0
    while not log.exists():
        time.sleep(POLL_SECONDS)
    with psycopg.connect(dsn) as connection, log.open("rb") as lines:
        lines.seek(offset)
        rows: list[tuple[object, ...]] = []
        while True:
            line = lines.readline()
            if line.endswith(b"\n"):
                rows.append(row(line))
                offset += len(line)
            else:
                lines.seek(offset)
            if rows and (len(rows) == BATCH_LINES or not line.endswith(b"\n")):
                with connection.cursor() as cursor:
                    cursor.executemany(INSERT, rows)
                connection.commit()
                offset_path.write_text(str(offset), "ascii")
                rows.clear()
            if not line.endswith(b"\n"):
                time.sleep(POLL_SECONDS)


if __name__ == "__main__":
    follow(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
