"""The numbers of a range of time, as the page, `GET /v1/activity` and the verb `export` show them: one way to them all.

A call belongs to the range in which it ended. Calls are the billable lines of the log; tokens, cost and credits are
what was charged for them, adjustments included. With a model chosen only charged calls count, since a call has no model
before its spend record came. Everything is read from our own tables, and of all sources together.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from time import monotonic
from typing import Any

from billing_tailer import reconcile
from billing_tailer.errors import TooMuch
from billing_tailer.given import BadValue, moment
from billing_tailer.health import Sight
from billing_tailer.ledger import Activity, Charged, Chosen, Place
from billing_tailer.model import ExceptionKind, FileState
from billing_tailer.spool import is_spool_file

PRESETS = {"1h": timedelta(hours=1), "24h": timedelta(days=1), "7d": timedelta(days=7), "30d": timedelta(days=30)}
DEFAULT_PRESET = "24h"
SUMMARY_SECONDS = 14.0
"""So long may it take to add up a range and the one before it."""
BARS_MAX = 62
BUCKETS = tuple(
    timedelta(minutes=minutes)
    for minutes in (1, 5, 10, 15, 30, 60, 180, 360, 720, 1440, 7 * 1440, 28 * 1440, 91 * 1440, 364 * 1440)
)
LINE_AFTER = timedelta(seconds=1)
"""A line is in the log so long after its call ended, at the latest."""
INFORMING = (ExceptionKind.NOT_CHARGED, ExceptionKind.CALL_ID_NOT_FORWARDED, ExceptionKind.MODEL_MISMATCH)
"""Exceptions that need no decision."""
CHUNK_ROWS = 500
"""Of an export: a row has 5 KB in memory, and the daemon is to stay small."""
CHUNK_SECONDS = 4.0


# --- ranges


@dataclass(frozen=True, slots=True)
class Range:
    """Calls that ended from start to before end. preset: by which name it was asked for, None where by its times."""

    start: datetime
    end: datetime
    preset: str | None = None

    @property
    def previous(self) -> "Range":
        """The range of the same length before it."""
        return Range(self.start - (self.end - self.start), self.start)

    @property
    def bucket(self) -> timedelta:
        """The length of a bar of its chart."""
        length = self.end - self.start
        whole = timedelta(days=length / BARS_MAX // timedelta(days=1) + 1)
        return next((bucket for bucket in BUCKETS if length / bucket <= BARS_MAX - 2), whole)


def range_of(preset: str, start: str, end: str, now: datetime) -> Range:
    """What was asked for, each empty where it was not: a preset up to now, or times. Raises BadValue."""
    if preset and (start or end):
        raise BadValue("range", preset, "is given together with from or to: give the one or the other")
    if not start and not end:
        name = preset or DEFAULT_PRESET
        if name not in PRESETS:
            raise BadValue("range", name, f"must be one of {', '.join(PRESETS)}; other ranges are given by from and to")
        return Range(now - PRESETS[name], now, name)
    until = moment("to", end) if end else now
    since = moment("from", start) if start else until - PRESETS[DEFAULT_PRESET]
    if since >= until:
        raise BadValue("from", start, f"must be before to, which is {until.isoformat()}")
    return Range(since, until)


# --- what was charged


@dataclass(frozen=True, slots=True)
class Totals:
    """A range added up. calls: billable ones; with a model chosen, charged ones. counts: calls by standing, and
    capture_rate: see `reconcile`; both None with a model chosen, and the rate without calls."""

    calls: int
    charged: Charged
    counts: Mapping[str, Any] | None
    capture_rate: Decimal | None


@dataclass(frozen=True, slots=True)
class Bar:
    """What was charged in one bucket of time for one model."""

    start: datetime
    model: str | None
    charged: Charged


@dataclass(frozen=True, slots=True)
class Summary:
    """A range, and for comparison the one before it (None: there was no time to add it up). models and accounts: the
    most expensive first; accounts None where there are too many."""

    range: Range
    chosen: Chosen
    totals: Totals
    previous: Totals | None
    bars: list[Bar]
    models: list[tuple[str | None, Charged]]
    accounts: list[tuple[str, Charged]] | None


def summary(activity: Activity, chosen_range: Range, chosen: Chosen, seconds: float = SUMMARY_SECONDS) -> Summary:
    """Add up a range. Raises TooMuch where that takes longer."""
    deadline = monotonic() + seconds
    sums, totals = _added_up(activity, chosen_range, chosen, deadline)
    try:
        previous = _added_up(activity, chosen_range.previous, chosen, deadline)[1]
    except TooMuch:
        previous = None
    models: dict[str | None, Charged] = {}
    for bar in sums.bars:
        models.setdefault(bar.model, Charged()).add(bar.charged)
    return Summary(
        chosen_range,
        chosen,
        totals,
        previous,
        sums.bars,
        sorted(models.items(), key=lambda item: (-item[1].cost_usd, item[0] or "")),
        sums.accounts,
    )


@dataclass(slots=True)
class _Added:
    bars: list[Bar] = field(default_factory=list)
    accounts: list[tuple[str, Charged]] | None = None


def _added_up(activity: Activity, one: Range, chosen: Chosen, deadline: float) -> tuple[_Added, Totals]:
    sums = activity.sums(one.start, one.end, chosen, one.bucket, deadline - monotonic())
    charged = Charged()
    for part in sums.series.values():
        charged.add(part)
    counts = None
    if chosen.model is None:
        counts = activity.counts(one.start, one.end, chosen.account, deadline - monotonic())
    totals = Totals(
        charged.calls if counts is None else counts["billable"],
        charged,
        counts,
        None if counts is None else reconcile.rate(counts["settled"] + counts["not_charged"], counts["billable"]),
    )
    bars = [Bar(start, model, part) for (start, model), part in sums.series.items()]
    bars.sort(key=lambda bar: (bar.start, bar.model or ""))
    accounts = None
    if sums.accounts is not None:
        accounts = sorted(sums.accounts.items(), key=lambda item: (-item[1].cost_usd, item[0]))
    return _Added(bars, accounts), totals


def days(activity: Activity, end: datetime, count: int, seconds: float) -> list[dict[str, Any]]:
    """What became of the calls of the days (UTC) up to before `end`, the newest first, as `reconcile` says it from our
    own tables: `count` days, or as many as there is time for. Raises TooMuch where there is not enough for one."""
    deadline = monotonic() + seconds
    found: list[dict[str, Any]] = []
    for _ in range(count):
        start = (end - timedelta(microseconds=1)).replace(hour=0, minute=0, second=0, microsecond=0)
        try:
            counts = activity.counts(start, end, None, deadline - monotonic())
        except TooMuch:
            if not found:
                raise
            return found
        captured = reconcile.rate(counts["settled"] + counts["not_charged"], counts["billable"])
        found.append({"from": start, "to": end, **counts, "capture_rate": captured})
        end = start
    return found


def receipts(activity: Activity, chosen_range: Range, chosen: Chosen) -> Iterator[list[dict[str, Any]]]:
    """All receipts of a range in chunks, the newest first. Raises TooMuch."""
    place: Place | None = Place(chosen_range.end)
    width = timedelta(hours=1)
    while place is not None:
        rows, place, width = activity.receipts(
            chosen_range.start, place, chosen, CHUNK_ROWS, width, seconds=CHUNK_SECONDS
        )
        yield rows


# --- how far it is complete


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the bill is complete.

    complete_to: the largest time T such that every committed call that ended before T is settled or decided, and every
    byte of the logs that could hold an older call is committed. A call is decided where it has a receipt, costs
    nothing, or was closed by a person; one that is held, unattributed, overdue or in conflict is not. A line counts as
    written one second after its call ended. None where that cannot be said: `why` says why.
    complete_but_for_exceptions_to: the same, but for the calls that wait for a person.
    bytes_behind: bytes of the followed files, spool included, that are seen and not committed. None where no file was
    looked at.
    exceptions: open ones that need a decision; informing: those that need none. dead_letters: open ones; their bytes
    are committed, and what they say of calls is not known. other_sources: followed by tailers of their own, whose
    unread bytes count as far as they recorded them.
    """

    time: datetime
    complete_to: datetime | None
    complete_but_for_exceptions_to: datetime | None
    why: str | None
    bytes_behind: int | None
    exceptions: int
    informing: int
    dead_letters: int
    other_sources: tuple[str, ...]


def progress(standing: Mapping[str, Any], sight: Sight | None, source_id: str) -> Progress:
    """standing: of the ledger. sight: what the loop saw of the files of our source, asked for before standing was: then
    what was seen is committed, or counts as unread."""
    bounds: list[datetime] = []
    why, behind = standing["unknown"], 0
    if why is not None:
        why = f"so many calls are not settled that the oldest is not found in time ({why})"
    elif sight is None:
        why = "this process does not commit at the moment: it stands by, or Postgres is away (see /readyz)"
    elif not sight.whole:
        why = "not every log file can be seen and read (see /readyz)"
    else:
        bounds.append(datetime.fromtimestamp(sight.looked_at, UTC) - LINE_AFTER)
    for file in standing["files"]:
        size = file["size_seen"]
        if sight is not None and file["source_id"] == source_id:
            size = max(size, sight.sizes.get(file["file_id"], 0))
        unread = max(0, size - file["committed_offset"])
        behind += unread
        blocked = file["state"] == FileState.BLOCKED  # nobody knows what follows there
        if (unread or blocked) and not is_spool_file(file["path"]):
            if file["last_call_at"] is None:
                what = "it is blocked" if blocked else f"{unread} bytes are not committed"
                why = why or f"{file['path']}: {what}, and no call before that tells the time"
            else:
                bounds.append(file["last_call_at"] - LINE_AFTER)
    opened: Mapping[str, int] = standing["exceptions"]
    informing = sum(opened.get(kind, 0) for kind in INFORMING)

    def first(unsettled: datetime | None) -> datetime | None:
        return None if why is not None else min([*bounds, *([] if unsettled is None else [unsettled])])

    return Progress(
        time=standing["time"],
        complete_to=first(standing["unsettled_since"]),
        complete_but_for_exceptions_to=first(standing["waiting_since"]),
        why=why,
        bytes_behind=None if sight is None else behind,
        exceptions=sum(opened.values()) - informing,
        informing=informing,
        dead_letters=standing["dead_letters"],
        other_sources=tuple(sorted({file["source_id"] for file in standing["files"]} - {source_id})),
    )
