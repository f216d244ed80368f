"""A daemon, ready and idle, gets a backlog; how long until Postgres has all of it, and what that took."""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import httpx
import psycopg

from tests.bench.logs import spool_name
from tests.bench.processes import cpu_seconds, memory_mb, tree_cpu_seconds
from tests.bench.world import (
    FACTS,
    PATIENCE_SECONDS,
    World,
    daemon,
    last_commit,
    value,
    wait_for_count,
    wait_until_ready,
)
from tests.support.daemon import Daemon

METRICS_SECONDS: Final = 0.4
"""How often the daemon is asked, which costs it milliseconds."""


@dataclass(frozen=True, slots=True)
class Followed:
    """seconds: from the moment the files appeared to the last COMMIT, by Postgres' clock. CPU seconds in that time: of
    the daemon, of its connections' server processes, and of all of Postgres."""

    seconds: float
    daemon_cpu: float
    backends_cpu: float
    postgres_cpu: float
    peak_mb: float


def follow(world: World, dsn: str, files: Mapping[str, Path], count: int, *, spool: Path | None = None) -> Followed:
    """files: name in the volume -> what is linked there. count: how many calls. spool: their callbacks; then it is
    over when all have receipts."""
    settled = spool is not None
    committed = int(value(dsn, FACTS))
    with world.volume() as volume:
        (volume / "audit.jsonl.empty").touch()  # something to be ready for
        with daemon(dsn, volume) as running:
            wait_until_ready(running)
            start = _used(world, running, dsn)
            appeared = time.time()
            if spool is not None:
                os.link(spool, volume / "spool" / spool_name())
            for name, path in files.items():
                os.link(path, volume / name)
            wait_for_count(running, dsn, FACTS, committed + count)
            if settled:
                _wait_for_receipts(running, count)
            end = _used(world, running, dsn)
            peak = memory_mb(running.pid)[1]
    if settled:
        trouble = value(dsn, "select count(*) from billing.call_exceptions")
        assert trouble == 0, f"{trouble} calls were not settled as they should"
    ended = last_commit(dsn, "billing.charge_receipts" if settled else "billing.usage_facts")
    daemon_cpu, backends_cpu, postgres_cpu = (after - before for after, before in zip(end, start, strict=True))
    return Followed(ended - appeared, daemon_cpu, backends_cpu, postgres_cpu, peak)


def _used(world: World, running: Daemon, dsn: str) -> tuple[float, float, float]:
    """CPU seconds until now: the daemon, the server processes of its connections, all of Postgres."""
    with psycopg.connect(dsn) as connection:
        backends = connection.execute(
            "select pid from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()"
        ).fetchall()
    return cpu_seconds(running.pid), sum(cpu_seconds(pid) for (pid,) in backends), tree_cpu_seconds(world.postmaster)


def _wait_for_receipts(running: Daemon, count: int) -> None:
    """Asks the daemon: counting millions of rows would take from Postgres what is being measured."""
    url = running.url
    with httpx.Client(base_url=url, trust_env=False, timeout=30) as client:

        def all_there() -> bool:
            time.sleep(METRICS_SECONDS)
            for entry in client.get("/metrics").text.splitlines():
                if entry.startswith("billing_tailer_receipts_total "):
                    return float(entry.partition(" ")[2]) >= count
            return False

        running.wait_until(all_there, PATIENCE_SECONDS, what=f"{count} receipts")
