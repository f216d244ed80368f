"""Postgres dies, or its answer to a COMMIT never comes: the daemon lives on, and every line is there once."""

import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any, Final

import psycopg

from billing_tailer.embedded import EmbeddedPostgres
from billing_tailer.ledger import migrate
from tests.support import database
from tests.support.daemon import Daemon
from tests.support.loglines import lines
from tests.support.proof import assert_sound, count, outcomes, rows
from tests.support.proxy import PostgresProxy
from tests.support.spendlines import payload
from tests.torture.scenario import CREDITS, TOKEN, post
from tests.torture.table import Tally

POSTGRES_KILLED: Final = "Postgres killed (-9) at random"
COMMIT_CUT: Final = "connection cut at COMMIT"
ANSWER_LOST_SECONDS: Final = 0.02
SETTLED_SECONDS_MAX: Final = 60.0


class Traffic:
    """Lines and callbacks of ever new calls, with a rotation now and then, and what must have become of them."""

    def __init__(self, volume: Path) -> None:
        self.calls = 0
        self._volume = volume
        self._log = volume / "audit.jsonl"
        self._log.touch()
        self._unanswered = 0

    def write(self, number: int) -> None:
        """So many lines more."""
        with self._log.open("ab") as out:
            out.write(lines(self.calls, number))
        self.calls += number

    def rotate(self) -> None:
        """By rename; the next line makes the new file."""
        self._log.rename(f"{self._log}.{self.calls}")

    def send(self, port: int, first: int, last: int) -> None:
        """The callbacks of these calls, until they are acknowledged."""
        events: list[dict[str, Any]] = [payload(number) for number in range(first, last)]
        while (answer := post(port, events)) is not True:
            self._unanswered += len(events) if answer is None else 0

    def settled(self, dsn: str) -> bool:
        """Whether all calls are charged; False also where Postgres cannot be asked."""
        try:
            return count(dsn, "charge_receipts") >= self.calls and count(dsn, "usage_facts") >= self.calls
        except psycopg.OperationalError:
            return False

    def wait_until_settled(self, daemon: Daemon, dsn: str) -> None:
        """However long it takes, as long as calls are charged."""
        charged = -1
        while not self.settled(dsn):
            try:
                daemon.wait_until(lambda: self.settled(dsn), SETTLED_SECONDS_MAX, what="all calls are charged")
            except AssertionError:
                before, charged = charged, count(dsn, "charge_receipts")
                if charged <= before or not daemon.alive():
                    raise

    def judge(self, dsn: str, scenario: str, runs: int, what: str) -> Tally:
        """Compare with what is committed."""
        tally = Tally(scenario, runs)
        charged = rows(dsn, "select coalesce(sum(charged_credits), 0)::bigint as n from charge_receipts")[0]["n"]
        found = outcomes(dsn)
        tally.lost = self.calls - count(dsn, "usage_facts") + self.calls - count(dsn, "charge_receipts")
        tally.doubled = found.get("replayed", 0) + found.get("conflict", 0) + count(dsn, "charge_adjustments")
        if tally.doubled <= self._unanswered:
            tally.doubled = 0
        tally.undeclared = found.get("dead_letter", 0) + count(dsn, "log_gaps")
        if charged != CREDITS * self.calls:
            tally.problems.append(f"{what}: {charged} credits for {self.calls} calls of {CREDITS}")
        by_path = {Path(row["path"]): row["file_id"] for row in rows(dsn, "select path, file_id from tail_files")}
        try:
            assert_sound(dsn, {file_id: path.read_bytes() for path, file_id in by_path.items()})
        except AssertionError as error:
            tally.problems.append(f"{what}: {str(error).splitlines()[0]}")
        return tally


def _daemon(dsn: str, volume: Path) -> Daemon:
    variables = {
        "BILLING_TAILER_AUDIT_GLOBS": f"{volume}/audit*.jsonl*",
        "BILLING_TAILER_SPOOL_DIR": f"{volume}/spool",
        "BILLING_TAILER_CALLBACK_TOKEN": TOKEN,
        "BILLING_TAILER_DATABASE_URL": dsn,
        "BILLING_TAILER_BATCH_LINES_MAX": "20",
        "BILLING_TAILER_POLL_INTERVAL_SECONDS": "0.02",
    }
    return Daemon(variables, volume / "daemon.log")


# --- Postgres killed -------------------------------------------------------------------------------------------------


def postgres_killed(directory: Path, *, kills: int, seed: int) -> Tally:
    """A Postgres of its own dies so many times while lines come in: the whole server, or one of the daemon's backends,
    after which Postgres ends them all and recovers."""
    dice = random.Random(seed)
    volume = _directory(directory / "postgres-killed")
    traffic = Traffic(volume)
    with EmbeddedPostgres(volume / "postgres", None, ["-c", "fsync=off", "-c", "restart_after_crash=on"]) as server:
        migrate(server.dsn)
        with _daemon(server.dsn, volume) as daemon:
            port = int(daemon.url.rsplit(":", 1)[1])
            for number in range(kills):
                _some_traffic(traffic, port, dice, rotate=number % 4 == 3)
                if dice.random() < 0.5:
                    _kill_server(server)
                    _some_traffic(traffic, port, dice)  # the log and the spool are the buffer
                    server.start()
                else:
                    _kill_backend(server.dsn, dice)
            traffic.wait_until_settled(daemon, server.dsn)
        return traffic.judge(server.dsn, POSTGRES_KILLED, kills, f"seed {seed}")


def _some_traffic(traffic: Traffic, port: int, dice: random.Random, *, rotate: bool = False) -> None:
    """For a third of a second at most: bursts of lines with their callbacks, before them or after."""
    for _ in range(dice.randint(1, 6)):
        first = traffic.calls
        traffic.write(dice.choice((1, 2, 60)))
        if rotate:
            traffic.rotate()
            rotate = False
        traffic.send(port, first, traffic.calls)
        time.sleep(dice.uniform(0, 0.05))


def _kill_server(server: EmbeddedPostgres) -> None:
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)
    while server.alive():
        time.sleep(0.001)


def _kill_backend(dsn: str, dice: random.Random) -> None:
    """One of the daemon's, if it has one at this moment."""
    try:
        found = rows(dsn, "select pid from pg_stat_activity where application_name like 'billing_tailer%%'")
    except psycopg.OperationalError:
        return  # it is still recovering from the last one
    if found:
        os.kill(dice.choice(found)["pid"], signal.SIGKILL)


# --- the connection cut at COMMIT ------------------------------------------------------------------------------------


class CommitCut:
    """Cuts the connection when a COMMIT comes by: before Postgres gets it, or after, so that the answer is lost."""

    def __init__(self, proxy: PostgresProxy) -> None:
        self._proxy = proxy
        self._countdown = 0
        self._arrives = False
        self._lock = threading.Lock()
        self.cuts = 0
        proxy.on_request = self._on_request

    def arm(self, countdown: int, *, arrives: bool) -> None:
        """The COMMIT with this number from now on, counted from 1."""
        with self._lock:
            self._countdown, self._arrives = countdown, arrives

    def _on_request(self, data: bytes) -> bool:
        if b"COMMIT" not in data:
            return True
        with self._lock:
            self._countdown -= 1
            if self._countdown != 0:
                return True
            self.cuts += 1
        if not self._arrives:
            return False
        self._proxy.mute()
        threading.Timer(ANSWER_LOST_SECONDS, self._lose_the_answer).start()
        return True

    def _lose_the_answer(self) -> None:
        self._proxy.drop()
        self._proxy.forward()


def commit_cut(admin_dsn: str, template: str, directory: Path, *, cuts: int, seed: int) -> Tally:
    """The connection breaks at so many COMMITs: of lines, of scans, of settlements; each before or after it arrived."""
    dice = random.Random(seed)
    volume = _directory(directory / "commit-cut")
    traffic = Traffic(volume)
    with (
        database.temporary(admin_dsn, template) as dsn,
        PostgresProxy(dsn) as proxy,
        _daemon(proxy.dsn, volume) as daemon,
    ):
        port = int(daemon.url.rsplit(":", 1)[1])
        cut = CommitCut(proxy)
        while cut.cuts < cuts:
            cut.arm(dice.randint(1, 4), arrives=dice.random() < 0.7)
            first = traffic.calls
            if dice.random() < 0.2 and first:
                traffic.rotate()
            traffic.write(dice.choice((1, 3, 70)))
            traffic.send(port, first, traffic.calls)
            traffic.wait_until_settled(daemon, dsn)
        return traffic.judge(dsn, COMMIT_CUT, cut.cuts, f"seed {seed}")


def _directory(path: Path) -> Path:
    """One that the user who runs Postgres may enter."""
    path.mkdir(mode=0o755)
    return path
