"""How much of everything a run measures."""

from dataclasses import dataclass
from typing import Final

GB: Final = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Amounts:
    """rounds: of everything that is compared in turn. lines: of a backlog. settled_calls: of one with its
    callbacks, which takes so much longer. latency: (calls per second, seconds). receipts: how many are in the
    database while the backlog is read, the last one also for the page. roomy: settings of a Postgres with memory
    for the indexes of the most of them. start_log: bytes of the long log that a process starts on. posting: seconds
    for each number of posters."""

    rounds: int
    lines: int
    settled_calls: int
    latency: tuple[tuple[int, float], ...]
    backlog_bytes: int
    outage_bytes: int
    idle_seconds: float
    receipts: tuple[int, ...]
    roomy: tuple[str, ...]
    files: int
    start_log_bytes: int
    starts: int
    posters: tuple[int, ...]
    posting_seconds: float
    waiters: int
    page_loads: int
    quick: bool = False


FULL: Final = Amounts(
    rounds=3,
    lines=1_000_000,
    settled_calls=100_000,
    latency=((1, 20), (200, 20), (1_000, 20)),
    backlog_bytes=5 * GB,
    outage_bytes=GB,
    idle_seconds=60,
    receipts=(0, 1_000_000, 10_000_000),
    roomy=("shared_buffers=4GB", "max_wal_size=16GB", "checkpoint_timeout=30min"),
    files=500,
    start_log_bytes=10 * GB,
    starts=5,
    posters=(1, 8, 64),
    posting_seconds=10,
    waiters=500,
    page_loads=5,
)
QUICK: Final = Amounts(
    rounds=1,
    lines=2_000,
    settled_calls=1_000,
    latency=((1, 1), (200, 0.3), (1_000, 0.3)),
    backlog_bytes=2_000_000,
    outage_bytes=2_000_000,
    idle_seconds=0.5,
    receipts=(0, 1_000),
    roomy=("shared_buffers=64MB",),
    files=20,
    start_log_bytes=5_000_000,
    starts=1,
    posters=(1, 8, 64),
    posting_seconds=0.2,
    waiters=50,
    page_loads=1,
    quick=True,
)
"""Shows that everything can be measured, and measures nothing."""
