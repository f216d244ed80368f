"""What the figures were measured on, and what else ran there. Names no host, no user and no path."""

import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any, Final

import psycopg

from billing_tailer import __version__
from tests.bench.processes import cpu_seconds
from tests.support.daemon import ROOT

SETTINGS: Final = (
    "fsync",
    "synchronous_commit",
    "full_page_writes",
    "wal_sync_method",
    "wal_level",
    "track_commit_timestamp",
    "shared_buffers",
    "max_wal_size",
    "checkpoint_timeout",
    "work_mem",
)
SAMPLE_SECONDS: Final = 0.3
BUSY_SHARE: Final = 0.07
"""Processes that use more than this share of a core while nothing of ours runs are named."""
FSYNCS: Final = 100


def describe(dsn: str, directory: Path) -> dict[str, Any]:
    """directory: where Postgres and the logs are."""
    with psycopg.connect(dsn) as connection:
        version = connection.execute("show server_version").fetchone()
        settings = connection.execute(
            "select name, current_setting(name) from pg_settings where name = any(%s) order by name", [list(SETTINGS)]
        ).fetchall()
    assert version is not None
    return {
        "cpu": _of("/proc/cpuinfo", "model name"),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(int(_of("/proc/meminfo", "MemTotal").split()[0]) / (1 << 20), 1),
        "kernel": f"{platform.system()} {platform.release()}",
        "filesystem": filesystem(directory),
        "fdatasync_ms": round(1000 / fsyncs_per_second(directory, FSYNCS), 3),
        "python": platform.python_version(),
        "postgres": str(version[0]),
        "postgres_settings": dict(settings),
        "version": __version__,
        "revision": revision(),
    }


def others() -> dict[str, Any]:
    """What else runs at this moment, while nothing of ours does."""
    before = {pid: cpu_seconds(pid) for pid in _pids()}
    time.sleep(SAMPLE_SECONDS)
    busy: dict[str, float] = {}
    for pid, used in before.items():
        share = (cpu_seconds(pid) - used) / SAMPLE_SECONDS
        if pid != os.getpid() and share > BUSY_SHARE:
            name = _name(pid)
            busy[name] = round(busy.get(name, 0.0) + share, 2)
    return {"load": [round(load, 2) for load in os.getloadavg()], "busy": busy}


def revision() -> str:
    """Of the code, with a plus where files differ from it; empty without git."""
    done = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def filesystem(directory: Path) -> str:
    """The type of the one that holds a directory."""
    device = directory.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for entry in Path("/proc/self/mountinfo").read_text("utf-8").splitlines():
        fields = entry.split()
        if fields[2] == wanted:
            return fields[fields.index("-") + 1]
    return "unknown"


def fsyncs_per_second(directory: Path, count: int, size: int = 1024) -> float:
    """Appends of so many bytes, each put on disk before the next: what one writer could do at most."""
    path = directory / "fsyncs"
    with path.open("wb", buffering=0) as out:
        started = time.perf_counter()
        for _ in range(count):
            out.write(b"x" * size)
            os.fdatasync(out.fileno())
        seconds = time.perf_counter() - started
    path.unlink()
    return count / seconds


def _of(path: str, name: str) -> str:
    for entry in Path(path).read_text("utf-8").splitlines():
        found, _, value = entry.partition(":")
        if found.strip() == name:
            return value.strip()
    return "unknown"


def _pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text("utf-8").strip()
    except (FileNotFoundError, ProcessLookupError):
        return "ended"
