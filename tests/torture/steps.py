"""The steps of the product in this process, and what happens at them: the hook that needs no line of product code.

A step is one call that the world outside can see: a round trip to Postgres (BEGIN, each statement, COPY, COMMIT), or
one call of `os` on a file. Only calls that come from `billing_tailer` count; each is named after the function it was
made in.
"""

import os
import sys
import threading
from collections.abc import Callable
from typing import Any, Final, Self

import psycopg

FILE_CALLS: Final = (
    "open",
    "pread",
    "preadv",
    "fstat",
    "stat",
    "lstat",
    "scandir",
    "lseek",
    "write",
    "fsync",
    "rename",
    "unlink",
)
_PASSED_THROUGH: Final = ("psycopg", "psycopg_binary", "pathlib", "contextlib", "posixpath", "glob", __name__)
_VERBS: Final = {"_enter_gen": "begin", "_exit_gen": "commit", "_sync_gen": "sync"}

Hook = Callable[[str, bool], None]
"""Called before (False) and after (True) each step, with its name, in the thread that makes it."""


class Steps:
    """While installed, calls `hook` around every step. A context manager; `remove` puts everything back."""

    def __init__(self, hook: Hook, *, files: bool = True, sql: bool = True) -> None:
        self._hook = hook
        self._files = files
        self._sql = sql
        self._saved: list[tuple[object, str, Any]] = []
        self._inside = threading.local()

    def __enter__(self) -> Self:
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def install(self) -> None:
        """Wrap the calls."""
        if self._files:
            for name in FILE_CALLS:
                self._replace(os, name, self._file_call(name, getattr(os, name)))
        if self._sql:
            self._replace(psycopg.Connection, "wait", self._round_trip(psycopg.Connection.wait))

    def remove(self) -> None:
        """Put back what was wrapped."""
        while self._saved:
            owner, name, real = self._saved.pop()
            setattr(owner, name, real)

    def _replace(self, owner: object, name: str, by: Any) -> None:
        self._saved.append((owner, name, getattr(owner, name)))
        setattr(owner, name, by)

    def _file_call(self, name: str, real: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            site = _site()
            return self._around(f"{site} {name}" if site else None, lambda: real(*arguments, **named))

        return call

    def _round_trip(self, real: Any) -> Any:
        def wait(connection: Any, generator: Any, *arguments: Any, **named: Any) -> Any:
            site = _site()
            step = f"{site} {_verb(generator)}" if site else None
            return self._around(step, lambda: real(connection, generator, *arguments, **named))

        return wait

    def _around(self, step: str | None, call: Callable[[], Any]) -> Any:
        if step is None or getattr(self._inside, "hook", False):
            return call()
        self._tell(step, False)
        result = call()
        self._tell(step, True)
        return result

    def _tell(self, step: str, done: bool) -> None:
        """What the hook itself does is no step."""
        self._inside.hook = True
        try:
            self._hook(step, done)
        finally:
            self._inside.hook = False


def _site() -> str | None:
    """`module.function` of the product that makes the call; None where another one does."""
    frame = sys._getframe(2)
    while frame.f_back is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if module.startswith("billing_tailer."):
            return f"{module.removeprefix('billing_tailer.')}.{frame.f_code.co_name}"
        if not module.startswith(_PASSED_THROUGH):
            return None
        frame = frame.f_back
    return None


def _verb(generator: Any) -> str:
    name = str(getattr(generator, "__name__", "wait"))
    verb = _VERBS.get(name)
    return verb or name.strip("_").removesuffix("_gen")
