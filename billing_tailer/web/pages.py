"""The pages for people, `GET /v1/activity`, and exports: what they may ask for and how it is answered.

All numbers come from `billing_tailer.activity`. Long questions go to threads of their own (`reads` is not the API's),
so that whoever waits for a run does not wait for a page (tests/e2e/test_page.py::test_a_slow_page_delays_no_run); what
takes too long says so. Whoever has no session is led to the form; programs send the bearer token.
"""

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib.resources import files
from typing import Any, Final, TypeVar
from urllib.parse import parse_qs

from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from billing_tailer import activity, exporting, pricing
from billing_tailer.activity import Range
from billing_tailer.errors import TailerError, TooMuch
from billing_tailer.events import Events
from billing_tailer.explain import RawLine, explained
from billing_tailer.given import BadValue, moment
from billing_tailer.health import Health
from billing_tailer.ledger import Activity, Chosen, Operator, Place, Reads
from billing_tailer.model import ExceptionKind
from billing_tailer.settle import Rules
from billing_tailer.web.access import Access
from billing_tailer.web.answers import summary_json
from billing_tailer.web.chart import chart
from billing_tailer.web.endpoints import Endpoint, json_endpoint
from billing_tailer.web.parameters import VALUE_CHARACTERS_MAX, identifier, integer
from billing_tailer.web.rendering import link, page, stamp
from billing_tailer.web.runs import placed_line
from billing_tailer.web.sessions import Failures, Sessions, is_from_elsewhere

THREADS: Final = 2
WAITING_MAX: Final = 30
"""For the reads of pages: so many at once, and so many that wait."""
ROWS: Final = 50
ROWS_SECONDS: Final = 4.0
FIRST_LOOK_BACK: Final = timedelta(minutes=10)
DAYS: Final = 14
DAYS_SECONDS: Final = 14.0
TOP: Final = 8
TOP_JSON: Final = 100
EXPORTS_MAX: Final = 2
"""Exports at once: each holds some megabytes, of the few that the daemon may have."""
FORM_BYTES_MAX: Final = 4096
RANGE_PARAMETERS: Final = ("range", "from", "to", "account", "model")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Deciding:
    """How calls are decided, for their explanation."""

    rules: Rules
    quiet_seconds: int
    deadline_seconds: int


def page_routes(
    token: str | None, reads: Reads, schema: str, source_id: str, deciding: Deciding, health: Health, events: Events
) -> list[BaseRoute]:
    """token: API_TOKEN; None lets only clients on this machine in. reads: not those that the API answers from."""
    return _Pages(token, reads, schema, source_id, deciding, health, events).routes()


class _Pages:
    def __init__(
        self,
        token: str | None,
        reads: Reads,
        schema: str,
        source_id: str,
        deciding: Deciding,
        health: Health,
        events: Events,
    ) -> None:
        self._sessions = None if token is None else Sessions(token)
        self._access = Access(token, self._sessions)
        self._reads = reads
        self._schema = schema
        self._source_id = source_id
        self._deciding = deciding
        self._health = health
        self._events = events
        self._failures = Failures()
        self._exports = 0

    def routes(self) -> list[BaseRoute]:
        return [
            Route("/", self._page(self._index)),
            Route("/calls/{call_id:path}", self._page(self._call)),
            Route("/exceptions", self._page(self._exceptions)),
            Route("/dead-letters", self._page(self._letters)),
            Route("/reconciliation", self._page(self._reconciliation)),
            Route("/export.{format}", self._page(self._export)),
            Route("/login", self._login, methods=["GET", "POST"]),
            Route("/logout", self._logout, methods=["POST"]),
            Route("/static/{name}", _static),
            Route("/v1/activity", self._json(self._activity)),
        ]

    # --- who may ask, and what goes wrong

    def _page(self, answer: Endpoint) -> Endpoint:
        @functools.wraps(answer)
        async def endpoint(request: Request) -> Response:
            refusal = self._access.refusal(request)
            if refusal is not None and refusal.status_code == 401 and "authorization" not in request.headers:
                target = request.url.path + (f"?{request.url.query}" if request.url.query else "")
                return RedirectResponse(link("/login", next=target if target != "/" else None), 303)
            if refusal is not None:
                return refusal
            try:
                return await answer(request)
            except BadValue as bad:
                return self._trouble(
                    request, 400, f"{bad.name} = {bad.value[:VALUE_CHARACTERS_MAX]!r}: {bad.remedy}", ""
                )
            except TooMuch as error:
                return self._trouble(request, 422, error.message, error.hint)
            except TailerError as error:
                return self._trouble(request, 503, f"This cannot be read now: {error.message}", error.hint)

        return endpoint

    def _trouble(self, request: Request, status: int, message: str, hint: str) -> Response:
        headers = {"Retry-After": "1"} if status == 503 else {}
        query = {name: request.query_params.get(name, "") for name in RANGE_PARAMETERS}
        return page("trouble.html", status, headers, **self._common(None), message=message, hint=hint, query=query)

    def _json(self, answer: Endpoint) -> Endpoint:
        return json_endpoint(self._access, answer, "this cannot be read now")

    def _common(self, progress: activity.Progress | None) -> dict[str, Any]:
        return {"progress": progress, "with_login": self._sessions is not None, "source_id": self._source_id}

    async def _ask(self, read: Callable[[Activity], T]) -> T:
        return await asyncio.wrap_future(self._reads.submit(lambda connection: read(Activity(connection))))

    async def _progress(self) -> activity.Progress:
        sight = self._health.sight()  # first: see activity.progress
        return activity.progress(await self._ask(Activity.standing), sight, self._source_id)

    # --- the activity

    async def _index(self, request: Request) -> Response:
        chosen_range, chosen = _question(request, (*RANGE_PARAMETERS, "before"))
        place = _place(request.query_params.get("before", ""), chosen_range)

        def rows(reads: Activity) -> tuple[list[dict[str, Any]], Place | None]:
            found = reads.receipts(chosen_range.start, place, chosen, ROWS, FIRST_LOOK_BACK, ROWS_SECONDS)
            return found[0], found[1]

        first = place.occurred_at == chosen_range.end and not place.call_id
        summing = self._ask(functools.partial(_summary, chosen_range, chosen)) if first else None
        found, progress, summary = await asyncio.gather(self._ask(rows), self._progress(), summing or _nothing())
        receipts, next_place = found
        shown: dict[str, Any] = {"summary": None, "chart": None}
        if summary is not None:
            shown = {"summary": summary, "chart": chart(summary)}
        return page(
            "activity.html",
            **self._common(progress),
            **shown,
            range=chosen_range,
            chosen=chosen,
            presets=activity.PRESETS,
            top=TOP,
            receipts=receipts,
            older=None if next_place is None else f"{stamp(next_place.occurred_at)}~{next_place.call_id}",
            first=first,
        )

    async def _activity(self, request: Request) -> Response:
        chosen_range, chosen = _question(request, RANGE_PARAMETERS)
        summary = await self._ask(functools.partial(_summary, chosen_range, chosen))
        return JSONResponse(summary_json(summary, await self._progress(), TOP_JSON))

    async def _export(self, request: Request) -> Response:
        kind = request.path_params["format"]
        if kind not in ("csv", "jsonl"):
            raise BadValue("format", kind, "must be csv or jsonl")
        chosen_range, chosen = _question(request, (*RANGE_PARAMETERS, "run_id"))
        name = f"receipts-{chosen_range.start:%Y%m%dT%H%M%S}-{chosen_range.end:%Y%m%dT%H%M%S}.{kind}"
        headers = {"Content-Disposition": f'attachment; filename="{name}"'}
        media_type = "text/csv" if kind == "csv" else "application/x-ndjson"
        if request.method == "HEAD":
            return Response(None, 200, headers, media_type)
        if self._exports >= EXPORTS_MAX:
            raise TooMuch(f"{EXPORTS_MAX} exports are under way", "wait for one of them, or use billing-tailer export")
        self._exports += 1
        try:
            chunks = self._chunks(kind, chosen_range, chosen)
            first = await anext(chunks)  # what fails at once is answered as an error
        except BaseException:
            self._exports -= 1
            raise
        return _Export(first, chunks, headers, media_type, self._export_ended)

    def _export_ended(self) -> None:
        self._exports -= 1

    async def _chunks(self, kind: str, chosen_range: Range, chosen: Chosen) -> AsyncIterator[str]:
        """Text of some rows at a time, the first with the header. Breaks off where Postgres does not answer any more:
        the client sees an incomplete body."""
        text_of = exporting.csv_rows if kind == "csv" else exporting.json_rows
        header = exporting.csv_header() if kind == "csv" else ""
        place: Place | None = Place(chosen_range.end)
        width = timedelta(hours=1)
        while place is not None:

            def read(
                reads: Activity, at: Place = place, back: timedelta = width
            ) -> tuple[str, Place | None, timedelta]:
                rows, older, wider = reads.receipts(
                    chosen_range.start, at, chosen, activity.CHUNK_ROWS, back, activity.CHUNK_SECONDS
                )
                return text_of(rows), older, wider  # in the thread that reads, and the rows are not kept

            text, place, width = await self._ask(read)
            yield header + text
            header = ""

    # --- a call

    async def _call(self, request: Request) -> Response:
        call_id = identifier("call_id", request.path_params["call_id"])
        how = self._deciding

        def read(connection: Any) -> Any:
            told = Operator(connection, self._schema, how.quiet_seconds, how.deadline_seconds).told(call_id)
            if told is None or told.fact is None:
                return told, {}
            return told, Activity(connection).places_of(told.fact["file_id"])

        (told, files_), progress = await asyncio.gather(asyncio.wrap_future(self._reads.submit(read)), self._progress())
        if told is None:
            return page("unknown.html", 404, **self._common(progress), call_id=call_id)
        line = None
        if told.fact is not None:
            found = await placed_line(told.fact, files_)
            line = RawLine(found["raw"], found["raw_missing"])
        answer = explained(call_id, told, line, how.rules)
        costs = [row["delta_cost_usd"] for row in told.adjustments]
        costs += [] if told.receipt is None else [told.receipt["provider_cost_usd"]]
        words = {"call": answer, "exceptions": told.exceptions, "total_cost_usd": pricing.total(costs)}
        return page("call.html", **self._common(progress), **words)

    # --- what needs a decision

    async def _exceptions(self, request: Request) -> Response:
        query = _known(request, ("kind", "all", "before"))
        kind, everything = query.get("kind", ""), _flag(query, "all")
        if kind and kind not in list(ExceptionKind):
            raise BadValue("kind", kind, f"must be one of {', '.join(ExceptionKind)}")
        before = _exception_place(query.get("before", ""))
        rows, progress = await asyncio.gather(
            self._ask(
                lambda reads: reads.exceptions(kind=kind or None, include_closed=everything, before=before, limit=ROWS)
            ),
            self._progress(),
        )
        older = None
        if len(rows) == ROWS:
            last = rows[-1]
            older = f"{stamp(last['opened_at'])}~{last['kind']}~{last['seq']}~{last['call_id']}"
        words: dict[str, Any] = {
            "kinds": list(ExceptionKind),
            "informing": activity.INFORMING,
            "kind": kind,
            "everything": everything,
        }
        return page("exceptions.html", **self._common(progress), rows=rows, older=older, first=before is None, **words)

    async def _letters(self, request: Request) -> Response:
        query = _known(request, ("all", "before"))
        everything = _flag(query, "all")
        before = integer(query, "before", 999_999_999, "the number of a dead letter")
        rows, progress = await asyncio.gather(
            self._ask(lambda reads: reads.dead_letters(include_resolved=everything, before=before, limit=ROWS)),
            self._progress(),
        )
        for row in rows:
            row["raw"] = bytes(row["raw"]).decode("utf-8", "backslashreplace").removesuffix("\n")
        older = rows[-1]["dead_letter_id"] if len(rows) == ROWS else None
        words: dict[str, Any] = {"older": older, "everything": everything, "first": before is None}
        return page("letters.html", **self._common(progress), rows=rows, **words)

    async def _reconciliation(self, request: Request) -> Response:
        query = _known(request, ("to",))
        now = datetime.now(UTC)
        end = min(moment("to", query["to"]), now) if query.get("to") else now
        rows, progress = await asyncio.gather(
            self._ask(lambda reads: activity.days(reads, end, DAYS, DAYS_SECONDS)), self._progress()
        )
        words: dict[str, Any] = {"older": rows[-1]["from"], "first": end == now}
        return page("reconciliation.html", **self._common(progress), rows=rows, **words)

    # --- sessions

    async def _login(self, request: Request) -> Response:
        target = _own_path(request.query_params.get("next", ""))
        if self._sessions is None:
            return RedirectResponse("/", 303)
        if request.method != "POST":
            return page("login.html", target=target, trouble=None)
        address = "" if request.client is None else request.client.host
        if is_from_elsewhere(request):
            return page("login.html", 403, target=target, trouble="the form was sent by another site")
        wait_seconds = self._failures.wait_seconds(address)
        if wait_seconds > 0:
            trouble = f"too many wrong tokens: try again in {int(wait_seconds) + 1} seconds"
            headers = {"Retry-After": str(int(wait_seconds) + 1)}
            return page("login.html", 429, headers, target=target, trouble=trouble)
        if not self._sessions.is_token(await _form_value(request, "token")):
            self._failures.add(address)
            self._events.warning("login.failed", address=address)
            return page("login.html", 401, target=target, trouble="this is not API_TOKEN")
        response = RedirectResponse(target, 303)
        self._sessions.begin(request, response)
        return response

    async def _logout(self, request: Request) -> Response:
        if self._sessions is None or is_from_elsewhere(request):
            return RedirectResponse("/", 303)
        response = RedirectResponse("/login", 303)
        self._sessions.end(request, response)
        return response


# --- parameters


def _known(request: Request, names: tuple[str, ...]) -> Mapping[str, str]:
    """The query, each of these once at most. Raises BadValue."""
    for name, value in request.query_params.multi_items():
        if name not in names:
            raise BadValue(name, value, f"is not a parameter: use {', '.join(names)}")
        if len(request.query_params.getlist(name)) > 1:
            raise BadValue(name, value, "is given more than once: give it once")
    return request.query_params


def _question(request: Request, names: tuple[str, ...]) -> tuple[Range, Chosen]:
    """The range and which calls of it; a parameter without a value, as forms send it, is not given. Raises
    BadValue."""
    query = _known(request, names)
    chosen_range = activity.range_of(
        query.get("range", ""), query.get("from", ""), query.get("to", ""), datetime.now(UTC)
    )
    ids = {name: query.get(name, "") for name in ("account", "model", "run_id")}
    return chosen_range, Chosen(**{name: identifier(name, value) for name, value in ids.items() if value})


def _place(given: str, chosen_range: Range) -> Place:
    if not given:
        return Place(chosen_range.end)
    time, _, call_id = given.partition("~")
    place = Place(moment("before", time), call_id and identifier("before", call_id))
    return place if place.occurred_at < chosen_range.end else Place(chosen_range.end)


def _exception_place(given: str) -> tuple[datetime, str, str, int] | None:
    if not given:
        return None
    time, kind, seq, call_id = [*given.split("~", 3), "", "", ""][:4]
    if not seq.isdecimal() or len(seq) > 9:
        raise BadValue("before", given, "must be what the link to older ones has")
    return moment("before", time), identifier("before", call_id), identifier("before", kind), int(seq)


def _flag(query: Mapping[str, str], name: str) -> bool:
    value = query.get(name, "")
    if value not in ("", "true"):
        raise BadValue(name, value, "must be true, or left out")
    return bool(value)


def _own_path(target: str) -> str:
    """Where to go after a login: nowhere but to a page of ours."""
    inside = target.startswith("/") and not target.startswith("//") and "\\" not in target and target.isprintable()
    return target if inside else "/"


async def _form_value(request: Request, name: str) -> str:
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > FORM_BYTES_MAX:
            return ""
    with contextlib.suppress(ValueError):
        return parse_qs(body.decode("ascii"), max_num_fields=10).get(name, [""])[0].strip()
    return ""


# --- small things


class _Export(StreamingResponse):
    """A download, which says when it is over, however it ends."""

    def __init__(
        self,
        first: str,
        rest: AsyncIterator[str],
        headers: Mapping[str, str],
        media_type: str,
        ended: Callable[[], None],
    ) -> None:
        self._ended = ended
        super().__init__(_after(first, rest), 200, headers, media_type)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._ended()


async def _after(first: str, rest: AsyncIterator[str]) -> AsyncIterator[str]:
    yield first
    del first
    async for chunk in rest:
        yield chunk


def _summary(chosen_range: Range, chosen: Chosen, reads: Activity) -> activity.Summary:
    return activity.summary(reads, chosen_range, chosen)


async def _nothing() -> None:
    return None


_STATIC = {
    name: ((files("billing_tailer.web") / "static" / name).read_bytes(), media_type)
    for name, media_type in (("page.css", "text/css"), ("page.js", "text/javascript"))
}


async def _static(request: Request) -> Response:
    found = _STATIC.get(request.path_params["name"])
    if found is None:
        return Response("not found", 404)
    return Response(found[0], 200, {"Cache-Control": "max-age=3600"}, found[1])
