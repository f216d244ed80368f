"""The tables of docs/performance.md, from the JSON file of a run: `python -m tests.bench --write-docs`."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from tests.bench.figures import FIGURES
from tests.bench.table import HEADER, cells, markdown
from tests.support.daemon import ROOT

DOCUMENT: Final = ROOT / "docs" / "performance.md"
MACHINE: Final = "machine"
NOT_YET: Final = "Not measured yet."
MARKER: Final = re.compile(r"<!-- /?bench-([a-z-]+) -->")
_PART: Final = re.compile(
    r"(?P<open><!-- bench-(?P<name>[a-z-]+) -->)\n.*?(?P<close><!-- /bench-(?P=name) -->)", re.DOTALL
)


def write(path: Path, console: Console) -> int:
    """Puts a run into the document; returns the exit code."""
    if not path.exists():
        console.print(f"there is no {path}: run python -m tests.bench first", style="red")
        return 1
    results = json.loads(path.read_text("utf-8"))
    quick = [name for name, found in results["figures"].items() if found["amounts"]["quick"]]
    if quick:
        console.print(f"{', '.join(quick)}: of a --quick run, which measures nothing; not written", style="red")
        return 1
    DOCUMENT.write_text(rendered(DOCUMENT.read_text("utf-8"), results), "utf-8")
    console.print(f"written: docs/{DOCUMENT.name}")
    return 0


def rendered(text: str, results: Mapping[str, Any]) -> str:
    """The text with every part as the run has it. Parts whose figure the run lacks stay as they are."""

    def part(match: re.Match[str]) -> str:
        name = match["name"]
        if name == MACHINE:
            body = machine(results["machine"])
        elif name in results["figures"]:
            body = figure(results["figures"][name])
        else:
            return match[0]
        return f"{match['open']}\n{body}\n{match['close']}"

    return _PART.sub(part, text)


def machine(found: Mapping[str, Any]) -> str:
    """What it was measured on."""
    rows = [(name.replace("_", " "), str(value)) for name, value in found.items() if not isinstance(value, dict)]
    settings = ", ".join(f"`{name}={value}`" for name, value in found["postgres_settings"].items())
    return markdown(("", ""), [*rows, ("Postgres settings", settings)])


def figure(found: Mapping[str, Any]) -> str:
    """A figure's table, and when it was measured beside what."""
    load = found["beside"]["load"][0]
    busy = ", ".join(f"{name} {share:.0%} of a core" for name, share in found["beside"]["busy"].items())
    rest = f"Measured {found['measured_at'][:16].replace('T', ' ')} UTC at {found['revision']}, load before {load}"
    said = f"{rest}, beside {busy}." if busy else f"{rest}."
    if found["error"] is not None:
        return f"{said} It broke off: {found['error'].strip().splitlines()[-1]}"
    return f"{markdown(HEADER, map(cells, found['readings']))}\n\n{said}"


def names() -> list[str]:
    """Every part that the document must have."""
    return [MACHINE, *FIGURES]
