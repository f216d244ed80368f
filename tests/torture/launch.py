"""The daemon as a process, started in milliseconds: forked from this one, which has imported everything.

To be used from a process with one thread. The child is the real program from its entry on: `cli.main()` with its own
environment, its own log, its own signals; it ends with its parent.
"""

import ctypes
import faulthandler
import mmap
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from billing_tailer import cli, run_cli
from tests.support.daemon import clean_environment
from tests.torture.steps import Steps

PRELOADED: Final = (run_cli,)
"""Verbs load what they need when they are called; here that is loaded once, and not by every fork."""
NAME_BYTES_MAX: Final = 200
_PR_SET_PDEATHSIG: Final = 1
DURING_SECONDS_MAX: Final = 0.002
STACKS_SECONDS: Final = 0.5


@dataclass(frozen=True, slots=True)
class Kill:
    """When a daemon dies by its own hand: before, after or within step `step` (from 0) of phase `phase`."""

    phase: int
    step: int
    when: str = "before"


class Shared:
    """Memory that the parent and its forked children see: the phase of the scenario, and a daemon's last words."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)

    def begin(self) -> None:
        """Of one run."""
        self._memory[:] = bytes(mmap.PAGESIZE)

    @property
    def phase(self) -> int:
        return self._memory[0]

    @phase.setter
    def phase(self, number: int) -> None:
        self._memory[0] = number

    @property
    def died_at(self) -> str:
        """The name of the step a daemon killed itself at; empty if none did."""
        return self._memory[1024 : 1024 + NAME_BYTES_MAX].rstrip(b"\0").decode()

    @died_at.setter
    def died_at(self, name: str) -> None:
        data = name.encode()[:NAME_BYTES_MAX]
        self._memory[1024 : 1024 + len(data)] = data


class Forked:
    """One daemon, forked from this process."""

    def __init__(
        self,
        variables: Mapping[str, str],
        log_path: Path,
        shared: Shared,
        kill: Kill | None = None,
        trace: Path | None = None,
    ) -> None:
        """kill: when it dies by its own hand. trace: where it writes the phase and the name of every step."""
        self._log_path = log_path
        self._shared = shared
        self._status: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            code = 70
            try:
                code = self._be_the_daemon(variables, kill, trace)
            finally:
                if sys.exc_info()[0] is not None:
                    traceback.print_exc()  # into the daemon's log
                os._exit(code)  # without the finalizers: the sockets that were inherited belong to the parent

    def _be_the_daemon(self, variables: Mapping[str, str], kill: Kill | None, trace: Path | None) -> int:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        log = os.open(self._log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        environment = clean_environment(variables)
        os.environ.clear()
        os.environ.update(environment)
        faulthandler.register(signal.SIGUSR1)
        sys.argv = ["billing-tailer", "run"]
        if trace is not None:
            Steps(_Tracer(self._shared, trace)).install()
        elif kill is not None:
            Steps(_Executioner(self._shared, kill)).install()
        try:
            cli.main()
        except SystemExit as ended:
            sys.stdout.flush()
            return ended.code if isinstance(ended.code, int) else 1

    @property
    def code(self) -> int | None:
        """The exit code, minus the signal that ended it, or None while it runs."""
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid == self.pid:
                self._status = os.waitstatus_to_exitcode(status)
        return self._status

    def show_stacks(self) -> None:
        """Where each thread of a daemon stands that runs, into its log."""
        if self.code is None:
            os.kill(self.pid, signal.SIGUSR1)
            time.sleep(STACKS_SECONDS)

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        if self.code is None:
            os.kill(self.pid, signal.SIGKILL)
            self._status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


class _Tracer:
    """The hook of a daemon that tells its steps, a line each: the phase, a space, the name."""

    def __init__(self, shared: Shared, path: Path) -> None:
        self._shared = shared
        self._out = path.open("a", buffering=1)

    def __call__(self, step: str, done: bool) -> None:
        if not done:
            self._out.write(f"{self._shared.phase} {step}\n")


class _Executioner:
    """The hook of a daemon that kills itself."""

    def __init__(self, shared: Shared, kill: Kill) -> None:
        self._shared = shared
        self._kill = kill
        self._marked: tuple[int, str] | None = None  # dies when this thread's step returns
        self._steps: Counter[int] = Counter()  # by phase
        self._lock = threading.Lock()

    def __call__(self, step: str, done: bool) -> None:
        if done:
            if self._marked == (threading.get_ident(), step):
                self._die(step)
            return
        kill = self._kill
        with self._lock:
            phase = self._shared.phase
            number = self._steps[phase]
            self._steps[phase] += 1
        if (phase, number) != (kill.phase, kill.step):
            return
        if kill.when == "before":
            self._die(step)
        elif kill.when == "after":
            self._marked = (threading.get_ident(), step)
        else:
            threading.Thread(target=self._die_soon, args=(step,), daemon=True).start()

    def _die(self, step: str) -> None:
        self._shared.died_at = step
        os.kill(os.getpid(), signal.SIGKILL)

    def _die_soon(self, step: str) -> None:
        time.sleep(random.uniform(0, DURING_SECONDS_MAX))
        self._die(step)
