"""What the kernel says of processes: CPU, memory, wake-ups."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

TICKS_PER_SECOND: Final = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid: int, *, children: bool = False) -> float:
    """Of a process with all its threads, those that have ended too. children: also of its children that have ended.
    0 where there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return sum(map(int, fields[11 : 15 if children else 13])) / TICKS_PER_SECOND


def tree_cpu_seconds(pid: int) -> float:
    """Of a process and all its children, ended ones too: for a Postgres server, all that it does."""
    return cpu_seconds(pid, children=True) + sum(cpu_seconds(child) for child in children_of(pid))


def children_of(pid: int) -> list[int]:
    """Those that it has now."""
    found: list[int] = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                parent = int((entry / "stat").read_text("utf-8").rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
            if parent == pid:
                found.append(int(entry.name))
    return found


def memory_mb(pid: int) -> tuple[float, float]:
    """Resident now, and at most until now."""
    fields = dict(_status(Path(f"/proc/{pid}/status")))
    return int(fields["VmRSS"].split()[0]) / 1024, int(fields["VmHWM"].split()[0]) / 1024


@dataclass(frozen=True, slots=True)
class Activity:
    """Of all threads of a process, up to a moment. switches: how often they gave the processor away."""

    cpu_seconds: float
    switches: int


def activity(pid: int) -> Activity:
    """To the nanosecond, where `cpu_seconds` counts in hundredths: an idle process needs less than that."""
    nanoseconds = switches = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        nanoseconds += int((task / "schedstat").read_text("ascii").split()[0])
        fields = dict(_status(task / "status"))
        switches += int(fields["voluntary_ctxt_switches"]) + int(fields["nonvoluntary_ctxt_switches"])
    return Activity(nanoseconds / 1e9, switches)


def _status(path: Path) -> list[tuple[str, str]]:
    pairs = (entry.partition(":") for entry in path.read_text("utf-8").splitlines())
    return [(name, value.strip()) for name, _, value in pairs]
