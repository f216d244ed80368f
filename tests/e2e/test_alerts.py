"""Every alert of deploy/prometheus, in a real Prometheus on real daemons: it fires by the trouble it is there for, and
clears by the remedy that deploy/runbook.md names.

Each scenario has daemons, databases and a Prometheus of its own; they all run at once, since they mostly wait. How the
rules are hurried says tests/e2e/prometheus.py. No metric is fake. Two causes are not the real ones: BillingTailerMemory
has a limit that every process exceeds, and what happens once a minute (the capture ratio, unaudited records) is had
sooner by starting the daemon again.
"""

import itertools
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
import yaml
from psycopg.conninfo import make_conninfo

from billing_tailer import ledger
from billing_tailer.embedded import EmbeddedPostgres
from tests.e2e.nginx import program
from tests.e2e.prometheus import RULES, Prometheus, hurried
from tests.support import database
from tests.support.callbacks import PATH
from tests.support.daemon import Daemon
from tests.support.loglines import line, lines
from tests.support.proof import rows
from tests.support.spendlines import payload
from tests.support.spendlogs import row, spend_logs
from tests.support.verbs import answer_of, run_verb
from tests.test_monitoring import panels

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]
TOKEN = "t" * 32
REASON = ("--reason", "alerts")
BY_HEADER = {"COST_SOURCE": "header"}
"""Where it is not about money: calls are settled at once."""


class World:
    """What a scenario has: a directory, databases, daemons with fixed ports, and a Prometheus that scrapes them."""

    def __init__(self, directory: Path, admin_dsn: str, template: str, stack: ExitStack) -> None:
        self.directory = directory
        self._admin_dsn = admin_dsn
        self._template = template
        self._stack = stack
        self._daemons = itertools.count()
        self.log = self.volume() / "audit.jsonl"
        self.prometheus: Prometheus

    def volume(self, name: str = "billing") -> Path:
        volume = self.directory / name
        volume.mkdir(exist_ok=True)
        return volume

    def database(self) -> str:
        return self._stack.enter_context(database.temporary(self._admin_dsn, self._template))

    def watch(self, *daemons: Daemon, memory_bytes_max: int | None = None) -> Prometheus:
        """Start a Prometheus."""
        self.prometheus = Prometheus(self.directory / "prometheus", free_port(), memory_bytes_max)
        self.prometheus.scrape([port_of(daemon) for daemon in daemons])
        return self._stack.enter_context(self.prometheus)

    def daemon(self, dsn: str, **variables: str) -> Daemon:
        """A daemon that runs."""
        number = next(self._daemons)
        settings = {
            "AUDIT_GLOBS": f"{self.log.parent}/audit*.jsonl*",
            "DATABASE_URL": dsn,
            "CALLBACK_TOKEN": TOKEN,
            "SPOOL_DIR": str(self.directory / f"spool-{number}"),
            "HTTP_PORT": str(free_port()),
            **variables,
        }
        named = {f"BILLING_TAILER_{name}": value for name, value in settings.items()}
        return self._stack.enter_context(Daemon(named, self.directory / f"daemon-{number}.log"))


_PORTS_GIVEN: set[int] = set()
_PORTS_LOCK = threading.Lock()


def free_port() -> int:
    """A port that nobody has, and that no other scenario gets: a daemon that is started again keeps its own."""
    with _PORTS_LOCK:
        while True:
            with socket.create_server(("127.0.0.1", 0)) as listener:
                port = int(listener.getsockname()[1])
            if port not in _PORTS_GIVEN:
                _PORTS_GIVEN.add(port)
                return port


def port_of(daemon: Daemon) -> int:
    return int(daemon.variables["BILLING_TAILER_HTTP_PORT"])


def again(daemon: Daemon, meanwhile: Callable[[], object] = lambda: None, **variables: str) -> None:
    """Stop it, and start it again."""
    assert daemon.terminate() == 0
    meanwhile()
    daemon.variables |= {f"BILLING_TAILER_{name}": value for name, value in variables.items()}
    daemon.start()
    daemon.wait_for_event("http.listening")


def verb(daemon: Daemon, *arguments: str) -> Any:
    """What a verb answers, with the variables of the daemon."""
    return answer_of(run_verb(daemon.variables, *arguments, "--json", timeout=60))


def append(path: Path, data: bytes) -> None:
    with path.open("ab") as out:
        out.write(data)


def execute(dsn: str, statement: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(statement.encode())


def post(daemon: Daemon, *events: dict[str, Any], token: str = TOKEN, body: bytes | None = None) -> int:
    """POST callbacks; the status."""
    with httpx.Client(trust_env=False, timeout=10) as client:
        headers = {"authorization": f"Bearer {token}"}
        url = f"http://127.0.0.1:{port_of(daemon)}{PATH}"
        if body is not None:
            return client.post(url, headers=headers, content=body).status_code
        return client.post(url, headers=headers, json=list(events)).status_code


# --- the scenarios -------------------------------------------------------------------------------------------------


def postgres(world: World) -> None:
    """Postgres is locked, takes no writes, and is away."""
    world.directory.chmod(0o755)
    server = world._stack.enter_context(EmbeddedPostgres(world.directory / "postgres", None))
    ledger.migrate(server.dsn)
    world.log.write_bytes(lines(0, 10))
    daemon = world.daemon(server.dsn, **BY_HEADER)
    seen = world.watch(daemon)
    seen.is_quiet()

    with psycopg.connect(server.dsn) as connection:  # a migration by hand, a backup tool
        connection.execute("lock table billing.tail_files in access exclusive mode")
        seen.fires("BillingTailerLoopHangs")
    seen.clears("BillingTailerLoopHangs")

    execute(server.dsn, "alter database billing_tailer set default_transaction_read_only = on")
    execute(server.dsn, "select pg_terminate_backend(pid) from pg_stat_activity where application_name like 'billing%'")
    append(world.log, lines(10, 1))
    seen.fires("BillingTailerCommitFailures")
    writable = make_conninfo(server.dsn, options="-c default_transaction_read_only=off")
    execute(writable, "alter database billing_tailer reset default_transaction_read_only")
    execute(server.dsn, "select pg_terminate_backend(pid) from pg_stat_activity where application_name like 'billing%'")
    seen.clears("BillingTailerCommitFailures")

    server.stop()
    seen.fires("BillingTailerNobodyCommits", source_id="default")
    server.start()
    seen.clears("BillingTailerNobodyCommits")


def processes(world: World) -> None:
    """A standby dies, two databases have one source, and nothing is scraped."""
    dsn = world.database()
    world.log.write_bytes(lines(0, 10))
    active = world.daemon(dsn, **BY_HEADER)
    active.wait_for_event("batch.committed")
    standby = world.daemon(dsn, **BY_HEADER)
    seen = world.watch(active, standby)
    seen.is_quiet()

    assert standby.terminate() == 0
    seen.fires("BillingTailerDown", instance=f"127.0.0.1:{port_of(standby)}")
    standby.start()
    seen.clears("BillingTailerDown")

    astray = world.daemon(world.database(), **BY_HEADER)
    seen.scrape([port_of(active), port_of(standby), port_of(astray)])
    seen.fires("BillingTailerTwoCommit", source_id="default")
    assert astray.terminate() == 0
    seen.scrape([port_of(active), port_of(standby)])
    seen.clears("BillingTailerTwoCommit")

    assert active.terminate() == 0  # the standby takes over: down, but somebody commits
    # hurried, its two minutes are 2 s, which a take-over may exceed: it fires no longer while Down still does
    standby.wait_until(lambda: {alert["labels"]["alertname"] for alert in seen.firing()} == {"BillingTailerDown"})
    seen.fires("BillingTailerDown")

    seen.scrape([])
    seen.fires("BillingTailerAbsent")
    seen.scrape([port_of(standby)])
    seen.clears("BillingTailerAbsent")
    seen.clears("BillingTailerDown")


def restarts(world: World) -> None:
    """The kernel ends it again and again."""
    daemon = world.daemon(world.database(), **BY_HEADER)
    seen = world.watch(daemon)
    seen.is_quiet()
    started = f'process_start_time_seconds{{instance="127.0.0.1:{port_of(daemon)}"}}'

    def restart() -> None:
        before = seen.value(started)
        daemon.kill()
        daemon.start()
        daemon.wait_until(lambda: seen.value(started) not in (None, before), what="a scrape")

    seen.fires("BillingTailerRestarts", restart)
    seen.clears("BillingTailerRestarts")


def memory(world: World) -> None:
    """With a limit of 1 MiB, until the process is stopped."""
    daemon = world.daemon(world.database())
    seen = world.watch(daemon, memory_bytes_max=1 << 20)
    seen.fires("BillingTailerMemory")
    assert daemon.terminate() == 0
    seen.clears("BillingTailerMemory")


def reading(world: World) -> None:
    """Half a line, and no volume."""
    dsn = world.database()
    world.log.write_bytes(lines(0, 10))
    daemon = world.daemon(dsn, **BY_HEADER)
    seen = world.watch(daemon)
    seen.is_quiet()

    append(world.log, line(10)[:100])
    seen.fires("BillingTailerStalled")
    seen.fires("BillingTailerLagging")
    append(world.log, line(10)[100:])
    seen.clears("BillingTailerStalled")
    seen.clears("BillingTailerLagging")

    elsewhere = world.directory / "elsewhere"
    world.log.parent.rename(elsewhere)
    seen.fires("BillingTailerFilesNotRead")
    elsewhere.rename(world.log.parent)
    seen.clears("BillingTailerFilesNotRead")
    seen.is_quiet(3)


def give_up(daemon: Daemon, dsn: str, state: str) -> None:
    """What an operator does about the one file in this state whose rest is lost."""
    (file,) = rows(dsn, "select file_id from tail_files where state = %s", state)
    verb(daemon, "offsets", "accept-gap", str(file["file_id"]), *REASON)


def files(world: World) -> None:
    """Files that are cut, deleted or emptied."""
    dsn = world.database()
    world.log.write_bytes(lines(0, 11))
    daemon = world.daemon(dsn, **BY_HEADER)
    seen = world.watch(daemon)
    seen.is_quiet()

    daemon.wait_until(lambda: len(rows(dsn, "select 1 from usage_facts")) == 11)
    os.truncate(world.log, len(lines(0, 5)))  # someone cuts committed lines off; emptied first, it would be a gap
    seen.fires("BillingTailerFileBlocked")
    give_up(daemon, dsn, "blocked")
    seen.clears("BillingTailerFileBlocked")
    seen.fires("BillingTailerOffsetReset", source="cli")

    again(daemon, world.log.unlink)
    seen.fires("BillingTailerFileMissing")
    give_up(daemon, dsn, "missing")
    seen.clears("BillingTailerFileMissing")

    world.log.write_bytes(lines(20, 10))
    daemon.wait_until(lambda: len(rows(dsn, "select 1 from usage_facts")) == 21)
    again(daemon, lambda: world.log.write_bytes(b""))  # found at the start, before the first scrape
    seen.fires("BillingTailerGapDeclared", reason="truncated", source_id="default")
    seen.clears("BillingTailerGapDeclared")
    seen.clears("BillingTailerOffsetReset")
    seen.is_quiet(3)


def bad_lines(world: World) -> None:
    """Lines that are not understood, and ids that come twice."""
    dsn = world.database()
    world.log.write_bytes(lines(0, 10))
    daemon = world.daemon(dsn, **BY_HEADER)
    seen = world.watch(daemon)
    seen.is_quiet()

    seen.fires("BillingTailerLinesNotUnderstood", lambda: append(world.log, b"a log format of its own\n" * 30))
    seen.fires("BillingTailerDeadLetters")
    append(world.log, lines(10, 20))
    seen.clears("BillingTailerLinesNotUnderstood")
    letters = [str(one["dead_letter_id"]) for one in rows(dsn, "select dead_letter_id from dead_letters")]
    verb(daemon, "dead-letters", "discard", *letters, *REASON)
    seen.clears("BillingTailerDeadLetters")

    append(world.log, line(1, nginx_request_id="f" * 32))
    seen.fires("BillingTailerCallIdReused")
    seen.clears("BillingTailerCallIdReused")
    seen.is_quiet(3)


def callbacks(world: World) -> None:
    """A wrong token, bodies that are none, and a spool that is full."""
    daemon = world.daemon(world.database(), SPOOL_BYTES_MAX=str(1 << 20))
    seen = world.watch(daemon)
    seen.is_quiet()

    seen.fires("BillingTailerCallbackTokenWrong", lambda: post(daemon, payload(1), token="w" * 32))
    assert post(daemon, payload(1)) == 200
    seen.clears("BillingTailerCallbackTokenWrong")

    assert post(daemon, body=b"no JSON") == 400
    seen.fires("BillingTailerCallbacksRefused", code="400")
    seen.clears("BillingTailerCallbacksRefused")

    def fill() -> None:
        while post(daemon, *(payload(number) for number in range(500))) == 200:
            pass

    seen.fires("BillingTailerSpoolRefuses", fill)
    seen.fires("BillingTailerCallbacksRefused", fill, code="503")
    again(daemon, SPOOL_BYTES_MAX=str(1 << 24))
    seen.clears("BillingTailerSpoolRefuses")
    assert post(daemon, payload(1)) == 200
    seen.clears("BillingTailerCallbacksRefused")


def silence(world: World) -> None:
    """Callbacks do not come."""
    known: list[dict[str, Any]] = []
    with spend_logs(known) as url:
        daemon = world.daemon(world.database(), LITELLM_URL=url, LITELLM_API_KEY="k" * 32)
        seen = world.watch(daemon)
        seen.is_quiet()

        calls = itertools.count()

        def feed() -> None:
            number = next(calls)  # one row after the other: a poll that found all at once would be the last that finds
            known.append(row(payload(number, startTime=1795307912.0, endTime=1795307912.5)))
            append(world.log, line(number))

        seen.fires("BillingTailerCallbacksSilent", feed, source_id="default")
        assert post(daemon, payload(0)) == 200
        seen.clears("BillingTailerCallbacksSilent", lambda: post(daemon, payload(0, attempt=next(calls))))
        dashboard_shows_something(seen)


def dashboard_shows_something(seen: Prometheus) -> None:
    """Prometheus understands every query of the dashboard, and has an answer to those that always have one."""
    silent = {}
    for panel in panels():
        for target in panel.get("targets", ()):
            expr = target["expr"].replace("$job", "billing_tailer").replace("$instance", ".+")
            found = seen.value(expr.replace("$__rate_interval", "5s"))
            if found is None and "> 0" not in expr and "commit_duration" not in expr:
                silent[panel["title"]] = expr
    assert silent == {}


def spend_log_rows(world: World) -> None:
    """LiteLLM's spend logs cannot be asked, and have rows that are none."""
    with ExitStack() as litellm:
        known: list[dict[str, Any]] = [row(payload(number)) for number in range(10)]
        port = free_port()
        url = litellm.enter_context(spend_logs(known, port))
        daemon = world.daemon(world.database(), LITELLM_URL=url, LITELLM_API_KEY="k" * 32)
        seen = world.watch(daemon)
        seen.is_quiet()

        at: dict[str, Any] = {"startTime": 1795307912.0, "endTime": 1795307912.5}
        known_not = {**row(payload(900, **at)), "litellm_call_id": None}
        litellm.close()
        append(world.log, line(300))
        seen.fires("BillingTailerSpendLogsFail")
        seen.fires("BillingTailerPendingTooOld")
        litellm.enter_context(spend_logs([*known, row(payload(300, **at)), known_not], port))
        seen.clears("BillingTailerSpendLogsFail")
        seen.clears("BillingTailerPendingTooOld")

        append(world.log, line(900))
        seen.fires("BillingTailerSpendRowsRejected")
        assert post(daemon, payload(900)) == 200
        seen.clears("BillingTailerSpendRowsRejected")


def money(world: World) -> None:
    """Calls that wait for somebody's decision, the capture ratio, and records without a line."""
    dsn = world.database()
    daemon = world.daemon(dsn, SETTLE_DEADLINE_SECONDS="1", CORRECTIONS="report")
    seen = world.watch(daemon)
    seen.is_quiet()

    ended = f"{time.time() - 300:.3f}"  # in the newest window that is closed
    skipped = {"status": "401", "litellm_call_id": "", "call_id": "call-00000020", "upstream_status": "401"}
    append(
        world.log,
        b"".join(line(number, msec=ended) for number in (1, 2, 4, 5, 6))
        + line(3, msec=ended, end_user="")
        + line(5, msec=ended, end_user="account-2", nginx_request_id="f" * 32)
        + line(7, msec=ended, call_id="another")
        + line(8, msec=ended, requested_model="gpt-none", litellm_model_group="gpt-none")
        + line(20, **skipped),
    )
    held = [payload(1, 0.0), payload(2, -1.0), payload(3), payload(5), payload(6), payload(7), payload(8)]
    assert post(daemon, *held, payload(20), payload(30)) == 200
    daemon.wait_until(lambda: rows(dsn, "select 1 from charge_receipts where source_reference = 'call-00000006'"))
    assert post(daemon, payload(6, 0.0005, attempt=1)) == 200
    records_came = time.monotonic()
    kinds = ("held_zero_cost", "held_bad_cost", "unattributed", "overdue", "conflict", "cost_mismatch")
    for kind in kinds:
        seen.fires("BillingTailerCallsNeedDecision", kind=kind)
    seen.fires("BillingTailerCallIdNotForwarded")
    seen.fires("BillingTailerModelMismatch")

    time.sleep(max(0.0, records_came + 17 - time.monotonic()))  # so long a record may wait for its line
    again(daemon)
    seen.fires("BillingTailerUnauditedWithLine")
    seen.fires("BillingTailerUnauditedRecords")
    seen.fires("BillingTailerCaptureLow")
    seen.fires("BillingTailerCaptureBelowOne")

    def decide(number: int, *words: str) -> None:
        verb(daemon, "exceptions", words[0], f"call-{number:08d}", *words[1:], *REASON)

    decide(1, "release", "--cost-usd", "0.001")
    decide(2, "release", "--cost-usd", "0.001")
    decide(3, "release", "--account", "account-1")
    decide(4, "release", "--cost-usd", "0")
    decide(5, "release", "--account", "account-1")
    decide(6, "close", "cost_mismatch")
    decide(7, "close", "call_id_not_forwarded")
    decide(8, "close", "model_mismatch")
    for name in ("CallsNeedDecision", "CallIdNotForwarded", "ModelMismatch"):
        seen.clears(f"BillingTailer{name}")
    again(daemon)
    for name in ("CaptureBelowOne", "CaptureLow", "UnauditedWithLine", "UnauditedRecords"):
        seen.clears(f"BillingTailer{name}")
    seen.is_quiet(3)


SCENARIOS = (
    postgres,
    processes,
    restarts,
    memory,
    reading,
    files,
    bad_lines,
    callbacks,
    silence,
    spend_log_rows,
    money,
)
"""The first one is played by the main thread, which alone may start a Postgres."""


@pytest.fixture(scope="module")
def played(session_dir: Path, admin_dsn: str, template_database: str) -> Iterator[dict[str, Future[Prometheus]]]:
    """All scenarios, at once: each one's Prometheus, which knows what has fired and cleared."""
    program("prometheus")
    directory = session_dir / "alerts"
    directory.mkdir()

    def play(scenario: Callable[[World], None]) -> Prometheus:
        own = directory / scenario.__name__
        own.mkdir()
        with ExitStack() as stack:
            world = World(own, admin_dsn, template_database, stack)
            scenario(world)
            return world.prometheus

    mine: Future[Prometheus] = Future()
    with ThreadPoolExecutor(len(SCENARIOS)) as pool:
        theirs = {scenario.__name__: pool.submit(play, scenario) for scenario in SCENARIOS[1:]}
        try:
            mine.set_result(play(SCENARIOS[0]))
        except Exception as error:  # noqa: BLE001  # its test raises it
            mine.set_exception(error)
        yield {SCENARIOS[0].__name__: mine, **theirs}
    shutil.rmtree(directory, ignore_errors=True)


@pytest.mark.parametrize("name", [scenario.__name__ for scenario in SCENARIOS])
def test_alerts_fire_and_clear(played: dict[str, Future[Prometheus]], name: str) -> None:
    played[name].result(230)


def test_every_alert_has_fired_and_cleared(played: dict[str, Future[Prometheus]]) -> None:
    seen = [future.result(230) for future in played.values()]
    groups = yaml.safe_load((RULES / "alerts.yml").read_text("utf-8"))["groups"]
    alerts = {rule["alert"] for group in groups for rule in group["rules"]}
    assert set().union(*(prometheus.fired for prometheus in seen)) == alerts
    assert set().union(*(prometheus.cleared for prometheus in seen)) == alerts


def test_only_durations_are_scaled() -> None:
    rule = {
        "alert": "A",
        "expr": "increase(a[15m]) > 3 and time() - b > 15 * 60 and c[1d] and d[6h] and changes(e[1h])",
        "for": "5m",
    }
    assert hurried({"groups": [{"name": "g", "rules": [rule]}]})["groups"][0]["rules"] == [
        {
            "alert": "A",
            "expr": "increase(a[3s]) > 3 and time() - b > 3 and c[30s] and d[10s] and changes(e[30s])",
            "for": "2000ms",
        }
    ]
