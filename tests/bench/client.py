"""HTTP clients that cost the two cores little: keep-alive, and no more of the protocol than the daemon speaks."""

import asyncio
import http.client
import json
from types import TracebackType
from typing import Any, Final, Self

from tests.bench.world import TOKEN
from tests.support.callbacks import PATH

HOST: Final = "127.0.0.1"


class Poster:
    """Posts callbacks over one connection, each after the answer to the last."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection(HOST, port, timeout=60)

    def post(self, events: list[dict[str, Any]]) -> None:
        """Returns when they are on disk."""
        body = json.dumps(events).encode()
        self._connection.request("POST", PATH, body, {"Authorization": f"Bearer {TOKEN}"})
        answer = self._connection.getresponse()
        said = answer.read()
        assert answer.status == 200, said

    def close(self) -> None:
        """Hang up."""
        self._connection.close()


class Client:
    """One connection on an event loop."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def __aenter__(self) -> Self:
        self._streams = await asyncio.open_connection(HOST, self._port)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._streams is not None
        self._streams[1].close()

    async def request(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        """Status and body of the answer."""
        assert self._streams is not None
        reader, writer = self._streams
        head = f"{method} {path} HTTP/1.1\r\nHost: {HOST}\r\nAuthorization: Bearer {TOKEN}\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()
        answer = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = int(answer.partition(b"content-length:")[2].split(None, 1)[0])
        return int(answer.split(None, 2)[1]), await reader.readexactly(length)


def port_of(url: str) -> int:
    """Of a daemon's URL."""
    return int(url.rpartition(":")[2])
