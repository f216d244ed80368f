"""The same log with other programs into the same Postgres, in turn with ours: rsyslog, Fluent Bit and a script.

None of them knows of receipts, and rsyslog and Fluent Bit keep their positions in files of their own, so that a line
may come twice or not at all after a death. What each of them stores is said beside its number. Who is not installed is
skipped, and the table says so.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

import psycopg
from psycopg.conninfo import conninfo_to_dict

from tests.bench import script
from tests.bench.following import follow
from tests.bench.readings import Goal, Reading, median, ratios, skipped
from tests.bench.reference import copy_seconds
from tests.bench.world import PATIENCE_SECONDS, POLL_SECONDS, World, execute, last_commit, value
from tests.support.daemon import ROOT, clean_environment

COUNTED_MAX: Final = 100_000
"""So many rows are counted at any time."""
NEARLY: Final = 0.97
READY_SECONDS: Final = 0.7
"""What a peer gets to start before the log appears."""
RSYSLOG_MODULES: Final = (Path("/usr/lib/rsyslog"), *Path("/usr/lib").glob("*/rsyslog"), Path("/usr/lib64/rsyslog"))
RSYSLOG: Final = """
global(workDirectory="{work}" maxMessageSize="64k")
module(load="imfile" mode="inotify")
module(load="ompgsql")
template(name="insert" type="string" option.stdsql="on" string="insert into lines (line) values ('%rawmsg%')")
ruleset(name="to-postgres"{queue}) {{
  action(type="ompgsql" server="{host}" db="{dbname}" user="{user}" template="insert")
}}
input(type="imfile" file="{volume}/audit*.jsonl" tag="audit:" ruleset="to-postgres")
"""
FLUENT_BIT: Final = """
[SERVICE]
    flush 1
    daemon off
[INPUT]
    name tail
    path {volume}/audit*.jsonl
    read_from_head true
    refresh_interval 1
    db {work}/positions.db
    buffer_chunk_size 1M
    buffer_max_size 8M
[OUTPUT]
    name pgsql
    match *
    host {host}
    user {user}
    database {dbname}
    table lines
"""


class Missing(Exception):
    """A peer that is not installed, in words."""


@dataclass(frozen=True, slots=True)
class Peer:
    """table: where its rows go. stores: what they are, in words. prepare: makes the table. command: of the process,
    with an empty directory for its files, the volume and the DSN; raises Missing."""

    key: str
    name: str
    stores: str
    table: str
    prepare: str
    command: Callable[[Path, Path, str], list[str]]
    times: float | None = None
    """How many times as fast ours has to be."""


def _rsyslog(queue: str, work: Path, volume: Path, dsn: str) -> list[str]:
    """queue: parameters of the ruleset."""
    program = shutil.which("rsyslogd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if program is None:
        raise Missing("rsyslogd is not installed (Debian: rsyslog, rsyslog-pgsql)")
    if not any((directory / "ompgsql.so").exists() for directory in RSYSLOG_MODULES):
        raise Missing("rsyslog's ompgsql is not installed (Debian: rsyslog-pgsql)")
    path = work / "rsyslog.conf"
    path.write_text(RSYSLOG.format(queue=queue, work=work, volume=volume, **_address(dsn)), "utf-8")
    return [program, "-n", "-f", str(path), "-i", str(work / "pid")]


def _fluent_bit(work: Path, volume: Path, dsn: str) -> list[str]:
    program = shutil.which("fluent-bit")
    if program is None:
        raise Missing("fluent-bit is not on PATH (no Debian package: use its own repository, or build its source)")
    path = work / "fluent-bit.conf"
    path.write_text(FLUENT_BIT.format(work=work, volume=volume, **_address(dsn)), "utf-8")
    return [program, "-c", str(path)]


def _script(work: Path, volume: Path, dsn: str) -> list[str]:
    return [sys.executable, "-m", script.__name__, str(volume / "audit.jsonl"), dsn, str(work / "offset")]


def _address(dsn: str) -> dict[str, str]:
    found = conninfo_to_dict(dsn)
    return {name: str(found[name]) for name in ("host", "dbname", "user")}


RSYSLOG_PEER: Final = Peer(
    "rsyslog",
    "rsyslog (imfile, ompgsql)",
    "as it comes: an INSERT per line; stores the line as text under a running number, parses nothing",
    "lines",
    "create table lines (id bigserial primary key, line text)",
    partial(_rsyslog, ""),
    5,
)
PEERS: Final = (
    RSYSLOG_PEER,
    replace(
        RSYSLOG_PEER,
        key="rsyslog_batches",
        name="rsyslog with large batches",
        stores="the same from a queue of its own, dequeueBatchSize 1000",
        command=partial(_rsyslog, ' queue.type="LinkedList" queue.dequeueBatchSize="1000"'),
    ),
    Peer(
        "fluent_bit",
        "Fluent Bit (tail, pgsql)",
        "stores tag, time and the line in jsonb, in its own table without a key",
        "lines",
        "",
        _fluent_bit,
        2,
    ),
    Peer(
        "script",
        "a script (json.loads, executemany)",
        "stores eight columns under the call id, and an offset file",
        "calls",
        script.TABLE,
        _script,
    ),
)


@contextmanager
def running(peer: Peer, volume: Path, dsn: str) -> Iterator[subprocess.Popen[bytes]]:
    """A peer's process on a volume, with its own configuration, positions and pid file. Raises Missing."""
    work = volume / f"{peer.key}-work"
    work.mkdir()
    command = peer.command(work, volume, dsn)
    if peer.prepare:
        execute(dsn, peer.prepare)
    with (work / "output").open("wb") as output:
        process = subprocess.Popen(
            command,
            env=clean_environment({}),
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_for_rows(peer: Peer, process: subprocess.Popen[bytes], volume: Path, dsn: str, wanted: int) -> None:
    """Until so many rows are there; an assertion with what the peer said where it ends, or takes too long."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    with psycopg.connect(dsn, autocommit=True) as connection:
        while _rows(connection, peer, wanted) < wanted:
            if process.poll() is not None or time.monotonic() > deadline:
                said = (volume / f"{peer.key}-work" / "output").read_text("utf-8", "replace")[-2000:]
                raise AssertionError(f"{peer.name} did not store {wanted} lines: code {process.poll()}\n{said}")
            time.sleep(POLL_SECONDS)


def _rows(connection: psycopg.Connection, peer: Peer, wanted: int) -> int:
    """As long as many are missing, what Postgres' statistics say, a second late: to count them again and again would
    take from the peer what is measured."""
    found = connection.execute("select to_regclass(%s) is not null", [peer.table]).fetchone()
    if found != (True,):
        return 0
    if wanted > COUNTED_MAX:
        inserted = connection.execute(
            "select coalesce(sum(n_tup_ins), 0) from pg_stat_user_tables where relname = %s", [peer.table]
        ).fetchone()
        if inserted is not None and inserted[0] < NEARLY * wanted:
            return int(inserted[0])
    row = connection.execute(f"select count(*) from {peer.table}".encode()).fetchone()
    return 0 if row is None else int(row[0])


def throughput(world: World) -> list[Reading]:
    """Lines per second of ours and of each peer, in turn."""
    count = world.amounts.lines
    ours: list[float] = []
    raw: list[float] = []
    theirs: dict[str, list[float]] = {}
    stored: dict[str, str] = {}
    missing: dict[str, str] = {}
    for _ in range(world.amounts.rounds):
        with world.database() as dsn:
            ours.append(count / follow(world, dsn, {"audit.jsonl": world.log(count)}, count).seconds)
            raw.append(count / copy_seconds(dsn, ["usage_facts"]))
        for peer in PEERS:
            try:
                rate, commits = _stored(world, peer, count)
                theirs.setdefault(peer.key, []).append(rate)
                stored[peer.key] = f"{peer.stores}; {count / commits:,.0f} lines per COMMIT"
            except Missing as why:
                missing[peer.key] = str(why)
    readings = [
        median("lines_per_s", "billing_tailer", "1/s", ours, note="facts, positions and proofs; 3 indexes"),
        median("copy_rows_per_s", "raw COPY of its rows", "1/s", raw, note="what nothing that writes them can exceed"),
    ]
    for peer in PEERS:
        goal = None if peer.times is None else Goal(at_least=peer.times)
        times = f"billing_tailer against {peer.name}"
        if peer.key in missing:
            readings.append(skipped(f"{peer.key}_lines_per_s", peer.name, "1/s", missing[peer.key]))
            readings.append(Reading(f"{peer.key}_times", times, None, "times", note="SKIPPED", goal=goal))
            continue
        rates = theirs[peer.key]
        readings.append(median(f"{peer.key}_lines_per_s", peer.name, "1/s", rates, note=stored[peer.key]))
        readings.append(median(f"{peer.key}_times", times, "times", ratios(ours, rates), goal=goal))
        if goal is not None:
            limit = f"raw COPY against {peer.name}"
            readings.append(median(f"{peer.key}_copy_times", limit, "times", ratios(raw, rates)))
    return readings


def _stored(world: World, peer: Peer, count: int) -> tuple[float, int]:
    """Lines per second, from the moment the log appeared to the last COMMIT; and how many of those there were."""
    with world.database() as dsn, world.volume() as volume:
        with running(peer, volume, dsn) as process:
            time.sleep(READY_SECONDS)
            appeared = time.time()
            os.link(world.log(count), volume / "audit.jsonl")
            wait_for_rows(peer, process, volume, dsn, count)
        found = int(value(dsn, f"select count(*) from {peer.table}"))
        assert found == count, f"{peer.name} stored {found} lines of {count}"
        commits = int(value(dsn, f"select count(distinct xmin::text) from {peer.table}"))
        return count / (last_commit(dsn, peer.table) - appeared), commits
