"""What becomes slower as things grow: receipts in the database, files in the volume, bytes in the log."""

import os
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Final

import psycopg

from tests.bench import logs
from tests.bench.fill import TABLES
from tests.bench.following import follow
from tests.bench.readings import Goal, Reading, median, ratios
from tests.bench.reference import KEYS, Rows, append_seconds, rows_of
from tests.bench.world import FACTS, World, daemon, last_commit, value, wait_for_count, wait_until_ready
from tests.support.daemon import Daemon

RECEIPTS_GOAL: Final = Goal(at_least=0.7)
START_GOAL: Final = Goal(at_most=0.5)
ROUND_SEEDS: Final = 100
"""The first seed of ours, and more than a call of `_beside` needs."""
BLOCK_BYTES: Final = 64 << 20


def receipts(world: World) -> list[Reading]:
    """Calls to receipts beside none and beside millions of receipts, in turn, and raw COPY of the same rows; then once
    more with a Postgres that has the indexes in memory."""
    amounts = world.amounts
    ours, raw = _beside(world, amounts.receipts, ROUND_SEEDS)
    most = max(amounts.receipts)
    with world.restarted(amounts.roomy):
        _warm(world.filled(most))
        roomy, roomy_raw = _beside(world, (0, most), 2 * ROUND_SEEDS)
    copied, memory = "raw COPY of their rows into the same tables", f"with {', '.join(amounts.roomy)}: "
    return [
        *_grown("calls_per_s", "ratio", "calls to receipts", ours, RECEIPTS_GOAL),
        *_grown("copy_calls_per_s", "copy_ratio", copied, raw, None),
        *_grown("roomy_calls_per_s", "roomy_ratio", f"{memory}calls to receipts", roomy, RECEIPTS_GOAL),
        *_grown("roomy_copy_calls_per_s", "roomy_copy_ratio", f"{memory}{copied}", roomy_raw, None),
    ]


Rates = dict[int, list[float]]
"""Calls per second, round by round, by how many receipts were there."""


def _beside(world: World, receipts: Sequence[int], seed: int) -> tuple[Rates, Rates]:
    """Ours, and raw COPY of the rows that came of the calls where there was none."""
    count = world.amounts.settled_calls
    ours: Rates = {there: [] for there in receipts}
    raw: Rates = {there: [] for there in receipts}
    with ExitStack() as stack:  # to drop a database takes a checkpoint: at the end
        for _ in range(world.amounts.rounds):
            rows: Rows = {}
            for there in receipts:
                seed += 1  # calls that grow a filled database must be new ones
                log, spool = world.log(count, seed), world.spool(count, seed)
                dsn = stack.enter_context(_database(world, there))
                ours[there].append(count / follow(world, dsn, {"audit.jsonl": log}, count, spool=spool).seconds)
                rows = rows if there else rows_of(dsn, list(KEYS))
                dsn = stack.enter_context(_database(world, there))
                raw[there].append(count / append_seconds(dsn, rows))
                world.forget(count, seed)
    return ours, raw


def _database(world: World, receipts: int) -> AbstractContextManager[str]:
    return nullcontext(world.filled(receipts)) if receipts else world.database()


def _grown(key: str, ratio_key: str, what: str, rates: Rates, goal: Goal | None) -> list[Reading]:
    readings = []
    for there, found in rates.items():
        beside = f"{what}, beside {there:,}"
        readings.append(median(f"{key}_{there}", beside, "1/s", found))
        if there:
            share = ratios(found, rates[0])
            held = goal if there == max(rates) else None
            readings.append(median(f"{ratio_key}_{there}", f"{beside}, of the rate beside none", "", share, goal=held))
    return readings


def _warm(dsn: str) -> None:
    """Read the indexes into Postgres' memory, where a server that has run for a while has them."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("create extension if not exists pg_prewarm")
        connection.execute(
            "select pg_prewarm(indexrelid::regclass) from pg_index where indrelid = any(%s::regclass[])",
            [[f"billing.{table}" for table in TABLES]],
        )


def files(world: World) -> list[Reading]:
    """The same lines in one file and in many, in turn."""
    amounts = world.amounts
    count = amounts.lines
    rates: dict[int, list[float]] = {1: [], amounts.files: []}
    with world.volume() as parts:
        many = _split(world.log(count), parts, count, amounts.files)
        for _ in range(amounts.rounds):
            for number, links in ((1, {"audit.jsonl": world.log(count)}), (amounts.files, many)):
                with world.database() as dsn:
                    rates[number].append(count / follow(world, dsn, links, count).seconds)
    return [
        median("lines_per_s_1", "lines to facts, 1 file", "1/s", rates[1], note=f"{count:,} lines"),
        median(f"lines_per_s_{amounts.files}", f"lines to facts, {amounts.files} files", "1/s", rates[amounts.files]),
        median("ratio", f"{amounts.files} files, of the rate of one", "", ratios(rates[amounts.files], rates[1])),
    ]


def _split(log: Path, directory: Path, count: int, number: int) -> dict[str, Path]:
    """Name -> part, in the order of the lines."""
    found: dict[str, Path] = {}
    with log.open("rb") as lines:
        for part in range(number):
            name = f"audit-{part:04d}.jsonl"
            found[name] = directory / name
            size = count * (part + 1) // number - count * part // number
            found[name].write_bytes(b"".join(islice(lines, size)))
    return found


def starts(world: World) -> list[Reading]:
    """From the start of the process to the commit of a line that was written while it was away: on a long log whose
    position is near the end, and on an empty one, in turn."""
    size = world.amounts.start_log_bytes
    seconds: dict[str, list[float]] = {"long": [], "empty": []}
    with _site(world, size) as long, _site(world, 0) as empty:
        for _ in range(world.amounts.starts):
            seconds["long"].append(_start(*long))
            seconds["empty"].append(_start(*empty))
    more = [a - b for a, b in zip(seconds["long"], seconds["empty"], strict=True)]
    gigabytes = f"{size / 1e9:.3g} GB"
    return [
        median("empty_s", "start to first commit, empty log", "s", seconds["empty"]),
        median("long_s", f"start to first commit, log of {gigabytes}", "s", seconds["long"]),
        median("more_s", f"what {gigabytes} add to it", "s", more, goal=START_GOAL),
    ]


@contextmanager
def _site(world: World, size: int) -> Iterator[tuple[str, Path]]:
    """A database and a volume whose log has so many bytes, all of which a daemon has passed over (START_AT=end)."""
    with world.database() as dsn, world.volume() as volume:
        _write_repeated(world.log(world.amounts.lines), volume / "audit.jsonl", size)
        # an empty file is known from its first line on, which must not be passed over
        with daemon(dsn, volume, {"BILLING_TAILER_START_AT": "end" if size else "beginning"}) as running:
            wait_until_ready(running)
            running.wait_until(lambda: value(dsn, "select count(*) from billing.log_gaps") == int(size > 0))
            _append_call(volume / "audit.jsonl")
            wait_for_count(running, dsn, FACTS, 1)
            running.terminate()
        yield dsn, volume


def _write_repeated(source: Path, target: Path, size: int) -> None:
    """The same lines again and again until the file has at least so many bytes: they will not be read."""
    with target.open("wb") as out:
        while out.tell() < size:
            with source.open("rb") as lines:
                shutil.copyfileobj(lines, out, BLOCK_BYTES)


def _append_call(log: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.write(descriptor, logs.line(uuid.uuid4().hex.encode()))
    os.close(descriptor)


def _start(dsn: str, volume: Path) -> float:
    before = int(value(dsn, FACTS))
    _append_call(volume / "audit.jsonl")
    running: Daemon = daemon(dsn, volume)
    started = time.time()
    with running:
        wait_for_count(running, dsn, FACTS, before + 1, poll_seconds=0.02)
        running.terminate()
    return last_commit(dsn, "billing.usage_facts") - started
