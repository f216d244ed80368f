"""The numbers of a range on real Postgres: sums, slices, pages of receipts, how far the bill is complete, and plans."""

import errno
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import psycopg
import pytest

from billing_tailer import activity as numbers
from billing_tailer.activity import Range
from billing_tailer.errors import TooMuch
from billing_tailer.given import EARLIEST, BadValue
from billing_tailer.health import Sight
from billing_tailer.ledger import Activity, Charged, Chosen, Place, activity_reads
from billing_tailer.ledger.connection import query
from tests.support.loglines import line
from tests.support.proof import rows
from tests.support.site import Site, site
from tests.support.verbs import Verb

START, END = datetime(2026, 11, 22, tzinfo=UTC), datetime(2026, 11, 23, tzinfo=UTC)
NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
DAY = Range(START, END)
MINUTE = timedelta(minutes=1)


@pytest.fixture
def page(dsn: str, tmp_path: Path) -> Iterator[Site]:
    with site(dsn, tmp_path) as page:
        yield page


@pytest.fixture
def reads(dsn: str) -> Iterator[Activity]:
    with activity_reads(dsn, "billing") as reads:
        yield reads


FACTS = """
insert into usage_facts (call_id, id_echoed, billing_account_id, status, request_completed, provenance, occurred_at,
                         file_id, start_offset, end_offset)
select 'g-' || md5(i::text), true, {account}, 200, true, 'response', '{start}'::timestamptz + i * interval '{step}',
       1, i, i + 1
from generate_series(0, {count} - 1) i
"""
RECEIPTS = """
insert into charge_receipts (source_system, source_reference, billing_account_id, litellm_call_id, charged_credits,
                             provider_cost_usd, user_cost_usd, markup_factor, provenance, spend_source, record_ids,
                             occurred_at, created_at)
select 'litellm', call_id, billing_account_id, call_id, 2250, 0.000225, 0.000225, 1, 'response', 'callback', '{r}',
       occurred_at, occurred_at
from usage_facts order by start_offset
"""
DETAILS = """
insert into llm_charge_details (source_system, source_reference, model, tokens_in, tokens_out, cached_tokens,
                                created_at)
select 'litellm', call_id, 'model-' || start_offset % 3, 1000, 200, 10, occurred_at
from usage_facts order by start_offset
"""


def generate(dsn: str, count: int, *, account: str = "'account-' || i % 7", step: str = "1 second") -> None:
    """Settled calls, one every `step` from START on."""
    facts = FACTS.format(account=account, start=START.isoformat(), step=step, count=count)
    with psycopg.connect(dsn, autocommit=True) as owner:
        owner.execute("set search_path to billing")
        for statement in (facts, RECEIPTS, DETAILS, "analyze"):
            owner.execute(statement.encode())


# --- ranges


def test_ranges() -> None:
    assert numbers.range_of("", "", "", NOW) == Range(NOW - timedelta(days=1), NOW, "24h")
    assert numbers.range_of("7d", "", "", NOW) == Range(NOW - timedelta(days=7), NOW, "7d")
    assert numbers.range_of("", "2026-11-22T03:00", "2026-11-22T05:00+01:00", NOW) == Range(
        datetime(2026, 11, 22, 3, tzinfo=UTC), datetime(2026, 11, 22, 4, tzinfo=UTC)
    )
    assert numbers.range_of("", "", "2026-11-22", NOW).start == datetime(2026, 11, 21, tzinfo=UTC)
    assert DAY.previous == Range(START - timedelta(days=1), START)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (("2d", "", ""), "range"),
        (("1h", "2026-11-22", ""), "range"),
        (("", "yesterday", ""), "from"),
        (("", "1969-12-31", ""), "from"),
        (("", "0001-01-01T00:00:00+14:00", ""), "from"),
        (("", "", "9999-12-31T23:59:59-14:00"), "to"),
        (("", "2026-11-22", "2026-11-22"), "from"),
        (("", "٢٠٢٦-11-22", ""), "from"),
    ],
)
def test_bad_ranges(given: tuple[str, str, str], name: str) -> None:
    with pytest.raises(BadValue) as caught:
        numbers.range_of(*given, NOW)
    assert caught.value.name == name


@pytest.mark.parametrize("seconds", [1, 3600, 86_400, 30 * 86_400, 366 * 86_400, 900 * 366 * 86_400])
def test_a_chart_has_few_bars(seconds: int) -> None:
    one = Range(START, START + timedelta(seconds=seconds))
    assert (one.end - one.start) / one.bucket <= numbers.BARS_MAX


# --- sums


def test_sums_are_receipts_and_adjustments(page: Site, reads: Activity, verb: Verb, dsn: str) -> None:
    page.bill(1, 2, cost=0.000225, cached_tokens=None)
    page.bill(3, cost=0.5, end_user="account-2", model_group="dear")
    page.log(4)  # pending
    page.rig.turn()
    verb("adjust", "call-00000001", "--cost-usd", "-0.000025", "--reason", "goodwill")
    verb("adjust", "call-00000003", "--credits", "7", "--reason", "goodwill")
    found = numbers.summary(reads, DAY, Chosen())
    assert found.totals.calls == 4
    assert found.totals.capture_rate == Decimal("0.75")
    assert found.totals.charged == Charged(3, 3000, 600, 0, Decimal("0.500425"), 2000 + 2250 + 5_000_000 + 7)
    assert [(name, charged.cost_usd) for name, charged in found.models] == [
        ("dear", Decimal("0.5")),
        ("up-gpt-4o-mini", Decimal("0.000425")),
    ]
    assert found.accounts == [
        ("account-2", Charged(1, 1000, 200, 0, Decimal("0.5"), 5_000_007)),
        ("account-1", Charged(2, 2000, 400, 0, Decimal("0.000425"), 4250)),
    ]
    assert found.previous is not None
    assert (found.previous.calls, found.previous.capture_rate) == (0, None)
    [receipts] = numbers.receipts(reads, DAY, Chosen())
    assert sum(row["total_credits"] for row in receipts) == found.totals.charged.credits
    assert sum(row["total_cost_usd"] for row in receipts) == found.totals.charged.cost_usd


def test_the_account_is_the_receipts(page: Site, reads: Activity, verb: Verb) -> None:
    page.bill(1, end_user="")
    verb("exceptions", "release", "call-00000001", "--account", "paid-by", "--reason", "asked")
    found = numbers.summary(reads, DAY, Chosen(account="paid-by"))
    assert (found.totals.calls, found.totals.capture_rate, found.totals.charged.credits) == (1, Decimal(1), 2250)
    assert numbers.summary(reads, DAY, Chosen(account="account-1")).totals.calls == 0


def test_one_model(page: Site, reads: Activity) -> None:
    page.bill(1, 2)
    page.bill(3, cost=0.5, model_group="dear")
    found = numbers.summary(reads, DAY, Chosen(model="dear"))
    assert (found.totals.calls, found.totals.charged.credits, found.totals.counts) == (1, 5_000_000, None)
    [receipts] = numbers.receipts(reads, DAY, Chosen(model="dear"))
    assert [row["call_id"] for row in receipts] == ["call-00000003"]


def test_receipts_of_others_do_not_count(page: Site, reads: Activity, dsn: str) -> None:
    page.bill(1)
    with psycopg.connect(dsn, autocommit=True) as owner:
        owner.execute("create temporary table copy as select * from billing.charge_receipts")
        owner.execute("update copy set source_system = 'other'")
        owner.execute("insert into billing.charge_receipts select * from copy")
    assert numbers.summary(reads, DAY, Chosen()).totals.charged.calls == 1
    assert [len(chunk) for chunk in numbers.receipts(reads, DAY, Chosen())] == [1]


def test_edges_of_a_range(page: Site, reads: Activity) -> None:
    """From start on, before end: two ranges that touch count each call once."""
    page.bill(0, 1000)  # a second apart
    moment = rows(page.reads._dsn or "", "select min(occurred_at) as first from charge_receipts")[0]["first"]
    second = timedelta(seconds=1)
    for one, calls in ((Range(moment, moment + second), 1), (Range(moment + second, moment + 2 * second), 1)):
        totals = numbers.summary(reads, one, Chosen()).totals
        assert (totals.calls, totals.charged.calls) == (calls, calls)
        assert [len(chunk) for chunk in numbers.receipts(reads, one, Chosen())] == [calls]
    assert numbers.summary(reads, Range(moment - second, moment), Chosen()).totals.calls == 0


def test_slices_add_up(dsn: str, reads: Activity) -> None:
    """A day in many slices is the day."""
    generate(dsn, 5000, step="17 seconds")
    found = numbers.summary(reads, DAY, Chosen())
    assert found.totals.calls == 5000
    assert found.totals.charged == Charged(5000, 5_000_000, 1_000_000, 50_000, Decimal("1.125"), 11_250_000)
    assert sum(bar.charged.credits for bar in found.bars) == 11_250_000
    assert {name for name, _ in found.models} == {"model-0", "model-1", "model-2"}
    assert len(found.accounts or []) == 7


def test_too_much_is_said(dsn: str, reads: Activity) -> None:
    generate(dsn, 2000, step="40 seconds")
    with pytest.raises(TooMuch, match="takes longer than 0 s") as caught:
        reads.sums(START, END, Chosen(), MINUTE, 0)
    assert "narrow the range" in caught.value.hint
    with psycopg.connect(dsn) as other:  # nothing ends in time
        other.execute("lock table billing.charge_receipts")
        reads._connection.execute("set statement_timeout = 20")
        with pytest.raises(TooMuch):
            reads.sums(START, END, Chosen(), MINUTE, 5)
        with pytest.raises(TooMuch):
            reads.receipts(START, Place(END), Chosen(), 10, MINUTE, 5)


def test_a_slice_that_is_too_long_is_halved(dsn: str, reads: Activity, monkeypatch: pytest.MonkeyPatch) -> None:
    """Postgres refuses slices of more than ten minutes here: the sum is whole all the same."""
    generate(dsn, 1000, step="10 seconds")
    real, refused = Activity._rows, []

    def strict(self: Activity, statement: Any, **words: Any) -> Any:
        if words["end"] - words["start"] > timedelta(minutes=10):
            refused.append(words)
            raise psycopg.errors.QueryCanceled("canceling statement due to statement timeout")
        return real(self, statement, **words)

    monkeypatch.setattr(Activity, "_rows", strict)
    sums = reads.sums(START, END, Chosen(), MINUTE, 30)
    assert sum(part.calls for part in sums.series.values()) == 1000
    assert refused


def test_no_snapshot_is_held_between_slices(dsn: str, reads: Activity) -> None:
    generate(dsn, 5000)
    chunks = numbers.receipts(reads, DAY, Chosen())
    next(chunks)
    held = rows(
        dsn, "select state, backend_xmin from pg_stat_activity where application_name = 'billing_tailer export'"
    )
    assert held == [{"state": "idle", "backend_xmin": None}]


def test_many_accounts(dsn: str, reads: Activity, monkeypatch: pytest.MonkeyPatch) -> None:
    """No list of accounts then; the sums stay whole."""
    monkeypatch.setattr("billing_tailer.ledger.activity.GROUPS_MAX", 300)
    generate(dsn, 2000, account="'account-' || i", step="1 second")
    found = numbers.summary(reads, DAY, Chosen())
    assert found.accounts is None
    assert found.totals.charged.calls == 2000


# --- pages of receipts


@pytest.mark.parametrize("step", ["0 seconds", "1 millisecond", "1 second", "25 seconds"])
def test_every_receipt_is_on_one_page(dsn: str, reads: Activity, step: str) -> None:
    """However close together they are, calls of one moment too."""
    generate(dsn, 3300, step=step)
    found: list[dict[str, Any]] = []
    place: Place | None = Place(END)
    width = timedelta(minutes=10)
    while place is not None:
        page, place, width = reads.receipts(START, place, Chosen(), 500, width, 4)
        found += page
    keys = [(row["occurred_at"], row["call_id"]) for row in found]
    assert len(set(keys)) == 3300
    with psycopg.connect(dsn) as owner:  # Postgres's own order
        order = "select occurred_at, source_reference from billing.charge_receipts order by 1 desc, 2 desc"
        assert keys == owner.execute(order).fetchall()


def test_pages_go_back_over_years(page: Site, reads: Activity) -> None:
    page.bill(1)
    page.bill(2, cost=0.5)
    late = datetime(2036, 1, 1, tzinfo=UTC)
    begun = time.monotonic()
    chunks = list(numbers.receipts(reads, Range(EARLIEST, late), Chosen()))
    assert [row["call_id"] for chunk in chunks for row in chunk] == ["call-00000002", "call-00000001"]
    assert time.monotonic() - begun < 5


def test_receipts_of_a_run(page: Site, reads: Activity) -> None:
    page.bill(1, 2, 102)
    chunks = numbers.receipts(reads, Range(EARLIEST, END), Chosen(run_id="run-2"))
    assert {row["call_id"] for chunk in chunks for row in chunk} == {"call-00000002", "call-00000102"}


# --- how far the bill is complete


def standing(**changes: Any) -> dict[str, Any]:
    file = {
        "file_id": 1,
        "source_id": "default",
        "path": "/billing/audit.jsonl",
        "state": "live",
        "committed_offset": 100,
        "size_seen": 100,
        "last_call_at": NOW - timedelta(minutes=9),
    }
    files = [{**file, **one} for one in changes.pop("files", [{}])]
    found: dict[str, Any] = {
        "time": NOW,
        "unknown": None,
        "unsettled_since": None,
        "waiting_since": None,
        "exceptions": {},
        "dead_letters": 0,
    }
    return {**found, "files": files, **changes}


def sight(size: int = 0, *, whole: bool = True) -> Sight:
    """Of file 1."""
    return Sight(NOW.timestamp(), {1: size}, whole)


def test_complete_up_to_the_last_look() -> None:
    found = numbers.progress(standing(), sight(100), "default")
    assert (found.complete_to, found.why, found.bytes_behind) == (NOW - timedelta(seconds=1), None, 0)
    assert found.complete_but_for_exceptions_to == found.complete_to


def test_complete_up_to_the_oldest_unsettled_call() -> None:
    held, pending = NOW - timedelta(days=3), NOW - timedelta(minutes=2)
    exceptions = {"held_zero_cost": 2, "not_charged": 5, "model_mismatch": 1}
    found = numbers.progress(
        standing(unsettled_since=held, waiting_since=pending, exceptions=exceptions), sight(100), "default"
    )
    assert (found.complete_to, found.complete_but_for_exceptions_to) == (held, pending)
    assert (found.exceptions, found.informing) == (2, 6)


def test_unread_bytes_hold_it_back() -> None:
    """As the loop sees them, or as they were recorded, of missing files and other sources too."""
    last = NOW - timedelta(minutes=9, seconds=1)
    for files, seen in (
        ([{}], 150),
        ([{"size_seen": 150}], 100),
        ([{"size_seen": 150, "state": "missing"}], 0),
        ([{"size_seen": 150, "source_id": "other"}], 0),
    ):
        found = numbers.progress(standing(files=files), sight(seen), "default")
        assert (found.complete_to, found.bytes_behind) == (last, 50), files
        assert found.other_sources == tuple({one["source_id"] for one in files if "source_id" in one})


def test_a_blocked_file_holds_it_back() -> None:
    """Also where nothing of it is seen behind the position: nobody knows what stands there now."""
    last = NOW - timedelta(minutes=9, seconds=1)
    assert numbers.progress(standing(files=[{"state": "blocked"}]), sight(100), "default").complete_to == last
    unknown = numbers.progress(standing(files=[{"state": "blocked", "last_call_at": None}]), sight(100), "default")
    assert "it is blocked" in (unknown.why or "")


def test_unread_spend_records_are_bytes_behind() -> None:
    """Their calls are not settled, which says how far it is complete."""
    path = "/spool/callbacks-0123456789abcdef0123456789abcdef-000001.jsonl"
    found = numbers.progress(standing(files=[{"path": path, "size_seen": 150}]), sight(), "default")
    assert (found.complete_to, found.bytes_behind) == (NOW - timedelta(seconds=1), 50)


def test_what_is_not_known_is_not_claimed() -> None:
    for one, seen, why in (
        (standing(), None, "does not commit"),
        (standing(), sight(whole=False), "not every log file"),
        (standing(unknown="too long"), sight(100), "not found in time (too long)"),
        (standing(files=[{"last_call_at": None, "size_seen": 150}]), sight(), ": 50 bytes are not committed"),
    ):
        found = numbers.progress(one, seen, "default")
        assert (found.complete_to, found.complete_but_for_exceptions_to) == (None, None)
        assert why in (found.why or "")


def test_the_ledger_knows_the_oldest_unsettled_call(page: Site, reads: Activity) -> None:
    """The one that ended first, not the one that began first."""
    page.log(1000, request_time="0.9")  # ends at 33.0
    page.log(2000, request_time="100")  # ends at 34.0, and began long before
    page.log(500, request_time="0.01", end_user="")  # ends at 32.5, and is going to be unattributed
    page.spend(500)
    page.rig.turn()
    at = datetime(2026, 11, 22, 0, 38, 32, tzinfo=UTC)
    found = reads.standing()
    assert found["unsettled_since"] == at + timedelta(seconds=0.5)
    assert found["waiting_since"] == at + timedelta(seconds=1)
    assert found["exceptions"] == {"unattributed": 1}
    [log] = [file for file in found["files"] if file["path"].endswith("audit.jsonl")]
    assert log["last_call_at"] == at + timedelta(seconds=0.5)  # of the last line


def test_too_many_unsettled_calls(page: Site, reads: Activity, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page goes on without what cannot be found in time."""
    real = Activity._rows

    def slow(self: Activity, statement: Any, **words: Any) -> Any:
        if statement == query("activity_unsettled"):
            raise psycopg.errors.QueryCanceled("canceling statement due to statement timeout")
        return real(self, statement, **words)

    monkeypatch.setattr(Activity, "_rows", slow)
    page.bill(1)
    assert "more than 5 s" in reads.standing()["unknown"]
    assert "Not known up to when it is billed completely" in page.get("/").text


def test_the_loop_tells_what_it_sees(page: Site) -> None:
    page.bill(1)
    page.rig.follower.show(time.time(), waiting=False)
    seen = page.rig.health.sight()
    assert seen is not None
    assert seen.whole
    assert abs(time.time() - seen.looked_at) < 5
    assert (page.volume / "audit.jsonl").stat().st_size in seen.sizes.values()
    page.rig.follower.show(time.time(), waiting=True)
    unseen = page.rig.health.sight()
    assert unseen is None


def test_a_new_file_that_cannot_be_opened_is_not_passed_over(page: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is recorded of it, and its calls are not billed: no time is named."""
    page.bill(1)
    page.rig.follower.show(time.time(), waiting=False)
    assert page.activity()["as_of"]["complete_to"] is not None

    def refuse(*_: object) -> None:
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(page.rig.files, "place_at", refuse)
    (page.volume / "audit-2.jsonl").write_bytes(line(2))
    page.rig.turn()
    page.rig.follower.show(time.time(), waiting=False)
    as_of = page.activity()["as_of"]
    assert as_of["complete_to"] is None
    assert "not every log file" in as_of["why"]


def test_what_comes_after_the_look_is_not_claimed(page: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A look that is younger than what the ledger said would vouch for a file that the ledger had not heard of."""
    page.bill(1)
    page.rig.follower.show(time.time() - 60, waiting=False)
    real = Activity.standing

    def slow(self: Activity) -> dict[str, Any]:
        found = real(self)
        page.rig.follower.show(time.time(), waiting=False)
        return found

    monkeypatch.setattr(Activity, "standing", slow)
    complete_to = datetime.fromisoformat(page.activity()["as_of"]["complete_to"])
    assert complete_to < datetime.now(UTC) - timedelta(seconds=50)


# --- days


def test_days(page: Site, reads: Activity) -> None:
    page.bill(1, 2)
    page.log(3)
    page.rig.turn()
    first, second = numbers.days(reads, END, 2, 10)
    assert (first["from"], first["to"], first["billable"], first["settled"], first["pending"]) == (START, END, 3, 2, 1)
    assert (first["capture_rate"], first["charged_credits"]) == (Decimal("0.666666"), 4500)
    assert (second["to"], second["billable"], second["capture_rate"]) == (START, 0, None)


def test_as_many_days_as_there_is_time_for(page: Site, reads: Activity, monkeypatch: pytest.MonkeyPatch) -> None:
    page.bill(1)
    real, asked = Activity.counts, []

    def slow(self: Activity, *arguments: Any) -> Any:
        asked.append(arguments)
        if len(asked) == 3:
            raise TooMuch("too long")
        return real(self, *arguments)

    monkeypatch.setattr(Activity, "counts", slow)
    assert [day["to"] for day in numbers.days(reads, END, 9, 10)] == [END, START]
    asked += [(), ()]
    with pytest.raises(TooMuch):
        numbers.days(reads, END, 9, -1)


# --- plans


def test_plans_look_at_a_range_alone(dsn: str, reads: Activity) -> None:
    """The indexes of block ranges find a range, keys find the rest: no table grows into a page's time."""
    generate(dsn, 20_000)
    connection = reads._connection
    connection.execute("set enable_seqscan = off")

    def plan(statement: Any, **words: Any) -> str:
        return str(connection.execute(f"explain {statement}", words).fetchall())

    hour = {"start": START, "end": START + timedelta(hours=1)}
    sums = query("activity_sums").format(conditions="")
    found = plan(sums, bucket=MINUTE, origin=START, limit=10, **hour)
    assert "charge_receipts_time" in found
    assert "llm_charge_details_time" in found
    receipts = query("activity_receipts").format(conditions="", details="")
    found = plan(receipts, before="", limit=50, **hour)
    assert "charge_receipts_time" in found
    assert "llm_charge_details_pkey" in found
    of_run = query("activity_receipts").format(conditions=query("activity_of_run"), details="")
    found = plan(of_run, before="", limit=50, run_id="run-1", **hour)
    assert "usage_facts_run" in found
    assert "charge_receipts_pkey" in found
    found = plan(query("activity_unsettled"))
    assert "Seq Scan on usage_facts" not in found
    assert "usage_facts_range" in plan(query("activity_last_call"), file_id=1, committed_offset=9)
    assert "dead_letters_pkey" in plan(query("activity_letters"), all=True, before=9, limit=5, raw_bytes=9)
