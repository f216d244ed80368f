"""The daemon as a process: `python -m billing_tailer run` with exactly the variables that a test names."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import httpx

ROOT: Final = Path(__file__).resolve().parents[2]
POLL_SECONDS: Final = 0.02
LOG_TAIL_BYTES: Final = 6000


def clean_environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Our environment without what configures a tailer or libpq, plus `variables`."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("BILLING_TAILER_", "PG"))}
    return {**inherited, "PYTHONPATH": str(ROOT), **variables}


def program(script: str = "") -> list[str]:
    """Arguments of Python: our module, or Python text in its place, for tests that must break something inside."""
    return ["-c", script] if script else ["-m", "billing_tailer"]


class Daemon:
    """One daemon, startable again and again; what it writes is appended to `log_path`.

    `variables` are full names (`BILLING_TAILER_AUDIT_GLOBS`); `BILLING_TAILER_HTTP_PORT` is 0 unless given, and the
    real port is read from the log. `script`: see `program`. A context manager: entering starts, leaving kills
    what still runs.
    """

    def __init__(
        self, variables: Mapping[str, str], log_path: Path, arguments: Sequence[str] = ("run",), *, script: str = ""
    ) -> None:
        self.variables = {"BILLING_TAILER_HTTP_PORT": "0", **variables}
        self.log_path = log_path
        self._command = [sys.executable, *program(script), *arguments]
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0  # where the log of the present process begins

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.alive():
            self.kill()

    # --- the process -------------------------------------------------------------------------------------------------

    def start(self) -> Self:
        assert not self.alive(), "the daemon runs already"
        with self.log_path.open("ab") as log:
            self._log_start = log.tell()
            self._process = subprocess.Popen(
                self._command,
                env=clean_environment(self.variables),
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self

    @property
    def pid(self) -> int:
        assert self._process is not None, "the daemon was never started"
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit code, None while it runs."""
        return self._process.poll() if self._process is not None else None

    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def wait(self, timeout: float = 30) -> int:
        """Waits for its end and returns the exit code."""
        assert self._process is not None, "the daemon was never started"
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the daemon did not end within {timeout} s\n{self.tail()}") from None

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None, "the daemon was never started"
        self._process.send_signal(number)

    def terminate(self, timeout: float = 10) -> int:
        """SIGTERM; returns the exit code."""
        self.signal(signal.SIGTERM)
        return self.wait(timeout)

    def kill(self) -> None:
        """SIGKILL: it gets no chance to do anything."""
        self.signal(signal.SIGKILL)
        self.wait()

    # --- what it says ------------------------------------------------------------------------------------------------

    def log(self) -> str:
        """What the present process (or the last one) wrote."""
        with self.log_path.open("rb") as log:
            log.seek(self._log_start)
            return log.read().decode("utf-8", "replace")

    def tail(self) -> str:
        return f"--- {self.log_path}, code {self.returncode} ---\n{self.log()[-LOG_TAIL_BYTES:]}"

    def events(self, event: str | None = None) -> Iterator[dict[str, Any]]:
        """The JSON lines of the log, all or those of one `event`."""
        for line in self.log().splitlines():
            if not line.startswith("{"):
                continue
            try:
                found = json.loads(line)
            except ValueError:  # the last line, being written
                continue
            if event is None or found.get("event") == event:
                yield found

    def wait_until(self, predicate: Callable[[], object], timeout: float = 30, *, what: str = "") -> None:
        """Polls until `predicate` is true; an assertion with the log's end when time is up or the daemon ended."""
        deadline = time.monotonic() + timeout
        while not predicate():
            problem = ""
            if not self.alive():
                problem = "the daemon ended"
            elif time.monotonic() > deadline:
                problem = f"{timeout} s passed"
            if problem and not predicate():  # it may have become true just before
                raise AssertionError(f"{problem} before {what or predicate}\n{self.tail()}")
            time.sleep(POLL_SECONDS)

    def wait_for_event(self, event: str, timeout: float = 30) -> dict[str, Any]:
        """The first log line with that `event`."""
        self.wait_until(lambda: next(self.events(event), None), timeout, what=f"event {event}")
        return next(self.events(event))

    # --- HTTP --------------------------------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        """Where it listens: waits for the `http.listening` line."""
        return f"http://127.0.0.1:{self.wait_for_event('http.listening')['port']}"

    def get(self, path: str, headers: Mapping[str, str] | None = None, timeout: float = 10) -> httpx.Response:
        """GET on the daemon; no proxy of the environment comes between."""
        with httpx.Client(base_url=self.url, trust_env=False, timeout=timeout) as client:
            return client.get(path, headers=dict(headers or {}))

    def metric(self, name: str, labels: str = "") -> float | None:
        """The value of one series of /metrics, such as `metric("billing_tailer_lines_total", '{outcome="fact"}')`."""
        series = f"{name}{labels} "
        for line in self.get("/metrics").text.splitlines():
            if line.startswith(series):
                return float(line.removeprefix(series))
        return None
