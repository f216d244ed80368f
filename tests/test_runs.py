"""The application's API on real Postgres: what `complete` means, who is woken when, who may ask, what a call shows."""

import asyncio
import json
import resource
import threading
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

from billing_tailer.ledger import Reads, RunStatus, listening
from billing_tailer.settler import Settler
from billing_tailer.spend import slim
from billing_tailer.web import HttpServer
from billing_tailer.web.access import is_loopback
from billing_tailer.web.runs import run_routes
from billing_tailer.web.waiters import Waiters
from tests.support.daemon import Daemon
from tests.support.follow import Rig, following
from tests.support.loglines import line
from tests.support.proof import rows
from tests.support.proxy import PostgresProxy
from tests.support.run_client import run_bill
from tests.support.verbs import Verb

PAYLOADS = Path(__file__).parent / "data" / "payloads"
TOKEN = "a-token-of-the-application"


def spooled(call_id: str, payload: str = "nonstream", **changes: object) -> bytes:
    """A line of the spool: LiteLLM's callback of a call."""
    event = {**json.loads((PAYLOADS / f"{payload}.json").read_bytes()), "litellm_call_id": call_id, **changes}
    return json.dumps({"received_at": 1795307913.0, "payload": slim(event)}).encode() + b"\n"


@dataclass
class Bench:
    """A tailer that the test turns, and its API."""

    rig: Rig
    volume: Path
    client: httpx.Client
    server: HttpServer
    reads: Reads
    waiters: Waiters

    def log(self, *numbers: int, run: str = "run-1", **changes: str) -> None:
        """Audit lines of calls."""
        metadata = json.dumps({"run_id": run, "graph_id": "g", "attempt": 1})
        with (self.volume / "audit.jsonl").open("ab") as log:
            for number in numbers:
                log.write(line(number, run_id=run, spend_logs_metadata=metadata, **changes))

    def spend(self, *numbers: int, payload: str = "nonstream", **changes: object) -> None:
        """LiteLLM's callbacks of calls."""
        with (self.volume / "callbacks-test.jsonl").open("ab") as spool:
            for number in numbers:
                spool.write(spooled(call_id(number), payload, **changes))

    def turn(self) -> None:
        self.rig.turn()

    def ask(self, run: str = "run-1", **parameters: Any) -> dict[str, Any]:
        answer = self.client.get(f"/v1/runs/{run}", params=parameters)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found


def call_id(number: int) -> str:
    return f"call-{number:08d}"


@contextmanager
def serving(
    reads: Reads, waiters: Waiters, rig: Rig, token: str | None = None, host: str = "127.0.0.1"
) -> Iterator[Any]:
    server = HttpServer(host, 0, rig.events, rig.health, run_routes(token, reads, waiters))
    server.start()
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{server.port}", trust_env=False, timeout=70) as client:
            yield server, client
    finally:
        waiters.close()
        server.stop()


@contextmanager
def bench(dsn: str, volume: Path, *, reads_dsn: str | None = None, **changes: Any) -> Iterator[Bench]:
    reads = Reads("billing", "default")
    waiters = Waiters(reads.run_status, recheck_seconds=changes.pop("recheck_seconds", 60))
    with (
        following(dsn, volume, notify=waiters.notify, **changes) as rig,
        reads.of(reads_dsn or dsn),
        serving(reads, waiters, rig) as (server, client),
    ):
        yield Bench(rig, volume, client, server, reads, waiters)


@pytest.fixture
def api(dsn: str, tmp_path: Path) -> Iterator[Bench]:
    with bench(dsn, tmp_path) as api:
        yield api


def in_thread(ask: Callable[[], Any]) -> tuple[threading.Thread, list[tuple[float, Any]]]:
    answers: list[tuple[float, Any]] = []
    thread = threading.Thread(target=lambda: answers.append((ask(), time.monotonic())[::-1]))
    thread.start()
    return thread, answers


# --- what it says ----------------------------------------------------------------------------------------------------


def test_an_unknown_run(api: Bench) -> None:
    answer = api.ask("no/such run", calls=1)
    assert answer.pop("as_of")["files"] == []
    assert answer == {
        "run_id": "no/such run",
        "calls": 0,
        "settled": 0,
        "pending": 0,
        "complete": False,
        "charged_credits": "0",
        "provider_cost_usd": "0.000000000000",
        "user_cost_usd": "0.000000000000",
        "exceptions": [],
    }
    assert api.ask("no/such run")["complete"] is False
    assert api.ask("no/such run", call_id="x")["complete"] is False


SETTLED, PENDING, HELD, UNATTRIBUTED, OVERDUE, NOT_CHARGED = range(6)


def prepare(api: Bench, dsn: str, *kinds: int) -> None:
    """A run with one call of each kind, whose numbers are the kinds."""
    for kind in kinds:
        api.log(kind, **({"end_user": ""} if kind == UNATTRIBUTED else {}))
        if kind in (SETTLED, UNATTRIBUTED):
            api.spend(kind)
        if kind == HELD:
            api.spend(kind, response_cost=0.0)
        if kind == NOT_CHARGED:
            api.spend(kind, payload="failure_upstream500")
    api.turn()
    if OVERDUE in kinds:
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute(
                "update billing.usage_facts set committed_at = now() - interval '1 day' where call_id = %s",
                (call_id(OVERDUE),),
            )
            connection.execute(
                "update billing.unsettled_facts set committed_at = now() - interval '1 day' where call_id = %s",
                (call_id(OVERDUE),),
            )
    if NOT_CHARGED in kinds:
        with psycopg.connect(dsn, autocommit=True) as connection:
            for table, column in (("usage_facts", "committed_at"), ("spend_records", "received_at")):
                connection.execute(
                    f"update billing.{table} set {column} = now() - interval '1 minute' where call_id = %s",
                    (call_id(NOT_CHARGED),),
                )
    api.rig.tailer._settler._next_sweep = 0
    api.turn()


@pytest.mark.parametrize(
    ("kinds", "parameters", "complete"),
    [
        ((SETTLED,), {"calls": 1}, True),
        ((SETTLED,), {"calls": 2}, False),
        ((SETTLED,), {}, None),
        ((SETTLED,), {"call_id": call_id(SETTLED)}, True),
        ((SETTLED,), {"call_id": [call_id(SETTLED), "call-unknown"]}, False),
        ((SETTLED, NOT_CHARGED), {"calls": 2}, True),
        ((SETTLED, NOT_CHARGED), {}, None),
        ((SETTLED, NOT_CHARGED), {"call_id": call_id(NOT_CHARGED)}, True),
        ((SETTLED, PENDING), {"calls": 2}, False),
        ((SETTLED, PENDING), {"calls": 1}, False),
        ((SETTLED, PENDING), {}, False),
        ((SETTLED, PENDING), {"call_id": call_id(PENDING)}, False),
        ((SETTLED, PENDING), {"call_id": call_id(SETTLED)}, True),
        ((SETTLED, HELD), {"calls": 2}, False),
        ((SETTLED, HELD), {}, False),
        ((SETTLED, UNATTRIBUTED), {"calls": 2}, False),
        ((SETTLED, UNATTRIBUTED), {}, False),
        ((SETTLED, OVERDUE), {"calls": 2}, False),
        ((SETTLED, OVERDUE), {}, False),
    ],
)
def test_complete(
    api: Bench, dsn: str, kinds: tuple[int, ...], parameters: dict[str, Any], complete: bool | None
) -> None:
    prepare(api, dsn, *kinds)
    answer = api.ask(**parameters)
    assert answer["complete"] is complete
    settled = len({SETTLED, NOT_CHARGED} & set(kinds))
    assert (answer["calls"], answer["settled"], answer["pending"]) == (len(kinds), settled, len(kinds) - settled)
    named = {HELD: "held_zero_cost", UNATTRIBUTED: "unattributed", OVERDUE: "overdue", NOT_CHARGED: "not_charged"}
    expected = [(call_id(kind), named[kind]) for kind in kinds if kind in named]
    assert [(one["call_id"], one["kind"]) for one in answer["exceptions"]] == expected
    assert all(one["opened_at"] for one in answer["exceptions"])


def test_a_named_call_of_another_run(api: Bench) -> None:
    api.log(1)
    api.log(2, run="run-2")
    api.spend(1, 2)
    api.turn()
    answer = api.ask(call_id=[call_id(1), call_id(2)])
    assert (answer["complete"], answer["unsettled_call_ids"]) == (False, [call_id(2)])


def test_money_is_receipts_plus_adjustments(api: Bench, dsn: str) -> None:
    api.log(1, 2)
    api.spend(1, 2, response_cost=0.000225)
    api.turn()
    answer = api.ask(calls=2)
    assert (answer["charged_credits"], answer["provider_cost_usd"]) == ("4500", "0.000450000000")
    api.spend(1, response_cost=0.1, id="another-attempt")
    api.turn()
    answer = api.ask(calls=2)
    assert (answer["charged_credits"], answer["provider_cost_usd"]) == ("1004500", "0.100450000000")
    assert answer["user_cost_usd"] == "0.100450000000"
    size = (api.volume / "audit.jsonl").stat().st_size
    files = {file["path"]: file["committed_offset"] for file in answer["as_of"]["files"]}
    assert files[f"{api.volume}/audit.jsonl"] == size
    assert answer["as_of"]["time"].endswith("+00:00")


def test_the_list_of_calls_has_pages(api: Bench) -> None:
    api.log(*range(5))
    api.spend(0, 1, 2)
    api.turn()
    listed: list[dict[str, Any]] = []
    after: str | None = ""
    for _ in range(3):
        page = api.ask(details="true", limit=2, **({"after": after} if after else {}))
        listed += page["call_list"]
        after = page["next_after"]
    assert after is None
    assert [one["call_id"] for one in listed] == [call_id(number) for number in range(5)]
    assert [one["standing"] for one in listed] == ["settled"] * 3 + ["pending"] * 2
    assert (
        listed[0]["charged_credits"] == api.ask(call_id=call_id(0), details="true")["call_list"][0]["charged_credits"]
    )
    assert "call_list" not in api.ask()


@pytest.mark.parametrize(
    ("query", "parameter"),
    [
        ("wait_seconds=61", "wait_seconds"),
        ("wait_seconds=-1", "wait_seconds"),
        ("wait_seconds=nan", "wait_seconds"),
        ("wait_seconds=1&wait_seconds=2", "wait_seconds"),
        ("calls=0", "calls"),
        ("calls=two", "calls"),
        ("calls=%F0%9D%9F%8F", "calls"),
        ("calls=1&call_id=a", "calls"),
        ("call_id=", "call_id"),
        ("call_id=%00", "call_id"),
        ("&".join(["call_id=a"] * 1001), "call_id"),
        ("details=yes", "details"),
        ("limit=5", "limit"),
        ("details=true&limit=1001", "limit"),
        ("wait=5", "wait"),
    ],
)
def test_a_bad_parameter(api: Bench, query: str, parameter: str) -> None:
    answer = api.client.get(f"/v1/runs/run-1?{query}")
    assert answer.status_code == 400
    found = answer.json()
    assert found["parameter"] == parameter
    assert found["error"] == f"{parameter} = {found['value']!r}: {found['remedy']}"
    assert len(found["remedy"]) > 10


def test_bad_ids(api: Bench) -> None:
    assert api.client.get("/v1/runs/").status_code == 400
    assert api.client.get("/v1/runs/a%00b").json()["parameter"] == "run_id"
    assert api.client.get("/v1/calls/a%00b").json()["parameter"] == "call_id"
    assert api.client.get(f"/v1/calls/{'x' * 1025}").status_code == 400


def test_a_thousand_named_calls(api: Bench) -> None:
    named = [f"{number:036d}" for number in range(1000)]
    assert api.ask(call_id=named)["unsettled_call_ids"] == named


# --- waiting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spend_first", [False, True])
@pytest.mark.parametrize("parameters", [{"calls": 1}, {"call_id": call_id(1)}, {}])
def test_woken_by_the_commit_of_the_second_half(
    api: Bench, monkeypatch: pytest.MonkeyPatch, spend_first: bool, parameters: dict[str, Any]
) -> None:
    committed: list[float] = []
    settle = Settler._settle

    def timed(self: Settler, call_ids: Any) -> int:
        settled = settle(self, call_ids)
        committed.append(time.monotonic())
        return settled

    monkeypatch.setattr(Settler, "_settle", timed)
    first, second = (api.spend, api.log) if spend_first else (api.log, api.spend)
    first(1)
    api.turn()
    committed.clear()
    thread, answers = in_thread(lambda: api.ask(wait_seconds=30, **parameters))
    wait_for(lambda: api.waiters._waiting == 1)
    time.sleep(0.1)
    assert not answers
    second(1)
    api.turn()
    thread.join(10)
    [(answered, answer)] = answers
    assert answer["complete"] is (True if parameters else None)
    assert answer["charged_credits"] != "0"
    assert answered - committed[0] < 0.1


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_the_time_is_up(api: Bench) -> None:
    api.log(1)
    api.turn()
    started = time.monotonic()
    answer = api.ask(calls=1, wait_seconds="0.5")
    assert 0.5 <= time.monotonic() - started < 1.5
    assert (answer["complete"], answer["calls"]) == (False, 1)
    assert api.waiters._runs == {}


def test_nobody_asks_postgres_while_nothing_happens(api: Bench) -> None:
    looks: list[str] = []
    look = api.waiters._look

    def counted(run_id: str, named: Collection[str]) -> Future[RunStatus]:
        looks.append(run_id)
        return look(run_id, named)

    api.waiters._look = counted
    threads = [in_thread(partial(api.ask, f"run-{n % 2}", calls=1, wait_seconds=2))[0] for n in range(6)]
    wait_for(lambda: api.waiters._waiting == 6)
    time.sleep(0.3)
    before = len(looks)
    time.sleep(0.5)
    assert len(looks) == before
    api.log(7, run="run-0")
    api.spend(7)
    api.turn()
    time.sleep(0.3)
    assert looks[before:] == ["run-0"], "one query, for all that wait for that run"
    for thread in threads:
        thread.join(10)


def test_commits_of_other_processes_are_seen_later(dsn: str, tmp_path: Path) -> None:
    with bench(dsn, tmp_path, recheck_seconds=0.3) as api:
        prepare(api, dsn, HELD)
        thread, answers = in_thread(lambda: api.ask(call_id=call_id(HELD), wait_seconds=30))
        wait_for(lambda: api.waiters._waiting == 1)
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute(
                "insert into billing.charge_receipts select 'litellm', call_id, 'a', run_id, 1, call_id, 1, 1e-7, 1e-7,"
                " 1, 'manual', null, '{}', 'llm_usage', 'llm', occurred_at from billing.usage_facts"
            )
        thread.join(10)
        assert answers[0][1]["complete"] is True


def test_an_operators_decision_wakes_who_waits(dsn: str, tmp_path: Path, verb: Verb) -> None:
    """Also when the connection that hears of it was cut, once there is a new one."""
    hearing = "select pid from pg_stat_activity where application_name = 'billing_tailer news' and state = 'idle'"
    hearing += " and datname = current_database()"
    with bench(dsn, tmp_path, recheck_seconds=60) as api, listening(dsn, "billing", api.waiters.notify) as hears:
        prepare(api, dsn, HELD, UNATTRIBUTED)
        releases = {HELD: ("--cost-usd", "0.5"), UNATTRIBUTED: ("--account", "account-9")}
        for number, says in releases.items():
            wait_for(lambda: rows(dsn, hearing) != [])
            thread, answers = in_thread(partial(api.ask, call_id=call_id(number), wait_seconds=30))
            wait_for(lambda: api.waiters._waiting == 1)
            verb("exceptions", "release", call_id(number), "--reason", "r", *says)
            told = time.monotonic()
            thread.join(10)
            assert answers[0][1]["complete"] is True
            assert answers[0][0] - told < 2
            (session,) = rows(dsn, hearing)
            rows(dsn, "select pg_terminate_backend(%s::int, 5000)", session["pid"])
        assert hears()
    assert not hears()


def test_a_client_that_leaves_waits_no_more(api: Bench) -> None:
    with pytest.raises(httpx.ReadTimeout):
        api.client.get("/v1/runs/run-1?calls=1&wait_seconds=60", timeout=0.3)
    wait_for(lambda: api.waiters._waiting == 0)
    assert api.waiters._runs == {}


def test_the_end_of_the_process_ends_the_waiting(api: Bench) -> None:
    thread, answers = in_thread(lambda: api.ask(calls=1, wait_seconds=60))
    wait_for(lambda: api.waiters._waiting == 1)
    time.sleep(0.2)
    started = time.monotonic()
    api.waiters.close()
    thread.join(5)
    assert answers[0][1]["complete"] is False
    assert time.monotonic() - started < 1
    assert api.client.get("/v1/runs/run-1").status_code == 503


def test_too_many_waiting(api: Bench) -> None:
    api.waiters._waiting_max = 1
    thread, answers = in_thread(lambda: api.ask(calls=1, wait_seconds=1))
    wait_for(lambda: api.waiters._waiting == 1)
    answer = api.client.get("/v1/runs/run-2")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    thread.join(10)
    assert answers


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    """Both ends of all connections are in this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("many_descriptors")
def test_five_hundred_wait(api: Bench) -> None:
    """They cost no thread, others no time, and each gets its own answer."""
    clients = 500
    api.log(*range(clients), run="run-x")
    api.turn()
    api.ask()
    threads_before = threading.active_count() + 1  # that of to_thread, below

    async def get(path: str) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", api.server.port)
        writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        answer = await reader.read()
        writer.close()
        await writer.wait_closed()
        return answer

    async def live_seconds() -> float:
        started = time.perf_counter()
        assert b"200 OK" in await get("/livez")
        return time.perf_counter() - started

    async def scenario() -> tuple[list[bytes], list[float]]:
        waiting = [
            asyncio.create_task(get(f"/v1/runs/run-x?call_id={call_id(number)}&wait_seconds=60"))
            for number in range(clients)
        ]
        await asyncio.to_thread(wait_for, lambda: api.waiters._waiting == clients)
        await asyncio.sleep(0.5)
        live = [await live_seconds() for _ in range(100)]
        assert threading.active_count() <= threads_before
        assert not any(task.done() for task in waiting)
        api.spend(*range(clients))
        turning = threading.Thread(target=api.turn)
        turning.start()
        answers = await asyncio.gather(*waiting)
        turning.join()
        return list(answers), live

    answers, live = asyncio.run(asyncio.wait_for(scenario(), 60))
    assert max(live) < 0.05
    assert all(json.loads(answer.partition(b"\r\n\r\n")[2])["complete"] is True for answer in answers)


# --- Postgres is away ------------------------------------------------------------------------------------------------


def test_postgres_away(dsn: str, tmp_path: Path) -> None:
    with PostgresProxy(dsn) as proxy, bench(dsn, tmp_path, reads_dsn=proxy.dsn) as api:
        assert api.ask()["calls"] == 0
        proxy.cut()
        for _ in range(3):
            answer = api.client.get("/v1/runs/run-1")
            assert answer.status_code == 503
            assert "refused" in answer.json()["error"]
            assert answer.headers["retry-after"] == "1"
        assert api.client.get("/v1/calls/call-1").status_code == 503
        proxy.forward()
        wait_for(lambda: api.client.get("/v1/runs/run-1").status_code == 200)


def test_a_restart_of_postgres_costs_no_answer(dsn: str, tmp_path: Path) -> None:
    with PostgresProxy(dsn) as proxy, bench(dsn, tmp_path, reads_dsn=proxy.dsn) as api:
        for _ in range(3):
            api.ask()
        proxy.drop()
        for _ in range(5):
            assert api.ask()["calls"] == 0


def test_before_there_is_a_database(dsn: str, tmp_path: Path) -> None:
    reads = Reads("billing", "default")
    with following(dsn, tmp_path) as rig, serving(reads, Waiters(reads.run_status), rig) as (_, client):
        answer = client.get("/v1/runs/run-1")
    assert (answer.status_code, "not open" in answer.json()["error"]) == (503, True)


def test_the_connections_cannot_write(api: Bench) -> None:
    def write(connection: Any) -> None:
        connection.execute("delete from usage_facts")

    with pytest.raises(Exception, match="read-only"):
        api.reads.submit(write).result(10)
    timeout = api.reads.submit(lambda connection: connection.execute("show statement_timeout").fetchone())
    assert timeout.result(10) == ("5s",)


# --- who may ask -----------------------------------------------------------------------------------------------------


def test_the_token(dsn: str, tmp_path: Path) -> None:
    reads = Reads("billing", "default")
    waiters = Waiters(reads.run_status)
    with following(dsn, tmp_path) as rig, reads.of(dsn), serving(reads, waiters, rig, TOKEN) as (_, client):
        for path in ("/v1/runs/run-1", "/v1/calls/call-1"):
            for header in (None, "", "Bearer", "Bearer x", f"Basic {TOKEN}", f"Bearer {TOKEN}x", "Bearer \xe9"):
                headers = {} if header is None else {"Authorization": header.encode("latin-1")}
                answer = client.get(path, headers=headers)
                assert answer.status_code == 401, header
                assert "API_TOKEN" in answer.json()["error"]
                assert TOKEN not in answer.text
            assert client.get(path, headers={"Authorization": f"bearer {TOKEN}"}).status_code in (200, 404)
        for path in ("/livez", "/metrics"):
            assert client.get(path).status_code == 200


def test_without_a_token_strangers_are_refused(api: Bench) -> None:
    for path in ("/v1/runs/run-1", "/v1/calls/call-1"):
        answer = api.client.get(path, headers={"X-Forwarded-For": "192.0.2.7"})
        assert answer.status_code == 403
        assert "API_TOKEN" in answer.json()["error"]
    assert api.client.get("/livez", headers={"X-Forwarded-For": "192.0.2.7"}).status_code == 200


@pytest.mark.parametrize(
    ("host", "local"),
    [
        *((host, True) for host in ("127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1")),
        *((host, False) for host in ("192.0.2.7", "::ffff:192.0.2.7", "0.0.0.0", "localhost", "")),  # noqa: S104 - not local
    ],
)
def test_loopback(host: str, local: bool) -> None:
    assert is_loopback(host) is local


# --- one call --------------------------------------------------------------------------------------------------------


def test_a_call_is_explained_down_to_its_line(api: Bench) -> None:
    api.log(1, 2)
    api.spend(2)
    api.turn()
    answer = api.client.get(f"/v1/calls/{call_id(2)}").json()
    raw = (api.volume / "audit.jsonl").read_bytes().splitlines()
    place = answer["fact"]["line"]
    assert place["path"] == f"{api.volume}/audit.jsonl"
    assert (place["start_offset"], place["end_offset"]) == (len(raw[0]) + 1, len(raw[0]) + len(raw[1]) + 2)
    assert (place["raw"].encode(), place["raw_missing"]) == (raw[1], None)
    assert answer["fact"]["run_id"] == "run-1"
    [record] = answer["spend_records"]
    assert record["line"]["path"] == f"{api.volume}/callbacks-test.jsonl"
    assert isinstance(record["cost_usd"], str)
    assert answer["receipt"]["record_ids"] == [record["record_id"]]
    assert answer["receipt"]["charged_credits"] == api.ask()["charged_credits"]
    assert answer["details"]["model"] == record["model_group"]
    assert (answer["adjustments"], answer["exceptions"], answer["conflicts"]) == ([], [], [])


def test_the_file_is_gone(api: Bench) -> None:
    api.log(1)
    api.turn()
    path = api.volume / "audit.jsonl"
    content = path.read_bytes()
    path.unlink()
    answer = api.client.get(f"/v1/calls/{call_id(1)}").json()
    assert answer["fact"]["line"]["raw"] is None
    assert "No such file" in answer["fact"]["line"]["raw_missing"]
    path.write_bytes(b"x" * len(content))
    line = api.client.get(f"/v1/calls/{call_id(1)}").json()["fact"]["line"]
    assert line["raw"] is None
    assert "another" in line["raw_missing"] or "content" in line["raw_missing"]


def test_unknown_unaudited_and_conflicting_calls(api: Bench) -> None:
    answer = api.client.get("/v1/calls/no-such-call")
    assert (answer.status_code, "'no-such-call' is not known" in answer.json()["error"]) == (404, True)
    api.spend(3)
    api.log(4)
    api.log(4, nginx_request_id="f" * 32, end_user="someone-else")
    api.turn()
    unaudited = api.client.get(f"/v1/calls/{call_id(3)}").json()
    assert (unaudited["fact"], len(unaudited["spend_records"])) == (None, 1)
    conflicting = api.client.get(f"/v1/calls/{call_id(4)}").json()
    assert [one["billing_account_id"] for one in conflicting["conflicts"]] == ["someone-else"]
    assert conflicting["conflicts"][0]["line"]["raw"]


# --- instead of the old reader ---------------------------------------------------------------------------------------


def test_what_the_old_reader_lost(dsn: str, tmp_path: Path) -> None:
    """A streamed call, whose line has no cost, is billed at its real cost, and a run whose lines lie 3 MB back in the
    log is complete: with the client that README shows."""
    reads = Reads("billing", "default")
    waiters = Waiters(reads.run_status)
    streamed = {"litellm_response_cost": "", "upstream_content_type": "text/event-stream"}
    with (
        following(dsn, tmp_path, notify=waiters.notify) as rig,
        reads.of(dsn),
        serving(reads, waiters, rig, TOKEN) as (server, client),
    ):
        api = Bench(rig, tmp_path, client, server, reads, waiters)
        api.log(1, 2, run="old run/1", **streamed)
        api.log(*range(10, 4510), run="run-later")
        assert (tmp_path / "audit.jsonl").stat().st_size > 3 << 20
        api.spend(1, payload="stream")
        api.turn()
        url = f"http://127.0.0.1:{server.port}"
        thread, answers = in_thread(lambda: run_bill(url, TOKEN, "old run/1", calls=2))
        wait_for(lambda: waiters._waiting == 1)
        api.spend(2, payload="stream")
        api.turn()
        thread.join(15)
    real = json.loads((PAYLOADS / "stream.json").read_bytes())["response_cost"]
    bill = answers[0][1]
    assert bill["complete"] is True
    assert float(bill["provider_cost_usd"]) == pytest.approx(2 * real)
    assert int(bill["charged_credits"]) == round(2 * real * 10**7) > 0
    receipts = rows(dsn, "select provenance from charge_receipts")
    assert [row["provenance"] for row in receipts] == ["stream", "stream"]


def test_the_daemon_serves_it_and_ends_in_time(dsn: str, tmp_path: Path) -> None:
    volume = tmp_path / "billing"
    volume.mkdir()
    (volume / "audit.jsonl").write_bytes(line(1, run_id="run-1"))
    settings = {"AUDIT_GLOBS": f"{volume}/audit*.jsonl*", "DATABASE_URL": dsn, "API_TOKEN": TOKEN}
    variables = {f"BILLING_TAILER_{name}": value for name, value in settings.items()}
    with Daemon(variables, tmp_path / "daemon.log") as daemon:
        daemon.wait_for_event("batch.committed")
        assert daemon.get("/v1/runs/run-1").status_code == 401
        url = daemon.url
        thread, answers = in_thread(lambda: run_bill(url, TOKEN, "run-1", calls=1, wait_seconds=30))
        time.sleep(0.5)
        assert daemon.terminate(timeout=3) == 0
        thread.join(5)
        assert "Traceback" not in daemon.log()
    assert (answers[0][1]["calls"], answers[0][1]["complete"]) == (1, False)
