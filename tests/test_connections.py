"""What clients can do to the HTTP server without a token, over real sockets: slow ones, idle ones, too large ones, and
requests that two readers would understand differently."""

import asyncio
import contextlib
import http.client
import json
import resource
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Route

from billing_tailer.events import Events
from billing_tailer.health import Health
from billing_tailer.spend import slim
from billing_tailer.spool import Spool
from billing_tailer.web import HttpServer, connections
from billing_tailer.web.callbacks import callback_routes
from tests.support.callbacks import dumps, event, post

TOKEN = "t" * 32
LIVEZ = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"
RELEASE = b"GET /release HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


def routes(spool: Spool) -> list[BaseRoute]:
    async def echo(request: Request) -> Response:
        try:
            body = await request.body()
        except ClientDisconnect:
            return Response(status_code=499)
        return JSONResponse({"body": body.decode("latin-1"), "query_bytes": len(request.url.query)})

    async def large(_: Request) -> Response:
        return PlainTextResponse(b"x" * (32 << 20))

    async def medium(_: Request) -> Response:
        return PlainTextResponse(b"x" * 60_000)

    released = asyncio.Event()

    async def wait(_: Request) -> Response:
        await released.wait()
        return PlainTextResponse("waited")

    async def release(_: Request) -> Response:
        released.set()
        released.clear()
        return PlainTextResponse("released")

    async def short(_: Request) -> Response:
        return PlainTextResponse("short")

    return [
        *callback_routes(TOKEN, spool, slim, 512 << 20, lambda _: None),
        Route("/echo", echo, methods=["GET", "POST"]),
        Route("/large", large),
        Route("/medium", medium),
        Route("/wait", wait),
        Route("/release", release),
        Route("/short", short, methods=["GET", "POST"]),
    ]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HttpServer]:
    spool = Spool(tmp_path_factory.mktemp("spool"), 1 << 40, lambda _: None)
    spool.start()
    server = HttpServer("127.0.0.1", 0, Events(), Health(), routes(spool))
    server.start()
    yield server
    server.stop()
    spool.stop()
    assert not server.alive()


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    """Both ends of all connections are in this process."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    if before[1] < 8192:
        pytest.skip(
            f"a process may have {before[1]} descriptors here, and both ends of thousands of connections need 8192"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (8192, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def connect(server: HttpServer, timeout: float = 10) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout)


def answers(sock: socket.socket, limit: float = 10) -> bytes:
    """Everything until the server closes."""
    found = b""
    sock.settimeout(limit)
    with contextlib.suppress(ConnectionResetError):
        while piece := sock.recv(65536):
            found += piece
    return found


def talk(server: HttpServer, *parts: bytes) -> bytes:
    """The answers to what is sent in parts, each in a packet of its own, until the server has nothing more to say."""
    with connect(server) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for part in parts:
            with contextlib.suppress(ConnectionError):
                sock.sendall(part)
            time.sleep(0.02)
        with contextlib.suppress(OSError):  # closed already
            sock.shutdown(socket.SHUT_WR)
        return answers(sock)


def health_seconds(server: HttpServer) -> float:
    """How long a health check takes."""
    started = time.perf_counter()
    with connect(server) as sock:
        sock.sendall(LIVEZ)
        assert sock.recv(4096).startswith(b"HTTP/1.1 200")
    return time.perf_counter() - started


def closed_after(sock: socket.socket, trickle: bytes = b"") -> float:
    """Seconds until the server closes, or refuses more of what is sent a byte at a time."""
    started = time.monotonic()
    sock.settimeout(0.05)
    while time.monotonic() - started < 10:
        try:
            if trickle:
                sock.sendall(trickle)
            if sock.recv(1 << 20) == b"":
                return time.monotonic() - started
        except TimeoutError:
            continue
        except ConnectionError:
            return time.monotonic() - started
    raise AssertionError("it stays open")


# --- slow ones -------------------------------------------------------------------------------------------------------

BEGINNINGS = {
    "nothing": (b"", b""),
    "half a request line": (b"GET /li", b""),
    "a request line a byte at a time": (b"GET /", b"l"),
    "headers a byte at a time": (b"GET /livez HTTP/1.1\r\nHost: x\r\nX: ", b"x"),
    "header after header": (b"GET /livez HTTP/1.1\r\nHost: x\r\n", b"X: y\r\n"),
}


@pytest.mark.parametrize("beginning", BEGINNINGS)
def test_half_a_request_is_not_waited_for(server: HttpServer, monkeypatch: pytest.MonkeyPatch, beginning: str) -> None:
    monkeypatch.setattr(connections, "HEAD_SECONDS_MAX", 0.4)
    first, trickle = BEGINNINGS[beginning]
    with connect(server) as sock:
        sock.sendall(first)
        assert 0.2 < closed_after(sock, trickle) < 3


def test_half_a_request_after_a_whole_one(server: HttpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """uvicorn's keep-alive time-out ends with the first byte."""
    monkeypatch.setattr(connections, "HEAD_SECONDS_MAX", 0.2)
    monkeypatch.setattr(connections, "KEEP_ALIVE_SECONDS", 0.3)
    with connect(server) as sock:
        sock.sendall(LIVEZ)
        assert sock.recv(4096).startswith(b"HTTP/1.1 200")
        sock.sendall(b"GET /livez HTT")
        assert 0.2 < closed_after(sock, b"P") < 3


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_the_body_that_nobody_wants(server: HttpServer, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """A request is answered without its body, which goes on and on: a GET, a wrong token."""
    monkeypatch.setattr(connections, "HEAD_SECONDS_MAX", 0.2)
    monkeypatch.setattr(connections, "KEEP_ALIVE_SECONDS", 0.3)
    path = "/livez" if method == "GET" else "/v1/callbacks/litellm"
    with connect(server) as sock:
        sock.sendall(f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000\r\n\r\n".encode())
        assert sock.recv(4096).split()[1] in (b"200", b"401")
        assert 0.2 < closed_after(sock, b"x" * 1000) < 3


@pytest.mark.parametrize("path", ["/large", "/medium"])
def test_an_answer_that_nobody_reads(server: HttpServer, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """One that fills the buffers, and smaller ones, asked for again and again."""
    monkeypatch.setattr(connections, "WRITE_SECONDS_MAX", 0.5)
    monkeypatch.setattr(connections, "HEAD_SECONDS_MAX", 0.5)
    before = threading.active_count()
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(5)
        sock.connect(("127.0.0.1", server.port))
        sock.setblocking(False)
        started = time.monotonic()
        while time.monotonic() - started < 5:
            try:
                sock.send(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            except BlockingIOError:
                time.sleep(0.01)
            except ConnectionError:
                break
            if path == "/large":
                time.sleep(0.05)
        assert 0.3 < time.monotonic() - started < 4, "given up"
    assert health_seconds(server) < 1
    assert threading.active_count() == before


def test_who_reads_slowly_gets_everything(server: HttpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slow is not stuck: the time-out begins anew whenever the buffer was emptied."""
    monkeypatch.setattr(connections, "WRITE_SECONDS_MAX", 1.0)
    client = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    client.request("GET", "/large")
    response = client.getresponse()
    total = 0
    while piece := response.read(4 << 20):
        total += len(piece)
        time.sleep(0.05)
    assert total == 32 << 20
    client.close()


def test_requests_under_way_are_left_alone(server: HttpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A callback whose body takes long, and keep-alive between two requests."""
    monkeypatch.setattr(connections, "HEAD_SECONDS_MAX", 0.2)
    body = dumps([event("slow")])
    head = f"POST /v1/callbacks/litellm HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
    with connect(server) as sock:
        for _ in range(2):
            sock.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode())
            for start in range(0, len(body), 1 + len(body) // 5):
                time.sleep(0.1)
                sock.sendall(body[start : start + 1 + len(body) // 5])
            answer = b""
            while not answer.endswith(b"}"):
                piece = sock.recv(4096)
                assert piece, answer
                answer += piece
            assert answer.endswith(b'{"accepted":1,"rejected":0}')
            time.sleep(0.3)


# --- idle ones -------------------------------------------------------------------------------------------------------


def test_idle_connections_keep_nobody_out(server: HttpServer, many_descriptors: None) -> None:
    """Three times as many idle connections as there may be, half of them with half a request, beside 500 clients that
    wait for an answer: health, callbacks and those 500 are answered, and nobody who asks is sent away."""
    waiting = [connect(server) for _ in range(500)]
    for sock in waiting:
        sock.sendall(b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\n")
    idle: list[socket.socket] = []
    seconds: list[float] = []
    statuses: list[int | None] = []
    for number in range(3000):
        idle.append(connect(server))
        if number % 2:
            with contextlib.suppress(ConnectionError):
                idle[-1].sendall(b"GET /livez HTTP/1.1\r\nHost:")
        if number % 100 == 99:
            seconds.append(health_seconds(server))
            statuses.append(asyncio.run(post(server.port, TOKEN, dumps([event(f"call-{number}")]))))
    print(f"\nhealth beside 3000 idle and 500 waiting: longest {max(seconds) * 1000:.0f} ms", end=" ")
    assert statuses == [200] * 30
    assert max(seconds) < 2
    assert talk(server, RELEASE).startswith(b"HTTP/1.1 200")
    for sock in waiting:
        assert sock.recv(4096).startswith(b"HTTP/1.1 200"), "who waits is not idle"
    for sock in (*waiting, *idle):
        sock.close()


def test_more_requests_under_way_than_there_may_be(
    server: HttpServer, many_descriptors: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """These are told so, and none of those who wait is cut."""
    waiting = [connect(server) for _ in range(connections.CONNECTIONS_MAX)]
    for sock in waiting:
        sock.sendall(b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\n")
    time.sleep(0.3)
    assert talk(server, LIVEZ).startswith(b"HTTP/1.1 503")
    waiting.pop().close()
    deadline = time.monotonic() + 3
    while not talk(server, LIVEZ).startswith(b"HTTP/1.1 200"):
        assert time.monotonic() < deadline
    assert talk(server, RELEASE).startswith(b"HTTP/1.1 200")
    assert waiting[0].recv(4096).startswith(b"HTTP/1.1 200")
    for sock in waiting:
        sock.close()


def test_half_requests_take_bounded_memory(server: HttpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEADS_BYTES_MAX", 1 << 20)
    half = b"GET /livez HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 60_000
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(server)) for _ in range(30)]
        for sock in clients:
            sock.sendall(half)
            health_seconds(server)  # until it has arrived
        ended = [closed_after(sock) < 1 for sock in clients[:10]]
        assert ended == [True] * 10, "the oldest give way"
        clients[-1].sendall(b"\r\n\r\n")
        assert clients[-1].recv(4096).startswith(b"HTTP/1.1 200"), "the newest stay"


# --- too large ones --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["a header", "headers", "a path", "a query", "a method", "a chunk's extension"])
def test_heads_are_bounded(server: HttpServer, what: str) -> None:
    size = 2 << 20
    request = {
        "a header": b"GET /livez HTTP/1.1\r\nHost: x\r\nX: " + b"x" * size,
        "headers": b"GET /livez HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * (size // 6),
        "a path": b"GET /" + b"x" * size,
        "a query": b"GET /livez?" + b"x=1&" * (size // 4),
        "a method": b"G" * size,
        "a chunk's extension": b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3;" + b"x" * size,
    }[what]
    answer = talk(server, request + b"\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400") or answer == b"", "told so, or cut while it still sends"
    assert health_seconds(server) < 1


def test_a_question_may_name_a_thousand_calls(server: HttpServer) -> None:
    """45 KB that come in several packets."""
    query = "&".join(f"call_id={number:036d}" for number in range(1000)).encode()
    head = b"GET /echo?" + query + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    answer = talk(server, head[:10_000], head[10_000:30_000], head[30_000:])
    assert answer.startswith(b"HTTP/1.1 200")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["query_bytes"] == len(query)


# --- two readings of one request -------------------------------------------------------------------------------------

HIDDEN = b"GET /short HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST /echo HTTP/1.1\r\nHost: x\r\n"
AMBIGUOUS = {
    "both lengths": POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + HIDDEN,
    "both, chunked first": POST + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n" + HIDDEN,
    "two lengths": POST + b"Content-Length: 0\r\nContent-Length: 35\r\n\r\n" + HIDDEN,
    "a list of lengths": POST + b"Content-Length: 0, 35\r\n\r\n" + HIDDEN,
    "a signed length": POST + b"Content-Length: +0\r\n\r\n" + HIDDEN,
    "a length with a space": POST + b"Content-Length : 0\r\n\r\n" + HIDDEN,
    "an unknown coding": POST + b"Transfer-Encoding: identity\r\n\r\n" + HIDDEN,
    "two codings": POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n" + HIDDEN,
    "a coding with a space": POST + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n" + HIDDEN,
    "a coding with a vertical tab": POST + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n" + HIDDEN,
    "a chunk that is longer than it says": POST + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabcX\r\n0\r\n\r\n" + HIDDEN,
    "a chunk size with a sign": POST + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n\r\n0\r\n\r\n" + HIDDEN,
    "a bare CR": b"POST /echo HTTP/1.1\r\nHost: x\r\nX: a\rContent-Length: 35\r\n\r\n" + HIDDEN,
    "NUL": b"POST /echo HTTP/1.1\r\nHost: x\r\nX: a\0b\r\n\r\n" + HIDDEN,
    "two hosts": b"POST /echo HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n" + HIDDEN,
    "no host": b"POST /echo HTTP/1.1\r\n\r\n" + HIDDEN,
}


@pytest.mark.parametrize("what", AMBIGUOUS)
def test_no_request_is_smuggled(server: HttpServer, what: str) -> None:
    """Where a proxy in front might see another end, the connection ends, and what follows is no request."""
    answer = talk(server, AMBIGUOUS[what])
    assert answer.startswith(b"HTTP/1.1 400")
    assert b"short" not in answer
    assert answer.count(b"HTTP/1.1 ") == 1


def test_what_is_clear_is_served(server: HttpServer) -> None:
    """The same requests, said properly, one after the other on one connection."""
    for request in (
        POST + b"Content-Length: 3\r\n\r\nabc" + HIDDEN,
        POST + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n" + HIDDEN,
    ):
        answer = talk(server, request)
        assert answer.count(b"HTTP/1.1 200") == 2
        assert b'"abc"' in answer
        assert answer.endswith(b"short")


def test_other_protocols_are_no_way_around(server: HttpServer) -> None:
    """An upgrade is not made: what follows is HTTP with the same limits."""
    for upgrade in (b"websocket", b"h2c"):
        head = b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: " + upgrade
        assert talk(server, head + b"\r\nSec-WebSocket-Version: 13\r\n\r\n").startswith(b"HTTP/1.1 200")
