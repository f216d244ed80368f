"""Run as a program, this module is the server of the tests that kill or measure one."""

import asyncio
import errno
import gzip
import hashlib
import hmac
import http.client
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, Self

import orjson
import pytest
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from billing_tailer.errors import ConfigError
from billing_tailer.spend import slim
from billing_tailer.spool import Spool
from billing_tailer.web import callbacks
from billing_tailer.web.callbacks import PATH, Element, Elements, callback_routes
from tests.support.callbacks import CANARY, SAMPLES, dumps, event, post

ROOT = Path(__file__).parents[1]
TOKEN = "tök-123"  # bytes, not characters, are compared
BODY_BYTES_MAX = 512 << 20


def application(
    spool: Spool, token: str | None, body_bytes_max: int, count: Callable[[int], None], **options: float
) -> Starlette:
    async def livez(_: Request) -> Response:
        return PlainTextResponse("alive")

    routes = callback_routes(token, spool, slim, body_bytes_max, count, **options)
    return Starlette(routes=[*routes, Route("/livez", livez)])


class QuickServer(uvicorn.Server):
    """Notices sooner that it should stop; there are many of them here."""

    async def main_loop(self) -> None:
        while not self.should_exit:  # noqa: ASYNC110  # uvicorn has a flag for it, no event
            await asyncio.sleep(0.005)


def server_of(app: Starlette) -> uvicorn.Server:
    return QuickServer(
        uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=1)
    )


def listener() -> socket.socket:
    # with its protocol named: asyncio sets TCP_NODELAY only where it knows that it is TCP
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", 0))
    sock.listen(512)
    return sock


class Served:
    """The endpoint behind a real server, in a thread."""

    def __init__(
        self,
        directory: Path,
        *,
        token: str | None = TOKEN,
        body_bytes_max: int = BODY_BYTES_MAX,
        spool_bytes_max: int = 1 << 40,
        **options: float,
    ) -> None:
        self.directory = directory
        self.counted: list[int] = []
        self.spool = Spool(directory, spool_bytes_max, lambda _: None)
        self.spool.start()
        self._listener = listener()
        self.port = int(self._listener.getsockname()[1])
        self._server = server_of(application(self.spool, token, body_bytes_max, self.counted.append, **options))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._listener]})

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join()
        self._listener.close()
        self.spool.stop()

    def post(self, body: bytes | Iterable[bytes], *, path: str = PATH, **headers: str) -> tuple[int, dict[str, Any]]:
        """headers: with _ for -. An iterable is sent in chunks, without Content-Length."""
        status, answer, _ = self.post_for_headers(body, path=path, **headers)
        return status, answer

    def post_for_headers(
        self, body: bytes | Iterable[bytes], *, path: str = PATH, **headers: str
    ) -> tuple[int, dict[str, Any], dict[str, str]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        sent = {"authorization": f"Bearer {TOKEN}", "content-type": "application/json"}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            raw = {name: value.encode() for name, value in sent.items() if value}
            connection.request("POST", path, body, raw, encode_chunked=not isinstance(body, bytes))
            response = connection.getresponse()
            return response.status, json.loads(response.read()), {k.lower(): v for k, v in response.getheaders()}
        finally:
            connection.close()

    def begin(self, headers: str, body: bytes) -> socket.socket:
        """A request whose body is not sent whole."""
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n{headers}\r\n\r\n"
        sock.sendall(head.encode() + body)
        return sock

    def lines(self) -> list[dict[str, Any]]:
        return lines_in(self.directory)

    def call_ids(self) -> list[str]:
        return [line["payload"]["litellm_call_id"] for line in self.lines() if "payload" in line]

    def rejected(self) -> list[dict[str, Any]]:
        return [line["rejected"] for line in self.lines() if "rejected" in line]


def lines_in(directory: Path) -> list[dict[str, Any]]:
    paths = sorted(directory.glob("callbacks-*.jsonl"))
    return [orjson.loads(line) for path in paths for line in path.read_bytes().split(b"\n") if line]


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with Served(tmp_path) as serving:
        yield serving


def wait_for(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# --- shapes of a body


@pytest.mark.parametrize("small_bytes_max", [1 << 20, 0], ids=["small", "large"])
@pytest.mark.parametrize("shape", ["array", "pretty", "ndjson", "ndjson, newline at the end", "values", "arrays"])
def test_every_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: str, small_bytes_max: int) -> None:
    monkeypatch.setattr(callbacks, "SMALL_BYTES_MAX", small_bytes_max)
    events = [event(f"call-{number}") for number in range(5)]
    body = {
        "array": dumps(events),
        "pretty": json.dumps(events, indent=2).encode(),
        "ndjson": b"\n".join(map(dumps, events)),
        "ndjson, newline at the end": b"\r\n".join(map(dumps, events)) + b"\r\n\n",
        "values": b"".join(json.dumps(e, indent=1).encode() for e in events),
        "arrays": b"\n".join(dumps([e]) for e in events),
    }[shape]
    before = time.time()
    with Served(tmp_path) as serving:
        assert serving.post(body) == (200, {"accepted": 5, "rejected": 0})
        assert [line["payload"] for line in serving.lines()] == [slim(e) for e in events]
        assert all(before <= line["received_at"] <= time.time() for line in serving.lines())
        assert serving.counted == [200]
    assert CANARY.encode() not in b"".join(path.read_bytes() for path in tmp_path.iterdir())


def test_single_objects_and_real_payloads(served: Served) -> None:
    for sample in SAMPLES:
        assert served.post(dumps(sample)) == (200, {"accepted": 1, "rejected": 0})
    assert [line["payload"] for line in served.lines()] == [slim(sample) for sample in SAMPLES]


def test_an_empty_array_is_no_mistake(served: Served) -> None:
    assert served.post(b" [ ]\n") == (200, {"accepted": 0, "rejected": 0})
    assert served.lines() == []


BAD = [
    (b"null", "not_an_object"),
    (b"42", "not_an_object"),
    (b'"text"', "not_an_object"),
    (b'["a", {"b": 1}]', "not_an_object"),
    (b"{'single': 1}", "invalid_json"),
    (b'{"a": tru}', "invalid_json"),
    (b'{"a": 01}', "invalid_json"),
    (b"garbage", "invalid_json"),
    (b'{"messages": ["', "unterminated"),
    (b'{"a": ' + b"[" * 1100 + b"]" * 1100 + b"}", "too_long"),
]


@pytest.mark.parametrize("small_bytes_max", [1 << 20, 0], ids=["small", "large"])
@pytest.mark.parametrize("by_line", [False, True], ids=["array", "lines"])
def test_a_bad_element_costs_only_itself(
    served: Served, monkeypatch: pytest.MonkeyPatch, by_line: bool, small_bytes_max: int
) -> None:
    monkeypatch.setattr(callbacks, "SMALL_BYTES_MAX", small_bytes_max)
    for bad, reason in BAD:
        if by_line and bad.startswith(b"["):
            continue  # an array on a line is a batch of its own
        good = [dumps(event(f"{bad!r:.20}{number}")) for number in range(4)]
        in_the_middle = [*good[:2], bad, *good[2:]]
        if by_line:
            body = b"\n".join(in_the_middle)
        else:
            body = b"[" + b", ".join(in_the_middle) + b"]"
            if reason == "unterminated":
                body = b"[" + b", ".join([*good, bad])
        before = len(served.lines())
        assert served.post(body) == (200, {"accepted": 4, "rejected": 1}), bad
        lines = served.lines()[before:]
        payloads = [line["payload"] for line in lines if "payload" in line]
        assert payloads == [slim(json.loads(element)) for element in good]
        (rejected,) = (line["rejected"] for line in lines if "rejected" in line)
        assert rejected["reason"] == reason
        assert (rejected["sha256"], rejected["bytes"]) == (hashlib.sha256(bad).hexdigest(), len(bad))
        assert set(rejected) == {"reason", "detail", "sha256", "bytes"}


def test_the_first_of_several_lines_may_be_torn(served: Served) -> None:
    for bad in (b'{"a": "torn', b'{"a": {"b', b'{"a": {', b"garbage"):
        before = len(served.call_ids()), len(served.rejected())
        lines = [bad, *(dumps(event(f"call-{number}")) for number in range(3))]
        status, answer = served.post(b"\n".join(lines))
        assert (status, served.call_ids()[before[0] :]) == (200, ["call-0", "call-1", "call-2"])
        assert answer["rejected"] == len(served.rejected()) - before[1] == 1


def test_an_object_over_several_lines_is_one_object(served: Served) -> None:
    assert served.post(b'{"a": 1,\n"b":\n{"c": []},\n"litellm_call_id": "x"}') == (200, {"accepted": 1, "rejected": 0})


@pytest.mark.parametrize("small_bytes_max", [1 << 20, 0], ids=["small", "large"])
def test_what_python_writes_and_json_forbids_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_bytes_max: int
) -> None:
    """NaN as a cost, half a surrogate pair where an answer was cut, invalid UTF-8 in a prompt."""
    monkeypatch.setattr(callbacks, "SMALL_BYTES_MAX", small_bytes_max)
    body = (
        b'[{"litellm_call_id": "a", "response_cost": NaN}, {"litellm_call_id": "b", "response_cost": 1e999},'
        b'{"litellm_call_id": "c", "messages": "\\ud83d"}, {"litellm_call_id": "d", "error_str": "\xff"},'
        b'{"litellm_call_id": "e", "response_cost": 123456789012345678901234567890}]'
    )
    with Served(tmp_path) as serving:
        assert serving.post(body) == (200, {"accepted": 5, "rejected": 0})
        assert serving.call_ids() == ["a", "b", "c", "d", "e"]
        costs = [line["payload"].get("response_cost") for line in serving.lines()]
        assert not any(Decimal(cost).is_finite() for cost in costs[:2])
        assert costs[4] == 123456789012345678901234567890.0


def test_a_slim_that_fails_costs_only_that_element(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def picky(payload: Any) -> dict[str, Any]:
        if payload["id"] == 1:
            raise KeyError(CANARY)
        return {"id": {2} if payload["id"] == 2 else payload["id"]}

    monkeypatch.setattr(sys.modules[__name__], "slim", picky)
    with Served(tmp_path) as serving:
        body = b'[{"id": 0}, {"id": 1}, {"id": 2}, {"id": 3}]'
        assert serving.post(body) == (200, {"accepted": 2, "rejected": 2})
        assert [rejected["reason"] for rejected in serving.rejected()] == ["bad_value", "bad_value"]
    assert CANARY.encode() not in b"".join(path.read_bytes() for path in tmp_path.iterdir())


def test_nothing_that_parses_is_a_400(served: Served) -> None:
    bodies = [b"", b"  \n", b"hello", b'{"a": ', b"[", b"[}", b'{"a": nope}', b"\x00\xff" * 700_000]
    for body in bodies:
        status, answer = served.post(body)
        assert status == 400, body[:20]
        assert "nothing in the body is JSON" in answer["error"]
    assert served.call_ids() == []
    assert served.counted == [400] * len(bodies)


def test_too_many_elements_are_one_rejection(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callbacks, "ELEMENTS_MAX", 10)
    monkeypatch.setattr(callbacks, "SMALL_BYTES_MAX", 0)
    assert served.post(dumps([{"litellm_call_id": str(number)} for number in range(30)])) == (
        200,
        {"accepted": 10, "rejected": 1},
    )
    assert served.rejected()[0]["reason"] == "too_long"


def test_an_element_may_be_long_only_where_nobody_looks(served: Served) -> None:
    words = ["word"] * 700_000
    body = dumps(
        [
            {"litellm_call_id": "a", "messages": words, "response": {"choices": words}},
            {"litellm_call_id": "b", "metadata": words},
            {"litellm_call_id": "c", "error_str": "\\u00e9\n" * 700_000},
            {"messages": [], "litellm_call_id": "d"},
        ]
    )
    assert served.post(body) == (200, {"accepted": 3, "rejected": 1})
    assert served.call_ids() == ["a", "c", "d"]
    assert served.rejected()[0]["reason"] == "too_long"


# --- taking a body apart

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.just("messages"), inner, max_size=4),
    max_leaves=12,
)


def apart(body: bytes, cuts: Iterable[int] = ()) -> list[Element]:
    elements = Elements()
    places = [0, *sorted(cuts), len(body)]
    found = [e for start, end in itertools.pairwise(places) for e in elements.feed(body[start:end])]
    return [*found, *elements.end()]


def undropped(value: Any) -> Any:
    """A value as `Elements` keeps it."""
    if not isinstance(value, dict):
        return value
    gone = ("messages", "response")
    return {k: None if k in gone and isinstance(v, dict | list) else v for k, v in value.items()}


@settings(max_examples=100, deadline=None)
@given(st.lists(json_values, max_size=5), st.lists(st.integers(0, 300)), st.sampled_from([None, 0, 2]), st.booleans())
def test_elements_are_found_wherever_the_chunks_end(
    values: list[Any], cuts: list[int], indent: int | None, ascii_only: bool
) -> None:
    body = json.dumps(values, indent=indent, ensure_ascii=ascii_only).encode()
    found = apart(body, [min(cut, len(body)) for cut in cuts])
    assert [json.loads(element.data) for element in found] == [undropped(value) for value in values]
    assert all(element.reason is None for element in found)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.dictionaries(st.text(), json_values, max_size=3), max_size=3),
    st.lists(st.integers(0, 300)),
    st.booleans(),
)
def test_lines_and_concatenated_objects_are_found(values: list[Any], cuts: list[int], lines: bool) -> None:
    body = (b"\n" if lines else b"").join(dumps(value) for value in values)
    found = apart(body, [min(cut, len(body)) for cut in cuts])
    assert [json.loads(element.data) for element in found] == [undropped(value) for value in values]
    assert [element.sha256 for element in found] == [hashlib.sha256(dumps(value)).hexdigest() for value in values]


@settings(max_examples=500, deadline=None)
@given(st.lists(st.sampled_from(b'[]{}",:\\\n a1'), max_size=60).map(bytes), st.lists(st.integers(0, 60)))
def test_no_bytes_can_confuse_it(body: bytes, cuts: list[int]) -> None:
    """Chunks make no difference, and nothing that could be an element is left out or counted twice."""
    found = apart(body, [min(cut, len(body)) for cut in cuts])
    assert found == apart(body)
    assert sum(element.size for element in found) <= len(body)
    separators = b"[], \n\r\t"
    assert sum(element.size for element in found) >= len([byte for byte in body if byte not in separators])


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from('ab\\"\n\u00e9\U0001f600'), min_size=30, max_size=300), st.integers(1, 40))
def test_a_string_is_never_cut_within_a_character(text: str, size: int) -> None:
    for ascii_only in (True, False):
        body = json.dumps({"a": text, "b": 1}, ensure_ascii=ascii_only).encode()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(callbacks, "STRING_BYTES_MAX", 10)
            (element,) = apart(body, range(0, len(body), size))
        value = callbacks._parsed(element.data)
        assert isinstance(value, dict)
        assert value["b"] == 1
        kept = value["a"].rstrip("\ufffd")
        assert text.startswith(kept if not kept or kept[-1] < "\ud800" or kept[-1] > "\udbff" else kept[:-1])


def test_a_slash_at_the_end_makes_no_difference(served: Served) -> None:
    """LiteLLM does not follow redirects: it would drop the batch."""
    assert served.post(dumps([event("x")]), path=f"{PATH}/") == (200, {"accepted": 1, "rejected": 0})
    assert served.post(b"{}", path=f"{PATH}/", authorization="")[0] == 401
    assert served.call_ids() == ["x"]
    assert served.counted == [200, 401]


# --- who may post


def test_a_stranger_is_told_so(served: Served) -> None:
    for told in ["", f"Basic {TOKEN}", "Bearer", "Bearer ", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", TOKEN]:
        status, answer, headers = served.post_for_headers(dumps([event("x")] * 40), authorization=told)
        assert status == 401, told
        assert "CALLBACK_TOKEN" in answer["error"]
        assert headers["www-authenticate"].startswith("Bearer")
        assert TOKEN not in str(answer)
    assert served.lines() == []
    assert set(served.counted) == {401}
    for scheme in ("Bearer", "bearer", "BEARER "):
        assert served.post(b"{}", authorization=f"{scheme} {TOKEN} ")[0] == 200


def test_the_token_is_compared_in_constant_time(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def compare(left: bytes, right: bytes) -> bool:
        compared.append((left, right))
        return False

    monkeypatch.setattr(hmac, "compare_digest", compare)
    assert served.post(b"{}")[0] == 401
    assert compared == [(TOKEN.encode(), TOKEN.encode())]


def test_without_a_token_only_this_machine_may_post(tmp_path: Path) -> None:
    with Served(tmp_path, token=None) as serving:
        for client in ("", "::1", "127.9.9.9", "::ffff:127.0.0.1"):
            assert serving.post(b"{}", authorization="", x_forwarded_for=client)[0] == 200, client
        for client in ("10.1.2.3", "::ffff:10.0.0.1", "fe80::1", "name"):
            status, answer = serving.post(b"{}", authorization="", x_forwarded_for=client)
            assert status == 401, client
            assert "no CALLBACK_TOKEN is configured" in answer["error"]


def test_a_page_in_a_browser_may_not_post(tmp_path: Path) -> None:
    """Whatever its name resolves to: browsers say where a POST comes from."""
    with Served(tmp_path, token=None) as serving:
        assert serving.post(b"{}", authorization="", origin="http://evil.test")[0] == 401
        assert serving.post(b"{}", authorization="", origin="null")[0] == 401
    with Served(tmp_path) as serving:
        assert serving.post(b"{}", origin="http://evil.test")[0] == 200  # it has the token


def test_an_empty_token_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="CALLBACK_TOKEN"):
        callback_routes("", Spool(tmp_path, 1, print), slim, 1, print)


# --- encodings, sizes, time


@pytest.mark.parametrize("count", [3, 300])
def test_gzip(served: Served, count: int) -> None:
    body = dumps([event(f"call-{number}") for number in range(count)])
    joined = gzip.compress(body[:1000]) + gzip.compress(body[1000:])
    for packed in (gzip.compress(body), joined):
        assert served.post(packed, content_encoding="GZIP") == (200, {"accepted": count, "rejected": 0})


def test_broken_gzip_keeps_what_came_before(served: Served) -> None:
    body = dumps([event(f"call-{number}", prompt=random.Random(number).randbytes(3000).hex()) for number in range(300)])
    packed = gzip.compress(body)
    for broken in (packed[: len(packed) // 2], packed[: len(packed) // 2] + b"\xff" * 5000):
        status, answer = served.post(broken, content_encoding="gzip")
        assert status == 200
        assert 100 < answer["accepted"] < 200
        assert answer["rejected"] == 1
    assert served.post(b"no gzip at all", content_encoding="gzip")[0] == 400
    assert served.post(b"", content_encoding="gzip")[0] == 400


def test_a_small_packed_body_cannot_become_a_large_one(tmp_path: Path) -> None:
    with Served(tmp_path, body_bytes_max=1 << 20) as serving:
        bomb = gzip.compress(dumps([event("x", "y" * (5 << 20))]))
        assert len(bomb) < 1 << 20
        assert serving.post(bomb, content_encoding="gzip")[0] == 413


def test_other_encodings_are_refused(served: Served) -> None:
    status, answer, headers = served.post_for_headers(b"{}", content_encoding="br")
    assert (status, headers["accept-encoding"]) == (415, "gzip, identity")
    assert "'br'" in answer["error"]
    assert served.post(b"{}", content_encoding="identity")[0] == 200


def test_a_body_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    with Served(tmp_path, body_bytes_max=100_000) as serving:
        body = dumps([event(f"call-{number}") for number in range(30)])
        status, answer = serving.post(body)
        assert (status, serving.lines()) == (413, [])
        assert "100000 bytes (CALLBACK_BYTES_MAX)" in answer["error"]
        assert serving.post([body])[0] == 413, "without Content-Length, too"
        assert serving.post(body[:100_000])[0] == 200, "as long as it may be"
        assert serving.counted == [413, 413, 200]


def test_a_client_that_leaves_is_told_nothing(served: Served) -> None:
    body = dumps([event(f"call-{number}") for number in range(3)])
    served.begin(f"Content-Length: {len(body)}", body[:-100]).close()
    wait_for(lambda: served.counted == [499])
    large = dumps([event(f"call-{number}", "x" * 100_000) for number in range(30)])
    served.begin(f"Content-Length: {len(large)}", large[:-100]).close()
    wait_for(lambda: served.counted == [499, 499])
    assert served.call_ids() == [f"call-{number}" for number in range(29)], "what was whole is kept all the same"
    assert served.rejected() == []


def test_a_slow_client_is_sent_away(tmp_path: Path) -> None:
    with Served(tmp_path, body_seconds_max=0.3) as serving:
        sock = serving.begin("Content-Length: 1000", b'[{"litellm_call_id": "a"},')
        started = time.monotonic()
        answer = b""
        while piece := sock.recv(4096):
            answer += piece
        assert 0.2 < time.monotonic() - started < 3
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"longer than 0.3 s" in answer
        assert serving.counted == [408]
        sock.close()


def test_slow_senders_do_not_keep_others_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callbacks, "BODIES_MAX", 2)
    monkeypatch.setattr(callbacks, "PATIENCE_SECONDS", 0.3)
    with Served(tmp_path) as serving:
        slow = [serving.begin("Content-Length: 1000", b"[") for _ in range(5)]
        time.sleep(0.1)
        started = time.monotonic()
        assert serving.post(dumps([event("x")]))[0] == 200
        assert 0.2 < time.monotonic() - started < 3
        for sock in slow:
            sock.close()
        wait_for(lambda: serving.counted == [200, 499, 499, 499, 499, 499])
        started = time.monotonic()
        assert serving.post(dumps([event("y")]))[0] == 200
        assert time.monotonic() - started < 0.3, "their places are free again"


def test_no_small_body_holds_the_loop_up() -> None:
    """Between two pauses is what a piece has, however broken the body is."""
    for body in (b"[[]," * 250_000, b'{"a":\n' * 150_000, b'{"a":"' + b"\\n" * 500_000, b'{"a":' + b'"",' * 300_000):
        longest, last = 0.0, time.thread_time()
        for _ in callbacks._take_apart(body, by_line=False):
            longest = max(longest, time.thread_time() - last)
            last = time.thread_time()
        assert longest < 0.2, body[:10]


# --- the spool refuses


def test_a_full_spool_is_a_503_and_then_none(tmp_path: Path) -> None:
    with Served(tmp_path, spool_bytes_max=20_000) as serving:
        accepted = 0
        while (told := serving.post_for_headers(dumps([event(f"call-{accepted}")])))[0] == 200:
            accepted += 1
        status, answer, headers = told
        assert (status, headers["retry-after"]) == (503, "1")
        assert "the spool is full" in answer["error"]
        assert serving.call_ids() == [f"call-{number}" for number in range(accepted)]
        assert serving.post(b"", authorization="no")[0] == 401
        serving.spool._bytes_max = 10**6
        assert serving.post(dumps([event("last")]))[0] == 200


@pytest.mark.parametrize("count", [1, 500])
def test_a_disk_that_fails_is_a_503(served: Served, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    def fsync(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    body = dumps([event(f"call-{number}") for number in range(count)])
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        status, answer = served.post(body)
    assert status == 503
    assert "No space left" in answer["error"]
    assert served.post(body)[0] == 200


def test_nothing_is_acknowledged_before_it_is_on_disk(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = threading.Event()
    real = os.fsync

    def fsync(fd: int) -> None:
        assert synced.wait(10)
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    answers: list[int] = []
    thread = threading.Thread(target=lambda: answers.append(served.post(dumps([event("x")]))[0]))
    thread.start()
    time.sleep(0.2)
    assert answers == []
    assert get_livez(served.port) < 0.2, "who waits for the disk holds nobody up"
    synced.set()
    thread.join()
    assert answers == [200]


# --- many at once


def get_livez(port: int) -> float:
    """Seconds until a health check is answered."""
    started = time.perf_counter()
    with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
        sock.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        assert sock.recv(4096).startswith(b"HTTP/1.1 200")
    return time.perf_counter() - started


class Process:
    """The endpoint in a process of its own."""

    def __init__(self, directory: Path) -> None:
        temporary = directory.with_name(f"{directory.name}-tmp")
        temporary.mkdir(exist_ok=True)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.test_callbacks", str(directory)],
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env={**os.environ, "TMPDIR": str(temporary)},
        )
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def memory_mib(self, what: str) -> float:
        """VmRSS, now, or VmHWM, the most it ever was."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(status.partition(f"{what}:")[2].split()[0]) / 1024


def main() -> None:
    """Serve the spool directory of the first argument until killed."""
    spool = Spool(Path(sys.argv[1]), 1 << 40, lambda _: None)
    spool.start()
    sock = listener()
    print(sock.getsockname()[1], flush=True)
    server_of(application(spool, TOKEN, BODY_BYTES_MAX, lambda _: None)).run(sockets=[sock])


@pytest.mark.e2e
def test_kill_9_in_the_middle_of_200_posts(tmp_path: Path) -> None:
    """Every record with a 200 is in the spool exactly once, in a whole line, and no prompt is anywhere on disk."""
    directory = tmp_path / "spool"
    bodies = {
        f"{number}": dumps([event(f"{number}-{index}") for index in range(1 + number % 20)]) for number in range(200)
    }
    answered: list[str] = []

    async def everyone(process: Process) -> None:
        async def one(name: str) -> None:
            if await post(process.port, TOKEN, bodies[name]) == 200:
                answered.append(name)
                if len(answered) == 70:
                    process.kill()

        await asyncio.gather(*(one(name) for name in bodies))

    with Process(directory) as process:
        asyncio.run(everyone(process))
    assert 70 <= len(answered) < 200
    adopter = Spool(directory, 1 << 40, lambda _: None)
    assert all(adopter.readable_bytes(bytes(path)) is not None for path in directory.iterdir())
    whole = [line for line in b"".join(p.read_bytes() for p in directory.iterdir()).split(b"\n") if line[-1:] == b"}"]
    found = [orjson.loads(line)["payload"]["litellm_call_id"] for line in whole]
    for name in answered:
        for index in range(1 + int(name) % 20):
            assert found.count(f"{name}-{index}") == 1
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    assert not [path for path in files if CANARY.encode() in path.read_bytes()]


def test_health_is_answered_while_200_batches_arrive(served: Served) -> None:
    """Bodies share the loop by slices: without them this is more than a second."""
    body = dumps([event(f"call-{number}") for number in range(50)])
    seconds: list[float] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            seconds.append(get_livez(served.port))

    async def everyone() -> list[int | None]:
        return await asyncio.gather(*(post(served.port, TOKEN, body) for _ in range(200)))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        statuses = asyncio.run(everyone())
    finally:
        done.set()
        watcher.join()
    assert statuses == [200] * 200
    assert len(served.call_ids()) == 10_000
    seconds.sort()
    print(f"\nhealth checks beside 200 batches: {len(seconds)}, median {seconds[len(seconds) // 2]:.3f}", end=" ")
    print(f"longest {seconds[-1]:.3f} s")
    assert seconds[len(seconds) // 2] < 0.5, "client and server share this process and its interpreter lock"


def test_health_is_answered_while_one_chunk_becomes_a_large_body(served: Served) -> None:
    """Nothing comes from the network in between, at which the loop would turn by itself."""
    packed = gzip.compress(dumps({"litellm_call_id": "x", "messages": ["a prompt"] * 5_000_000}))
    answers: list[tuple[int, dict[str, Any]]] = []
    thread = threading.Thread(target=lambda: answers.append(served.post(packed, content_encoding="gzip")))
    seconds: list[float] = []
    thread.start()
    while thread.is_alive():
        seconds.append(get_livez(served.port))
    thread.join()
    assert answers == [(200, {"accepted": 1, "rejected": 0})]
    assert len(seconds) > 20


def huge(count: int, field: str, prompt_bytes: int) -> list[bytes]:
    """An array of payloads with a large prompt each, in blocks: its parts are the same bytes again and again."""
    sentence = ('a prompt \\n with \\u00e9 and \\"quotes\\" ' + CANARY + " ").encode()
    prompt = [sentence * 2000] * (prompt_bytes // len(sentence * 2000))
    payload = event("<id>", "short")
    payload[field] = "<here>"
    before, _, after = dumps(payload).partition(b"<here>")
    blocks = [b"["]
    for number in range(count):
        blocks += [before.replace(b"<id>", b"call-%d" % number), *prompt, after.replace(b"<id>", b"call-%d" % number)]
        blocks.append(b"," if number + 1 < count else b"]")
    return blocks


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("count", "field", "prompt_bytes"),
    [(330, "messages", 1_000_000), (1, "messages", 50_000_000), (1, "error_str", 50_000_000), (2000, "messages", 0)],
)
def test_a_huge_body_needs_little_memory(tmp_path: Path, count: int, field: str, prompt_bytes: int) -> None:
    """300 MB, one prompt of 50 MB, many payloads as they are: below 96 MiB, and others are answered meanwhile."""
    blocks = huge(count, field, prompt_bytes)
    seconds: list[float] = []
    posts: list[float] = []
    done = threading.Event()
    with Process(tmp_path) as process:

        def watch() -> None:
            while not done.wait(0.01):
                seconds.append(get_livez(process.port))
                began = time.perf_counter()
                assert asyncio.run(post(process.port, TOKEN, dumps([event("warm")]))) == 200
                posts.append(time.perf_counter() - began)

        asyncio.run(post(process.port, TOKEN, dumps([event("warm")])))
        before = process.memory_mib("VmRSS")
        watcher = threading.Thread(target=watch)
        watcher.start()
        started = time.perf_counter()
        try:
            answer = asyncio.run(post_blocks(process.port, blocks))
        finally:
            done.set()
            watcher.join()
        took = time.perf_counter() - started
        most = process.memory_mib("VmHWM")
    seconds.sort()
    size = sum(map(len, blocks)) / 1e6
    print(f"\n{count} payloads, {size:.0f} MB: {took:.1f} s, {before:.0f} MiB before, {most:.0f} at most;", end=" ")
    posts.sort()
    print(f"health: median {seconds[len(seconds) // 2] * 1000:.1f} ms, longest {seconds[-1] * 1000:.1f} ms;", end=" ")
    print(f"{len(posts)} small posts: median {posts[len(posts) // 2] * 1000:.1f} ms, longest {posts[-1] * 1000:.1f} ms")
    assert answer == {"accepted": count, "rejected": 0}
    assert most < 96
    assert most - before < 32
    assert seconds[len(seconds) // 2] < 0.05
    assert posts[len(posts) // 2] < 0.05
    assert len({line["payload"]["litellm_call_id"] for line in lines_in(tmp_path)}) == count + 1
    assert not [path for path in tmp_path.iterdir() if CANARY.encode() in path.read_bytes()]


async def post_blocks(port: int, blocks: Sequence[bytes]) -> dict[str, Any]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    length = sum(map(len, blocks))
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: {length}\r\n"
    writer.write(f"{head}Connection: close\r\n\r\n".encode())
    for block in blocks:
        writer.write(block)
        await writer.drain()
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    return dict(json.loads(answer.partition(b"\r\n\r\n")[2]))


if __name__ == "__main__":
    main()
