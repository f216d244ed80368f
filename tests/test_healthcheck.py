"""`billing-tailer healthcheck`: what Docker asks every minute."""

import http.server
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from billing_tailer.events import Events
from billing_tailer.health import LIVE_SECONDS_MAX, Health
from billing_tailer.web import HttpServer
from tests.support.verbs import Verb

NOWHERE = "postgresql://nobody@127.0.0.1:1/nowhere"


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Verb:
    """With a database that is not there."""
    verb = Verb(monkeypatch, capsys)
    verb.environment(AUDIT_GLOBS=f"{tmp_path}/audit*.jsonl*", DATABASE_URL=NOWHERE)
    return verb


class _Stranger(http.server.BaseHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name of the method that it replaces
        pass


@contextmanager
def serving(host: str, health: Health) -> Iterator[int]:
    """The daemon's own HTTP server; gives the port."""
    server = HttpServer(host, 0, Events(), health)
    server.start()
    try:
        yield server.port
    finally:
        server.stop()


@pytest.mark.parametrize(
    ("told", "asked"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("0.0.0.0", "127.0.0.1"),  # noqa: S104 - which is the point
        ("::", "[::1]"),
        ("localhost", "localhost"),
    ],
)
def test_a_daemon_that_lives(verb: Verb, told: str, asked: str) -> None:
    with serving("127.0.0.1" if told == "localhost" else told, Health()) as port:
        verb.environment(HTTP_HOST=told, HTTP_PORT=str(port))
        answer = verb.json("healthcheck")
        assert (answer["alive"], answer["url"], answer["reason"]) == (True, f"http://{asked}:{port}/livez", None)
        assert 0 <= answer["seconds_since_tick"] < LIVE_SECONDS_MAX
        assert "alive" in verb("healthcheck")


def test_a_loop_that_hangs(verb: Verb) -> None:
    health = Health()
    health._last_tick -= LIVE_SECONDS_MAX + 1
    with serving("127.0.0.1", health) as port:
        verb.environment(HTTP_PORT=str(port))
        answer = verb.json("healthcheck", code=1)
    assert not answer["alive"]
    assert answer["seconds_since_tick"] > LIVE_SECONDS_MAX
    assert answer["reason"].startswith("the loop has not turned for 31 s")


def test_nobody_listens(verb: Verb) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    verb.environment(HTTP_PORT=str(port))
    answer = verb.json("healthcheck", code=1)
    assert not answer["alive"]
    assert answer["reason"].startswith("no answer: ")


def test_somebody_who_does_not_answer(verb: Verb, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("billing_tailer.healthcheck.ANSWER_SECONDS_MAX", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        verb.environment(HTTP_PORT=str(listener.getsockname()[1]))
        assert verb.json("healthcheck", code=1)["reason"] == "no answer: timed out"


def test_somebody_else_listens(verb: Verb) -> None:
    server = http.server.HTTPServer(("127.0.0.1", 0), _Stranger)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        verb.environment(HTTP_PORT=str(server.server_port))
        answer = verb.json("healthcheck", code=1)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert answer["reason"] == "status 501, and not the answer of a billing-tailer"


def test_a_port_that_nobody_knows(verb: Verb) -> None:
    verb.environment(HTTP_PORT="0")
    verb("healthcheck", code=2)
    assert "HTTP_PORT = 0" in verb.stderr
