"""`GET /v1/runs/{run_id}` and `GET /v1/calls/{call_id}`: what the application asks instead of reading the log.

A run's `complete` (tests/test_runs.py::test_complete):

- true: the calls that the client counts on (`calls=N` of this run, or each `call_id=...`) are known and settled;
- null: the client counts on nothing, and nothing pends: the log cannot know of calls that still run;
- false: something pends, is held, unattributed or overdue, or is not known yet.

With `calls=N` every call of the run counts; with `call_id=...` those named alone. A wait ends when `complete` is not
false any more, or at its time. Money and credits are decimal strings: receipts plus adjustments.
"""

import asyncio
import contextlib
import re
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from billing_tailer.files import read_range
from billing_tailer.given import BadValue
from billing_tailer.ledger import Reads, RunStatus
from billing_tailer.web.access import Access
from billing_tailer.web.endpoints import Endpoint, json_endpoint
from billing_tailer.web.parameters import identifier, integer
from billing_tailer.web.waiters import Waiters

WAIT_SECONDS_MAX = 60
CALLS_MAX = 1_000_000
NAMED_MAX = 1000
PAGE_MAX = 1000
LINE_BYTES_MAX = 1 << 20
"""Of a raw line, so much is shown."""
CLIENT_LEFT = 499
_STOPPED = ("held_zero_cost", "held_bad_cost", "conflict", "unattributed", "overdue")


def run_routes(token: str | None, reads: Reads, waiters: Waiters) -> list[BaseRoute]:
    """The application's API. token: API_TOKEN; None lets only clients on this machine in."""
    access = Access(token)

    def guarded(answer: Endpoint) -> Endpoint:
        return json_endpoint(access, answer, "Postgres does not answer")

    async def run(request: Request) -> Response:
        return await _run(request, reads, waiters)

    async def call(request: Request) -> Response:
        return await _call(request, reads)

    return [Route("/v1/runs/{run_id:path}", guarded(run)), Route("/v1/calls/{call_id:path}", guarded(call))]


# --- parameters


@dataclass(frozen=True, slots=True)
class _Question:
    run_id: str
    wait_seconds: float
    calls: int | None
    named: frozenset[str]
    details: bool
    after: str
    limit: int

    def complete(self, status: RunStatus) -> bool | None:
        """As the module's docstring says."""
        if self.named:
            return self.named <= status.settled_named
        if status.settled < status.calls or status.calls == 0:
            return False
        return None if self.calls is None else status.calls >= self.calls


_PARAMETERS = ("wait_seconds", "calls", "call_id", "details", "after", "limit")


def _question(request: Request) -> _Question:
    """Raises BadValue."""
    query = request.query_params
    for name, value in query.multi_items():
        if name not in _PARAMETERS:
            raise BadValue(name, value, f"is not a parameter: use {', '.join(_PARAMETERS)}")
        if name != "call_id" and len(query.getlist(name)) > 1:
            raise BadValue(name, value, "is given more than once: give it once")
    named = query.getlist("call_id")
    if named and "calls" in query:
        raise BadValue("calls", query["calls"], "is given together with call_id: give one of them")
    if len(named) > NAMED_MAX:
        raise BadValue("call_id", str(len(named)), f"at most {NAMED_MAX} of them: use calls=N for more")
    details = query.get("details", "false")
    if details not in ("true", "false"):
        raise BadValue("details", details, "must be true or false")
    for name in ("after", "limit"):
        if name in query and details == "false":
            raise BadValue(name, query[name], "belongs to the list of calls: add details=true")
    after = query.get("after", "")
    return _Question(
        run_id=identifier("run_id", request.path_params["run_id"]),
        wait_seconds=_seconds(query.get("wait_seconds", "0")),
        calls=integer(query, "calls", CALLS_MAX, "how many calls the run made; leave it out if you do not know"),
        named=frozenset(identifier("call_id", one) for one in named),
        details=details == "true",
        after=after and identifier("after", after),
        limit=integer(query, "limit", PAGE_MAX, "how many calls to list") or PAGE_MAX,
    )


def _seconds(value: str) -> float:
    if not re.fullmatch(r"[0-9]{1,2}(\.[0-9]{1,6})?", value) or float(value) > WAIT_SECONDS_MAX:
        remedy = f"must be a number of seconds from 0 to {WAIT_SECONDS_MAX}: ask again to wait longer"
        raise BadValue("wait_seconds", value, remedy)
    return float(value)


# --- a run


async def _run(request: Request, reads: Reads, waiters: Waiters) -> Response:
    question = _question(request)

    def enough(status: RunStatus) -> bool:
        return question.wait_seconds == 0 or question.complete(status) is not False

    status = await _unless_left(
        request, waiters.wait(question.run_id, question.named, enough, question.wait_seconds or WAIT_SECONDS_MAX)
    )
    if status is None:
        return Response(status_code=CLIENT_LEFT)
    answer: dict[str, Any] = {
        "run_id": question.run_id,
        "calls": status.calls,
        "settled": status.settled,
        "pending": status.calls - status.settled,
        "complete": question.complete(status),
        "charged_credits": str(status.charged_credits),
        "provider_cost_usd": _usd(status.provider_cost_usd),
        "user_cost_usd": _usd(status.user_cost_usd),
        "exceptions": status.exceptions,
        "as_of": {"time": _plain(status.time), "files": status.files},
    }
    if question.named:
        answer["unsettled_call_ids"] = sorted(question.named - status.settled_named)
    if question.details:
        rows = await asyncio.wrap_future(reads.run_calls(question.run_id, question.after, question.limit))
        answer["call_list"] = [_listed(row) for row in rows]
        answer["next_after"] = rows[-1]["call_id"] if len(rows) == question.limit else None
    return JSONResponse(answer)


async def _unless_left(request: Request, waiting: Awaitable[RunStatus]) -> RunStatus | None:
    """None where the client hung up: nobody waits any more."""
    answer = asyncio.ensure_future(waiting)
    left = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait([answer, left], return_when=asyncio.FIRST_COMPLETED)
        return await answer if answer.done() else None
    finally:
        for task in (answer, left):
            if not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _usd(amount: Decimal) -> str:
    return f"{amount:.12f}"


def _listed(row: Mapping[str, Any]) -> dict[str, Any]:
    kinds = row["kinds"] or []
    if row["charged"]:
        standing = "settled"
    elif row["settled"]:
        standing = "not_charged"
    else:
        standing = next((kind for kind in _STOPPED if kind in kinds), "pending")
    return {
        "call_id": row["call_id"],
        "standing": standing,
        "exceptions": kinds,
        "occurred_at": _plain(row["occurred_at"]),
        "http_status": row["http_status"],
        "charged_credits": str(row["charged_credits"]),
        "provider_cost_usd": _usd(row["provider_cost_usd"]),
        "user_cost_usd": _usd(row["user_cost_usd"]),
        **{name: row[name] for name in ("model", "tokens_in", "tokens_out", "cache_hit")},
    }


# --- a call


_CREDITS = ("charged_credits", "delta_credits")


async def _call(request: Request, reads: Reads) -> Response:
    for name, value in request.query_params.multi_items():
        raise BadValue(name, value, "is not a parameter: this takes none")
    call_id = identifier("call_id", request.path_params["call_id"])
    found = await asyncio.wrap_future(reads.call(call_id))
    if found["fact"] is None and not found["records"]:
        hint = "no line of the log and no spend record has this id: it may not be committed yet, see as_of of the run"
        return JSONResponse({"error": f"call {call_id!r} is not known", "hint": hint}, 404)
    files = found["files"]
    fact = found["fact"]
    return JSONResponse(
        {
            "call_id": call_id,
            "fact": None if fact is None else {**_row(fact), "line": await placed_line(fact, files)},
            "spend_records": [{**_row(row), "line": _place(row, files)} for row in found["records"]],
            "receipt": found["receipt"] and _row(found["receipt"]),
            "details": found["details"] and _row(found["details"]),
            "adjustments": [_row(row) for row in found["adjustments"]],
            "exceptions": [_row(row) for row in found["exceptions"]],
            "conflicts": [{**_row(row), "line": await placed_line(row, files)} for row in found["conflicts"][:10]],
            "conflict_count": len(found["conflicts"]),
        }
    )


async def placed_line(row: Mapping[str, Any], files: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Where a line stands, and, while its file is there, its text."""
    place = _place(row, files)
    file = files.get(row["file_id"])
    if place is None or file is None:
        return {"path": None, "raw": None, "raw_missing": f"file {row['file_id']} is not recorded any more"}
    end = min(row["end_offset"], row["start_offset"] + LINE_BYTES_MAX)
    locator = (int(file["device"]), int(file["inode"]))
    raw = await asyncio.to_thread(read_range, file["path"], locator, bytes(file["head"]), row["start_offset"], end)
    shown = raw if isinstance(raw, str) else raw.decode("utf-8", "replace").removesuffix("\n")
    told = {"raw": None, "raw_missing": shown} if isinstance(raw, str) else {"raw": shown, "raw_missing": None}
    return {**place, **told}


def _place(row: Mapping[str, Any], files: Mapping[int, Mapping[str, Any]]) -> dict[str, Any] | None:
    file = files.get(row["file_id"])
    if file is None:
        return None
    place = {"file_id": row["file_id"], "path": file["path"], "generation": file["generation"]}
    return {**place, "start_offset": row["start_offset"], "end_offset": row.get("end_offset")}


def _row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the database as JSON; its place in a file is told elsewhere."""
    shown = {
        name: _plain(value) for name, value in row.items() if name not in ("file_id", "start_offset", "end_offset")
    }
    return {**shown, **{name: str(row[name]) for name in _CREDITS if name in row}}


def _plain(value: object) -> Any:
    if isinstance(value, Decimal):
        return f"{value:f}"
    if isinstance(value, datetime):
        return value.isoformat()
    return value.hex() if isinstance(value, bytes | memoryview) else value
