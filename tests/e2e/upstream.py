"""An HTTP upstream that answers as LiteLLM was seen to answer (docs/integrating.md), case by case.

The body's `model` names the case: `chat` (a priced answer), `stream` (server-sent events, no cost header),
`error-<status>` (LiteLLM's own error: call id and a cost of 0), `slow` (no answer before the client has gone). With
`Authorization: Bearer bad` it is a 401 without a call id. GET answers 200 without a call id. What came in is kept: a
client that hung up cannot tell.
"""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

SLOW_SECONDS_MAX = 30.0
CHUNKS = 3


class Upstream:
    """A context manager: entering starts it on a free port of the loopback address."""

    def __init__(self) -> None:
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, name="upstream", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.closing.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def address(self) -> str:
        """host:port."""
        host, port = self._server.server_address[:2]
        return f"{host!s}:{port}"

    @property
    def received(self) -> dict[str, dict[str, str]]:
        """Run id -> headers, with names in lower case, of every POST that was not refused."""
        return self._server.received


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, *arguments: Any) -> None:
        self.received: dict[str, dict[str, str]] = {}
        self.closing = threading.Event()
        super().__init__(*arguments)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is part of the game."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name is http.server's
        """Says nothing."""

    def do_GET(self) -> None:
        self._answer(200, {"status": "healthy"}, {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.headers.get("authorization") == "Bearer bad":
            self._answer(401, {"error": {"message": "Authentication Error", "code": "401"}}, {})
            return
        received = {name.lower(): value for name, value in self.headers.items()}
        self.server.received[received["x-cogni-run-id"]] = received
        call_id = received["x-litellm-call-id"]
        case = body["model"]
        headers = {"x-litellm-call-id": call_id, "x-litellm-version": "1.106.2"}
        priced = {"x-litellm-model-group": case, "x-litellm-model-name": f"openai/{case}", "x-litellm-model-id": "m1"}
        if case.startswith("error-"):
            self._answer(int(case[6:]), {"error": {"message": case}}, headers | {"x-litellm-response-cost": "0"})
        elif case == "stream":
            self._stream(headers | priced | {"x-litellm-response-cost-original": "0.0"})
        else:
            if case == "slow":
                self.server.closing.wait(SLOW_SECONDS_MAX)
            self._answer(
                200, {"choices": [{"message": {}}]}, headers | priced | {"x-litellm-response-cost": "0.000225"}
            )

    def _answer(self, status: int, body: dict[str, Any], headers: dict[str, str]) -> None:
        content = json.dumps(body).encode()
        self._head(status, {"content-type": "application/json", "content-length": str(len(content)), **headers})
        self.wfile.write(content)

    def _stream(self, headers: dict[str, str]) -> None:
        kind = "text/event-stream; charset=utf-8"
        self._head(200, {"content-type": kind, "transfer-encoding": "chunked", **headers})
        for data in [json.dumps({"choices": [{"delta": {"content": "."}}]})] * CHUNKS + ["[DONE]"]:
            event = f"data: {data}\n\n".encode()
            self.wfile.write(b"%x\r\n%b\r\n" % (len(event), event))
        self.wfile.write(b"0\r\n\r\n")

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
