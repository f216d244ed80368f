"""LiteLLM's spend logs over HTTP: the only room that knows its addresses, its paging and its failures.

Rows come out as LiteLLM sent them; what a row means is `spend`'s business. Synchronous, for a thread of its own; every
wait ends when `stop` is set.

A POLL MISSES NOTHING (tests/test_litellm.py::test_every_row_that_existed_at_the_begin_is_returned): a window that was
read to its end has returned every row that LiteLLM could show when the window was begun. `/spend/logs/v2` pages by
OFFSET over a growing table, in the order of `startTime` without a tie-breaker, and counts no further than 10,000. So
offsets are not used to go on: a first page is one statement in Postgres, hence complete up to its last `startTime`;
the next question begins at that row's second, and the rows of that second that come again are dropped. Only where one
page does not reach beyond a second does `page` count, over that second alone, and over again with other borders
between the pages where rows of the same time may have changed places at one
(::test_rows_that_change_places_between_pages). What cannot be completed raises, and is never taken for complete.

NEVER HAMMER (::test_requests_per_minute_are_bounded): one token bucket for all threads, retries included.
THE KEY IS NEVER SHOWN (::test_the_key_is_in_no_message).
"""

import contextlib
import json
import re
import socket
import ssl
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any, Final, Self

import httpx
import orjson
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from billing_tailer.errors import ConfigError, TailerError

Row = dict[str, Any]

PAGE_ROWS_MAX: Final = 1000
"""LiteLLM's own limit since July 2026; before that it was `PAGE_ROWS_OLD`, and more is a 422."""
PAGE_ROWS_OLD: Final = 100
ANSWER_BYTES_MAX: Final = 64 << 20
ERROR_BYTES_MAX: Final = 64 << 10
SAID_CHARS_MAX: Final = 200
ATTEMPTS_MAX: Final = 4
BACKOFF_SECONDS_MAX: Final = 10.0
RETRY_AFTER_SECONDS_MAX: Final = 60.0
CONNECT_SECONDS_MAX: Final = 3.0
ANSWER_TIMEOUTS_MAX: Final = 6
"""A whole answer may take this many times the time-out of a single read."""
CONNECTIONS_MAX: Final = 4
KEEPALIVE_SECONDS: Final = 2.0
"""Less than the 5 s after which uvicorn closes an idle connection, or we would write into closed ones."""
PASSES_MAX: Final = 8
PASS_PAGES_MAX: Final = 1000

_URL = "BILLING_TAILER_LITELLM_URL"
_KEY = "BILLING_TAILER_LITELLM_API_KEY"
_HINT_URL = f"look at {_URL}: it is the address of LiteLLM itself, without /v1"
_HINT_KEY = f"look at {_KEY}: spend logs need the key of a proxy admin (or admin viewer)"
_HINT_VERSION = "this program knows LiteLLM 1.106; upgrade LiteLLM, or report the difference"
_HINT_DATABASE = "LiteLLM has spend logs only with a database (DATABASE_URL): give it one, or use callbacks alone"
_HINT_WAIT = f"it is tried again; if it stays so, look at LiteLLM and at {_URL}"
_NO_DATABASE = (b"Prisma Client is not initialized", b"Database not connected", b"No connected db", b"No DB Connected")
_SECOND = timedelta(seconds=1)
_KEY_LIKE = re.compile(r"sk-[^\s'\",}]*|\b[0-9a-f]{64}\b")


class LiteLLMUnavailable(TailerError):
    """LiteLLM cannot answer now (connection, time-out, 408, 429, 5xx) after several attempts: try again later."""

    retry_after_seconds: float = 0.0


class LiteLLMContract(TailerError):
    """LiteLLM answered, but not as spend logs do: a person must look at it."""


class LiteLLMStopped(TailerError):
    """`stop` was set before the answer was complete: what came so far is not everything."""


class _KeyRefused(LiteLLMContract):
    """401 or 403."""


class _PageTooLarge(LiteLLMContract):
    """The page has too many rows for LiteLLM (`rows_max` says its limit) or too many bytes for us (None)."""

    rows_max: int | None = None

    def smaller(self, size: int) -> int:
        """The next page size to try; raises this error where there is none."""
        rows = size // 2 if self.rows_max is None else self.rows_max
        if not 1 <= rows < size:
            raise self
        return rows


@dataclass(frozen=True, slots=True)
class _Page:
    rows: list[Row]
    size: int
    total: int
    first: datetime | None
    last: datetime | None

    @property
    def is_whole(self) -> bool:
        """Were these all rows of the window? The count is an earlier statement than the rows, so it is not enough that
        it equals their number: a full page may have lost a counted row to one that came in between."""
        return self.total <= len(self.rows) < self.size


class _Bucket:
    """At most `per_minute` starts in any 60 s, a tenth of them at once, the others evenly spread. Thread-safe."""

    def __init__(self, per_minute: int, monotonic: Callable[[], float]) -> None:
        burst = max(1, per_minute // 10)
        self._interval = 60.0 / (per_minute - burst + 1)
        self._ahead = (burst - 1) * self._interval
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._next = monotonic()

    def seconds_to_wait(self) -> float:
        """Take a token; it may be used after this many seconds."""
        with self._lock:
            now = self._monotonic()
            use_at = max(now, self._next - self._ahead)
            self._next = max(use_at, self._next) + self._interval
            return use_at - now


class SpendLogs:
    """LiteLLM's spend logs. Methods may be called from several threads.

    All raise LiteLLMUnavailable, LiteLLMContract or LiteLLMStopped.
    """

    def __init__(
        self,
        url: str,
        api_key: str,
        *,
        stop: threading.Event,
        requests_per_minute: int = 120,
        timeout_seconds: float = 10.0,
        page_size: int = 500,
        answer_bytes_max: int = ANSWER_BYTES_MAX,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """timeout_seconds: for each read; a whole answer may take `ANSWER_TIMEOUTS_MAX` times as long."""
        assert requests_per_minute >= 1
        assert 1 <= page_size <= PAGE_ROWS_MAX
        self._address = _checked_url(url)
        self._api_key = _checked_key(api_key)
        self._stop = stop
        self._timeout_seconds = timeout_seconds
        self._page_size = page_size
        self._answer_bytes_max = answer_bytes_max
        self._monotonic = monotonic
        self._bucket = _Bucket(requests_per_minute, monotonic)
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._client = httpx.Client(
            headers={
                "Authorization": f"Bearer {api_key}",
                "Accept": "application/json",
                "Accept-Encoding": "identity",  # what is bounded is what is received
                "User-Agent": "billing-tailer",
            },
            timeout=httpx.Timeout(timeout_seconds, connect=min(timeout_seconds, CONNECT_SECONDS_MAX)),
            limits=httpx.Limits(
                max_connections=CONNECTIONS_MAX,
                max_keepalive_connections=CONNECTIONS_MAX,
                keepalive_expiry=KEEPALIVE_SECONDS,
            ),
            verify=_tls(self._address),
            trust_env=False,
            follow_redirects=False,
        )

    def __repr__(self) -> str:
        return f"SpendLogs({self._address})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """From any thread: after `stop` was set, this also ends a request that is waiting for its answer."""
        for connection in list(self._sockets):
            with contextlib.suppress(OSError):  # closed already
                connection.shutdown(socket.SHUT_RDWR)
        self._client.close()

    # --- questions -----------------------------------------------------------------------------------------------

    def window(self, start: datetime, end: datetime) -> Iterator[list[Row]]:
        """All rows whose call started from `start` to `end` (aware), widened to whole seconds, in batches.

        Each row comes once (by `request_id`, its primary key). Only an iteration that ends without an exception has
        covered the window.
        """
        if start.tzinfo is None or end.tzinfo is None or end < start:
            raise ValueError(f"no window from {start} to {end}")
        first, last = _floor(start), _floor(end)
        return self._window(first, last if last == end else last + _SECOND)

    def by_call_id(self, call_id: str) -> list[Row]:
        """The rows of one call, an empty list if there are none.

        A LiteLLM without the column `litellm_call_id` looks for `request_id` only, and so finds failures and
        embeddings, but no completions: those are found by `window`.
        """
        if not call_id:
            raise ValueError("a call id is not empty")
        if "\0" in call_id:
            return []  # no row can have it: Postgres has no such text
        return self._rows_of(call_id, ATTEMPTS_MAX)

    def reachable(self) -> str | None:
        """None if spend logs can be read, all of them; else what is wrong, and the next step. Asks once, no retries."""
        end = _floor(datetime.now(UTC))
        try:
            self._page(end - _SECOND, end, size=1, attempts=1)
            self._rows_of("billing-tailer-check", attempts=1)
            self._check_admin(end)
        except TailerError as error:
            return str(error)
        return None

    def stored_between(self, start: datetime, end: datetime) -> int:
        """How many rows of calls that started in a time there are. Asks once. Raises TailerError."""
        return self._page(_floor(start), _floor(end), size=1, attempts=1).total

    def version(self) -> str | None:
        """LiteLLM's version, where it tells it."""
        try:
            answer = self._json(self._get("/health/readiness", {}, attempts=1))
        except TailerError:
            return None
        version = answer.get("litellm_version") if isinstance(answer, dict) else None
        return self._clean(version) if isinstance(version, str) and version else None

    # --- paging --------------------------------------------------------------------------------------------------

    def _window(self, cursor: datetime, last: datetime) -> Iterator[list[Row]]:
        """First pages only, each from the second in which the one before ended: every step is at least a second."""
        seen: set[str] = set()
        size = self._page_size
        while True:
            try:
                page = self._page(cursor, last, size)
            except _PageTooLarge as error:
                size = self._smaller(error, size)
                continue
            if fresh := _unseen(page.rows, seen):
                yield fresh
            if page.is_whole:
                return
            ids = {row["request_id"] for row in page.rows}
            reached = _floor(page.last or cursor)
            seen = ids if reached > cursor else seen | ids  # what may come again
            if reached == cursor:
                second_end = min(cursor + _SECOND, last)
                yield from self._second(cursor, second_end, size, seen)
                if second_end == last:
                    return
                reached = second_end
            cursor = reached

    def _second(self, start: datetime, end: datetime, size: int, seen: set[str]) -> Iterator[list[Row]]:
        """More rows than one page within a second: page by number, again with smaller pages, until of every time all
        rows were read in one of the passes."""
        doubtful: set[datetime] | None = None
        for number in range(PASSES_MAX):
            rows = max(1, size - number * max(1, size // 17))
            try:
                borders = yield from self._pass(start, end, rows, seen)
            except _PageTooLarge as error:
                size = self._smaller(error, rows)
                continue
            doubtful = borders if doubtful is None else doubtful & borders
            if not doubtful:
                return
        times = ", ".join(map(str, sorted(doubtful or [start])[:3]))
        raise LiteLLMContract(
            f"LiteLLM has too many rows of one time for pages of {size}, some may be missing: {times}", _HINT_VERSION
        )

    def _pass(
        self, start: datetime, end: datetime, size: int, seen: set[str]
    ) -> Generator[list[Row], None, set[datetime]]:
        """Every page once; the result is the times of which rows may be missing.

        Those are the times that end one page and begin the next. New rows push others to later pages only, so of any
        other time there is a page that showed all its rows at once: the first page on which they begin; or, if they
        ran over its end, a later one, to which new rows have pushed them.
        """
        doubtful: set[datetime] = set()
        before: datetime | None = None
        for number in range(1, PASS_PAGES_MAX + 1):
            page = self._page(start, end, size, number=number)
            if page.first is not None and page.first == before:
                doubtful.add(page.first)
            before = page.last
            if fresh := _unseen(page.rows, seen):
                seen.update(row["request_id"] for row in fresh)
                yield fresh
            if len(page.rows) < size:
                return doubtful
        raise LiteLLMUnavailable(f"LiteLLM's rows from {start} to {end} have no last page", _HINT_WAIT)

    def _smaller(self, error: _PageTooLarge, size: int) -> int:
        smaller = error.smaller(size)
        if error.rows_max is not None:  # LiteLLM's limit holds for good, a window with large rows does not
            self._page_size = min(self._page_size, smaller)
        return smaller

    def _page(
        self,
        start: datetime,
        end: datetime,
        size: int,
        *,
        number: int = 1,
        attempts: int = ATTEMPTS_MAX,
    ) -> _Page:
        params = {
            **_dates(start, end),
            "sort_by": "startTime",
            "sort_order": "asc",
            "page": str(number),
            "page_size": str(size),
        }
        body = self._get("/spend/logs/v2", params, attempts)
        return _checked_page(self._json(body), start, end, size, number)

    # --- other questions -----------------------------------------------------------------------------------------

    def _rows_of(self, call_id: str, attempts: int) -> list[Row]:
        rows = self._json(self._get("/spend/logs", {"request_id": call_id}, attempts))
        if not isinstance(rows, list):
            raise _contract("/spend/logs", f"is {_kind(rows)}, not a list")
        found = [row for row in rows if row is not None]  # older versions say [null] for none
        if not all(isinstance(row, dict) for row in found):
            raise _contract("/spend/logs", "has rows that are no objects")
        return [row for row in found if _call_id(row) == call_id]

    def _check_admin(self, now: datetime) -> None:
        """A key that is no admin's sees its own rows only, silently; but it may not ask for an unknown team."""
        params = {**_dates(now, now), "page_size": "1", "team_id": "billing-tailer-check"}
        try:
            self._get("/spend/logs/v2", params, attempts=1)
        except _KeyRefused as error:
            raise LiteLLMContract("LiteLLM shows this key only a part of the spend logs", _HINT_KEY) from error

    # --- HTTP ----------------------------------------------------------------------------------------------------

    def _get(self, path: str, params: Mapping[str, str], attempts: int) -> bytearray:
        """The body of a 200; waits for a token, and again and again with back-off while LiteLLM is unavailable."""
        backoff = wait_random_exponential(multiplier=0.5, max=BACKOFF_SECONDS_MAX)

        def pause(state: RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome is not None else None
            asked = error.retry_after_seconds if isinstance(error, LiteLLMUnavailable) else 0.0
            return max(backoff(state), min(asked, RETRY_AFTER_SECONDS_MAX))

        retrying = Retrying(
            retry=retry_if_exception_type(LiteLLMUnavailable),
            stop=stop_after_attempt(attempts),
            wait=pause,
            sleep=self._wait,
            reraise=True,
        )
        try:
            return retrying(self._attempt, path, params)
        except LiteLLMUnavailable:
            if self._stop.is_set():
                raise _stopped() from None
            raise

    def _attempt(self, path: str, params: Mapping[str, str]) -> bytearray:
        self._wait(self._bucket.seconds_to_wait())
        deadline = self._monotonic() + ANSWER_TIMEOUTS_MAX * self._timeout_seconds
        try:
            trace = {"trace": self._remember_socket}
            with self._client.stream("GET", self._address + path, params=params, extensions=trace) as response:
                body = self._read(response, path, deadline)
        except httpx.TimeoutException as error:
            raise self._unavailable(f"gave no answer within {self._timeout_seconds:g} s") from error
        except httpx.HTTPError as error:
            raise self._unavailable(f"cannot be reached: {self._clean(str(error)) or type(error).__name__}") from error
        if response.status_code != httpx.codes.OK:
            raise self._refusal(response, path, bytes(body))
        if response.headers.get("x-litellm-spend-logs-truncated", "").lower() == "true":
            raise _contract(path, "is truncated: it has too many rows, and which are missing cannot be told")
        return body

    def _remember_socket(self, event: str, details: Mapping[str, Any]) -> None:
        if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            connection = details["return_value"].get_extra_info("socket")
            if isinstance(connection, socket.socket):
                self._sockets.add(connection)

    def _read(self, response: httpx.Response, path: str, deadline: float) -> bytearray:
        """The body, never more of it in memory than is allowed; of an error only its beginning."""
        is_error = response.status_code != httpx.codes.OK
        if response.headers.get("content-encoding", "identity").lower() != "identity":
            raise _contract(path, "is compressed, though we asked for identity")
        body = bytearray()
        for chunk in response.iter_raw():
            body += chunk
            if is_error and len(body) > ERROR_BYTES_MAX:
                break
            if len(body) > self._answer_bytes_max:
                raise _PageTooLarge(f"LiteLLM's {path} is longer than {self._answer_bytes_max} bytes", _HINT_VERSION)
            if self._stop.is_set():
                raise _stopped()
            if self._monotonic() > deadline:
                raise self._unavailable("sends its answer too slowly")
        return body

    def _refusal(self, response: httpx.Response, path: str, body: bytes) -> TailerError:
        """What an answer other than 200 means."""
        status = response.status_code
        if any(words in body for words in _NO_DATABASE):
            return LiteLLMUnavailable(f"LiteLLM at {self._address} runs without a database ({status})", _HINT_DATABASE)
        if status in (401, 403):  # what LiteLLM says here repeats parts of the key
            return _KeyRefused(f"LiteLLM at {self._address} refuses our key for {path} ({status})", _HINT_KEY)
        said = f"{path}: {status} {self._said(body)}".rstrip()
        if status in (408, 425, 429) or status >= 500:
            error = self._unavailable(f"answers {said}")
            error.retry_after_seconds = _retry_after(response.headers.get("retry-after", ""))
            return error
        if status in (404, 405):
            hint = f"{_HINT_URL}; or LiteLLM is older than November 2025 and has no /spend/logs/v2"
            return LiteLLMContract(f"{self._address}{path} does not exist ({status})", hint)
        if response.has_redirect_location:
            return LiteLLMContract(
                f"{self._address}{path} redirects ({status}), and redirects are not followed", _HINT_URL
            )
        if status == 422 and b"page_size" in body:
            too_large = _PageTooLarge(f"LiteLLM at {self._address} answers {said}", _HINT_VERSION)
            too_large.rows_max = PAGE_ROWS_OLD
            return too_large
        return LiteLLMContract(f"LiteLLM at {self._address} answers {said}", _HINT_VERSION)

    def _wait(self, seconds: float) -> None:
        if self._stop.is_set() or (seconds > 0 and self._stop.wait(seconds)):
            raise _stopped()

    def _json(self, body: bytearray) -> Any:
        try:
            return orjson.loads(body)
        except orjson.JSONDecodeError as error:
            raise LiteLLMContract(f"{self._address} does not answer with JSON", _HINT_URL) from error

    def _unavailable(self, what: str) -> LiteLLMUnavailable:
        return LiteLLMUnavailable(f"LiteLLM at {self._address} {what}", _HINT_WAIT)

    def _said(self, body: bytes) -> str:
        """LiteLLM's own words, without keys, on one line, bounded."""
        text = body.decode("utf-8", errors="replace")
        try:
            answer = orjson.loads(body)
        except orjson.JSONDecodeError:
            return self._clean(text)
        if isinstance(answer, dict):
            error = answer.get("error")
            said = error.get("message") if isinstance(error, dict) else answer.get("detail", error)
            text = said if isinstance(said, str) else text
        return self._clean(text)

    def _clean(self, text: str) -> str:
        shown = _KEY_LIKE.sub("***", text.replace(self._api_key, "***"))
        return "".join(c if c.isprintable() else " " for c in shown)[:SAID_CHARS_MAX].strip()


# --- what must be true of an answer -----------------------------------------------------------------------------------


def _checked_page(answer: Any, start: datetime, end: datetime, size: int, number: int) -> _Page:
    path = "/spend/logs/v2"
    if not isinstance(answer, dict) or not isinstance(answer.get("data"), list):
        raise _contract(path, f"has no list `data`: it is {_kind(answer)}")
    rows: list[Any] = answer["data"]
    total = answer.get("total")
    if type(total) is not int or total < 0:
        raise _contract(path, "has no sound `total`")
    if answer.get("page_size", size) != size or answer.get("page", number) != number or len(rows) > size:
        raise _contract(path, f"is not the page asked for: page {number} with at most {size} rows")
    if not rows and number == 1 and total > 0:
        raise _contract(path, f"has no rows, though it counts {total}")
    times = [_start_time(row) for row in rows]
    if times and not start <= min(times) <= max(times) <= end:
        raise _contract(path, f"has rows that started at {min(times)} to {max(times)}, outside of {start} to {end}")
    if times != sorted(times):
        raise _contract(path, "is not sorted by startTime as asked: LiteLLM is older than February 2026")
    return _Page(rows, size, total, times[0] if times else None, times[-1] if times else None)


def _start_time(row: Any) -> datetime:
    """With or without `Z`, UTC either way."""
    if not isinstance(row, dict) or not isinstance(row.get("request_id"), str):
        raise _contract("/spend/logs/v2", "has rows that are no objects with a `request_id`")
    try:
        at = datetime.fromisoformat(row["startTime"])
    except (KeyError, TypeError, ValueError) as error:
        raise _contract("/spend/logs/v2", "has a row without a sound `startTime`") from error
    return at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)


def _call_id(row: Row) -> object:
    """The column, or what older versions keep in `metadata`, which may be JSON in a string."""
    if column := row.get("litellm_call_id"):
        return column
    metadata = row.get("metadata")
    if isinstance(metadata, str):
        try:
            metadata = json.loads(metadata)
        except ValueError:
            return None
    return metadata.get("litellm_call_id") if isinstance(metadata, dict) else None


def _unseen(rows: list[Row], seen: set[str]) -> list[Row]:
    return [row for row in rows if row["request_id"] not in seen]


def _contract(path: str, what: str) -> LiteLLMContract:
    return LiteLLMContract(f"LiteLLM's answer to {path} {what}", f"{_HINT_VERSION}; see also {_URL}")


def _stopped() -> LiteLLMStopped:
    return LiteLLMStopped("stopped before LiteLLM's answer was complete")


def _kind(value: object) -> str:
    return {dict: "an object", list: "a list", str: "a text", type(None): "null"}.get(type(value), "a number")


# --- small things -----------------------------------------------------------------------------------------------------


def _checked_url(url: str) -> str:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        parsed = httpx.URL()
    sound = (
        re.fullmatch(r"[!-~]+", url)
        and parsed.scheme in ("http", "https")
        and parsed.host
        and not (parsed.userinfo or parsed.query or parsed.fragment)
    )
    if not sound:
        shown = "" if "@" in url or "?" in url else f", not {url!r}"
        raise ConfigError(
            f"{_URL} must be http://host[:port][/path] or https://..., without user and query{shown}",
            f"set {_URL} to LiteLLM's own address, e.g. http://litellm:4000",
        )
    return url.rstrip("/")


def _checked_key(api_key: str) -> str:
    if not api_key or not api_key.isascii() or not api_key.isprintable() or " " in api_key:
        raise ConfigError(f"{_KEY} must be printable ASCII without blanks", f"set {_KEY} to LiteLLM's admin key")
    return api_key


def _tls(address: str) -> ssl.SSLContext:
    """The authorities of httpx and of this machine, where a company's own one is. Plain HTTP needs none."""
    if address.startswith("http:"):
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context = httpx.create_ssl_context(trust_env=False)
    context.load_default_certs()
    return context


def _retry_after(value: str) -> float:
    """Seconds, from a number or an HTTP date; 0 if it is neither."""
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", value):
        return float(value)
    try:
        at = parsedate_to_datetime(value)
    except (TypeError, ValueError):
        return 0.0
    at = at.replace(tzinfo=UTC) if at.tzinfo is None else at
    return max(0.0, (at - datetime.now(UTC)).total_seconds())


def _floor(at: datetime) -> datetime:
    return at.astimezone(UTC).replace(microsecond=0)


def _dates(start: datetime, end: datetime) -> dict[str, str]:
    form = "%Y-%m-%d %H:%M:%S"
    return {"start_date": start.strftime(form), "end_date": end.strftime(form)}
