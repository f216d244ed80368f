"""`make bench`, or `python -m tests.bench` with options: measure, print tables, write a JSON file.

Machines are noisy: what is compared is measured in turn (A, B, A, B ...), and the median of the rounds is told.
Everything runs on an embedded Postgres with fsync on. A figure that fails costs none of the others.
"""

import argparse
import json
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from tests.bench import docs, machine
from tests.bench.amounts import FULL, GB, QUICK, Amounts
from tests.bench.figures import FIGURES
from tests.bench.table import show
from tests.bench.world import World
from tests.support.daemon import ROOT

RESULTS: Final = ROOT / "build" / "bench.json"


def measure(name: str, world: World) -> dict[str, Any]:
    """One figure, as the JSON file has it. error: null, or the traceback of what broke it off."""
    result: dict[str, Any] = {
        "title": FIGURES[name].title,
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "revision": machine.revision(),
        "beside": machine.others(),
        "amounts": asdict(world.amounts),
        "readings": [],
        "error": None,
    }
    started = time.monotonic()
    try:
        result["readings"] = [reading.as_json() for reading in FIGURES[name].measure(world)]
    except Exception:  # noqa: BLE001 - it is told, and the other figures go on
        result["error"] = traceback.format_exc()
    result["seconds"] = round(time.monotonic() - started, 1)
    return result


def run(names: Sequence[str], amounts: Amounts, path: Path, *, keep: bool, console: Console) -> int:
    """Measures and writes; returns the exit code: 1 if a figure broke off."""
    results: dict[str, Any] = {"machine": {}, "figures": {}}
    if keep and path.exists():
        results = json.loads(path.read_text("utf-8"))
    path.parent.mkdir(parents=True, exist_ok=True)
    broken = []
    with World(amounts) as world:
        results["machine"] = machine.describe(world.admin_dsn, world.directory)
        console.print_json(data=results["machine"])
        for name in names:
            found = measure(name, world)
            results["figures"][name] = found
            path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", "utf-8")
            title = f"{name}: {found['title']} ({found['seconds']} s; load {found['beside']['load'][0]})"
            if found["error"] is None:
                show(console, title, found["readings"])
            else:
                broken.append(name)
                console.print(f"{title}\n{found['error']}", style="red", markup=False)
    if broken:
        console.print(f"broke off: {', '.join(broken)}", style="bold red")
    return 1 if broken else 0


def names_of(text: str) -> list[str]:
    """Of `--only`; they come in the order of FIGURES."""
    wanted = set(text.split(","))
    unknown = wanted - FIGURES.keys()
    if unknown:
        raise argparse.ArgumentTypeError(f"no figure {', '.join(sorted(unknown))}: there are {', '.join(FIGURES)}")
    return [name for name in FIGURES if name in wanted]


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--only", type=names_of, default=list(FIGURES), metavar="NAME,...", help=", ".join(FIGURES))
    parser.add_argument("--quick", action="store_true", help="tiny numbers: shows that everything can be measured")
    parser.add_argument("--rounds", type=int, help="of everything that is compared in turn")
    parser.add_argument("--lines", type=int, help="of the backlog")
    parser.add_argument("--settled-calls", type=int, help="of the backlog with callbacks")
    parser.add_argument("--backlog-gb", type=float, help="of the backlog whose memory is measured")
    parser.add_argument("--json", type=Path, default=RESULTS, metavar="PATH", help="default: build/bench.json")
    parser.add_argument("--keep", action="store_true", help="keep the figures of the file that are not measured now")
    parser.add_argument("--write-docs", action="store_true", help="measure nothing: put the file into the document")
    given = parser.parse_args(arguments)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    if given.write_docs:
        return docs.write(given.json, console)
    amounts = QUICK if given.quick else FULL
    changes = {
        "rounds": given.rounds,
        "lines": given.lines,
        "settled_calls": given.settled_calls,
        "backlog_bytes": None if given.backlog_gb is None else int(given.backlog_gb * GB),
    }
    amounts = replace(amounts, **{name: value for name, value in changes.items() if value is not None})
    return run(given.only, amounts, given.json, keep=given.keep, console=console)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
