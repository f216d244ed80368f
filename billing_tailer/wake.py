"""Wakes the loop when something happens in a log directory. The poll alone is enough; this only makes it sooner.

inotify misses remote writers, overlay file systems' lower layers and queue overflows, so that nothing may depend on it
(tests/test_wake.py).
"""

import os
import threading
from collections.abc import Callable, Container, Iterable
from pathlib import Path

from watchdog.events import (
    FileCreatedEvent,
    FileDeletedEvent,
    FileModifiedEvent,
    FileMovedEvent,
    FileSystemEvent,
    FileSystemEventHandler,
)
from watchdog.observers import Observer
from watchdog.observers.api import BaseObserver, ObservedWatch

# reading makes events of its own (opened, closed): only what a writer or a rotation does may wake us
_EVENTS: list[type[FileSystemEvent]] = [FileModifiedEvent, FileCreatedEvent, FileMovedEvent, FileDeletedEvent]


class Wake(FileSystemEventHandler):
    """An event that file system events set, and that the loop waits for."""

    def __init__(self, concerns: Callable[[str], bool] = lambda _: True, told: Container[str] = ()) -> None:
        """concerns: whether a path is of interest; what happens to other files in the same directories is not. told:
        directories whose writer calls `set`: to hear of each write twice costs two threads a turn."""
        self._concerns = concerns
        self._told = told
        self._event = threading.Event()
        self._observer: BaseObserver | None = None
        self._watched: dict[str, tuple[tuple[int, int], ObservedWatch]] = {}
        self.trouble: str | None = None

    def start(self) -> None:
        """Start watchdog's threads; where inotify is not to be had, `trouble` says why and the poll does the work."""
        try:
            observer = Observer()  # opens inotify
            observer.start()
        except OSError as error:
            self.trouble = str(error)
        else:
            self._observer = observer

    def watch(self, directories: Iterable[str]) -> None:
        """Watch these directories, also those that were made anew under the same name; what cannot be watched is tried
        again next time."""
        if self._observer is None:
            return
        found: dict[str, tuple[int, int]] = {}
        troubles = []
        for directory in directories:
            if directory in self._told:
                continue
            try:
                status = Path(directory).stat()
                found[directory] = (status.st_dev, status.st_ino)
            except OSError as error:
                troubles.append(f"{directory}: {error}")
        for directory, (identity, watch) in list(self._watched.items()):
            if found.get(directory) != identity:
                del self._watched[directory]
                self._observer.unschedule(watch)
        for directory in found.keys() - self._watched.keys():
            try:
                watch = self._observer.schedule(self, directory, event_filter=_EVENTS)
                self._watched[directory] = (found[directory], watch)
            except OSError as error:
                troubles.append(f"{directory}: {error}")
        self.trouble = "; ".join(troubles) or None

    def on_any_event(self, event: FileSystemEvent) -> None:
        """watchdog's thread: only note it, and act at the loop's own pace."""
        if self._concerns(os.fsdecode(event.src_path)) or self._concerns(os.fsdecode(event.dest_path)):
            self._event.set()

    def set(self) -> None:
        """Wake the loop for another reason."""
        self._event.set()

    def wait(self, seconds: float) -> None:
        """Until something happens, or the time is up."""
        self._event.wait(seconds)
        self._event.clear()

    def stop(self) -> None:
        """End watchdog's threads."""
        if self._observer is not None:
            self._observer.stop()
            self._observer.join(timeout=1)
