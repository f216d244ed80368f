"""A proxy in front of Postgres that a test can cut, stall, or make swallow the answers.

::

    with PostgresProxy(dsn) as proxy:
        connection = psycopg.connect(proxy.dsn)
        proxy.cut()        # connections break, new ones are refused
        proxy.forward()    # as if nothing had been

It listens on loopback TCP and connects to whatever the DSN names, a unix socket or TCP.
"""

import contextlib
import enum
import socket
import struct
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self

from psycopg.conninfo import conninfo_to_dict, make_conninfo

TICK_SECONDS: Final = 0.05
CHUNK_BYTES: Final = 65536


class Mode(enum.Enum):
    """What happens to the bytes that arrive."""

    FORWARD = "forward"
    STALL = "stall"  # nothing passes, in neither direction, and nothing breaks: a frozen host or network
    MUTE = "mute"  # requests pass, answers are held back: a COMMIT happens and nobody hears of it


class PostgresProxy:
    """Forwards connections on `dsn` to the server of `target_dsn`. Methods may be called from any thread."""

    def __init__(self, target_dsn: str) -> None:
        self._target = _address(target_dsn)
        self._mode = Mode.FORWARD
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._listener: socket.socket | None = None
        self._threads: list[threading.Thread] = []
        self.port = 0
        self.accepted = 0
        self.on_request: Callable[[bytes], bool] = lambda _: True
        """Called with bytes from a client before they go to the server; False breaks that connection instead."""
        self._listen()
        self.dsn = make_conninfo(target_dsn, host="127.0.0.1", port=self.port, sslmode="disable", gssencmode="disable")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def connections(self) -> int:
        """How many connections pass through at the moment."""
        with self._lock:
            return len(self._pairs)

    def forward(self) -> None:
        """Everything passes (again); what was held back passes first."""
        self._mode = Mode.FORWARD
        if self._listener is None:
            self._listen()

    def stall(self) -> None:
        """Bytes are held back in both directions until `forward()`; new connections are accepted and held as well."""
        self._mode = Mode.STALL

    def mute(self) -> None:
        """Requests reach Postgres, answers are held back until `forward()`; then `drop()` loses them for good."""
        self._mode = Mode.MUTE

    def drop(self) -> None:
        """Breaks all connections, with a reset. New ones are still accepted."""
        with self._lock:
            pairs, self._pairs = self._pairs, []
        for client, server in pairs:
            _reset(client)
            _reset(server)

    def refuse(self) -> None:
        """New connections are refused; those that there are go on."""
        listener, self._listener = self._listener, None
        if listener is not None:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
            listener.close()

    def cut(self) -> None:
        """As if the server's host had gone: connections break and new ones are refused, until `forward()`."""
        self.refuse()
        self.drop()

    def close(self) -> None:
        """Ends everything, threads included."""
        self._closed.set()
        self.cut()
        for thread in self._threads:
            thread.join(5)
            assert not thread.is_alive(), f"proxy thread {thread.name} does not end"

    def _listen(self) -> None:
        listener = socket.create_server(("127.0.0.1", self.port), backlog=64)  # sets SO_REUSEADDR
        self.port = listener.getsockname()[1]
        self._listener = listener
        self._start(self._accept, listener)

    def _start(self, target: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True, name=f"proxy-{len(self._threads)}")
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            server = self._connect()
            if server is None:
                _reset(client)
                continue
            with self._lock:
                self._pairs.append((client, server))
                self.accepted += 1
            if self._listener is not listener:  # cut in between
                self.drop()
                return
            self._start(self._pump, client, server, Mode.STALL)
            self._start(self._pump, server, client, Mode.MUTE)

    def _connect(self) -> socket.socket | None:
        try:
            if isinstance(self._target, str):
                server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                server.connect(self._target)
                return server
            return socket.create_connection(self._target, timeout=5)
        except OSError:
            return None

    def _pump(self, source: socket.socket, sink: socket.socket, held_by: Mode) -> None:
        """Copies until one side ends. `held_by`: STALL for requests; answers are held by STALL and by MUTE."""
        holding = {Mode.STALL, held_by}
        try:
            source.settimeout(TICK_SECONDS)
            while not self._closed.is_set():
                try:
                    data = source.recv(CHUNK_BYTES)
                except TimeoutError:
                    continue
                while self._mode in holding and self._is_open(source) and not self._closed.wait(TICK_SECONDS / 5):
                    pass
                if not data or not self._is_open(source):
                    break
                if held_by is Mode.STALL and not self.on_request(data):
                    break
                _send_all(sink, data)
        except OSError:
            pass
        finally:
            self._end(source, sink)

    def _is_open(self, one: socket.socket) -> bool:
        with self._lock:
            return any(one in pair for pair in self._pairs)

    def _end(self, source: socket.socket, sink: socket.socket) -> None:
        with self._lock:
            self._pairs = [pair for pair in self._pairs if source not in pair]
        for one in (source, sink):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()


def _send_all(sink: socket.socket, data: bytes) -> None:
    view = memoryview(data)
    while view:
        with contextlib.suppress(TimeoutError):  # the sink is another pump's source, which set the time-out
            view = view[sink.send(view) :]


def _reset(one: socket.socket) -> None:
    """Closes with a TCP reset, as a crashed host's successor would."""
    with contextlib.suppress(OSError):
        if one.family != socket.AF_UNIX:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            one.shutdown(socket.SHUT_RDWR)
    one.close()


def _address(dsn: str) -> str | tuple[str, int]:
    parts = conninfo_to_dict(dsn)
    host, port = str(parts.get("host") or "127.0.0.1"), int(parts.get("port") or 5432)
    return f"{host}/.s.PGSQL.{port}" if host.startswith("/") else (host, port)
