"""What is measured, by name."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from tests.bench import backlog, growth, latency, peers, resources, serving
from tests.bench.readings import Reading
from tests.bench.world import World


@dataclass(frozen=True, slots=True)
class Figure:
    """title: as the table has it."""

    title: str
    measure: Callable[[World], Sequence[Reading]]


FIGURES: Final[Mapping[str, Figure]] = {
    # single things first: a disk that has just taken tens of gigabytes is slow for minutes after
    "idle": Figure("Nothing to do", resources.idle),
    "latency": Figure("Single lines", latency.lines),
    "settling": Figure("Single calls", latency.settling),
    "callbacks": Figure("Callbacks accepted", serving.callbacks),
    "waiters": Figure("Clients that wait for runs", serving.waiters),
    "backlog": Figure("A backlog, to facts", backlog.facts),
    "receipts": Figure("A backlog with its callbacks, to receipts", backlog.receipts),
    "growth-files": Figure("Files in the volume", growth.files),
    # before more receipts come to those of the page
    "page": Figure("The activity page", serving.page),
    "growth-receipts": Figure("Receipts in the database", growth.receipts),
    "peers": Figure("The same log with other programs", peers.throughput),
    "memory": Figure("Memory", resources.memory),
    "start": Figure("Start on a long log", growth.starts),
}
