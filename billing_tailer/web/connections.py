"""uvicorn's HTTP/1.1 with the limits that it has no setting for: what a client may cost before and after its request.

A request under way is its endpoint's business. All other connections are idle: nothing came yet, or half a request, or
the answer is not fetched, or the rest of a body that nobody wants. None of that needs a token; so it must cost little:

- an idle connection is closed HEAD_SECONDS_MAX after its beginning, or KEEP_ALIVE_SECONDS later where it had a request,
  however it trickles (tests/test_connections.py::test_half_a_request_is_not_waited_for);
- an answer that stays in our buffers for WRITE_SECONDS_MAX is given up (::test_an_answer_that_nobody_reads);
- where there are more than CONNECTIONS_MAX connections, or more than HEADS_BYTES_MAX of half requests, the one that is
  idle for longest gives way: idle ones never keep out those who ask (::test_idle_connections_keep_nobody_out);
- a request with both Content-Length and Transfer-Encoding is refused and its connection closed, as a proxy in front
  could see another end of it than we do (::test_no_request_is_smuggled).

uvicorn's limit_concurrency is left for connections that all have a request under way: 503.
"""

import asyncio
from collections import OrderedDict
from typing import Any, ClassVar, cast

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

CONNECTIONS_MAX = 1000
HEAD_BYTES_MAX = 64 << 10
"""Of a request line with its headers: a question after a run names up to 1,000 calls."""
HEADS_BYTES_MAX = 8 << 20
"""Of all requests together whose end has not come."""
HEAD_SECONDS_MAX = 10.0
KEEP_ALIVE_SECONDS = 15
WRITE_SECONDS_MAX = 30.0


class Idle:
    """The connections of a server without a request under way, the longest idle first, and how much each has sent."""

    def __init__(self) -> None:
        self._held: OrderedDict[Connection, int] = OrderedDict()
        self._held_bytes = 0

    def hold(self, connection: "Connection", head_bytes: int) -> None:
        """One that is idle, or has sent more of a request; its place in the order stays."""
        self._held_bytes += head_bytes - self._held.get(connection, 0)
        self._held[connection] = head_bytes

    def drop(self, connection: "Connection") -> None:
        """One that is not idle any more, or gone."""
        self._held_bytes -= self._held.pop(connection, 0)

    def make_room(self, newest: "Connection", connections: int) -> None:
        """Close those that are too many. newest: is spared. connections: how many there are, idle or not."""
        while self._held and (connections > CONNECTIONS_MAX or self._held_bytes > HEADS_BYTES_MAX):
            oldest = next(iter(self._held))
            if oldest is newest:
                return
            oldest.give_up()
            connections -= 1


class Connection(H11Protocol):
    """One connection. Use a subclass made by `connection_class`, one per server."""

    idle: ClassVar[Idle]
    _timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        """asyncio.Protocol."""
        super().connection_made(transport)
        self._wait(HEAD_SECONDS_MAX)
        self.idle.make_room(self, len(self.connections))

    def data_received(self, data: bytes) -> None:
        """asyncio.Protocol."""
        super().data_received(data)
        if _is_under_way(self.cycle):
            self._wait_no_more()
        elif not self.transport.is_closing():
            self.idle.hold(self, len(self.conn.trailing_data[0]))
            self.idle.make_room(self, len(self.connections))

    def on_response_complete(self) -> None:
        """uvicorn: the answer is in the buffers; the next request may have begun."""
        super().on_response_complete()
        if not _is_under_way(self.cycle):
            self._wait(KEEP_ALIVE_SECONDS + HEAD_SECONDS_MAX)

    def pause_writing(self) -> None:
        """asyncio.Protocol: the client reads more slowly than we write."""
        super().pause_writing()
        self._write_timer = self.loop.call_later(WRITE_SECONDS_MAX, self.give_up)

    def resume_writing(self) -> None:
        """asyncio.Protocol."""
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio.Protocol."""
        self._wait_no_more()
        if self._write_timer is not None:
            self._write_timer.cancel()
        super().connection_lost(exc)

    def give_up(self) -> None:
        """Close at once, whatever is still in the buffers."""
        self._wait_no_more()
        self.connections.discard(self)
        self.transport.abort()

    def _wait(self, seconds: float) -> None:
        self._wait_no_more()
        self.idle.hold(self, 0)
        self._timer = self.loop.call_later(seconds, self.give_up)

    def _wait_no_more(self) -> None:
        self.idle.drop(self)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _is_under_way(cycle: RequestResponseCycle | None) -> bool:
    return cycle is not None and not cycle.response_complete


def connection_class() -> type[Connection]:
    """What uvicorn makes of each connection of one server."""
    return cast("type[Connection]", type("ServerConnection", (Connection,), {"idle": Idle()}))


def without_ambiguous(app: ASGIApp) -> ASGIApp:
    """The application, for requests that say once where they end."""

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        headers: list[tuple[bytes, Any]] = scope.get("headers", [])
        if {b"content-length", b"transfer-encoding"} <= {name for name, _ in headers}:
            error = "both Content-Length and Transfer-Encoding: send one of them"
            await JSONResponse({"error": error}, 400, {"Connection": "close"})(scope, receive, send)
        else:
            await app(scope, receive, send)

    return guarded
