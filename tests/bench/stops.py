"""When the machine itself stands still: a process before which the kernel lets no other one go wakes up late.

A virtual machine is stopped by its host for tens of milliseconds, and nothing in it says so. What happens in it then
takes so much longer, whoever does it. Each processor has a process that looks on, and the machine stands still where
all of them do: a stop of one alone may have touched nothing that was measured.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Self

from tests.support.daemon import ROOT

NAP_SECONDS: Final = 0.002
LATE_SECONDS: Final = 0.005
"""Later than that no process of the machine's own makes one of such a priority."""


Span = tuple[float, float]


@dataclass(slots=True)
class Stops:
    """A context manager: looks on while it is entered. spans: from when to when the machine stood still, in seconds of
    the epoch. missing: why it cannot look on."""

    spans: list[Span] = field(default_factory=list)
    missing: str = ""
    processes: "list[subprocess.Popen[str]]" = field(default_factory=list)

    def __enter__(self) -> Self:
        for processor in sorted(os.sched_getaffinity(0)):
            command = [sys.executable, "-m", "tests.bench.stops", str(processor)]
            self.processes.append(
                subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            )
        for process in self.processes:
            assert process.stdout is not None
            self.missing = process.stdout.readline().strip() or self.missing
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        of_each = []
        for process in self.processes:
            said, _ = process.communicate()
            assert process.returncode == 0, "see above"
            of_each.append([_span(line) for line in said.splitlines()])
        self.spans += together(of_each)

    def within(self, began: float, ended: float) -> float:
        """How many seconds between two moments the machine stood still."""
        return sum(max(0.0, min(ended, end) - max(began, start)) for start, end in self.spans)

    def longest(self) -> float:
        """In seconds; 0 where there was none."""
        return max((end - start for start, end in self.spans), default=0.0)


def _span(line: str) -> Span:
    start, end = map(float, line.split())
    return start, end


def together(of_each: Sequence[Sequence[Span]]) -> list[Span]:
    """When all of them stood still at once."""
    common, *others = of_each
    for spans in others:
        pairs = [(max(a, c), min(b, d)) for a, b in common for c, d in spans]
        common = [(start, end) for start, end in pairs if start < end]
    return list(common)


def watch(is_over: Iterable[bool]) -> Iterable[Span]:
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
        os.sched_setaffinity(0, {int(sys.argv[1])})
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    except OSError as error:
        print(f"nobody can look on with a priority over all others: {error.strerror}", flush=True)
        sys.exit()
    print(flush=True)
    for start, end in watch(_closed(sys.stdin.fileno())):
        print(start, end, flush=True)
