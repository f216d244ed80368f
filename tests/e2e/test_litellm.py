"""Real money: LiteLLM behind nginx, every known case driven once, billed by three daemons that see different sources.

One daemon gets LiteLLM's callbacks, one asks its spend logs, one does both. Each has a database of its own, follows the
same audit log, and must come to the bill that is known in advance (tests/e2e/litellm/cases.py), to the last digit.
LiteLLM loses events while a POST of its own is under way: a case whose events did not all come is sent again, and what
was lost is no case for the daemon that has callbacks alone.
"""

import dataclasses
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, Final

import psycopg
import pytest
from psycopg import sql

from tests.e2e.litellm import bills
from tests.e2e.litellm.bills import Rules
from tests.e2e.litellm.cases import ACCOUNT, PRIVATE_TEXTS, Call, Outcome, drive
from tests.e2e.litellm.recorder import TOKEN, Recorder
from tests.e2e.litellm.stack import MASTER_KEY, Stack
from tests.e2e.nginx import Nginx
from tests.support import database
from tests.support.daemon import Daemon

MARKUP: Final = Decimal("1.2")
ROUNDS_MAX: Final = 4
EVENT_SECONDS_MAX: Final = 10
ROW_SECONDS_MAX: Final = 60
SETTLED_SECONDS_MAX: Final = 120
DEADLINE_SECONDS: Final = 45
"""Long enough for LiteLLM's rows to appear, which is why nothing but the row that it drops is overdue in the end."""

SOURCES: Final = {
    "callbacks": {"callback"},
    "spend-logs": {"spend_logs"},
    "both": {"callback", "spend_logs"},
}

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]


@dataclass
class Biller:
    """A daemon with its sources; `rules` are what it was told."""

    daemon: Daemon
    dsn: str
    directory: Path
    rules: Rules


@dataclass
class Drive:
    """What was sent, and what LiteLLM said of it: the costs of each call by source. `deadline`, on the monotonic clock,
    is when every bill must be right."""

    calls: list[Call]
    billers: dict[str, Biller]
    said: dict[str, dict[str, list[Decimal]]]
    recorder: Recorder
    deadline: float

    def call_of(self, call: Call, biller: Biller) -> Call | None:
        """The call with what this daemon can know of it; None where LiteLLM lost events that it would have needed."""
        if "spend_logs" in biller.rules.sources and call.expect.row:
            return call
        if "callback" in biller.rules.sources:
            return call if _events(self.recorder, call) >= call.expect.events else None
        if call.expect.outcome is Outcome.NO_CALL:
            return call
        overdue = dataclasses.replace(call.expect, outcome=Outcome.OVERDUE, model_mismatch=False)
        return dataclasses.replace(call, expect=overdue)

    def said_of(self, call_id: str, biller: Biller) -> Decimal | None:
        """LiteLLM's own sum of a call: the larger of those of the sources that the daemon has."""
        sums = [
            bills.total(self.said[source][call_id]) for source in biller.rules.sources if call_id in self.said[source]
        ]
        return max(sums, default=None)


# --- the drive ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def driven(session_dir: Path, admin_dsn: str, template_database: str) -> Iterator[Drive]:
    with ExitStack() as running:
        directory = session_dir / "litellm"
        for name in ("litellm", "nginx"):
            directory.joinpath(name).mkdir(parents=True)
        recorder = running.enter_context(Recorder())
        stack = running.enter_context(Stack(directory / "litellm", admin_dsn, recorder.url, TOKEN))
        nginx = running.enter_context(Nginx(directory / "nginx", stack.address))
        billers = {}
        for name in SOURCES:
            dsn = running.enter_context(database.temporary(admin_dsn, template_database))
            billers[name] = _biller(name, directory / name, dsn, nginx, stack)
            running.enter_context(billers[name].daemon)
            if "callback" in billers[name].rules.sources:
                recorder.pass_on_to(billers[name].daemon.url)
        start = datetime.now(UTC) - timedelta(minutes=2)
        calls = _drive_all(f"http://127.0.0.1:{nginx.port}", recorder)
        rows = _rows(stack, start, calls)
        costs = {"callback": _costs(recorder.events(), "response_cost"), "spend_logs": _costs(rows, "spend")}
        yield Drive(calls, billers, costs, recorder, time.monotonic() + SETTLED_SECONDS_MAX)


def _biller(name: str, directory: Path, dsn: str, nginx: Nginx, stack: Stack) -> Biller:
    directory.mkdir()
    sources = SOURCES[name]
    variables = {"DATABASE_URL": dsn, "AUDIT_GLOBS": f"{nginx.log_dir}/audit*.jsonl*"}
    variables |= {"FREE_MODELS": "up-free-declared", "MARKUP_FACTOR": str(MARKUP)}
    if "callback" in sources:
        variables |= {"CALLBACK_TOKEN": TOKEN, "SPOOL_DIR": str(directory / "spool")}
        directory.joinpath("spool").mkdir()
    if "spend_logs" in sources:
        variables |= {"LITELLM_URL": stack.url, "LITELLM_API_KEY": MASTER_KEY}
    if sources == {"spend_logs"}:
        variables["SETTLE_DEADLINE_SECONDS"] = str(DEADLINE_SECONDS)
    environment = {f"BILLING_TAILER_{key}": value for key, value in variables.items()}
    rules = Rules(ACCOUNT, MARKUP, sources)
    return Biller(Daemon(environment, directory / "daemon.log"), dsn, directory, rules)


def _drive_all(base_url: str, recorder: Recorder) -> list[Call]:
    """Sends every case, and again those of which LiteLLM lost events."""
    calls: list[Call] = []
    missing: set[str] | None = None
    for number in range(ROUNDS_MAX):
        sent = list(drive(base_url, missing))
        calls += [_without_row(call) if number and call.case == "same_provider_id" else call for call in sent]
        missing = _missing(recorder, sent)
        if not missing:
            return calls
    raise AssertionError(f"LiteLLM sent no events for {missing} in {ROUNDS_MAX} rounds")


def _without_row(call: Call) -> Call:
    """LiteLLM keeps one row for the provider's fixed id."""
    return dataclasses.replace(call, expect=dataclasses.replace(call.expect, row=False))


def _missing(recorder: Recorder, sent: list[Call]) -> set[str]:
    """The cases whose events have not come in time."""
    deadline = time.monotonic() + EVENT_SECONDS_MAX
    while missing := {call.case for call in sent if _events(recorder, call) < call.expect.events}:
        if time.monotonic() > deadline:
            break
        time.sleep(0.2)
    return missing


def _run_id(record: Any) -> str | None:
    metadata = record["metadata"].get("spend_logs_metadata") or {}
    run_id: str | None = metadata.get("run_id")
    return run_id


def _events(recorder: Recorder, call: Call) -> int:
    return sum(_run_id(event) == call.run_id for event in recorder.events())


def _rows(stack: Stack, start: datetime, calls: list[Call]) -> list[dict[str, Any]]:
    """LiteLLM's rows, when it has written all that it will write."""
    wanted = {call.run_id for call in calls if call.expect.row}
    deadline = time.monotonic() + ROW_SECONDS_MAX
    while True:
        pages = stack.spend_logs_pages(start, datetime.now(UTC) + timedelta(minutes=2))
        rows = [row for page in pages for row in page["data"]]
        missing = wanted - {_run_id(row) for row in rows}
        if not missing:
            return rows
        assert time.monotonic() < deadline, f"LiteLLM wrote no row for {missing}"
        time.sleep(0.5)


def _costs(records: Any, name: str) -> dict[str, list[Decimal]]:
    costs: dict[str, list[Decimal]] = {}
    for record in records:
        costs.setdefault(record["litellm_call_id"], []).append(Decimal(record[name] or 0))
    return costs


# --- the bill -----------------------------------------------------------------------------------------------------


def _wrong(driven: Drive, biller: Biller) -> dict[str, list[str]]:
    """Run id -> what is wrong with its bill."""
    tables = bills.fetch(biller.dsn)
    found = bills.by_run(tables)
    wrong = {"": bills.strays(tables, {call.run_id for call in driven.calls})}
    for call in driven.calls:
        known = driven.call_of(call, biller)
        bill = found.get(call.run_id, bills.Bill())
        call_id = bill.usage_facts[0]["call_id"] if bill.usage_facts else ""
        if known is not None:
            wrong[call.run_id] = bills.differences(known, bill, driven.said_of(call_id, biller), biller.rules)
    return {run_id: problems for run_id, problems in wrong.items() if problems}


def _wait_for_bills(driven: Drive, name: str) -> tuple[Biller, dict[str, list[str]]]:
    """What is still wrong when all is right, time is up or the daemon has ended."""
    biller = driven.billers[name]
    while (wrong := _wrong(driven, biller)) and time.monotonic() < driven.deadline and biller.daemon.alive():
        time.sleep(0.5)
    return biller, wrong


@pytest.mark.parametrize("name", SOURCES)
def test_every_case_is_billed_as_known_in_advance(driven: Drive, name: str) -> None:
    biller, wrong = _wait_for_bills(driven, name)
    shown = "\n".join(f"{run_id}: {'; '.join(problems)}" for run_id, problems in wrong.items())
    assert not wrong, f"{biller.daemon.tail()}\n{shown}"
    if "callback" in biller.rules.sources:
        assert set(driven.recorder.answers(biller.daemon.url)) == {200}


@pytest.mark.parametrize("name", SOURCES)
def test_the_receipts_add_up_to_what_litellm_says(driven: Drive, name: str) -> None:
    biller, _ = _wait_for_bills(driven, name)
    tables = bills.fetch(biller.dsn)
    # audited, and neither held for a person's decision nor lost on the way by LiteLLM
    due = {
        fact["call_id"]
        for call in driven.calls
        for fact in tables["usage_facts"]
        if fact["run_id"] == call.run_id
        and (known := driven.call_of(call, biller)) is not None
        and known.expect.outcome in (Outcome.CHARGED, Outcome.NOT_CHARGED)
    }
    charged = [receipt for receipt in tables["charge_receipts"] if receipt["source_reference"] in due]
    said = {call_id: driven.said_of(call_id, biller) for call_id in due}
    assert None not in said.values()
    assert len(charged) > len(SOURCES)
    assert sum(receipt["provider_cost_usd"] for receipt in charged) == sum(filter(None, said.values()))


@pytest.mark.parametrize("name", SOURCES)
def test_no_prompt_answer_or_key_is_stored(driven: Drive, name: str) -> None:
    biller, _ = _wait_for_bills(driven, name)
    stored = {str(path): path.read_text("utf-8", "replace") for path in biller.directory.rglob("*") if path.is_file()}
    with psycopg.connect(biller.dsn) as connection:
        tables = connection.execute("select tablename from pg_tables where schemaname = 'billing'").fetchall()
        for (table,) in tables:
            rows = sql.SQL("select t::text from {} t").format(sql.Identifier("billing", table))
            stored[table] = "\n".join(text for (text,) in connection.execute(rows))
    assert any(stored.values())
    found = {(where, text) for where, content in stored.items() for text in PRIVATE_TEXTS if text in content}
    assert found == set()
