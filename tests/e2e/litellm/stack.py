"""A running LiteLLM, with the known provider behind it and a database of its own."""

import json
import os
import socket
import time
from collections.abc import Iterable
from contextlib import ExitStack
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import httpx
import psycopg
import pytest

from tests.e2e.litellm.install import HERE, Installation, InstallError, installed
from tests.e2e.program import Program
from tests.support import database

MASTER_KEY: Final = "sk-master"
READY_SECONDS_MAX: Final = 180
PAGE_ROWS: Final = 100
# What docs/integrating.md recommends: LiteLLM's defaults hold an event back for five seconds.
CALLBACK_BATCHING: Final = {"DEFAULT_FLUSH_INTERVAL_SECONDS": "1", "DEFAULT_BATCH_SIZE": "50"}


class Stack:
    """A context manager: entering starts provider and LiteLLM, leaving ends them and drops LiteLLM's database.

    LiteLLM's Python, its schema, its migrations and Postgres are real; query_engine.py stands in for Prisma's engine.
    Its events go to `callback_url`. Skips the test where LiteLLM cannot be installed.
    """

    def __init__(self, directory: Path, admin_dsn: str, callback_url: str, callback_token: str) -> None:
        self.directory = directory
        self.port = _free_port()
        self._admin_dsn = admin_dsn
        self._callbacks = {
            "GENERIC_LOGGER_ENDPOINT": callback_url,
            "GENERIC_LOGGER_HEADERS": f"Authorization=Bearer {callback_token}",
        }
        self._running = ExitStack()

    @property
    def address(self) -> str:
        """host:port of LiteLLM."""
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        """LiteLLM's own address, as the one who bills asks it."""
        return f"http://{self.address}"

    def __enter__(self) -> Self:
        try:
            made = installed()
        except InstallError as error:
            pytest.skip(f"LiteLLM cannot be installed: {error}")
        with self._running:
            name = database.create(self._admin_dsn, prefix="litellm")
            self._running.callback(database.drop, self._admin_dsn, name)
            dsn = database.dsn_of(self._admin_dsn, name)
            provider = self._start_provider(made)
            litellm = self._start_litellm(made, dsn, provider)  # which takes seconds before it looks at its tables
            _migrate(made, dsn)
            litellm.wait_for("INFO:     Application startup complete", READY_SECONDS_MAX)
            self._wait_until_ready()
            self._running = self._running.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._running.close()

    def spend_logs_pages(self, start: datetime, end: datetime, page_size: int = PAGE_ROWS) -> list[dict[str, Any]]:
        """The answers of /spend/logs/v2 for calls that started in between, page by page, oldest row first; numbers that
        are no integers are as exact as their text."""
        window = {"start_date": f"{start:%Y-%m-%d %H:%M:%S}", "end_date": f"{end:%Y-%m-%d %H:%M:%S}"}
        asked = {**window, "page_size": page_size, "sort_by": "startTime", "sort_order": "asc"}
        pages: list[dict[str, Any]] = []
        while not pages or len(pages) < pages[0]["total_pages"]:
            answer = self._get("/spend/logs/v2", {**asked, "page": len(pages) + 1}).raise_for_status()
            pages.append(json.loads(answer.text, parse_float=Decimal))
        return pages

    def _start_provider(self, made: Installation) -> str:
        port = _free_port()
        command = [str(made.python), str(HERE / "provider.py"), str(port)]
        program = self._running.enter_context(
            Program(command, self.directory, {"PATH": os.defpath}, self.directory / "provider.log")
        )
        program.wait_for("INFO:     Uvicorn running", 30)
        return f"127.0.0.1:{port}"

    def _start_litellm(self, made: Installation, dsn: str, provider: str) -> Program:
        config = (HERE / "config.yaml.in").read_text("utf-8").replace("@PROVIDER@", f"http://{provider}")
        self.directory.joinpath("config.yaml").write_text(config, "utf-8")
        engine = self.directory / "query-engine"
        engine.write_text(f'#!/bin/sh\nexec "{made.python}" "{HERE / "query_engine.py"}" "$@"\n', "utf-8")
        engine.chmod(0o755)
        environment = {
            "PATH": f"{made.python.parent}:{os.defpath}",
            "HOME": str(self.directory),
            "LITELLM_MASTER_KEY": MASTER_KEY,
            "LITELLM_SALT_KEY": "sk-salt",
            # LiteLLM wants to see that there is a database; the engine is who connects
            "DATABASE_URL": "postgresql://litellm@127.0.0.1/litellm",
            "DISABLE_SCHEMA_UPDATE": "true",
            "PRISMA_QUERY_ENGINE_BINARY": str(engine),
            "ENGINE_DSN": dsn,
            "ENGINE_SCHEMA": str(made.schema),
            "ENGINE_LOG": str(self.directory / "query-engine.log"),
            # nothing is fetched from outside
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            "LITELLM_TELEMETRY": "False",
            "NO_DOCS": "True",
            "DISABLE_ADMIN_UI": "True",
            **CALLBACK_BATCHING,
            **self._callbacks,
        }
        command = [str(made.python.parent / "litellm"), "--config", "config.yaml", "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--num_workers", "1"]
        return self._running.enter_context(
            Program(command, self.directory, environment, self.directory / "litellm.log")
        )

    def _get(self, path: str, parameters: dict[str, Any]) -> httpx.Response:
        with httpx.Client(base_url=self.url, trust_env=False, timeout=30) as client:
            return client.get(path, params=parameters, headers={"authorization": f"Bearer {MASTER_KEY}"})

    def _wait_until_ready(self) -> None:
        """LiteLLM listens before its database client is connected."""
        deadline = time.monotonic() + READY_SECONDS_MAX
        while True:
            try:
                answer = self._get("/spend/logs", {"request_id": "none"})
            except httpx.TransportError as error:
                problem = repr(error)
            else:
                if answer.status_code == 200:
                    return
                problem = answer.text
            if time.monotonic() > deadline:
                raise AssertionError(f"LiteLLM is not ready: {problem}; its log is in {self.directory}")
            time.sleep(0.1)


def _migrate(made: Installation, dsn: str) -> None:
    with psycopg.connect(dsn, autocommit=True, options="-c client_min_messages=warning") as connection:
        for path in _migrations(made):
            connection.execute(path.read_bytes())


def _migrations(made: Installation) -> Iterable[Path]:
    found = sorted(made.packages.glob("litellm_proxy_extras/migrations/*/migration.sql"))
    assert found, "LiteLLM's migrations are not where they were"
    return found


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
