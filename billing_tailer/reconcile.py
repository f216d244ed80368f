"""What became of the calls of a time window, and what LiteLLM's own rows say about the same window.

A call belongs to the window in which it ended. `capture_rate` = (settled + not charged) / billable calls: held,
unattributed, overdue and pending calls, unapplied differences, and calls that a person closed without a receipt count
as not captured. All sources of the database are counted together, as one LiteLLM may serve them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import ROUND_FLOOR, Decimal
from functools import partial
from typing import Any

from billing_tailer import pricing
from billing_tailer.errors import ConfigError
from billing_tailer.ledger import Operator
from billing_tailer.litellm import SpendLogs
from billing_tailer.model import Rejected, SpendRecord
from billing_tailer.printing import plain
from billing_tailer.spend import parse_row

MARGIN = timedelta(seconds=120)
"""LiteLLM's clock and ours, and the time between the proxy's start of a request and LiteLLM's."""
SWEEP_SECONDS_MAX = 60
"""After its deadline a call is decided by the next sweep: a window that is over for longer is closed."""
DAY = timedelta(days=1)
WINDOWS_MAX = 400
RATE_DECIMALS = Decimal("0.000001")


@dataclass(frozen=True, slots=True)
class Span:
    """A window: from start to before end, UTC."""

    start: datetime
    end: datetime


def spans(start: datetime | None, end: datetime | None, now: datetime, deadline_seconds: int) -> list[Span]:
    """The days of a period, UTC; the first and the last are cut where the period is. Raises ConfigError.

    By default the last whole day whose calls have all had time to settle. A window that is not over is refused; the
    calls of one that is just over may still be pending.
    """
    if end is None:
        end = _midnight(now - timedelta(seconds=deadline_seconds))
        end = end if start is None or start < end else _midnight(now)
    if start is None:
        start = _midnight(end - timedelta(microseconds=1))
    if end > now:
        raise ConfigError(f"--to {end.isoformat()} is in the future", "name a window that is over: its calls are known")
    if start >= end:
        raise ConfigError(
            f"--from {start.isoformat()} is not before --to {end.isoformat()}",
            "name a period of time: without --to it ends with the last whole day (UTC)",
        )
    if (end - start) / DAY > WINDOWS_MAX:
        raise ConfigError(f"more than {WINDOWS_MAX} days", "name a shorter period")
    return list(_days(start, end))


def _midnight(moment: datetime) -> datetime:
    return moment.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)


def _days(start: datetime, end: datetime) -> Iterator[Span]:
    while start < end:
        next_day = min(_midnight(start) + DAY, end)
        yield Span(start, next_day)
        start = next_day


def window(ledger: Operator, span: Span) -> dict[str, Any]:
    """Counts, costs and capture rate of a window, as plain JSON; `litellm` is left to `compare`."""
    counts = ledger.window_counts(span.start, span.end)
    captured = counts["settled"] + counts["not_charged"]
    found: dict[str, Any] = plain(
        {
            "from": span.start,
            "to": span.end,
            **counts,
            "capture_rate": rate(captured, counts["billable"]),
            "litellm": None,
        }
    )
    return found


def rate(captured: int, billable: int) -> Decimal | None:
    """The capture rate, rounded down: only what is whole is shown as 1. None without calls."""
    return (Decimal(captured) / billable).quantize(RATE_DECIMALS, ROUND_FLOOR) if billable else None


# --- against LiteLLM's own rows


@dataclass(slots=True)
class _Listed:
    """What differs: all are counted, the first ones listed."""

    limit: int
    count: int = 0
    cost_usd: Decimal = Decimal(0)
    calls: list[dict[str, Any]] = field(default_factory=list)

    def add(self, call_id: str, cost_usd: Decimal, **words: Any) -> None:
        self.count += 1
        self.cost_usd = pricing.total([self.cost_usd, cost_usd])
        if len(self.calls) < self.limit:
            self.calls.append({"call_id": call_id, **words})

    def as_dict(self) -> dict[str, Any]:
        return {"count": self.count, "cost_usd": self.cost_usd, "calls": self.calls}


@dataclass(slots=True)
class _Theirs:
    """LiteLLM's rows of one call, added up."""

    cost_usd: Decimal
    at: datetime | None


def compare(ledger: Operator, logs: SpendLogs, span: Span, cost_max: Decimal, limit: int) -> dict[str, Any]:
    """LiteLLM's rows against the calls of a window, as plain JSON; every list holds `limit` calls at most.

    missing_here: LiteLLM has rows of a call of ours, we have no spend record. unaudited: rows that ended in the window
    of calls without an audit line. missing_there: we have records, LiteLLM has no row. amount_differs: what is charged
    (before markup, adjustments included) is not the sum of the rows, compared at 1e-12 USD.
    """
    ours = {row["call_id"]: row for row in ledger.window_calls(span.start, span.end)}
    first = min((row["started_at"] for row in ours.values()), default=span.start)
    theirs, rows, rejected = _rows(logs, min(first, span.start) - MARGIN, span.end + MARGIN, cost_max)
    missing_here, unaudited, missing_there, differs = (_Listed(limit) for _ in range(4))
    total = Decimal(0)
    for call_id, row in sorted(ours.items()):
        their = theirs.pop(call_id, None)
        if their is None:
            if row["has_records"]:
                missing_there.add(call_id, row["provider_cost_usd"] or Decimal(0), charged_usd=row["provider_cost_usd"])
            continue
        total = pricing.total([total, their.cost_usd])
        if not row["has_records"]:
            missing_here.add(call_id, their.cost_usd, litellm_usd=their.cost_usd, standing=row["standing"])
        elif row["provider_cost_usd"] is not None:
            delta = pricing.difference(pricing.quantized(their.cost_usd), row["provider_cost_usd"])
            if delta:
                amounts = {"charged_usd": row["provider_cost_usd"], "litellm_usd": their.cost_usd}
                differs.add(call_id, delta, **amounts)
    inside = [call_id for call_id, their in theirs.items() if _is_in(their, span)]
    known = ledger.known(inside) if inside else set()
    for call_id in sorted(inside):
        if call_id not in known:
            unaudited.add(call_id, theirs[call_id].cost_usd, litellm_usd=theirs[call_id].cost_usd)
    found: dict[str, Any] = plain(
        {
            "rows": rows,
            "rows_not_understood": rejected,
            "audited_usd": total,
            "missing_here": missing_here.as_dict(),
            "unaudited": unaudited.as_dict(),
            "missing_there": missing_there.as_dict(),
            "amount_differs": differs.as_dict(),
            "failure": None,
        }
    )
    return found


def _rows(logs: SpendLogs, start: datetime, end: datetime, cost_max: Decimal) -> tuple[dict[str, _Theirs], int, int]:
    """LiteLLM's rows by call, their number, and how many of them are not understood."""
    parse = partial(parse_row, cost_max=cost_max)
    theirs: dict[str, _Theirs] = {}
    count = rejected = 0
    for batch in logs.window(start, end):
        for outcome in map(parse, batch):
            count += 1
            if isinstance(outcome, Rejected):
                rejected += 1
            else:
                _add(theirs, outcome)
    return theirs, count, rejected


def _add(theirs: dict[str, _Theirs], record: SpendRecord) -> None:
    at = record.ended_at or record.started_at
    cost = record.cost_usd or Decimal(0)
    if (known := theirs.get(record.call_id)) is None:
        theirs[record.call_id] = _Theirs(cost, at)
        return
    known.cost_usd = pricing.total([known.cost_usd, cost])
    known.at = max((moment for moment in (known.at, at) if moment is not None), default=None)


def _is_in(their: _Theirs, span: Span) -> bool:
    return their.at is not None and span.start <= their.at < span.end


def sums(windows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The windows added up, with the capture rate of the whole period."""
    counted = (
        "billable",
        "settled",
        "not_charged",
        "pending",
        "held",
        "unattributed",
        "overdue",
        "unapplied",
        "closed",
        "charged_credits",
    )
    added: dict[str, Any] = {name: sum(window[name] for window in windows) for name in counted}
    cost = pricing.total(Decimal(window["provider_cost_usd"]) for window in windows)
    captured = rate(added["settled"] + added["not_charged"], added["billable"])
    found: dict[str, Any] = plain({**added, "provider_cost_usd": cost, "capture_rate": captured})
    return found
