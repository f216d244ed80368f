"""What the loop says of itself, for /livez, /readyz and the pages: written by the loop, read by the HTTP thread."""

import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

LIVE_SECONDS_MAX = 30.0
"""Without a tick of the loop for so long, the process is not alive."""


@dataclass(frozen=True, slots=True)
class Sight:
    """What the loop saw of the log files. looked_at: seconds of the epoch at which its last look at the directories
    began. sizes: bytes by file_id, of files in sight; whole: that look saw all files that there should be, and each has
    a position and can be read, or is blocked."""

    looked_at: float
    sizes: Mapping[int, int]
    whole: bool


class Health:
    """Reasons why the tailer is not ready, by topic. An empty list of reasons means ready."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last_tick = time.monotonic()
        self._sight: Sight | None = None
        self._reasons: dict[str, list[str]] = {"starting": ["no look at the log directories yet"]}

    def tick(self) -> None:
        """The loop is turning."""
        self._last_tick = time.monotonic()

    def seconds_since_tick(self) -> float:
        """Age of the last tick."""
        return time.monotonic() - self._last_tick

    def alive(self) -> bool:
        """Whether the loop turns. Never asks Postgres."""
        return self.seconds_since_tick() < LIVE_SECONDS_MAX

    def say(self, topic: str, reasons: Iterable[str]) -> None:
        """Replace what is wrong about a topic; no reasons: nothing is."""
        with self._lock:
            self._reasons[topic] = list(reasons)
            if topic == "files":
                self._reasons["starting"] = []

    def counts(self) -> dict[str, int]:
        """How many reasons there are, by topic, also of topics without trouble."""
        with self._lock:
            return {topic: len(reasons) for topic, reasons in self._reasons.items()}

    def reasons(self) -> dict[str, list[str]]:
        """What is wrong, by topic; topics without trouble are left out."""
        with self._lock:
            return {topic: list(reasons) for topic, reasons in self._reasons.items() if reasons}

    def see(self, sight: Sight | None) -> None:
        """The files as they are now; None while another tailer reads them, or Postgres is away."""
        self._sight = sight

    def sight(self) -> Sight | None:
        """What was seen last."""
        return self._sight
