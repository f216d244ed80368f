"""The parts of README.md and docs/ that follow from the code, so that no table is typed by hand.

    python -m tests.docs_tables            says which parts are not what the code says, exit code 1 if there are any
    python -m tests.docs_tables --write    puts them right

Each part stands between `<!-- name -->` and `<!-- /name -->`. What the code cannot say, the meaning of a reason or why
a log field is needed, stands here, keyed by what the code has: a new reason without a meaning is an error, and so is a
meaning of something that is gone. tests/test_docs.py::test_tables_are_what_the_code_says runs it.
"""

import ast
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any

import typer.main

from billing_tailer import audit, errors
from billing_tailer.cli import cli
from billing_tailer.events import Events
from billing_tailer.health import Health
from billing_tailer.ledger import Reads, migrations
from billing_tailer.model import (
    BlockReason,
    DeadLetterReason,
    ExceptionKind,
    FileState,
    GapReason,
    Outcome,
    Rejected,
    Skip,
    SkipReason,
    UsageFact,
)
from billing_tailer.settings import LLM_ROUTES, PREFIX, describe
from billing_tailer.settle import Rules
from billing_tailer.spend import slim
from billing_tailer.spool import Spool
from billing_tailer.web.callbacks import callback_routes
from billing_tailer.web.pages import Deciding, page_routes
from billing_tailer.web.runs import run_routes
from billing_tailer.web.server import application
from billing_tailer.web.waiters import Waiters
from tests.scenarios.inventory import SCENARIOS

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "billing_tailer"
FILES = (
    "README.md",
    "deploy/runbook.md",
    "docs/activity.md",
    "docs/containers.md",
    "docs/growing.md",
    "docs/integrating.md",
    "docs/operating.md",
    "docs/scenarios.md",
)
LOG_FORMAT = "deploy/nginx/audit.conf.template"
RUN_CLIENT = "tests/support/run_client.py"
NOT_YET = "not written by this version"

# --- what the code cannot say -------------------------------------------------------------------------------------

OUTCOMES: Mapping[StrEnum, str] = {
    Outcome.FACT: "a billable call: a row of `usage_facts`",
    Outcome.SPEND_RECORD: "what LiteLLM says of one attempt of a call, a line of the spool: a row of `spend_records`",
    Outcome.REPLAYED: "a line or record that is there already (a copied log, a rewind, an event sent twice): accounted "
    "for, nothing else",
    Outcome.CONFLICT: "another request under a call id that is taken: a row of `call_conflicts`; look at the proxy",
    Outcome.DEAD_LETTER: "could not be understood: a row of `dead_letters`, with the bytes",
    SkipReason.NOT_LLM_ROUTE: "no POST to one of `LLM_ROUTES`, such as `GET /v1/models` or a health check",
    SkipReason.REJECTED_BEFORE_LLM: "refused by nginx or by LiteLLM's door, before a model was asked",
    SkipReason.BLANK_LINE: "white space",
    SkipReason.TORN: "what a death or a failed write left in the spool: its sender was not told that it was safe",
}
DEAD_LETTERS: Mapping[StrEnum, str] = {
    DeadLetterReason.INVALID_JSON: "not JSON",
    DeadLetterReason.NOT_AN_OBJECT: "JSON, but no object",
    DeadLetterReason.DUPLICATE_KEY: "one key twice: neither value can be trusted",
    DeadLetterReason.MISSING_FIELD: "a field that every such line must have is not there: correct nginx's "
    "`log_format`; of a callback, its call id",
    DeadLetterReason.BAD_VALUE: "a field that decides the bill (status, time, an id) has an impossible value",
    DeadLetterReason.TOO_LONG: "longer than `LINE_BYTES_MAX`, its first 4 KiB are kept; of a callback, more than 4 MiB "
    "without its prompts and answers, or deeper than 500 levels",
    DeadLetterReason.UNTERMINATED: "what stands behind the last newline of a finished file; a callback that breaks off",
    DeadLetterReason.REFUSED_BY_POSTGRES: "Postgres refused the row; its words are in `detail`",
}
GAPS: Mapping[StrEnum, str] = {
    GapReason.TRUNCATED: "the file was cut before these bytes were read",
    GapReason.REGROWN: "the file's content was replaced by another of at least the same length",
    GapReason.INODE_REUSED: "the file is gone, and another file has its inode number",
    GapReason.START_AT: "left out by `START_AT=end`",
    GapReason.SKIPPED: "left out by an operator's offset reset",
    GapReason.HOLE: "NUL bytes where a line should begin, two seconds after something followed them",
    GapReason.ACCEPTED: "given up by an operator (`offsets accept-gap`), of a file that was missing or blocked",
}
BLOCKS: Mapping[StrEnum, str] = {
    BlockReason.OFFSET_PAST_END: "the file is shorter than what is committed of it, and begins with the same bytes",
    BlockReason.AMBIGUOUS: "the file is gone, and several others begin with all that was committed of it",
}
STATES: Mapping[StrEnum, str] = {
    FileState.LIVE: "seen under the name it was first seen with",
    FileState.ROTATED: "seen under another name, or deleted and still held open",
    FileState.MISSING: "not in sight, which proves nothing: position and facts stay as they are",
    FileState.BLOCKED: "not read until an operator decides",
    FileState.FINAL: (
        "its content is gone from its place, it was deleted, committed and silent for a day, or an operator gave up "
        "its rest: nothing more is read, unless it appears again"
    ),
}
EXIT_CODES: Mapping[int, str] = {
    0: "done; for `run`: ended by SIGTERM or SIGINT",
    1: "failed; for `status` and `check`: something needs an operator",
    2: "wrong usage, or wrong or missing configuration: the message names the variable, its value and what to do",
    3: "another process owns the data directory, or has moved a position of this source",
}
ENDPOINTS: Mapping[str, str] = {
    "/livez": "200 while the loop turns, 503 after 30 s without a turn. Never asks Postgres: restart on 503",
    "/readyz": "200 if this process commits and every file is followed, else 503 with the reasons by topic as JSON",
    "/metrics": "Prometheus' text format",
    "POST /v1/callbacks/litellm": "LiteLLM's events, as a JSON array, an object per line or one object, also gzipped: "
    "200 with the numbers of those accepted and rejected, once all are on disk; 400 where nothing is JSON, 401, 408, "
    "413, 415, 503 where the spool is full. Exists where `CALLBACK_TOKEN` or `SPOOL_DIR` is set",
    "/v1/runs/{run_id}": "the bill of a run, at once or as soon as it is complete: `wait_seconds` (to 60), `calls=N` "
    "or `call_id=...` (to 1,000 of them), `details=true` with `after` and `limit`",
    "/v1/calls/{call_id}": "everything about one call, down to the line in the log; 404 where nothing is known of it",
    "/v1/activity": "the numbers of the activity page as JSON: `range` or `from` and `to`, `account`, `model`",
    "/": "the activity page: how far the bill is complete, sums, cost over time, models, accounts, receipts",
    "/calls/{call_id}": "a call's page, from its line to the money",
    "/exceptions": "calls that need a decision or a look, with the commands that decide them",
    "/dead-letters": "what was not understood, with the commands that decide it",
    "/reconciliation": "what became of the calls of each day",
    "/export.{format}": "receipts of a range as `csv` or `jsonl`, with the parameters of `/` and `run_id`",
    "/login": "the form that makes a session of 12 hours with `API_TOKEN`; five wrong tokens in a minute, then 429",
    "POST /logout": "ends the session in this browser",
    "/static/{name}": "the pages' style and script; for everybody",
}
EXCEPTIONS: Mapping[ExceptionKind, tuple[str, str]] = {
    ExceptionKind.HELD_ZERO_COST: (
        (
            "a success with tokens, without a cost, no cache hit, of a model that is not in `FREE_MODELS`: an "
            "unpriced model looks the same as a free one. Not charged until somebody decides"
        ),
        (
            "free: add the model to `FREE_MODELS` and restart, which settles those that are held already. Unpriced: "
            "give it a price in LiteLLM, and `release` each call with its cost"
        ),
    ),
    ExceptionKind.HELD_BAD_COST: (
        "a cost that is no number, negative or above `COST_MAX_USD`. Not charged until somebody decides",
        "read the cost in `explain`, and `release` the call with what it should be",
    ),
    ExceptionKind.UNATTRIBUTED: (
        "the line names no account. Not charged until somebody names one",
        "`release` with the account; correct the proxy, which must set `end_user`",
    ),
    ExceptionKind.NOT_CHARGED: (
        "all attempts failed, and cost nothing. Closed by itself where a later record changes that",
        "nothing",
    ),
    ExceptionKind.OVERDUE: (
        (
            "no spend record within `SETTLE_DEADLINE_SECONDS`: lost, or late. Still pending: a record that comes "
            "later settles the call and closes this"
        ),
        (
            "many of them: do callbacks arrive, is LiteLLM's database well? See below. A few: look in LiteLLM for "
            "the call id, and `release` with what it says, or `close` it and charge nothing"
        ),
    ),
    ExceptionKind.CONFLICT: (
        (
            "several requests under one call id, for different accounts. Not charged until somebody decides; "
            "after a receipt, corrections stop"
        ),
        (
            "see that the proxy sets `x-litellm-call-id`; then `release` with the account that pays for all of "
            "them, or `close`"
        ),
    ),
    ExceptionKind.COST_MISMATCH: (
        (
            "a later record says another amount than what is charged, and it is not applied: "
            "`CORRECTIONS=report`, or a person had named the amount"
        ),
        "`adjust` by the difference in `detail`, or `close` to leave it",
    ),
    ExceptionKind.CALL_ID_NOT_FORWARDED: (
        "informs: LiteLLM used another call id than the proxy asked for",
        (
            "correct the proxy: calls whose answer never came cannot be tied to their cost, and clients may "
            "choose the id"
        ),
    ),
    ExceptionKind.MODEL_MISMATCH: (
        "informs: LiteLLM ran another model than the log says was asked for (a fallback). What ran is billed",
        "nothing, if you meant to have fallbacks",
    ),
}
TABLES: Mapping[str, str] = {
    "tail_files": "one row per generation of a file: identity, committed offset, state",
    "tail_batches": "which byte ranges are committed, their SHA-256 and how many lines of them had which outcome",
    "log_gaps": "byte ranges that were not read, and why",
    "dead_letters": "byte ranges that were not understood, and why, with their bytes",
    "offset_resets": "every move of an offset, and every decision about a missing or blocked file, by an operator",
    "backfills": "every run of `backfill` that read something, who started it and why",
    "usage_facts": "one row per call: run, account, route, status, times, and the byte range of its line",
    "call_conflicts": "further requests under a call id that is taken",
    "spend_records": "what LiteLLM says of each attempt of a call, by source: status, model, tokens, cost unrounded",
    "unsettled_facts": "work list: calls without a receipt that may still get one",
    "unlisted_facts": "byte ranges of large batches whose calls are not in `unsettled_facts` yet",
    "touched_calls": "work list: calls about which a record has come that was not looked at yet",
    "skipped_calls": "calls whose lines were skipped as refused, the newest ones: to know them again in a spend record",
    "unaudited_progress": "how far it was looked for spend records without a line",
    "prunes": "every removal of spend records without a line: how many, who and why",
    "charge_receipts": "the money: one row per charged call, never changed",
    "llm_charge_details": "one row per receipt: model, tokens, LiteLLM's cost and times",
    "charge_adjustments": "later corrections of a receipt: the difference, why, and who made it",
    "call_exceptions": "why a call needs a look: opened, and closed by whom and why",
}
ALWAYS, CALLS, OPTIONAL = "every line", "calls", "no"
LOG_FIELDS: Mapping[str, tuple[str, str]] = {
    "method": (ALWAYS, "only a POST is a call"),
    "uri": (ALWAYS, "its path says whether this is a call; the query is not kept"),
    "status": (CALLS, "whether LiteLLM was asked at all"),
    "msec": (CALLS, "the end of the request: when the call happened"),
    "time": (OPTIONAL, "stands in for an empty or absent `msec`, to the second"),
    "nginx_request_id": (OPTIONAL, "tells a line that comes twice from two requests under one call id: do have it"),
    "call_id": (OPTIONAL, "the id that the proxy gave to LiteLLM: names the calls whose answer never came (499, 504)"),
    "litellm_call_id": (CALLS, "LiteLLM's own word for the call: the key that ties the line to its cost"),
    "run_id": (CALLS, "which run the call belongs to; else the `run_id` of `spend_logs_metadata`"),
    "end_user": (CALLS, "the account that pays. The proxy must set it, or the caller chooses"),
    "spend_logs_metadata": (OPTIONAL, "`run_id`, `graph_id` and `attempt`, as JSON in the string"),
    "requested_model": (OPTIONAL, "what the client asked for: a witness"),
    "litellm_model_group": (OPTIONAL, "what LiteLLM says it used: a witness"),
    "litellm_response_cost": (OPTIONAL, "a witness, never a price: absent on streams, too high on cache hits"),
    "litellm_cache_key": (OPTIONAL, "set on a cache hit: a witness"),
    "request_time": (CALLS, "how long it took; with `msec`, when it began"),
    "request_completion": (CALLS, "`OK`, or empty where the client left before the end of the answer"),
    "upstream_status": (CALLS, "tells LiteLLM's refusals from nginx's own"),
    "upstream_connect_time": (CALLS, "tells a LiteLLM that was never reached from one that broke off"),
    "upstream_content_type": (CALLS, "tells streams from plain answers"),
    "ts": (OPTIONAL, "only in the older format: its time"),
}

# --- markdown -----------------------------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def code(text: str) -> str:
    """As code, or nothing."""
    return f"`{text}`" if text else ""


def same_keys(what: str, code_has: Iterable[Any], meanings: Iterable[Any]) -> None:
    """Raise where something of the code has no meaning here, or the other way round."""
    has, explained = {str(key) for key in code_has}, {str(key) for key in meanings}
    if has != explained:
        raise LookupError(
            f"tests/docs_tables.py: {what}: no meaning for {sorted(has - explained)}, "
            f"meanings of what is not there: {sorted(explained - has)}"
        )


# --- the parts ----------------------------------------------------------------------------------------------------


@cache
def trees() -> dict[Path, ast.Module]:
    """The modules of the package, parsed."""
    return {path: ast.parse(path.read_text("utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}


@cache
def attributes_used(defined_in: str) -> frozenset[str]:
    """Names of attributes that modules other than the defining one look up."""
    return frozenset(
        node.attr
        for path, tree in trees().items()
        if path.name != defined_in
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
    )


def environment() -> str:
    """Every variable with default and meaning."""
    used = attributes_used("settings.py")
    rows = []
    for variable in describe():
        unused = variable.name.removeprefix(PREFIX).lower() not in used
        meaning = variable.meaning + ("; checked, but nothing uses it yet" if unused else "")
        rows.append((code(variable.name), code(variable.default), meaning))
    return table(("variable", "default", "meaning"), rows)


def commands() -> Iterator[tuple[str, Any]]:
    """Every verb with its click command, in the order of the help."""

    def walk(group: Any, path: str) -> Iterator[tuple[str, Any]]:
        for name in group.list_commands(None):
            command: Any = group.get_command(None, name)
            if hasattr(command, "commands"):
                yield from walk(command, f"{path}{name} ")
            else:
                yield path + name, command

    yield from walk(typer.main.get_command(cli), "")


def usage(name: str, command: Any) -> str:
    """A verb as it is typed: `offsets reset PATH=... --reason TEXT [--json]`."""
    words = [name]
    for parameter in command.params:
        if not parameter.opts[0].startswith("-"):
            word = parameter.metavar or parameter.name.upper()
        elif parameter.is_flag:
            word = parameter.opts[0]
        else:
            kind = parameter.type_descriptor.annotation
            value = "N" if kind is int else "TEXT" if kind is str else parameter.name.upper()
            word = f"{parameter.opts[0]} {parameter.metavar or value}"
        words.append(word if parameter.required else f"[{word}]")
    return " ".join(words)


def verbs() -> str:
    """Every verb with its options."""
    return table(
        ("`billing-tailer ...`", "what it does"),
        ((code(usage(name, command)), " ".join(command.help.split())) for name, command in commands()),
    )


def metric_rows() -> Iterator[tuple[str, str, tuple[str, ...], str]]:
    """Name, type, labels and meaning of every metric of ours."""
    suffixes = {"counter": "_total", "info": "_info"}
    for collector in Events().registry._collector_to_names:
        metric: Any = collector
        if not hasattr(metric, "_documentation"):
            continue  # the process's own: memory, descriptors, CPU
        kind = metric._type
        labels = tuple(metric._labelnames) or (tuple(metric._value) if kind == "info" else ())
        yield metric._name + suffixes.get(kind, ""), kind, labels, metric._documentation


def metrics() -> str:
    """The registry, and which labels a metric has."""
    rows = ((code(name), kind, ", ".join(map(code, labels)), text) for name, kind, labels, text in metric_rows())
    return table(("metric", "type", "labels", "meaning"), rows)


def reasons(*enums: type[StrEnum], meanings: Mapping[StrEnum, str], header: str) -> str:
    """The members of closed enums; those that no code makes are marked."""
    members = [member for enum in enums for member in enum]
    same_keys(header, members, meanings)
    used = attributes_used("model.py")
    rows = [(code(m), meanings[m] + ("" if m.name in used else f" ({NOT_YET})")) for m in members]
    return table((header, "meaning"), rows)


def exit_codes() -> str:
    """From the classes of our errors."""
    found = {0} | {
        kind.exit_code
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.TailerError)
    }
    same_keys("exit codes", found, EXIT_CODES)
    return table(("exit code", "meaning"), ((str(key), EXIT_CODES[key]) for key in sorted(found)))


def endpoints() -> str:
    """From the routes of the application."""
    reads = Reads("billing", "default")
    more = [
        *callback_routes(None, Spool(ROOT, 1, lambda _: None), slim, 1, lambda _: None),
        *run_routes(None, reads, Waiters(reads.run_status)),
        *page_routes(None, reads, "billing", "default", Deciding(Rules(), 1, 1), Health(), Events()),
    ]
    paths = []
    for route in application(Events(), Health(), more).routes:
        path = str(getattr(route, "path", "")).replace(":path}", "}")
        if path != "/" and path.endswith("/"):
            continue  # the same as without
        paths.append(path if "GET" in getattr(route, "methods", ()) else f"POST {path}")
    same_keys("endpoints", paths, ENDPOINTS)
    return table(("path", "answer"), ((code(path), ENDPOINTS[path]) for path in paths))


def exception_kinds() -> str:
    """From the enum."""
    same_keys("exception kinds", ExceptionKind, EXCEPTIONS)
    return table(("kind", "meaning", "what to do"), ((code(kind), *EXCEPTIONS[kind]) for kind in ExceptionKind))


def run_client() -> str:
    """The client for applications, as tests/test_runs.py runs it."""
    return f"```python\n{(ROOT / RUN_CLIENT).read_text('utf-8')}```"


def tables() -> str:
    """From the migrations."""
    names = [name for m in migrations() for name in re.findall(r"^create table (\w+)", m.text, re.MULTILINE)]
    same_keys("tables", names, TABLES)
    return table(("table", "holds"), ((code(name), TABLES[name]) for name in names))


def required_fields() -> str:
    """What a line of a call must have, as a sentence."""
    return ", ".join(map(code, audit.REQUIRED_FIELDS))


def fields_read() -> set[str]:
    """The names of the log fields that audit.py looks up, from its syntax tree."""
    found: set[str] = set()
    for node in ast.walk(trees()[PACKAGE / "audit.py"]):
        match node:
            case ast.Call(
                func=ast.Attribute(value=ast.Name(id="fields"), attr="get"), args=[ast.Constant(value=str(value)), *_]
            ):
                found.add(value)
            case ast.Call(func=ast.Name(), args=[ast.Name(id="fields"), ast.Constant(value=str(value))]):
                found.add(value)
            case ast.Subscript(value=ast.Name(id="fields"), slice=ast.Constant(value=str(value))):
                found.add(value)
            case ast.Compare(left=ast.Constant(value=str(value)), comparators=[ast.Name(id="fields")]):
                found.add(value)
    return found


def nginx_variables() -> dict[str, str]:
    """Field -> nginx variable, as the log format of deploy/nginx writes it."""
    return dict(re.findall(r'"(\w+)":"(\$\w+)"', (ROOT / LOG_FORMAT).read_text("utf-8")))


def log_fields() -> str:
    """Every field that is read, where nginx has it from, and what it is for."""
    variables = nginx_variables()
    same_keys("log fields", fields_read() | set(audit.REQUIRED_FIELDS), LOG_FIELDS)
    rows = []
    for name, (needed, why) in LOG_FIELDS.items():
        if (name in audit.REQUIRED_FIELDS) != (needed == CALLS and name not in ("status", "msec")):
            raise LookupError(f"tests/docs_tables.py: LOG_FIELDS says {name} is needed in {needed}, audit.py does not")
        if name not in variables and name != "ts":
            raise LookupError(f"{LOG_FORMAT} does not log {name}")
        rows.append((code(name), code(variables.get(name, "")), needed, why))
    return table(("field", "nginx variable", "must be in", "why"), rows)


# --- which lines are calls: every row of that table is put to the parser -------------------------------------------

_LINE = {
    "msec": "1795307912.609",
    "call_id": "57f12d0299cf1194ba9e93d772036edb",
    "nginx_request_id": "57f12d0299cf1194ba9e93d772036edb",
    "method": "POST",
    "uri": "/v1/chat/completions",
    "status": "200",
    "run_id": "run-1",
    "end_user": "account-1",
    "litellm_call_id": "57f12d0299cf1194ba9e93d772036edb",
    "request_time": "0.425",
    "request_completion": "OK",
    "upstream_status": "200",
    "upstream_connect_time": "0.001",
    "upstream_content_type": "application/json",
}
_OLDER = {"ts": "2026-11-22T00:38:32+00:00", "run_id": "run-1", "end_user": "account-1"}
_NO_ID = {"litellm_call_id": ""}
_NO_UPSTREAM = {**_NO_ID, "upstream_status": "-", "upstream_connect_time": "-"}
_GET = {**_NO_ID, "method": "GET"}


def _statuses(statuses: Iterable[int], change: Mapping[str, str]) -> list[dict[str, str]]:
    return [{**_LINE, "upstream_status": str(s), **change, "status": str(s)} for s in statuses]


def line_cases() -> list[tuple[str, str, list[dict[str, str]]]]:
    """What happened, how the line shows it, and such lines."""
    older = [{**_OLDER, "status": "200", "litellm_call_id": "c-1"}, {**_OLDER, "status": "401", "litellm_call_id": ""}]
    return [
        ("an answer, plain, streamed or from LiteLLM's cache", "200, call id", _statuses([200], {})),
        ("the client left in mid-stream", "200, `request_completion` empty", [{**_LINE, "request_completion": ""}]),
        (
            "an error of the model, or a time-out of LiteLLM",
            "400, 408, 429, 500, ..., call id",
            _statuses([400, 408, 429, 500, 503], {}),
        ),
        ("the client left before the answer: LiteLLM goes on", "499, no call id", _statuses([499], _NO_ID)),
        ("nginx gave up waiting: LiteLLM goes on", "504, no call id", _statuses([504], {**_NO_ID})),
        ("LiteLLM broke off", "502, no call id, connected", _statuses([502], _NO_ID)),
        ("LiteLLM could not be reached", "502, no call id, not connected", _statuses([502], _NO_UPSTREAM)),
        (
            "LiteLLM's door refused: key, route, method",
            "401, 403, 404, 405, no call id",
            _statuses([401, 403, 404, 405], _NO_ID),
        ),
        ("a redirect, such as LiteLLM's to the path without a slash", "3xx, no call id", _statuses([307], _NO_ID)),
        (
            "nginx refused: too large, too often, malformed",
            "4xx or 5xx, no upstream",
            _statuses([400, 413, 429, 500, 503], _NO_UPSTREAM),
        ),
        ("any other answer of LiteLLM without a call id", "400, 500, ...", _statuses([400, 500], _NO_ID)),
        ("no POST", "GET, OPTIONS, ...", [{**_LINE, **_GET}, {**_LINE, **_GET, "method": "OPTIONS"}]),
        ("another route", "`/v1/models`, `/health`, ...", [{**_LINE, "uri": u} for u in ("/v1/models", "/health")]),
        ("a line of the older format", "`ts` and no `method`", older[:1]),
        ("the same, refused by LiteLLM's door", "401, 403, 404, 405, no call id", older[1:]),
    ]


def outcome_of(line: Mapping[str, str]) -> str:
    """What the parser makes of a line."""
    match audit.parse(json.dumps(line, separators=(",", ":")).encode(), audit.routes(LLM_ROUTES)):
        case UsageFact():
            return Outcome.FACT
        case Skip(reason):
            return reason
        case Rejected(reason, detail):
            raise AssertionError(f"the table of lines has one that is not understood: {reason}, {detail}")


def line_outcomes() -> str:
    """Which lines are calls, as the parser has it."""
    rows = []
    for happened, shown, lines in line_cases():
        outcomes = {outcome_of(line) for line in lines}
        rows.append((happened, shown, " or ".join(code(outcome) for outcome in sorted(outcomes))))
    return table(("what happened", "in the line", "outcome"), rows)


def scenarios() -> str:
    """What the tests of following a file are about; a file is named once in a row."""
    rows = []
    for area, found in SCENARIOS.items():
        for scenario, tests in found.items():
            named: list[str] = []
            for before, test in zip(("", *tests), tests, strict=False):
                file, _, name = test.partition("::")
                named.append(code(f"::{name}" if before.partition("::")[0] == file else test))
            rows.append((area, scenario, ", ".join(named)))
    return table(("", "scenario", "held by"), rows)


PARTS: Mapping[str, Callable[[], str]] = {
    "environment": environment,
    "verbs": verbs,
    "metrics": metrics,
    "outcomes": lambda: reasons(Outcome, SkipReason, meanings=OUTCOMES, header="outcome"),
    "dead-letter-reasons": lambda: reasons(DeadLetterReason, meanings=DEAD_LETTERS, header="reason"),
    "gap-reasons": lambda: reasons(GapReason, meanings=GAPS, header="reason"),
    "block-reasons": lambda: reasons(BlockReason, meanings=BLOCKS, header="reason"),
    "file-states": lambda: reasons(FileState, meanings=STATES, header="state"),
    "exit-codes": exit_codes,
    "endpoints": endpoints,
    "run-client": run_client,
    "exception-kinds": exception_kinds,
    "tables": tables,
    "required-fields": required_fields,
    "log-fields": log_fields,
    "line-outcomes": line_outcomes,
    "scenarios": scenarios,
}

_PART = re.compile(r"(?P<open><!-- (?P<name>[a-z-]+) -->)\n.*?(?P<close><!-- /(?P=name) -->)", re.DOTALL)
_MARKER = re.compile(r"<!-- /?([a-z-]+) -->")


def markers(text: str) -> list[str]:
    """The names in the markers of a text, opening and closing ones alike."""
    return _MARKER.findall(text)


def rendered(text: str) -> str:
    """A text with every part as the code has it now."""

    def part(match: re.Match[str]) -> str:
        return f"{match['open']}\n{PARTS[match['name']]()}\n{match['close']}"

    return _PART.sub(part, text)


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    code_ = 0
    for name in FILES:
        path = ROOT / name
        before = path.read_text("utf-8")
        after = rendered(before)
        if after == before:
            continue
        if "--write" in arguments:
            path.write_text(after, "utf-8")
            print(f"written: {name}")
        else:
            print(f"{name} is not what the code says: run python -m tests.docs_tables --write")
            code_ = 1
    return code_


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
