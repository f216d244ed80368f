"""Memory, whatever there is to read, and what a daemon costs that has nothing to do."""

import os
import statistics
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.bench import logs
from tests.bench.client import Poster, port_of
from tests.bench.processes import activity, memory_mb
from tests.bench.readings import Goal, Reading
from tests.bench.world import FACTS, RECEIPTS, World, daemon, wait_for_count, wait_until_ready
from tests.support.daemon import Daemon
from tests.support.logfiles import repeated
from tests.support.proxy import PostgresProxy

MEMORY_GOAL: Final = Goal(at_most=96)
IDLE_GOAL: Final = Goal(at_most=0.5)
SAMPLE_SECONDS: Final = 0.25
LINE_BYTES_MAX: Final = 1 << 20
"""What a daemon takes for a line as it comes."""
LONG_LINES: Final = 8
LETTERS: Final = "select count(*) from billing.dead_letters"
QUIET_SECONDS: Final = 2.0
"""After the last commit, before idleness is measured."""


@dataclass(slots=True)
class Memory:
    """Megabytes, sampled and at most."""

    resident: list[float] = field(default_factory=list)
    peak: float = 0.0

    def readings(self, key: str, what: str, note: str) -> list[Reading]:
        """Median of the samples, and the highest that the kernel saw."""
        resident = statistics.median(self.resident)
        return [
            Reading(f"{key}_resident_mb", f"memory {what}, median", resident, "MB", note=note),
            Reading(f"{key}_peak_mb", f"memory {what}, at most", self.peak, "MB", goal=MEMORY_GOAL),
        ]


@contextmanager
def _watched(running: Daemon) -> Iterator[Memory]:
    """Samples until the end of the block."""
    memory = Memory()
    with repeated(lambda: memory.resident.append(memory_mb(running.pid)[0]), SAMPLE_SECONDS):
        yield memory
    now, memory.peak = memory_mb(running.pid)
    memory.resident.append(now)


def memory(world: World) -> list[Reading]:
    """Of a backlog, an outage, and lines of 1 MiB."""
    return [*_backlog(world), *_outage(world), *_long_lines(world)]


def _calls_of(size: int) -> int:
    return max(1, size // len(logs.line(b"0" * 32)))


def _backlog(world: World) -> list[Reading]:
    count = _calls_of(world.amounts.backlog_bytes)
    with world.database() as dsn, world.volume() as volume:
        logs.write_log(volume / "audit.jsonl", count, seed=1)
        size = (volume / "audit.jsonl").stat().st_size
        with daemon(dsn, volume) as running, _watched(running) as found:
            wait_for_count(running, dsn, FACTS, count)
    return found.readings("backlog", "while a backlog is read", f"{size / 1e9:.3g} GB, {count:,} lines")


def _outage(world: World) -> list[Reading]:
    """Postgres goes away under a running daemon, the log grows, Postgres is back."""
    count = _calls_of(world.amounts.outage_bytes)
    with world.database() as dsn, world.volume() as volume, PostgresProxy(dsn) as proxy:
        log = volume / "audit.jsonl"
        log.touch()
        with daemon(proxy.dsn, volume) as running:
            wait_until_ready(running)
            with _watched(running) as found:
                proxy.cut()
                logs.write_log(log, count, seed=2)
                proxy.forward()
                wait_for_count(running, dsn, FACTS, count)
    note = f"{world.amounts.outage_bytes / 1e9:.3g} GB, {count:,} lines"
    return found.readings("outage", "in an outage of Postgres and after", note)


def _long_lines(world: World) -> list[Reading]:
    """Some that are as long as a line may be, and some that are one byte longer."""
    with world.database() as dsn, world.volume() as volume:
        log = volume / "audit.jsonl"
        log.touch()
        with daemon(dsn, volume) as running:
            wait_until_ready(running)
            with _watched(running) as found:
                for size in (LINE_BYTES_MAX, LINE_BYTES_MAX + 1):
                    _append(log, [_padded(size) for _ in range(LONG_LINES)])
                wait_for_count(running, dsn, FACTS, LONG_LINES)
                wait_for_count(running, dsn, LETTERS, LONG_LINES)
    return found.readings(
        "long_line", "while lines of 1 MiB are read", f"{LONG_LINES} lines, and {LONG_LINES} too long"
    )


def _padded(size: int) -> bytes:
    """A line of so many bytes before its newline."""
    text = logs.line(uuid.uuid4().hex.encode()).removesuffix(b"}\n") + b',"pad":"'
    return text + b"y" * (size - len(text) - 2) + b'"}\n'


def _append(log: Path, lines: list[bytes]) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    for line in lines:
        os.write(descriptor, line)
    os.close(descriptor)


def idle(world: World) -> list[Reading]:
    """A daemon that has followed a log and settled its calls, and has nothing to do."""
    with world.database() as dsn, world.volume() as volume:
        logs.write_log(volume / "audit.jsonl", 100, seed=3)
        with daemon(dsn, volume) as running:
            wait_until_ready(running)
            poster = Poster(port_of(running.url))
            calls = [call_id.decode() for call_id in logs.call_ids(100, seed=3)]
            poster.post([logs.callback(call_id, number) for number, call_id in enumerate(calls)])
            poster.close()
            wait_for_count(running, dsn, RECEIPTS, len(calls))
            time.sleep(min(QUIET_SECONDS, world.amounts.idle_seconds))
            before, started = activity(running.pid), time.monotonic()
            time.sleep(world.amounts.idle_seconds)
            after, seconds = activity(running.pid), time.monotonic() - started
            resident = memory_mb(running.pid)[0]
    share = 100 * (after.cpu_seconds - before.cpu_seconds) / seconds
    wakeups = (after.switches - before.switches) / seconds
    return [
        Reading("cpu_percent", "of a core, idle", share, "%", note=f"over {seconds:.0f} s", goal=IDLE_GOAL),
        Reading("wakeups_per_s", "wake-ups, idle", wakeups, "1/s", note="context switches of all threads"),
        Reading("resident_mb", "memory, idle", resident, "MB", goal=MEMORY_GOAL),
    ]
