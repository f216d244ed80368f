"""The main job on real input: nginx with our configuration writes, the daemon follows, nothing is lost or doubled."""

import hashlib
import http.client
import itertools
import json
import random
import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
import pytest
from psycopg.rows import dict_row

from tests.e2e.nginx import Nginx
from tests.e2e.program import wait
from tests.e2e.upstream import Upstream
from tests.support.daemon import Daemon

CONNECTIONS = 8


class Case(NamedTuple):
    """A kind of request: how often, and what its audit line and its fact (`None`: a skip) must say."""

    times: int
    method: str
    path: str
    status: int
    fact: dict[str, Any] | None = None
    authorization: str = "Bearer good"


ANSWERED = {"request_completed": True, "id_echoed": True, "provenance": "response"}
HUNG_UP = {"request_completed": False, "id_echoed": False, "provenance": "response"}
CHAT = "/v1/chat/completions"
CASES = {
    "chat": Case(1100, "POST", CHAT, 200, ANSWERED),
    "stream": Case(700, "POST", f"{CHAT}?beta=1", 200, ANSWERED | {"provenance": "stream"}),
    "embedding": Case(100, "POST", "/embeddings", 200, ANSWERED),
    "error-400": Case(30, "POST", CHAT, 400, ANSWERED),
    "error-404": Case(10, "POST", CHAT, 404, ANSWERED),
    "error-500": Case(40, "POST", CHAT, 500, ANSWERED),
    "slow": Case(20, "POST", CHAT, 499, HUNG_UP),
    "refused": Case(40, "POST", CHAT, 401, authorization="Bearer bad"),
    "health": Case(100, "GET", "/health/liveliness", 200),
    "models": Case(20, "GET", "/v1/models", 200),
}
FACTS = sum(case.times for case in CASES.values() if case.fact is not None)
OUTCOMES = {"fact": 2000, "rejected_before_llm": 40, "not_llm_route": 120}
LINES = sum(OUTCOMES.values())


@dataclass
class Request:
    """One request; `call_id` is what the client was told in the answer."""

    number: int
    name: str
    status: int | None = None
    call_id: str | None = None

    @property
    def case(self) -> Case:
        return CASES[self.name]

    @property
    def run_id(self) -> str:
        return f"run-{self.number}"


@pytest.mark.e2e
def test_requests_through_nginx_with_a_rotation_become_facts_once(open_dir: Path, dsn: str) -> None:
    assert OUTCOMES["fact"] == FACTS
    assert sum(case.times for case in CASES.values()) == LINES
    names = [name for name, case in CASES.items() for _ in range(case.times)]
    random.Random(20261122).shuffle(names)
    requests = [Request(number, name) for number, name in enumerate(names)]
    with Upstream() as upstream, Nginx(open_dir, upstream.address) as nginx:
        variables = {
            "BILLING_TAILER_DATABASE_URL": dsn,
            "BILLING_TAILER_AUDIT_GLOBS": f"{nginx.log_dir}/audit*.jsonl*",
        }
        with Daemon(variables, open_dir / "daemon.log") as daemon:
            rotated = _send_and_rotate(requests, upstream, nginx)
            daemon.wait_until(lambda: _committed_lines(daemon) >= LINES, what=f"{LINES} committed lines")
            assert daemon.terminate() == 0
    assert sum(path.read_bytes().count(b"\n") for path in (nginx.log, rotated)) == LINES
    with psycopg.connect(dsn, row_factory=dict_row) as connection:
        _check_facts(connection, requests, upstream)
        _check_ranges(connection, [nginx.log, rotated])


def _send_and_rotate(requests: list[Request], upstream: Upstream, nginx: Nginx) -> Path:
    """Sends everything over several connections; half way, renames the log, sees nginx go on there, sends USR1."""
    queue, done = iter(requests), itertools.count()
    progress = 0

    def client() -> None:
        nonlocal progress
        connection = http.client.HTTPConnection("127.0.0.1", nginx.port, timeout=30)
        for request in queue:  # a list's iterator hands each item to one thread only
            _send(connection, request, upstream)
            progress = next(done)
        connection.close()

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        clients = [pool.submit(client) for _ in range(CONNECTIONS)]
        wait(lambda: progress > LINES // 2 or any(c.done() for c in clients), 60, lambda: f"{progress} requests done")
        rotated = nginx.log.rename(f"{nginx.log}-20261122")
        size = rotated.stat().st_size
        wait(lambda: rotated.stat().st_size > size, 10, lambda: "nginx did not write on to the renamed file")
        nginx.reopen()
        for finished in clients:
            finished.result(60)
    assert nginx.log.stat().st_size > 0, "nginx wrote nothing after the rotation"
    return rotated


def _send(connection: http.client.HTTPConnection, request: Request, upstream: Upstream) -> None:
    headers = {
        "authorization": request.case.authorization,
        "content-type": "application/json",
        "x-cogni-run-id": request.run_id,
        "x-litellm-end-user-id": f"account-{request.number % 7}",
        "x-litellm-call-id": "chosen-by-the-client",  # with every request: it must not become the key of a call
        "x-model": request.name,
    }
    body = json.dumps({"model": request.name, "messages": []}) if request.case.method == "POST" else None
    connection.request(request.case.method, request.case.path, body, headers)
    if request.name == "slow":
        wait(lambda: request.run_id in upstream.received, 30, lambda: f"{request.run_id} did not reach the upstream")
        connection.close()  # and opens itself again with the next request
        return
    response = connection.getresponse()
    response.read()
    request.status, request.call_id = response.status, response.headers["x-litellm-call-id"]


def _committed_lines(daemon: Daemon) -> float:
    text = daemon.get("/metrics").text
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith("billing_tailer_lines_total{"))


def _check_facts(connection: psycopg.Connection[dict[str, Any]], requests: list[Request], upstream: Upstream) -> None:
    facts = {row["run_id"]: row for row in connection.execute("select * from billing.usage_facts")}
    calls = {request.run_id: request for request in requests if request.case.fact is not None}
    assert facts.keys() == calls.keys()
    assert connection.execute("select count(*) as n from billing.usage_facts").fetchall() == [{"n": len(calls)}]
    for run_id, request in calls.items():
        fact, case = facts[run_id], request.case
        assert request.status in (case.status, None)
        expected = {
            "call_id": upstream.received[run_id]["x-litellm-call-id"],
            "billing_account_id": f"account-{request.number % 7}",
            "path": case.path.partition("?")[0],
            "status": case.status,
            "requested_model": request.name,
            **(case.fact or {}),
        }
        assert {name: fact[name] for name in expected} == expected
        assert fact["nginx_request_id"] == fact["proxy_call_id"] == fact["call_id"]
        if request.name != "slow":
            assert request.call_id == fact["call_id"]
    for table in ("dead_letters", "call_conflicts", "log_gaps"):
        assert connection.execute(f"select * from billing.{table}").fetchall() == []


def _check_ranges(connection: psycopg.Connection[dict[str, Any]], logs: list[Path]) -> None:
    """EVERY_BYTE_HAS_AN_OUTCOME: the batches of each file follow each other without a hole and hash to its bytes."""
    by_inode = {path.stat().st_ino: path for path in logs}
    files = connection.execute("select * from billing.tail_files").fetchall()
    assert sorted(int(row["inode"]) for row in files) == sorted(by_inode)
    counts: Counter[str] = Counter()
    for file in files:
        content = by_inode[int(file["inode"])].read_bytes()
        offset = 0
        for batch in connection.execute(
            "select * from billing.tail_batches where file_id = %s order by start_offset", [file["file_id"]]
        ):
            assert batch["start_offset"] == offset
            offset = batch["end_offset"]
            assert hashlib.sha256(content[batch["start_offset"] : offset]).digest() == batch["sha256"]
            counts.update(batch["counts"])
        assert offset == file["committed_offset"] == len(content)
    assert +counts == OUTCOMES


@pytest.mark.e2e
def test_nginx_takes_the_rendered_template(tmp_path: Path) -> None:
    """By its own `-t`, without a word about it; and it says where one is wrong."""
    nginx = Nginx(tmp_path, "127.0.0.1:4000")
    command = [*nginx.configured(), "-t"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (found.returncode, "[warn]" in found.stderr, "test is successful" in found.stderr) == (0, False, True)
    audit = tmp_path / "audit.conf"
    audit.write_text(audit.read_text("utf-8").replace("escape=json", "escape=jsom"), "utf-8")
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode != 0
    assert "jsom" in found.stderr
