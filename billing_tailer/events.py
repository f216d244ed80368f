"""Everything observable: one method per event, which both logs and counts. The only room that logs or counts.

Metric names, their labels and their meaning stand in README's table, which a test compares with the registry.
"""

import logging
import math
import sys
import time
from collections.abc import Callable, Collection, Mapping
from decimal import Decimal
from typing import Any

import structlog
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from billing_tailer import __version__
from billing_tailer.model import (
    DeadLetterReason,
    ExceptionKind,
    FileState,
    Gap,
    GapReason,
    Outcome,
    Plan,
    Position,
    SkipReason,
    SpendSource,
)
from billing_tailer.settle import Decision

FILE_LABELS_MAX = 50
"""Files with a label of their own; the others are summed under `_other`."""
OTHER = "_other"
CALLBACK_CODES = (200, 400, 401, 408, 413, 415, 499, 500, 503)
"""What the callback endpoint answers."""
UNAUTHORIZED = 401
REFUSAL_SECONDS = 60.0
"""So often the log says that callbacks came without the token."""
GAPS_OF_OPERATORS = (GapReason.START_AT, GapReason.SKIPPED, GapReason.ACCEPTED)
"""Bytes that somebody wanted left out: the loop finds them in Postgres, it does not declare them."""
LETTERS_LOGGED_MAX = 20
"""Dead letters of one batch with a line of their own in the log; all of them are counted, and listed by the verb."""


def configure_logging(level: str, log_format: str) -> None:
    """One JSON object per line on standard output, or text for people (`console`)."""
    renderer: Any = structlog.processors.JSONRenderer() if log_format == "json" else structlog.dev.ConsoleRenderer()
    # psycopg's own warnings go beside the errors it raises, which we log in our form
    logging.getLogger("psycopg").setLevel(logging.ERROR)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(sys.stdout),
        cache_logger_on_first_use=True,
    )


class Events:
    """The log and the metrics of one process."""

    _next_refusal = 0.0

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._log: structlog.typing.FilteringBoundLogger = structlog.get_logger()
        disable_created_metrics()  # type: ignore[no-untyped-call]  # prometheus_client's own types lack it
        ProcessCollector(registry=registry)

        def gauge(name: str, meaning: str, *labels: str) -> Gauge:
            return Gauge(f"billing_tailer_{name}", meaning, labels, registry=registry)

        def counter(name: str, meaning: str, *labels: str) -> Counter:
            return Counter(f"billing_tailer_{name}", meaning, labels, registry=registry)

        self._lag = gauge("lag_bytes", "Bytes of a log file that are not committed yet", "file")
        self._offset = gauge("committed_offset_bytes", "Committed offset of a log file", "file")
        self._size = gauge("file_size_bytes", "Size of a log file", "file")
        self._oldest = gauge(
            "oldest_uncommitted_timestamp_seconds",
            "Since when the oldest uncommitted bytes have been seen; NaN if there are none",
        )
        self._last_commit = gauge("last_commit_timestamp_seconds", "Time of the last commit")
        self._lines = counter("lines_total", "Committed lines by outcome", "outcome")
        self._letters_open = gauge("dead_letters_open", "Dead letters nobody has decided yet, counted up to 10000")
        self._letters = counter("dead_letters_total", "Dead letters by reason", "reason")
        self._seconds = Histogram(
            "billing_tailer_commit_duration_seconds",
            "Duration of a commit",
            buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10),
            registry=registry,
        )
        self._failures = counter("commit_failures_total", "Failed commits by reason", "reason")
        self._resets = counter(
            "offset_resets_total", "Offsets moved, and missing or blocked files decided, by an operator", "source"
        )
        self._pending = gauge("pending_calls", "Calls that may get a receipt; large batches first count whole")
        self._oldest_pending = gauge(
            "oldest_pending_timestamp_seconds", "Since when the longest waiting call is committed; NaN if none waits"
        )
        self._receipts = counter("receipts_total", "Receipts written")
        self._credits = counter("charged_credits_total", "Credits charged by receipts (1 credit = 0.0000001 USD)")
        self._adjustments = counter("adjustments_total", "Corrections of settled calls")
        self._exceptions = gauge("call_exceptions_open", "Open exceptions of calls by kind", "kind")
        self._records = counter("spend_records_total", "Spend records committed by source", "source")
        self._rejected_rows = counter("spend_rows_rejected_total", "Rows of LiteLLM's spend logs that are no records")
        self._capture = gauge(
            "capture_ratio",
            "Settled or not charged part of the calls of the newest closed window, the 15 minutes up to one settle "
            "deadline and a minute ago, of all sources of the database; NaN without calls, or where nobody could count",
        )
        self._unaudited = counter(
            "unaudited_spend_records_total",
            "Spend records of the database that had no audit line one settle deadline after they came; each is counted "
            "by one process",
        )
        self._with_line = counter(
            "unaudited_with_line_total",
            "Those of them whose audit line was skipped as refused before a model was asked",
        )
        self._callbacks = counter("callback_requests_total", "Callback requests by HTTP status", "code")
        self._spool_alarm = gauge("spool_alarm", "1 while the spool is full or cannot be written")
        self._polled = gauge(
            "reconcile_last_success_timestamp_seconds", "Time of the last complete poll of LiteLLM's spend logs"
        )
        self._poll_failures = counter("reconcile_failures_total", "Polls of LiteLLM's spend logs that failed")
        Info("billing_tailer_build", "Version of the program", registry=registry).info({"version": __version__})
        self._of_files(gauge, counter)
        self._of_the_process(gauge)
        self._labelled: set[str] = set()
        self._gaps_known: Mapping[GapReason, tuple[int, int]] | None = None
        self._zero_series()

    def _of_files(self, gauge: Callable[..., Gauge], counter: Callable[..., Counter]) -> None:
        """What becomes of files as a whole."""
        self._files = gauge("files", "Generations of files by state", "state")
        self._gap_bytes = counter(
            "gap_bytes_total", "Bytes declared as not read, by the daemon or by an operator, where it is known how many"
        )
        self._gaps = counter("gaps_total", "Declared gaps by reason", "reason")
        self._gaps_recorded = gauge(
            "gaps_recorded", "Gaps of the source that stand in `log_gaps`, counted up to 10000", "reason"
        )

    def _of_the_process(self, gauge: Callable[..., Gauge]) -> None:
        """What this process is, and how it is."""
        self._active = gauge("active", "1 while this process is the one that commits, 0 on standby")
        self._source = gauge("source_info", "1, with the SOURCE_ID of this process", "source_id")
        self._turned = gauge("last_turn_timestamp_seconds", "Time of the last turn of the loop, which /livez asks for")
        self._unready = gauge("unready_reasons", "Reasons that /readyz gives for not being ready, by topic", "topic")

    def _zero_series(self) -> None:
        """Series that exist from the start, so that a first increase can be seen by rate()."""
        for outcome in (*Outcome, *SkipReason):
            self._lines.labels(outcome)
        for reason in DeadLetterReason:
            self._letters.labels(reason)
        for state in FileState:
            self._files.labels(state)
        for gap_reason in GapReason:
            self._gaps.labels(gap_reason)
        self._failures.labels("connection")  # the others are Postgres' names of what went wrong
        for source in ("env", "cli"):
            self._resets.labels(source)
        for kind in ExceptionKind:
            self._exceptions.labels(kind)
        for spend_source in (SpendSource.CALLBACK, SpendSource.SPEND_LOGS):
            self._records.labels(spend_source)
        for since in (self._oldest_pending, self._oldest, self._capture):
            since.set(math.nan)

    def of_source(self, source_id: str) -> None:
        """Which source this process follows, or stands by for."""
        self._source.labels(source_id).set(1)

    def expect_callbacks(self) -> None:
        """There is an endpoint for callbacks: that none come can be seen only where their series exist."""
        for code in CALLBACK_CODES:
            self._callbacks.labels(str(code))

    def health(self, turned_at: float, reasons: Mapping[str, int]) -> None:
        """What /livez and /readyz would say now. turned_at: seconds of the epoch; reasons: how many, by topic."""
        self._turned.set(turned_at)
        for topic, count in reasons.items():
            self._unready.labels(topic).set(count)

    def exposition(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    # --- the daemon

    def info(self, event: str, **fields: Any) -> None:
        """Something happened as it should."""
        self._log.info(event, **fields)

    def warning(self, event: str, **fields: Any) -> None:
        """Something an operator should know."""
        self._log.warning(event, **fields)

    def error(self, event: str, **fields: Any) -> None:
        """Something an operator must act upon."""
        self._log.error(event, **fields)

    # --- the loop

    def committed(self, plan: Plan, counts: Mapping[str, int], seconds: float, now: float) -> None:
        """One plan is committed: the canonical line of the log."""
        for outcome, count in counts.items():
            self._lines.labels(outcome).inc(count)
        self._records.labels(SpendSource.CALLBACK).inc(counts.get(Outcome.SPEND_RECORD, 0))
        for number, letter in enumerate(plan.dead_letters):
            self._letters.labels(letter.reason).inc()
            if number >= LETTERS_LOGGED_MAX:
                continue
            self._log.warning(
                "dead_letter",
                reason=letter.reason,
                detail=letter.detail,
                file_id=letter.file_id,
                start=letter.start_offset,
                end=letter.end_offset,
            )
        self._seconds.observe(seconds)
        self._last_commit.set(now)
        self._log.info(
            "batch.committed",
            lines=plan.lines,
            bytes=plan.bytes,
            outcomes={str(outcome): count for outcome, count in counts.items()},
            files=[
                {"path": s.position.path, "from": s.position.committed_offset, "to": s.end_offset}
                for s in plan.steps[:10]
            ],
            file_count=len(plan.steps),
            seconds=round(seconds, 6),
        )

    def commit_failed(self, reason: str, message: str) -> None:
        """A transaction failed; nothing of it is in the database, or it will be found there."""
        self._failures.labels(reason).inc()
        self._log.warning("commit.failed", reason=reason, message=message)

    def settled(self, decisions: Collection[Decision]) -> None:
        """Decisions are committed."""
        receipts = [decision.receipt for decision in decisions if decision.receipt is not None]
        for decision in decisions:
            if decision.adjustment is not None:
                self._adjustments.inc()
                self._log.warning(
                    "adjustment",
                    call_id=decision.adjustment.source_reference,
                    delta_credits=decision.adjustment.delta_credits,
                    reason=decision.adjustment.reason,
                )
            for one in decision.opened:
                self._log.warning("exception.opened", call_id=one.call_id, kind=one.kind)
            for one in decision.closed:
                self._log.info("exception.closed", call_id=one.call_id, kind=one.kind, reason=one.reason)
        if receipts:
            self._receipts.inc(len(receipts))
            self._credits.inc(sum(receipt.charged_credits for receipt in receipts))
            self._log.info("settled", receipts=len(receipts))

    def settlement(self, counts: Mapping[str, Any]) -> None:
        """What waits for settlement, as counted in the database."""
        self._pending.set(counts["pending"])
        self._oldest_pending.set(math.nan if counts["oldest_pending"] is None else counts["oldest_pending"])
        for kind in ExceptionKind:
            self._exceptions.labels(kind).set(counts["exceptions"].get(kind, 0))

    def captured(self, ratio: Decimal | None) -> None:
        """The capture ratio of the newest closed window; None: nothing to tell."""
        self._capture.set(math.nan if ratio is None else float(ratio))

    def unaudited(self, records: int, with_line: int, call_ids: Collection[str]) -> None:
        """Spend records have no audit line. with_line: those whose line was skipped, call_ids: some of them."""
        self._unaudited.inc(records)
        self._with_line.inc(with_line)
        if with_line:
            self._log.error("unaudited_with_line", records=with_line, call_ids=list(call_ids))

    def polled(self, records: int, new: int, rejected: int, failure: str | None) -> None:
        """LiteLLM's spend logs were asked."""
        self._records.labels(SpendSource.SPEND_LOGS).inc(new)
        self._rejected_rows.inc(rejected)
        if failure is None:
            self._polled.set_to_current_time()
        else:
            self._poll_failures.inc()
            self._log.error("spend_logs.failed", message=failure)
        if new or rejected:
            self._log.info("spend_logs.polled", records=records, new=new, rejected=rejected)

    def callback(self, code: int) -> None:
        """A callback request was answered. LiteLLM says nowhere that it was refused: the log does, once a minute."""
        self._callbacks.labels(str(code)).inc()
        if code == UNAUTHORIZED and time.monotonic() >= self._next_refusal:
            self._next_refusal = time.monotonic() + REFUSAL_SECONDS
            self._log.warning("callback.refused", code=code, message="without CALLBACK_TOKEN; what it had is dropped")

    def spool(self, trouble: str | None) -> None:
        """The spool is in trouble, or well."""
        self._spool_alarm.set(trouble is not None)
        if trouble is not None:
            self._log.error("spool.trouble", message=trouble)

    def gap(self, gap: Gap, path: str) -> None:
        """Bytes are declared as not read."""
        self._gaps.labels(gap.reason).inc()
        if gap.end_offset is not None:
            self._gap_bytes.inc(gap.end_offset - gap.start_offset)
        self._log.error(
            "gap.declared",
            path=path,
            file_id=gap.file_id,
            start=gap.start_offset,
            end=gap.end_offset,
            reason=gap.reason,
        )

    def gaps_recorded(self, gaps: Mapping[GapReason, tuple[int, int]]) -> None:
        """How many gaps stand in Postgres and how many bytes they have, by reason. What operators have added since
        the last time is counted as declared."""
        for reason in GapReason:
            self._gaps_recorded.labels(reason).set(gaps.get(reason, (0, 0))[0])
        for reason in GAPS_OF_OPERATORS if self._gaps_known is not None else ():
            count, size = gaps.get(reason, (0, 0))
            count_before, size_before = (self._gaps_known or {}).get(reason, (0, 0))
            self._gaps.labels(reason).inc(max(0, count - count_before))
            self._gap_bytes.inc(max(0, size - size_before))
        self._gaps_known = gaps

    def reset(self, source: str, **fields: Any) -> None:
        """An operator moved an offset."""
        self._resets.labels(source).inc()
        self._log.warning("offset.reset", source=source, **fields)

    def active(self, active: bool) -> None:
        """This process became, or ceased to be, the one that commits."""
        self._active.set(active)

    def dead_letters_open(self, count: int) -> None:
        """As counted in the database."""
        self._letters_open.set(count)

    def files(self, positions: Mapping[int, Position], sizes: Mapping[int, tuple[str, int, int]]) -> None:
        """Where the followed files stand. sizes: file_id -> (path, committed offset, size) of those in sight."""
        states = dict.fromkeys(FileState, 0)
        for position in positions.values():
            states[position.state] += 1
        for state, count in states.items():
            self._files.labels(state).set(count)
        unread_first = sorted(sizes.values(), key=lambda s: (s[1] >= s[2], s[0]))
        rows: dict[str, tuple[int, int]] = {}
        for index, (path, offset, size) in enumerate(unread_first):
            label = path if index < FILE_LABELS_MAX else OTHER
            before = rows.get(label, (0, 0))
            rows[label] = (before[0] + offset, before[1] + size)
        for label in self._labelled - set(rows):
            for metric in (self._lag, self._offset, self._size):
                metric.remove(label)
        self._labelled = set(rows)
        for label, (offset, size) in rows.items():
            self._lag.labels(label).set(max(0, size - offset))
            self._offset.labels(label).set(offset)
            self._size.labels(label).set(size)

    def oldest_uncommitted(self, since: float | None) -> None:
        """Since when there are uncommitted bytes, in seconds of the epoch."""
        self._oldest.set(math.nan if since is None else since)
