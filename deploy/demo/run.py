"""What `make run` runs: the daemon, and where no log is named, a demonstration log for it to follow.

Without BILLING_TAILER_AUDIT_GLOBS, `feed.py` appends recorded real lines to a log under the data directory and the
daemon follows that one; this process says where everything can be seen. It hands a request to stop to the daemon once,
however often it came (make passes SIGTERM on to a process that a signal to the whole group has reached already, and a
second signal makes the daemon drop everything), and a later one as a second one. Neither child outlives it, even if it
is killed. tests/e2e/test_demo.py and tests/e2e/test_make_run.py hold that.
"""

import ctypes
import glob
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Final

from billing_tailer.embedded import default_data_dir
from billing_tailer.errors import ConfigError
from billing_tailer.settings import PREFIX, Settings, load

ROOT: Final = Path(__file__).resolve().parents[2]
DAEMON: Final = (sys.executable, "-m", "billing_tailer", "run")
FEEDER: Final = (sys.executable, str(ROOT / "deploy/demo/feed.py"), str(ROOT / "tests/data/audit.jsonl"))
FACTS: Final = 'billing_tailer_lines_total{outcome="fact"} '
POLL_SECONDS: Final = 0.1
ONE_REQUEST_SECONDS: Final = 1.0
"""Signals that come within this time are one request to stop."""
_PR_SET_PDEATHSIG: Final = 1


def main() -> int:
    """Returns the exit code: the daemon's, 1 where a signal or the loss of the feeder ended it."""
    if "MAKELEVEL" in os.environ:
        _end_with(os.getppid())  # otherwise a killed `make` would leave the daemon behind
    environment = dict(os.environ)
    if sys.stdout.isatty() and not _given("LOG_FORMAT"):
        environment[f"{PREFIX}LOG_FORMAT"] = "console"
    if _given("AUDIT_GLOBS"):
        return Processes(environment).run()
    try:
        demo = Demo(load(environment))
        demo.make_directories()
    except ConfigError as error:
        print(f"billing-tailer: {error}", file=sys.stderr)
        return error.exit_code
    environment |= demo.variables
    for name in demo.variables:
        environment.pop(f"{name}_FILE", None)  # what it says is in the variable now, and both are an error
    return Processes(environment, demo).run()


def _given(name: str) -> bool:
    return any(f"{PREFIX}{name}{suffix}" in os.environ for suffix in ("", "_FILE"))


class Demo:
    """Where the demonstration has its log, and where it can be seen."""

    def __init__(self, settings: Settings) -> None:
        self._embedded = settings.uses_embedded_postgres
        # a database of its own: demonstration facts must never stand beside real ones
        self._data_dir = (settings.data_dir or default_data_dir(os.environ)) / "demo"
        self.log_dir = self._data_dir / "billing"
        host, port = settings.http_host, settings.http_port or _free_port(settings.http_host)
        reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - is replaced here
        self._url = f"http://{f'[{reachable}]' if ':' in reachable else reachable}:{port}"
        self.variables = {
            f"{PREFIX}AUDIT_GLOBS": f"{glob.escape(str(self.log_dir))}/audit*.jsonl*",
            f"{PREFIX}HTTP_PORT": str(port),
            f"{PREFIX}DATA_DIR": str(self._data_dir),
        }
        if not self._embedded and not _given("SOURCE_ID"):
            self.variables[f"{PREFIX}SOURCE_ID"] = "demo"  # no part of a real source that lives in that database
        self.port_was_free = not _listens(reachable, port)

    def make_directories(self) -> None:
        """The directory of the log, with the modes that the embedded Postgres gives to the data directory."""
        missing = [path for path in (self.log_dir, *self.log_dir.parents) if not path.exists()]
        try:
            self.log_dir.mkdir(parents=True, exist_ok=True)
            if os.geteuid() == 0:
                for path in missing:
                    path.chmod(0o755)
            elif self._data_dir in missing:
                self._data_dir.chmod(0o700)
        except OSError as error:
            raise ConfigError(
                f"cannot make {self.log_dir}: {error.strerror}",
                "set BILLING_TAILER_DATA_DIR to a directory that this user can write",
            ) from error

    def where(self) -> str:
        """Where the page, status, metrics and data can be seen."""
        asked = {name: os.environ[name] for key in ("DB_SCHEMA", "SOURCE_ID") if (name := PREFIX + key) in os.environ}
        asked |= {name: value for name, value in self.variables.items() if not name.endswith("HTTP_PORT")}
        status = Path(sys.executable).parent / "billing-tailer"
        command = [f"{name}={shlex.quote(value)}" for name, value in asked.items()]
        command += [shlex.quote(str(status.relative_to(ROOT) if status.is_relative_to(ROOT) else status)), "status"]
        data = f"{self._data_dir} (embedded Postgres)" if self._embedded else "the database of your environment"
        return "\n".join(
            [
                f"  page     {self._url}/",
                f"  status   {' '.join(command)}",
                f"  health   {self._url}/livez  {self._url}/readyz",
                f"  metrics  {self._url}/metrics",
                f"  log      {self.log_dir}",
                f"  data     {data}",
            ]
        )

    def facts(self) -> int:
        """How many facts the daemon has committed, by its metrics; 0 while it does not answer."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(f"{self._url}/metrics", timeout=1) as response:
                lines = response.read().decode().splitlines()
        except OSError:
            return 0
        return next((int(float(line.removeprefix(FACTS))) for line in lines if line.startswith(FACTS)), 0)

    def first_facts(self, count: int) -> str:
        """The line that says that it works."""
        return f"first facts committed: {count} calls, see {self._url}/metrics, and in another terminal in {ROOT}:"


class Processes:
    """The daemon and, in a demonstration, the feeder."""

    def __init__(self, environment: dict[str, str], demo: Demo | None = None) -> None:
        self._environment = environment
        self._demo = demo
        self._stop_asked: list[float] = []
        self._stops_sent = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup
            signal.signal(signal.SIGHUP, self._on_signal)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self._stop_asked or now - self._stop_asked[-1] > ONE_REQUEST_SECONDS:
            self._stop_asked.append(now)

    def run(self) -> int:
        """Start them, wait for the end of the daemon, end the feeder; returns the exit code."""
        feeder = None
        if self._demo is not None:
            _say(
                f"BILLING_TAILER_AUDIT_GLOBS is not set: following a live feed of recorded lines\n{self._demo.where()}"
            )
            feeder = self._start([*FEEDER, str(self._demo.log_dir)])
        daemon = self._start(DAEMON)
        feeder_failed = False
        # where the port is another process's, the daemon ends and says so: its numbers are not ours to show
        quiet = self._demo is None or not self._demo.port_was_free
        while daemon.poll() is None:
            if feeder is not None and feeder.poll() is not None and not self._stop_asked:
                _say(f"the feeder has ended with code {feeder.returncode}: stopping")
                feeder_failed = True
                self._stop_asked.append(time.monotonic())
            self._pass_on(daemon)
            if not quiet and not self._stop_asked:
                quiet = self._announce()
            time.sleep(POLL_SECONDS)
        if feeder is not None:
            feeder.kill()
            feeder.wait()
        return 1 if feeder_failed else self._exit_code(daemon.returncode)

    def _pass_on(self, daemon: subprocess.Popen[bytes]) -> None:
        while self._stops_sent < len(self._stop_asked):
            self._stops_sent += 1
            daemon.send_signal(signal.SIGTERM)

    def _announce(self) -> bool:
        assert self._demo is not None
        count = self._demo.facts()
        if count > 0:
            _say(f"{self._demo.first_facts(count)}\n{self._demo.where()}")
        return count > 0

    def _exit_code(self, returncode: int) -> int:
        if returncode >= 0:
            return returncode
        stopped_while_starting = returncode == -signal.SIGTERM and self._stops_sent == 1
        return 0 if stopped_while_starting else 1

    def _start(self, command: Sequence[str]) -> subprocess.Popen[bytes]:
        owner = os.getpid()
        return subprocess.Popen(
            command,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C reaches this process, which passes it on
            preexec_fn=lambda: _end_with(owner),  # noqa: PLW1509 - there are no threads here
        )


def _end_with(parent: int) -> None:
    """Have the kernel send us SIGTERM when the parent ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)  # it ended before we asked


def _free_port(host: str) -> int:
    """A port that nobody has at this moment; 0 for a host that is not ours, of which the daemon will complain."""
    try:
        with socket.create_server((host, 0), family=_family(host)) as listener:
            return int(listener.getsockname()[1])
    except OSError:
        return 0


def _listens(host: str, port: int) -> bool:
    with socket.socket(_family(host), socket.SOCK_STREAM) as client:
        client.settimeout(1)
        try:
            client.connect((host, port))
        except OSError:
            return False
        return True


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
