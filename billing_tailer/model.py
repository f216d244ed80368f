"""The values that travel through the rooms: immutable, no I/O, no clock.

A line's way: bytes -> `FactRow` | `Skip` | `Rejected` -> `Plan` -> one transaction. The records that exist once per
line are `NamedTuple`s, because a frozen dataclass costs several times as much to make and there are 10,000 in a batch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from decimal import Decimal
from enum import StrEnum
from typing import NamedTuple

HEAD_BYTES_MAX = 1024
"""How much of the beginning of a file is kept verbatim to know it again."""
FRONTIER_BYTES_MAX = 4096
"""How much before the committed offset is hashed to know the file again."""


class SkipReason(StrEnum):
    """Why a line is no call to be billed, and no mistake either. Also the metric label and the key in
    `tail_batches.counts`."""

    NOT_LLM_ROUTE = "not_llm_route"
    REJECTED_BEFORE_LLM = "rejected_before_llm"
    BLANK_LINE = "blank_line"
    TORN = "torn"


class DeadLetterReason(StrEnum):
    """Why a byte range could not become a fact. Also the metric label and `dead_letters.reason`."""

    INVALID_JSON = "invalid_json"
    NOT_AN_OBJECT = "not_an_object"
    DUPLICATE_KEY = "duplicate_key"
    MISSING_FIELD = "missing_field"
    BAD_VALUE = "bad_value"
    TOO_LONG = "too_long"
    UNTERMINATED = "unterminated"
    REFUSED_BY_POSTGRES = "refused_by_postgres"


class GapReason(StrEnum):
    """Why a byte range is declared as not read: `log_gaps.reason`."""

    TRUNCATED = "truncated"
    REGROWN = "regrown"
    INODE_REUSED = "inode_reused"
    START_AT = "start_at"
    SKIPPED = "skipped"
    HOLE = "hole"
    ACCEPTED = "accepted"


class BlockReason(StrEnum):
    """Why a file is not read until an operator decides: `tail_files.blocked_reason`."""

    OFFSET_PAST_END = "offset_past_end"
    AMBIGUOUS = "ambiguous"


class FileState(StrEnum):
    """`tail_files.state`.

    live: seen under the name it was first seen with. rotated: seen under another name, or held open without a name.
    missing: not seen and not held, which proves nothing (CANNOT_SEE_IS_NOT_GONE). blocked: an operator must decide.
    final: nothing more will be read from this generation, unless a file with its content appears again.
    """

    LIVE = "live"
    ROTATED = "rotated"
    MISSING = "missing"
    BLOCKED = "blocked"
    FINAL = "final"


class Outcome(StrEnum):
    """Outcomes of a line beside the skip reasons. Also the metric label and the key in `tail_batches.counts`."""

    FACT = "fact"
    REPLAYED = "replayed"
    CONFLICT = "conflict"
    DEAD_LETTER = "dead_letter"
    SPEND_RECORD = "spend_record"


class UsageFact(NamedTuple):
    """One billable call, as its audit line tells it.

    call_id: the key; nginx_request_id: tells a replay from a conflict; proxy_call_id: the id our proxy asked LiteLLM to
    use; id_echoed: LiteLLM's answer carried the call id; header_cost_usd: a witness, never a price
    (LITELLM_IS_USAGE_TRUTH); request_seconds: duration; occurred_at: end of the request, UTC;
    line_sha256: only where the line has no request id, to tell a replay from a conflict.
    """

    call_id: str
    nginx_request_id: str | None
    proxy_call_id: str | None
    id_echoed: bool
    run_id: str | None
    attempt: int | None
    graph_id: str | None
    billing_account_id: str | None
    method: str | None
    path: str | None
    status: int
    request_completed: bool
    provenance: str
    requested_model: str | None
    header_cost_usd: Decimal | None
    header_model_group: str | None
    cache_key: str | None
    request_seconds: Decimal | None
    occurred_at: datetime
    line_sha256: bytes | None


class Skip(NamedTuple):
    """A line that is no call to be billed. call_id: the id under which LiteLLM may know the request all the same; only
    of a line `rejected_before_llm`, and only if it has one."""

    reason: SkipReason
    call_id: str | None = None


class Rejected(NamedTuple):
    """A line that cannot be understood. `detail` names the field and the value, for the operator."""

    reason: DeadLetterReason
    detail: str


class FactRow(NamedTuple):
    """A usage fact on its way into Postgres. text: its columns, as `rows` writes them; second: that of the epoch in
    which the request ended."""

    call_id: str
    text: str
    second: int


class PlacedFact(NamedTuple):
    """A fact and the byte range it was read from; `end_offset` is exclusive and includes the newline. text: the columns
    of the place too, behind those of the fact (`rows.placed`)."""

    call_id: str
    text: str
    second: int
    file_id: int
    start_offset: int
    end_offset: int


class PlacedSkip(NamedTuple):
    """A call whose line was skipped, and where that line begins."""

    call_id: str
    file_id: int
    start_offset: int


class PlacedRecord(NamedTuple):
    """A spend record and where in the spool it was read; both None for one that LiteLLM was asked for."""

    record: "SpendRecord"
    file_id: int | None = None
    start_offset: int | None = None


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A byte range that could not become a fact. `raw` is bounded, `sha256` covers the whole range."""

    file_id: int
    start_offset: int
    end_offset: int
    reason: DeadLetterReason
    detail: str
    raw: bytes
    sha256: bytes


@dataclass(frozen=True, slots=True)
class Gap:
    """A byte range that is declared as not read; `end_offset` None: nobody knows how far it went."""

    file_id: int
    start_offset: int
    end_offset: int | None
    reason: GapReason


@dataclass(frozen=True, slots=True)
class Position:
    """One generation of one file and how far it is committed: a row of `tail_files`. Offsets and sizes in bytes."""

    file_id: int
    path: str
    device: int
    inode: int
    generation: int
    previous_file_id: int | None
    head: bytes
    committed_offset: int
    frontier_sha256: bytes
    frontier_bytes: int
    size_seen: int
    state: FileState
    blocked_reason: BlockReason | None = None
    dead_letter_bytes: int = 0
    first_seen_at: datetime | None = None
    last_commit_at: datetime | None = None

    @property
    def locator(self) -> tuple[int, int]:
        """(device, inode)."""
        return (self.device, self.inode)


@dataclass(frozen=True, slots=True)
class SeenFile:
    """A regular file found by a scan. `path` is escaped (`files.escape_path`), `size` in bytes, times in nanoseconds.

    listed: False for a file that no directory shows any more and that is only held open: deleted, or moved away.
    compressed: a gzip file, whose content is what is followed; `size` and all offsets are those of the content.
    """

    path: str
    device: int
    inode: int
    size: int
    mtime_ns: int = 0
    ctime_ns: int = 0
    listed: bool = True
    compressed: bool = False

    @property
    def locator(self) -> tuple[int, int]:
        """(device, inode)."""
        return (self.device, self.inode)


@dataclass(frozen=True, slots=True)
class Place:
    """A place in a file and what identifies it: the head and the frontier that a position there has."""

    offset: int
    head: bytes
    frontier_sha256: bytes
    frontier_bytes: int


class Verdict(StrEnum):
    """What comparing a file with a position says."""

    AGREES = "agrees"
    CUT = "cut"
    """Agrees up to the offset, but ends before a byte that was seen and not committed."""
    SHRUNK = "shrunk"
    """Shorter than the offset, and the beginning is another one (or nothing is left)."""
    PAST_END = "past_end"
    """Shorter than the offset, with the same beginning."""
    DIFFERS = "differs"
    """Long enough, but not the bytes that were committed."""
    UNREADABLE = "unreadable"
    BEHIND = "behind"
    """Not there yet, in a file that can only be read from its beginning: ask again."""


@dataclass(frozen=True, slots=True)
class BatchRow:
    """The row of `tail_batches` that a step inserts (`grows_from` None) or grows from that end offset."""

    start_offset: int
    grows_from: int | None
    end_offset: int
    sha256: bytes
    counts: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class FileStep:
    """One file's part of a plan: moves `position` to `end_offset` and says what the bytes between were, which is lines
    (batch) or a hole (gap)."""

    position: Position
    end_offset: int
    head: bytes
    frontier_sha256: bytes
    frontier_bytes: int
    size_seen: int
    dead_letter_bytes: int
    batch: BatchRow | None
    counts: Mapping[str, int]
    gap: Gap | None = None

    def after(self) -> Position:
        """The position once the step is committed."""
        return replace(
            self.position,
            head=self.head,
            committed_offset=self.end_offset,
            frontier_sha256=self.frontier_sha256,
            frontier_bytes=self.frontier_bytes,
            size_seen=self.size_seen,
            dead_letter_bytes=self.dead_letter_bytes,
        )

    def __post_init__(self) -> None:
        # pair assertion: ledger/writer.py makes Postgres assert the same again
        if not self.position.committed_offset < self.end_offset <= self.size_seen:
            raise AssertionError(f"step of {self.position.path} does not move forward inside the file: {self}")


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything one transaction commits. fact_calls: the call ids of the facts. earliest: by `file_id`, the earliest
    second of its facts."""

    steps: tuple[FileStep, ...]
    facts: tuple[PlacedFact, ...]
    dead_letters: tuple[DeadLetter, ...]
    records: tuple[PlacedRecord, ...]
    skips: tuple[PlacedSkip, ...]
    fact_calls: frozenset[str]
    earliest: Mapping[int, int]

    @property
    def overlapping(self) -> bool:
        """Whether two lines of the plan share a call id."""
        return len(self.fact_calls) != len(self.facts)

    @property
    def lines(self) -> int:
        """Number of lines the plan accounts for."""
        return sum(sum(step.counts.values()) for step in self.steps)

    @property
    def bytes(self) -> int:
        """Number of bytes the plan moves the offsets by."""
        return sum(step.end_offset - step.position.committed_offset for step in self.steps)


# --- settlement: what LiteLLM says of a call, and what becomes of it ------------------------------------------------


class SpendSource(StrEnum):
    """Where a spend record came from: `spend_records.source`, `charge_receipts.spend_source`.

    header: no record, but the line's `x-litellm-response-cost`, where COST_SOURCE asks for it.
    """

    CALLBACK = "callback"
    SPEND_LOGS = "spend_logs"
    HEADER = "header"


class SpendStatus(StrEnum):
    """How an attempt ended, as LiteLLM says: `spend_records.status`."""

    SUCCESS = "success"
    FAILURE = "failure"


@dataclass(frozen=True, slots=True)
class SpendRecord:
    """What LiteLLM says of one attempt of a call: a row of `spend_records`. `received_at` is set by Postgres.

    (call_id, source, record_id): the key. cost_usd: USD, unrounded, never negative; cost_text: only where the cost is
    no amount that can be charged (then cost_usd is None); both None: LiteLLM gave no cost. Tokens: counts, the cached
    ones included in prompt_tokens; None where LiteLLM gave no usable number. end_user, run_id: LiteLLM's, not our
    proxy's. request_id: the provider's or LiteLLM's id, forensic, never a join key. started_at, ended_at: UTC.
    """

    call_id: str
    source: SpendSource
    record_id: str
    status: SpendStatus
    model_group: str | None
    model: str | None
    provider: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    cached_tokens: int | None
    reasoning_tokens: int | None
    cost_usd: Decimal | None
    cost_text: str | None
    cache_hit: bool | None
    end_user: str | None
    run_id: str | None
    error_code: str | None
    request_id: str | None
    started_at: datetime | None
    ended_at: datetime | None


class Provenance(StrEnum):
    """How the answer was delivered, or `manual` where a person named the cost: `charge_receipts.provenance`."""

    STREAM = "stream"
    RESPONSE = "response"
    MANUAL = "manual"


class ExceptionKind(StrEnum):
    """Why a call needs a look: `call_exceptions.kind`, also the metric label.

    The held ones, `conflict` and `unattributed` keep a call from being charged. `not_charged` and `overdue` say why it
    has no receipt. `cost_mismatch`: what is charged is not what the records say. The last two only inform.
    """

    HELD_ZERO_COST = "held_zero_cost"
    HELD_BAD_COST = "held_bad_cost"
    UNATTRIBUTED = "unattributed"
    NOT_CHARGED = "not_charged"
    OVERDUE = "overdue"
    CONFLICT = "conflict"
    COST_MISMATCH = "cost_mismatch"
    CALL_ID_NOT_FORWARDED = "call_id_not_forwarded"
    MODEL_MISMATCH = "model_mismatch"


class Corrections(StrEnum):
    """What to do where later records change the bill of a settled call: `BILLING_TAILER_CORRECTIONS`."""

    APPLY = "apply"
    REPORT = "report"


SETTLER = "settler"
"""`created_by` and `closed_by` of what the program does by itself; anything else is a person's name."""
SOURCE_SYSTEM = "litellm"
CHARGE_REASON = "llm_usage"
RECEIPT_KIND = "llm"


@dataclass(frozen=True, slots=True)
class Receipt:
    """The money of one call: a row of `charge_receipts` (without created_at). Costs in USD, 1 credit = 1e-7 USD.

    source_reference: the call id alone (ONE_RECEIPT_PER_CALL). spend_source, record_ids: the records that were summed;
    with provenance `manual` the source is None and record_ids are all those the person could see.
    """

    source_reference: str
    billing_account_id: str
    run_id: str | None
    attempt: int | None
    litellm_call_id: str
    charged_credits: int
    provider_cost_usd: Decimal
    user_cost_usd: Decimal
    markup_factor: Decimal
    provenance: Provenance
    spend_source: SpendSource | None
    record_ids: tuple[str, ...]
    occurred_at: datetime
    source_system: str = SOURCE_SYSTEM
    charge_reason: str = CHARGE_REASON
    receipt_kind: str = RECEIPT_KIND


@dataclass(frozen=True, slots=True)
class ChargeDetails:
    """The telemetry of one receipt: a row of `llm_charge_details`. Everything but graph_id is LiteLLM's word.

    provider_call_id: forensic, never a join key; model: LiteLLM's model group; response_cost_usd: of the record the
    details come from, unrounded; latency_ms: between that record's start and end. All None where there are no records.
    """

    source_reference: str
    provider_call_id: str | None
    model: str | None
    provider_model: str | None
    provider: str | None
    tokens_in: int | None
    tokens_out: int | None
    cached_tokens: int | None
    reasoning_tokens: int | None
    response_cost_usd: Decimal | None
    cache_hit: bool | None
    latency_ms: int | None
    graph_id: str | None
    source_system: str = SOURCE_SYSTEM


@dataclass(frozen=True, slots=True)
class Adjustment:
    """A correction of a settled call: a row of `charge_adjustments` (without created_at).

    delta_credits, delta_cost_usd (of the provider cost): added to the receipt's. evidence: JSON, with `record_ids`.
    created_by: SETTLER, or the person who decided.
    """

    source_reference: str
    evidence_hash: str
    delta_credits: int
    delta_cost_usd: Decimal
    reason: str
    evidence: Mapping[str, object]
    created_by: str


@dataclass(frozen=True, slots=True)
class CallException:
    """A row of `call_exceptions`, open (closed_by None) or closed. detail: JSON; its `evidence` tells whether a person
    who closed it has seen what there is to see now."""

    call_id: str
    kind: ExceptionKind
    seq: int
    detail: Mapping[str, object]
    closed_by: str | None = None
    reason: str | None = None

    @property
    def is_open(self) -> bool:
        """Whether nobody has closed it."""
        return self.closed_by is None

    @property
    def evidence(self) -> object:
        """What it is about; the same kind with other evidence is another exception."""
        return self.detail.get("evidence")


@dataclass(frozen=True, slots=True)
class Release:
    """A person's decision on one call (`exceptions release`).

    cost_usd: the provider cost of the whole call, before markup; None: the records' own. billing_account_id: whom to
    charge; None: as the line says.
    """

    reason: str
    released_by: str
    cost_usd: Decimal | None = None
    billing_account_id: str | None = None
