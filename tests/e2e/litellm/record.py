"""Writes tests/data/litellm/ anew, from one drive of all cases: `python -m tests.e2e.litellm.record`.

- cases.jsonl: what was sent, and what to expect of it
- audit.jsonl: nginx's lines
- callback_bodies.jsonl: the bodies of LiteLLM's POSTs, one a line, in the order in which they came
- spend_logs_v2.jsonl: the pages of LiteLLM's /spend/logs/v2, one a line, oldest row first

All as it was, prompts included, but for what is long and says nothing of a call: LiteLLM's price list is cut down to
the prices, tracebacks are cut short. Paths and ports of the machine are replaced.
"""

import dataclasses
import json
import re
import sys
import tempfile
import time
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

from billing_tailer.embedded import EmbeddedPostgres
from tests.e2e.litellm.cases import Call, drive
from tests.e2e.litellm.install import installed
from tests.e2e.litellm.recorder import TOKEN, Recorder
from tests.e2e.litellm.stack import Stack
from tests.e2e.nginx import Nginx
from tests.support.daemon import ROOT

DATA: Final = ROOT / "tests/data/litellm"
PAGE_ROWS: Final = 10  # so that there is more than one page
QUIET_SECONDS: Final = 15
TRACEBACK_CHARACTERS_MAX: Final = 200
PRICE: Final = re.compile(r"key|mode|litellm_provider|(in|out)put_cost_per_token|cache_\w+_token_cost")
PORTS: Final = re.compile(r"(127\.0\.0\.1:)\d+")


def shortened(value: Any) -> Any:
    """The same structure with less in it."""
    if isinstance(value, str):
        for path in (str(installed().directory), sys.base_prefix):
            value = value.replace(path, "/app")
        return PORTS.sub(r"\g<1>9000", value)
    if isinstance(value, list):
        return [shortened(item) for item in value]
    if not isinstance(value, dict):
        return value
    short = {key: shortened(item) for key, item in value.items()}
    if isinstance(short.get("model_map_value"), dict):
        short["model_map_value"] = {k: v for k, v in short["model_map_value"].items() if PRICE.fullmatch(k)}
    if isinstance(short.get("traceback"), str):
        short["traceback"] = short["traceback"][:TRACEBACK_CHARACTERS_MAX]
    return short


def write(name: str, values: Iterable[Any]) -> None:
    """One JSON text a line; floats get the digits that they came with."""
    text = "".join(json.dumps(shortened(value), separators=(",", ":"), default=float) + "\n" for value in values)
    machine = re.search(r"/(?:root|home|tmp|var)/[^\"]*", text)
    assert machine is None, f"{name} names {machine[0]}"
    DATA.joinpath(name).write_text(text, "utf-8")


def case_of(call: Call) -> dict[str, Any]:
    """A call as JSON; its cost is exact text."""
    case = dataclasses.asdict(call)
    cost = call.expect.cost_usd
    return {**case, "expect": {**case["expect"], "cost_usd": None if cost is None else str(cost)}}


def main() -> None:
    """Drives and writes."""
    DATA.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="billing-tailer-record-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        for part in ("litellm", "nginx"):
            directory.joinpath(part).mkdir()
        with (
            EmbeddedPostgres(directory / "postgres") as postgres,
            Recorder() as recorder,
            Stack(directory / "litellm", postgres.dsn, recorder.url, TOKEN) as stack,
            Nginx(directory / "nginx", stack.address) as nginx,
        ):
            start = datetime.now(UTC) - timedelta(minutes=2)
            calls = list(drive(f"http://127.0.0.1:{nginx.port}"))
            time.sleep(QUIET_SECONDS)
            end = datetime.now(UTC) + timedelta(minutes=2)
            write("cases.jsonl", map(case_of, calls))
            write("audit.jsonl", map(json.loads, nginx.log.read_text("utf-8").splitlines()))
            write("callback_bodies.jsonl", (json.loads(post.body) for post in recorder.posts))
            write("spend_logs_v2.jsonl", stack.spend_logs_pages(start, end, PAGE_ROWS))


if __name__ == "__main__":
    main()
