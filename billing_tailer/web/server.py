"""uvicorn in a side thread. If the thread dies, the process must end: `alive` tells the composition root."""

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Sequence

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from billing_tailer import __version__
from billing_tailer.errors import ConfigError
from billing_tailer.events import Events
from billing_tailer.health import Health
from billing_tailer.web.connections import (
    CONNECTIONS_MAX,
    HEAD_BYTES_MAX,
    KEEP_ALIVE_SECONDS,
    connection_class,
    without_ambiguous,
)
from billing_tailer.web.headers import with_headers

STOP_SECONDS_MAX = 2.0
TICK_SECONDS = 1.0
LISTEN_BACKLOG = 1024


class _Server(uvicorn.Server):
    """uvicorn looks ten times a second whether it is to end, a third of what an idle daemon costs. This one is told."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._ending = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def main_loop(self) -> None:
        """Until `end`; once a second what uvicorn does so often, the Date of its answers."""
        self._loop = asyncio.get_running_loop()
        while not await self.on_tick(0):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ending.wait(), TICK_SECONDS)

    def end(self) -> None:
        """From another thread."""
        self.should_exit = True
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # it has ended by itself
                self._loop.call_soon_threadsafe(self._ending.set)


class HttpServer:
    """Serves `/livez`, `/readyz` and `/metrics` from the moment `start` returns."""

    def __init__(self, host: str, port: int, events: Events, health: Health, routes: Sequence[BaseRoute] = ()) -> None:
        """port 0: chosen by the system, found in `port` after `start`. routes: beside health and metrics."""
        self._routes = routes
        self._host = host
        self.port = port
        self._events = events
        self._health = health
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Bind, then serve in a thread. Raises ConfigError where the address cannot be used."""
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        # with the protocol named, or asyncio would not set TCP_NODELAY and every answer after the first wait 40 ms
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((self._host, self.port))
            listener.listen(LISTEN_BACKLOG)  # uvicorn would, but only after `start` has returned
        except OSError as error:
            listener.close()
            raise ConfigError(
                f"BILLING_TAILER_HTTP_HOST={self._host} BILLING_TAILER_HTTP_PORT={self.port}: {error.strerror}",
                "choose a free port (0 lets the system choose), or end the process that has it",
            ) from None
        self.port = int(listener.getsockname()[1])
        config = uvicorn.Config(
            with_headers(without_ambiguous(application(self._events, self._health, self._routes))),
            http=connection_class(),
            ws="none",
            h11_max_incomplete_event_size=HEAD_BYTES_MAX,
            log_config=None,
            log_level="error",  # not a line of text between the JSON for every port scan
            access_log=False,
            lifespan="off",
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=1,
            limit_concurrency=CONNECTIONS_MAX + 1,
            server_header=False,
            forwarded_allow_ips="127.0.0.1",  # and nobody from the environment: being local may stand for a token
        )
        self._server = _Server(config)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [listener]}, name="http", daemon=True
        )
        self._thread.start()
        self._events.info("http.listening", host=self._host, port=self.port)

    def alive(self) -> bool:
        """Whether the thread still serves."""
        return self._thread is not None and self._thread.is_alive()

    def stop(self) -> None:
        """End the thread, within STOP_SECONDS_MAX."""
        if self._server is not None and self._thread is not None:
            self._server.end()
            self._thread.join(STOP_SECONDS_MAX)


def application(events: Events, health: Health, routes: Sequence[BaseRoute] = ()) -> Starlette:
    """The ASGI application."""

    async def livez(_: Request) -> Response:
        age = round(health.seconds_since_tick(), 3)
        return JSONResponse({"alive": health.alive(), "seconds_since_tick": age}, 200 if health.alive() else 503)

    async def readyz(_: Request) -> Response:
        reasons = health.reasons()
        ready = not reasons and health.alive()
        return JSONResponse({"ready": ready, "reasons": reasons, "version": __version__}, 200 if ready else 503)

    async def metrics(_: Request) -> Response:
        events.health(time.time() - health.seconds_since_tick(), health.counts())
        return Response(events.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")

    own = [Route("/livez", livez), Route("/readyz", readyz), Route("/metrics", metrics)]
    app = Starlette(routes=[*own, *routes])
    app.router.redirect_slashes = False  # a 404 is seen; a redirect may lose the body or the token
    return app
