"""`make bench`: backlog throughput against raw COPY, latency of single lines, memory. Ratios in one run.

Machines are noisy: each figure is taken in turn with its reference, and the median of the pairs is printed. Everything
runs on the embedded Postgres with fsync on.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path

import httpx
import psycopg

from billing_tailer.embedded import EmbeddedPostgres
from billing_tailer.ledger import migrate
from billing_tailer.ledger.writer import COLUMNS
from tests.support import database
from tests.support.daemon import Daemon
from tests.support.loglines import line
from tests.support.spendlines import payload

REFERENCE = (
    "create table reference (like billing.usage_facts including defaults including constraints); "
    "alter table reference add primary key (call_id); "
    "create index on reference (run_id) where run_id is not null; "
    "create index on reference (file_id, start_offset)"
)


def _log(path: Path, count: int) -> None:
    """Lines of random call ids, as real ones are."""
    with path.open("wb") as out:
        for number in range(count):
            call = str(uuid.uuid4())
            out.write(line(number, litellm_call_id=call, nginx_request_id=uuid.uuid4().hex))


@contextmanager
def _database(admin: str) -> Iterator[str]:
    with database.temporary(admin) as dsn:
        migrate(dsn)
        yield dsn


def _backlog(admin: str, directory: Path, count: int, pairs: int) -> dict[str, float]:
    """Lines per second of a daemon on a backlog, from its first read to the commit of the last line, against raw COPY
    of the very same rows into a table of the same columns and indexes."""
    log = directory / "audit.jsonl"
    _log(log, count)
    ours: list[float] = []
    raw: list[float] = []
    memory: list[float] = []
    for _ in range(pairs):
        with _database(admin) as dsn:
            with _daemon(dsn, directory) as daemon:
                daemon.wait_until(partial(lambda dsn: _facts(dsn) == count, dsn), timeout=300)
                memory.append(_peak_mb(daemon.pid))
                first = next(daemon.events("file.new"))["timestamp"]
                last = list(daemon.events("batch.committed"))[-1]["timestamp"]
            ours.append(count / _seconds_between(first, last))
            raw.append(count / _raw_copy(dsn))
    return {
        "lines": count,
        "bytes_per_line": log.stat().st_size / count,
        "tailer_lines_per_s": statistics.median(ours),
        "raw_copy_rows_per_s": statistics.median(raw),
        "ratio": statistics.median(a / b for a, b in zip(ours, raw, strict=True)),
        "peak_rss_mb": max(memory),
    }


def _raw_copy(dsn: str) -> float:
    with psycopg.connect(dsn, autocommit=True) as connection:
        names = ", ".join(COLUMNS)
        with connection.cursor().copy(f"copy billing.usage_facts ({names}) to stdout") as out:
            data = b"".join(bytes(block) for block in out)
        connection.execute(REFERENCE)
        started = time.perf_counter()
        with connection.cursor().copy(f"copy reference ({names}) from stdin") as copy:
            for start in range(0, len(data), 1 << 16):
                copy.write(data[start : start + (1 << 16)])
        return time.perf_counter() - started


def _latency(admin: str, directory: Path, rate: int, seconds: int) -> dict[str, float]:
    """Milliseconds from the write of a line to its commit (Postgres' clock, same machine)."""
    log = directory / "audit.jsonl"
    log.write_bytes(b"")
    written: dict[str, float] = {}
    with _database(admin) as dsn, _daemon(dsn, directory) as daemon:
        daemon.wait_until(lambda: daemon.get("/readyz").status_code == 200)
        descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
        start = time.time()
        for number in range(rate * seconds):
            call = str(uuid.uuid4())
            data = line(number, litellm_call_id=call, nginx_request_id=uuid.uuid4().hex)
            time.sleep(max(0.0, start + number / rate - time.time()))
            written[call] = time.time()
            os.write(descriptor, data)
        os.close(descriptor)
        daemon.wait_until(lambda: _facts(dsn) == len(written))
        # the log line of a batch is written right after COMMIT returned: its time is that of the commit
        ends = [(event["files"][0]["to"], _epoch(event["timestamp"])) for event in daemon.events("batch.committed")]
        cpu = _cpu_seconds(daemon.pid)
        time.sleep(5)
        idle = (_cpu_seconds(daemon.pid) - cpu) / 5
        with psycopg.connect(dsn) as connection:
            rows = connection.execute("select call_id, end_offset from billing.usage_facts").fetchall()
    commits = sorted(ends)
    delays = []
    for call, end in rows:
        committed = next(when for to, when in commits if to >= end)
        delays.append(1000 * (committed - written[call]))
    delays.sort()
    return {
        "rate_per_s": rate,
        "median_ms": statistics.median(delays),
        "p99_ms": delays[int(len(delays) * 0.99)],
        "idle_share_of_a_core": idle,
    }


def _settling(admin: str, directory: Path, rate: int, seconds: int) -> dict[str, float]:
    """Milliseconds from the arrival of a call's second half (the line, or the 200 of its callback) to the COMMIT of its
    receipt, by Postgres' own commit timestamps (same machine, same clock)."""
    log = directory / "audit.jsonl"
    log.write_bytes(b"")
    arrived: dict[str, float] = {}
    token = "callback-token-0123456789"
    more = {"BILLING_TAILER_CALLBACK_TOKEN": token, "BILLING_TAILER_SPOOL_DIR": f"{directory}/spool"}
    with _database(admin) as dsn, _daemon(dsn, directory, more) as daemon:
        daemon.wait_until(lambda: daemon.get("/readyz").status_code == 200)
        headers = {"authorization": f"Bearer {token}"}
        with (
            httpx.Client(base_url=daemon.url, headers=headers, trust_env=False) as client,
            log.open("ab", buffering=0) as out,
        ):
            start = time.time()
            for number in range(rate * seconds):
                time.sleep(max(0.0, start + number / rate - time.time()))
                if number % 2:
                    out.write(line(number))
                    _callback(client, number)
                else:
                    _callback(client, number)
                    out.write(line(number))
                arrived[f"call-{number:08d}"] = time.time()
        daemon.wait_until(lambda: _receipts(dsn) == len(arrived), timeout=60)
        with psycopg.connect(dsn) as connection:
            rows = connection.execute(
                "select source_reference, extract(epoch from pg_xact_commit_timestamp(xmin))::float8 "
                "from billing.charge_receipts"
            ).fetchall()
    delays = sorted(1000 * (committed - arrived[call]) for call, committed in rows)
    return {
        "calls_per_s": rate,
        "settled_median_ms": statistics.median(delays),
        "settled_p99_ms": delays[int(len(delays) * 0.99)],
        "settled_max_ms": delays[-1],
    }


def _callback(client: httpx.Client, number: int) -> None:
    client.post("/v1/callbacks/litellm", json=[payload(number)]).raise_for_status()


def _receipts(dsn: str) -> int:
    with psycopg.connect(dsn) as connection:
        row = connection.execute("select count(*) from billing.charge_receipts").fetchone()
    assert row is not None
    return int(row[0])


def _daemon(dsn: str, directory: Path, more: Mapping[str, str] | None = None) -> Daemon:
    variables = {
        "BILLING_TAILER_AUDIT_GLOBS": f"{directory}/audit*.jsonl*",
        "BILLING_TAILER_DATABASE_URL": dsn,
        **(more or {}),
    }
    return Daemon(variables, directory / f"daemon-{uuid.uuid4().hex}.log")


def _facts(dsn: str) -> int:
    with psycopg.connect(dsn) as connection:
        row = connection.execute("select coalesce(sum((counts->>'fact')::int), 0) from billing.tail_batches").fetchone()
    assert row is not None
    return int(row[0])


def _epoch(timestamp: str) -> float:
    return datetime.fromisoformat(timestamp).timestamp()


def _seconds_between(first: str, last: str) -> float:
    return _epoch(last) - _epoch(first)


def _peak_mb(pid: int) -> float:
    for entry in Path(f"/proc/{pid}/status").read_text().splitlines():
        if entry.startswith("VmHWM:"):
            return int(entry.split()[1]) / 1024
    raise AssertionError("no VmHWM")


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Run all and print one JSON object per figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", type=int, default=200_000)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--only", choices=["backlog", "latency", "settling"])
    wanted = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="billing-tailer-bench-"))
    directory.chmod(0o755)
    try:
        with EmbeddedPostgres(directory / "postgres", None, ("-c", "track_commit_timestamp=on")) as server:
            if wanted.only in (None, "backlog"):
                _print("backlog", _backlog(server.dsn, directory, wanted.lines, wanted.pairs))
            if wanted.only in (None, "latency"):
                _print("latency", _latency(server.dsn, directory, 200, 10))
            if wanted.only in (None, "settling"):
                _print("settling", _settling(server.dsn, directory, 100, 20))
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _print(name: str, figures: dict[str, float]) -> None:
    print(json.dumps({name: {key: round(value, 4) for key, value in figures.items()}}), flush=True)


if __name__ == "__main__":
    main()
