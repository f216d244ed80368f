"""Fuzzing the endpoint of callbacks: whatever is posted, however it comes, the answer is a documented one, what was
acknowledged is in the spool, and nothing of a prompt is on disk.

The ASGI application is called, with a real spool; tests/test_connections.py and tests/test_callbacks.py have sockets.
"""

import asyncio
import copy
import gzip
import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from starlette.applications import Starlette

from billing_tailer.model import Rejected, SpendRecord
from billing_tailer.spend import parse_spool_line, slim
from billing_tailer.spool import Spool
from billing_tailer.web import callbacks
from billing_tailer.web.callbacks import CLIENT_LEFT, PATH, callback_routes
from tests import test_callbacks
from tests.support.callbacks import CANARY, SAMPLES
from tests.support.fuzzing import SECONDS, Mutator, fuzz, seeds
from tests.test_callbacks import Process, huge
from tests.test_connections import TOKEN
from tests.test_spend import ALLOWED

pytestmark = pytest.mark.timeout(120 + 3 * SECONDS)

DOCUMENTED = {200, 400, 401, 408, 413, 415, 503, CLIENT_LEFT}
BODY_BYTES_MAX = 300_000


@dataclass
class Sent:
    """One request: its body in pieces, of which some may never come, and what it should lead to where that is known."""

    headers: dict[str, str]
    pieces: list[bytes]
    ends: str = "whole"
    """whole; left: the client hangs up in the middle; stalls: nothing more comes."""
    good: list[str] = field(default_factory=list)
    """Call ids of the records that must be taken if the answer is 200."""
    bad: int = 0
    untouched: bool = True
    """Records and nothing else: the numbers must be exactly these."""


class Endpoint:
    """The application with its spool, and what came into that with each request."""

    def __init__(self, directory: Path, spool_bytes_max: int = 1 << 40) -> None:
        self.counted: list[int] = []
        self.directory = directory
        self.spool = Spool(directory, spool_bytes_max, lambda _: None)
        self.spool.start()
        self._app = Starlette(
            routes=callback_routes(TOKEN, self.spool, slim, BODY_BYTES_MAX, self.counted.append, body_seconds_max=0.05)
        )
        self._loop = asyncio.new_event_loop()
        self._read: Counter[Path] = Counter()

    def close(self) -> None:
        self._loop.close()
        self.spool.stop()

    def post(self, sent: Sent) -> tuple[int, dict[str, Any]]:
        """The status and the answer."""
        return self._loop.run_until_complete(self._post(sent))

    async def _post(self, sent: Sent) -> tuple[int, dict[str, Any]]:
        waiting = list(sent.pieces)
        answers: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            if waiting:
                more = len(waiting) > 1 or sent.ends != "whole"
                return {"type": "http.request", "body": waiting.pop(0), "more_body": more}
            if sent.ends == "stalls":
                await asyncio.sleep(10)
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            answers.append(message)

        headers = [(name.lower().encode(), value.encode("latin-1")) for name, value in sent.headers.items()]
        scope = {"type": "http", "http_version": "1.1", "method": "POST", "path": PATH, "raw_path": PATH.encode()}
        scope |= {
            "query_string": b"",
            "headers": headers,
            "client": ("192.0.2.1", 1),
            "server": ("x", 1),
            "scheme": "http",
        }
        await self._app(scope, receive, send)
        assert [answer["type"] for answer in answers] == ["http.response.start", "http.response.body"]
        return answers[0]["status"], json.loads(answers[1]["body"])

    def new_lines(self) -> list[bytes]:
        """What came into the spool since the last look."""
        found: list[bytes] = []
        for path in sorted(self.directory.iterdir()):
            content = path.read_bytes()[self._read[path] :]
            self._read[path] += len(content)
            assert content.endswith(b"\n") or not content
            found += content.splitlines()
        return found


@pytest.fixture
def endpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    endpoint = Endpoint(tmp_path / "spool")
    yield endpoint
    endpoint.close()
    assert list(temporary.iterdir()) == [], "no body goes into a temporary file"


# --- what is posted --------------------------------------------------------------------------------------------------


def with_canaries(mutator: Mutator, value: Any) -> Any:
    """A copy of JSON with the canary in keys and values that nobody asked for, at every level."""
    if isinstance(value, dict):
        found = {key: with_canaries(mutator, inner) for key, inner in value.items()}
        if mutator.random.random() < 0.5:
            found[CANARY] = mutator.random.choice((CANARY, [CANARY], {CANARY: CANARY}, CANARY * 300))
        return found
    return [with_canaries(mutator, inner) for inner in value] if isinstance(value, list) else value


def payload(mutator: Mutator, call_id: str) -> dict[str, Any]:
    """A real payload with a prompt wherever LiteLLM may put one, and where it would not."""
    found: dict[str, Any] = with_canaries(mutator, copy.deepcopy(mutator.random.choice(SAMPLES)))
    found["litellm_call_id"] = call_id
    prompt = mutator.random.choice((CANARY, [{"content": CANARY}], {"a": [CANARY]}, f'"}}],"{CANARY}', CANARY * 2000))
    for name in ("messages", "response", "error_str", "model_parameters", "hidden_params", "request_tags"):
        found[name] = prompt
    found["metadata"] = {**(found.get("metadata") or {}), "prompt": prompt, mutator.text(): CANARY}
    return found


def body_of(mutator: Mutator, sent: Sent) -> bytes:
    """Some records and some that are none, in one of the shapes; notes what should become of them."""
    elements: list[bytes] = []
    lines = mutator.random.random() < 0.4
    indent = None if lines or mutator.random.random() < 0.7 else 1
    for _ in range(mutator.random.randrange(1, 6)):
        if mutator.random.random() < 0.2:
            bad = mutator.random.choice(
                ("null", "17", f'"{CANARY}"', "tru", '{"a": }', f'{{"{CANARY}": 01}}', "1e999999")
            )
            elements.append(bad.encode())
            sent.bad += 1
            continue
        call_id = f"fuzz-{mutator.random.getrandbits(64):x}"
        text = json.dumps(payload(mutator, call_id), indent=indent, ensure_ascii=mutator.random.random() < 0.5)
        elements.append(text.encode("utf-8", "replace"))
        sent.good.append(call_id)
    if lines:
        sent.headers["Content-Type"] = mutator.random.choice(("application/json", "application/x-ndjson"))
        return b"\n".join(elements) + b"\n" * mutator.random.randrange(3)
    return b"[" + b", ".join(elements) + b"]"


def request_of(mutator: Mutator) -> Sent:
    """A request of any kind."""
    sent = Sent({"Authorization": f"Bearer {TOKEN}"}, [])
    body = body_of(mutator, sent)
    choose = mutator.random.random
    if choose() < 0.4:
        body = mutator.edited(body)
        sent.untouched = False
    if choose() < 0.1:
        body += b" " * 2 * BODY_BYTES_MAX
    if choose() < 0.3:
        sent.headers["Content-Encoding"] = mutator.random.choice(("gzip", " GZIP ", "gzip"))
        body = gzip.compress(body, 1)
        if choose() < 0.3:
            body = mutator.edited(body) if choose() < 0.5 else body[: mutator.random.randrange(len(body))]
            sent.untouched = False
    elif choose() < 0.05:
        sent.headers["Content-Encoding"] = mutator.random.choice(("br", "deflate", "gzip, gzip", "\xff", "x" * 300))
    if choose() < 0.1:
        sent.headers["Authorization"] = mutator.random.choice(
            ("", "Bearer", f"Basic {TOKEN}", f"Bearer {TOKEN}x", "\xff")
        )
    if choose() < 0.1:
        lengths = ("0", "99999999999999999999", "\xb2", "-1", "", "1" * 4000)
        sent.headers["Content-Length"] = mutator.random.choice(lengths)
    cuts = sorted(mutator.random.randrange(len(body) + 1) for _ in range(mutator.random.choice((0, 0, 1, 3, 12))))
    sent.pieces = [body[start:end] for start, end in zip([0, *cuts], [*cuts, len(body)], strict=True)]
    if choose() < 0.1:
        sent.ends = mutator.random.choice(("left", "left", "stalls"))
        sent.pieces = sent.pieces[: 1 + mutator.random.randrange(len(sent.pieces))]
    return sent


# --- what must come of it --------------------------------------------------------------------------------------------


def canaries(value: Any, here: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The places of a payload at which the canary stands, in a key or a text."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if CANARY in key:
                yield (*here, key)
            yield from canaries(inner, (*here, key))
    elif isinstance(value, list):
        for inner in value:
            yield from canaries(inner, (*here, "[]"))
    elif CANARY in str(value):
        yield here


def assert_kept(sent: Sent, status: int, answer: dict[str, Any], lines: list[bytes]) -> None:
    """Status, answer and spool agree, and nothing is in the spool that should not be."""
    assert status in DOCUMENTED
    stored = [orjson.loads(line) for line in lines]
    payloads = [line["payload"] for line in stored if "payload" in line]
    rejected = [line["rejected"] for line in stored if "rejected" in line]
    assert len(payloads) + len(rejected) == len(stored)
    for line in lines:
        assert type(parse_spool_line(line, Decimal(1000))) in (SpendRecord, Rejected)
    for one in rejected:
        assert set(one) == {"reason", "detail", "sha256", "bytes"}
        assert CANARY not in str(one)
    for one in payloads:
        # bytes that were moved may put a piece of a prompt where a model's name belongs: it is cut there like any name
        allowed = frozenset() if sent.untouched else ALLOWED
        assert set(canaries(one)) <= allowed
        assert len(orjson.dumps(one)) < 8000
    if status in (401, 415, 503):
        assert stored == []
    if status == 200:
        assert (answer["accepted"], answer["rejected"]) == (len(payloads), len(rejected))
        if sent.untouched:
            assert [one["litellm_call_id"] for one in payloads] == sent.good
            assert len(rejected) == sent.bad
    else:
        assert set(answer) == {"error"}
        assert CANARY not in answer["error"]
        assert TOKEN not in answer["error"]


def test_any_request(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    statuses: Counter[int] = Counter()

    def example(seed: int) -> None:
        mutator = Mutator(seed)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(callbacks, "SMALL_BYTES_MAX", mutator.random.choice((0, 1000, 1 << 20)))
            patch.setattr(callbacks, "STRING_BYTES_MAX", mutator.random.choice((100, 1 << 20)))
            patch.setattr(callbacks, "PIECE_BYTES", mutator.random.choice((7, 1000, 32 << 10)))
            sent = request_of(mutator)
            status, answer = endpoint.post(sent)
        assert_kept(sent, status, answer, endpoint.new_lines())
        assert endpoint.counted.pop() == status
        statuses[status] += 1

    tried = fuzz(example, 1.0, seed=seeds)
    print(f"\n{tried} requests: {dict(statuses)}", end=" ")
    assert set(statuses) == DOCUMENTED - {503}, "the mutations reach every answer"
    sent = Sent({"Authorization": f"Bearer {TOKEN}"}, [b"[]"])
    assert endpoint.post(sent) == (200, {"accepted": 0, "rejected": 0}), "no place and no lock is left taken"


def test_a_spool_that_refuses(tmp_path: Path) -> None:
    """Nothing is acknowledged that is nowhere."""
    endpoint = Endpoint(tmp_path / "spool", spool_bytes_max=0)
    mutator = Mutator(1)
    statuses = Counter(endpoint.post(request_of(mutator))[0] for _ in range(150))
    assert statuses[503] > 30
    assert statuses[200] == 0
    assert endpoint.new_lines() == []
    endpoint.close()


def test_the_checks_can_fail() -> None:
    sent = Sent({}, [], good=["a"])
    line = orjson.dumps({"received_at": 1.0, "payload": {"litellm_call_id": "a", "metadata": {}}})
    answer = {"accepted": 1, "rejected": 0}
    assert_kept(sent, 200, answer, [line])
    leak = orjson.dumps({"received_at": 1.0, "payload": {"litellm_call_id": "a", "note": CANARY}})
    for wrong in ([], [line, line], [leak], [line.replace(b'"a"', b'"b"')]):
        with pytest.raises(AssertionError):
            assert_kept(sent, 200, answer, wrong)
    for status, told in ((500, {}), (401, {"error": "x"}), (400, {"error": CANARY})):
        with pytest.raises(AssertionError):
            assert_kept(sent, status, told, [line])


# --- memory ----------------------------------------------------------------------------------------------------------

NESTED = b"[" * 100_000
LARGE = {
    "nested deeply": (b'[{"a":' + NESTED * 2, None),
    "nested in what is dropped": (b'[{"messages":' + NESTED * 2, None),
    "a key of 20 MB": (b'[{"' + b"k" * 20_000_000 + b'":1,"litellm_call_id":"a"}]', None),
    "a number of 20 MB": (b'[{"response_cost":' + b"9" * 20_000_000 + b',"litellm_call_id":"a"}]', None),
    "many keys": (b'[{"litellm_call_id":"a"' + b"".join(b',"k%d":1' % n for n in range(400_000)) + b"}]", None),
    "many elements": (b"[" + b"1," * 20_000 + b"1]", None),
    "a bomb of spaces": (b"[" + b" " * 50_000_000 + b"]", "gzip"),
    "a bomb of brackets": (NESTED * 3, "gzip"),
}
"""Larger than what may be held, and small enough to be taken apart within seconds: a bracket costs about 2 us. More of
them are a 408 after a minute, in slices that hold nobody up."""


@pytest.mark.e2e
@pytest.mark.slow
def test_nothing_that_is_posted_fills_the_memory(tmp_path: Path) -> None:
    """One process takes them all, one after the other, and stays below the daemon's bound; and a long prompt."""
    with Process(tmp_path / "spool") as process:
        endpoint = f"http://127.0.0.1:{process.port}{PATH}"
        for what, (body, encoding) in LARGE.items():
            status = posted(endpoint, body if encoding is None else gzip.compress(body, 1), encoding)
            most = process.memory_mib("VmHWM")
            print(f"\n{what}: {status}, {most:.0f} MiB at most so far", end=" ")
            assert status in (200, 400, 413)
            assert most < 96, what
        assert posted(endpoint, b"".join(huge(1, "messages", 10_000_000)), None) == 200
        assert process.memory_mib("VmHWM") < 96


def posted(url: str, body: bytes, encoding: str | None) -> int:
    headers = {b"authorization": f"Bearer {test_callbacks.TOKEN}".encode(), b"content-type": b"application/json"}
    if encoding is not None:
        headers[b"content-encoding"] = encoding.encode()
    return httpx.post(url, content=body, headers=headers, timeout=60, trust_env=False).status_code
