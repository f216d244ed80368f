"""A program whose output is read while it runs, and what it leaves behind."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

LOG_TAIL_BYTES = 6000


class Program:
    """A program in a session and process group of its own. A context manager: leaving kills the group."""

    def __init__(self, command: Sequence[str], cwd: Path, environment: Mapping[str, str], log_path: Path) -> None:
        self._log_path = log_path
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # below nohup it is ignored, and what is ignored is inherited
        with log_path.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                cwd=cwd,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    @property
    def output(self) -> str:
        return self._log_path.read_text("utf-8", "replace")

    def wait_for(self, text: str, seconds: float) -> str:
        """The first line of the output that starts with `text`."""

        def found() -> str | None:
            return next((line for line in self.output.splitlines() if line.startswith(text)), None)

        deadline = time.monotonic() + seconds
        while (line := found()) is None:
            ended = self._process.poll() is not None
            late = time.monotonic() > deadline
            if (ended or late) and found() is None:
                what = f"ended with {self._process.returncode}" if ended else f"{seconds} s passed"
                raise AssertionError(f"{what} before {text!r}:\n{self.output[-LOG_TAIL_BYTES:]}")
            time.sleep(0.05)
        return line

    def send(self, number: signal.Signals) -> None:
        """To the program alone."""
        self._process.send_signal(number)

    def send_to_group(self, number: signal.Signals) -> None:
        """To the program and the children that share its group, as a terminal does at Ctrl-C."""
        os.killpg(self._process.pid, number)

    def wait(self, seconds: float) -> int:
        """The exit code, negative for a signal."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still runs after {seconds} s:\n{self.output[-LOG_TAIL_BYTES:]}") from None


def processes_of(directory: Path) -> dict[int, str]:
    """Pid -> command line of every process that runs in, from or with something of `directory`."""
    found = {}
    prefix = str(directory.resolve())
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            command = entry.joinpath("cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
            places = [str(entry.joinpath(name).readlink()) for name in ("cwd", "exe")]
        except OSError:  # it has ended, or is a kernel thread or another user's
            continue
        if prefix in command or any(place.startswith(prefix) for place in places):
            found[int(entry.name)] = command
    return found


def wait_until_none_is_left(directory: Path, seconds: float) -> None:
    """Waits for the end of every process of `directory`."""
    wait(lambda: not processes_of(directory), seconds, lambda: f"still there: {processes_of(directory)}")


def wait(condition: Callable[[], bool], seconds: float, problem: Callable[[], str]) -> None:
    """Waits until a condition holds; an assertion with `problem` when time is up."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"{seconds} s passed: {problem()}")
        time.sleep(0.005)
