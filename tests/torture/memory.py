"""The real daemon stays small whatever it has to read: a line of 1 GiB, a hole of 2 GiB, the backlog of an outage."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from tests.support import database
from tests.support.daemon import Daemon
from tests.support.loglines import line, lines
from tests.support.proof import assert_sound, count, outcomes
from tests.support.proxy import PostgresProxy
from tests.torture.table import Tally

RSS_MB_MAX: Final = 96.0
GIB: Final = 1 << 30
BLOCK_CALLS: Final = 20_000
"""Lines that are written at once."""
READ_SECONDS_PER_GIB: Final = 120
LINES_PER_SECOND_MIN: Final = 5_000
_NUMBER: Final = 12_345_678


def long_line(admin_dsn: str, template: str, directory: Path, *, size: int) -> Tally:
    """One line of `size` bytes between others: one dead letter. Sparse behind its first bytes, so no disk is needed."""

    def write(log: Path) -> None:
        with log.open("wb") as out:
            out.write(lines(0, 3) + b'{"msec":"')
            out.seek(size, 1)
            out.write(b"\n" + lines(3, 3))

    wanted = {"fact": 6, "dead_letter": 1}
    return _read(f"a line of {_gib(size)}", admin_dsn, template, directory / "long", size, write, wanted)


def hole(admin_dsn: str, template: str, directory: Path, *, size: int) -> Tally:
    """Sparse NUL bytes between lines, as a writer without O_APPEND leaves them."""

    def write(log: Path) -> None:
        with log.open("wb") as out:
            out.write(lines(0, 3))
            out.seek(size, 1)
            out.write(lines(3, 3))

    return _read(f"a hole of {_gib(size)}", admin_dsn, template, directory / "hole", size, write, {"fact": 6})


def _read(
    scenario: str,
    admin_dsn: str,
    template: str,
    directory: Path,
    size: int,
    write: Callable[[Path], None],
    wanted: dict[str, int],
) -> Tally:
    directory.mkdir(mode=0o755)
    log = directory / "audit.jsonl"
    write(log)
    with database.temporary(admin_dsn, template) as dsn, _daemon(dsn, directory) as daemon:
        timeout = 30 + READ_SECONDS_PER_GIB * size / GIB
        daemon.wait_until(lambda: sum(outcomes(dsn).values()) >= sum(wanted.values()), timeout, what="all is read")
        tally = _judge(scenario, dsn, wanted, _peak_mb(daemon.pid))
    log.unlink()
    return tally


def backlog(admin_dsn: str, template: str, directory: Path, *, size: int, calls_per_gib: int) -> Tally:
    """An outage: Postgres is not to be had while `size` bytes come in; then it is back, and all of it is read."""
    directory = directory / "backlog"
    directory.mkdir(mode=0o755)
    log = directory / "audit.jsonl"
    log.touch()
    with (
        database.temporary(admin_dsn, template) as dsn,
        PostgresProxy(dsn) as proxy,
        _daemon(proxy.dsn, directory) as daemon,
    ):
        daemon.wait_until(lambda: daemon.get("/readyz").status_code == 200)
        proxy.cut()
        calls = _write_calls(log, size, GIB // calls_per_gib)
        proxy.forward()
        timeout = 30 + calls / LINES_PER_SECOND_MIN + READ_SECONDS_PER_GIB * size / GIB
        daemon.wait_until(lambda: _committed(dsn) >= calls, timeout, what="the backlog is read")
        tally = _judge(f"an outage's backlog of {_gib(size)}", dsn, {"fact": calls}, _peak_mb(daemon.pid))
    log.unlink()
    return tally


def _write_calls(log: Path, size: int, line_bytes: int) -> int:
    """Lines of about so many bytes until the file has `size`; returns how many."""
    pad = "y" * max(0, line_bytes - len(line(_NUMBER)) - len(b',"pad":""'))
    text = line(_NUMBER, pad=pad) if pad else line(_NUMBER)
    call, request = f"call-{_NUMBER:08d}".encode(), f"{_NUMBER:032x}".encode()
    calls = 0
    with log.open("ab", buffering=1 << 20) as out:
        while calls * len(text) < size:
            out.write(text.replace(call, b"call-%08d" % calls).replace(request, b"%032x" % calls))
            calls += 1
    return calls


def _committed(dsn: str) -> int:
    time.sleep(0.5)  # the count has to go through all of them, on the machine whose speed is needed elsewhere
    return count(dsn, "usage_facts")


def _judge(scenario: str, dsn: str, wanted: dict[str, int], peak_rss_mb: float) -> Tally:
    found = outcomes(dsn)
    tally = Tally(scenario, runs=1, peak_rss_mb=peak_rss_mb)
    tally.lost = max(0, wanted["fact"] - count(dsn, "usage_facts"))
    tally.doubled = sum(number for outcome, number in found.items() if outcome not in wanted)
    tally.undeclared = max(0, wanted.get("dead_letter", 0) - found.get("dead_letter", 0))
    if peak_rss_mb >= RSS_MB_MAX:
        tally.problems.append(f"{peak_rss_mb:.1f} MB resident, not below {RSS_MB_MAX:.0f}")
    if found != wanted:
        tally.problems.append(f"{found}, not {wanted}")
    try:
        assert_sound(dsn)
    except AssertionError as error:
        tally.problems.append(str(error).splitlines()[0])
    return tally


def _daemon(dsn: str, volume: Path) -> Daemon:
    variables = {"BILLING_TAILER_AUDIT_GLOBS": f"{volume}/audit*.jsonl*", "BILLING_TAILER_DATABASE_URL": dsn}
    return Daemon(variables, volume / "daemon.log")


def _peak_mb(pid: int) -> float:
    """The highest resident set size of a process until now (VmHWM)."""
    for entry in Path(f"/proc/{pid}/status").read_text().splitlines():
        if entry.startswith("VmHWM:"):
            return int(entry.split()[1]) / 1024
    raise AssertionError("no VmHWM")


def _gib(size: int) -> str:
    return f"{size / GIB:.0f} GiB" if size >= GIB else f"{size / (1 << 20):.0f} MiB"
