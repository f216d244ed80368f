"""When the machine itself stands still: a process before which the kernel lets no other one go wakes up late.

A virtual machine is stopped by its host for tens of milliseconds, and nothing in it says so. What happens in it then
takes so much longer, whoever does it. One process sees one processor: a stop of another one is not seen, and one that
did not touch the daemon is.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Self

from tests.support.daemon import ROOT

NAP_SECONDS: Final = 0.002
LATE_SECONDS: Final = 0.005
"""Later than that no process of the machine's own makes one of such a priority."""


@dataclass(slots=True)
class Stops:
    """A context manager: looks on while it is entered. spans: from when to when the machine stood still, in seconds of
    the epoch. missing: why it cannot look on."""

    spans: list[tuple[float, float]] = field(default_factory=list)
    missing: str = ""
    _process: "subprocess.Popen[str] | None" = None

    def __enter__(self) -> Self:
        command = [sys.executable, "-m", "tests.bench.stops"]
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.missing = self._process.stdout.readline().strip()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process is not None
        said, _ = self._process.communicate()
        assert self._process.returncode == 0, "see above"
        self.spans += [_span(line) for line in said.splitlines()]

    def within(self, began: float, ended: float) -> float:
        """How many seconds between two moments the machine stood still."""
        return sum(max(0.0, min(ended, end) - max(began, start)) for start, end in self.spans)

    def longest(self) -> float:
        """In seconds; 0 where there was none."""
        return max((end - start for start, end in self.spans), default=0.0)


def _span(line: str) -> tuple[float, float]:
    start, end = map(float, line.split())
    return start, end


def watch(is_over: Iterable[bool]) -> Iterable[tuple[float, float]]:
    """The spans as they are found; is_over: asked after each nap."""
    for over in is_over:
        if over:
            return
        began = time.time()
        time.sleep(NAP_SECONDS)
        woke = time.time()
        if woke - began > NAP_SECONDS + LATE_SECONDS:
            yield began + NAP_SECONDS, woke


def _closed(descriptor: int) -> Iterable[bool]:
    """Whether the other end was closed, each time it is asked."""
    os.set_blocking(descriptor, False)
    while True:
        try:
            yield os.read(descriptor, 1) == b""
        except BlockingIOError:
            yield False


if __name__ == "__main__":
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    except OSError as error:
        print(f"no priority over all others: {error.strerror}", flush=True)
        sys.exit()
    print(flush=True)
    for start, end in watch(_closed(sys.stdin.fileno())):
        print(start, end, flush=True)
