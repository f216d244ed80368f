"""Takes LiteLLM's callbacks, keeps every POST as it came, and passes it on to any number of daemons.

So several daemons can bill the same drive. LiteLLM gets its 200 at once; what a daemon answers is kept for the test to
look at. A daemon gets the POSTs one after the other, in the order in which they came.
"""

import json
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Final, Self

import httpx

PATH: Final = "/v1/callbacks/litellm"
TOKEN: Final = "token-of-the-callbacks"
KEPT_HEADERS: Final = ("authorization", "content-type", "content-encoding")
IDENTITY: Final = ("id", "status", "model_id", "startTime", "endTime", "response_cost")


@dataclass(frozen=True, slots=True)
class Post:
    """One POST as it came."""

    headers: dict[str, str]
    body: bytes

    def events(self) -> list[dict[str, Any]]:
        """The events of the body, numbers that are no integers as exact as their text."""
        events: list[dict[str, Any]] = json.loads(self.body, parse_float=Decimal)
        return events


class Recorder:
    """A context manager: entering listens on a free port of the loopback address."""

    def __init__(self) -> None:
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.recorder = self
        self._thread = threading.Thread(target=self._server.serve_forever, name="recorder", daemon=True)
        self._lock = threading.Lock()
        self._posts: list[Post] = []
        self._targets: dict[str, tuple[ThreadPoolExecutor, list[Future[int]]]] = {}

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        for pool, _ in self._targets.values():
            pool.shutdown(cancel_futures=True)

    @property
    def url(self) -> str:
        """Where LiteLLM is to send its events."""
        return f"http://127.0.0.1:{self._server.server_address[1]}{PATH}"

    @property
    def posts(self) -> list[Post]:
        """What has come so far."""
        with self._lock:
            return list(self._posts)

    def pass_on_to(self, url: str) -> None:
        """From now on, every POST goes to the daemon at `url` too."""
        with self._lock:
            self._targets[url] = (ThreadPoolExecutor(1), [])

    def answers(self, url: str) -> list[int]:
        """The status of every POST that was passed on there; waits for those under way."""
        with self._lock:
            sent = list(self._targets[url][1])
        return [future.result(30) for future in sent]

    def events(self) -> Iterator[dict[str, Any]]:
        """Every event once: LiteLLM may send one more than once."""
        seen: set[tuple[str, ...]] = set()
        for post in self.posts:
            for event in post.events():
                identity = (str(event["litellm_call_id"]), *(str(event.get(name)) for name in IDENTITY))
                if identity not in seen:
                    seen.add(identity)
                    yield event

    def take(self, post: Post) -> None:
        """Keeps a POST and passes it on."""
        with self._lock:
            self._posts.append(post)
            for url, (pool, sent) in self._targets.items():
                sent.append(pool.submit(_pass_on, url, post))


def _pass_on(url: str, post: Post) -> int:
    with httpx.Client(trust_env=False, timeout=30) as client:
        return client.post(url + PATH, content=post.body, headers=post.headers).status_code


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    recorder: Recorder


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name is http.server's
        """Says nothing."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        headers = {name: self.headers[name] for name in KEPT_HEADERS if name in self.headers}
        self.server.recorder.take(Post(headers, body))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()
