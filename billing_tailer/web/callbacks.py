"""`POST /v1/callbacks/litellm`: LiteLLM's events, each one line in the spool before the 200.

LiteLLM loses whatever happens while a POST is under way, and a whole batch on any 4xx or 5xx. So this never waits for
Postgres, and it takes what it can get: a JSON array, one object per line or a single object, where a bad element costs
nobody but itself (tests/test_callbacks.py). The answers:

- 200 `{"accepted": n, "rejected": m}`: every element is on disk, as `{"received_at": ..., "payload": {...}}` or as
  `{"received_at": ..., "rejected": {"reason", "detail", "sha256", "bytes"}}`, which has nothing of its content.
- 400 nothing in the body is JSON · 401 · 408 the body took too long · 413 · 415 · 503 the spool refuses.

Without a 200 nothing is acknowledged, but what was read whole before a client left or a limit was reached is spooled
all the same: LiteLLM does not send it again, and if someone does, the records' own keys make that harmless.

PROMPTS_ARE_NEVER_STORED: only what `slim` keeps leaves this room. A large body is taken apart as it arrives, not put
into a file first: prompts and answers are dropped on the way, no more than ELEMENT_BYTES_MAX of an element is held, and
300 MB need no more memory than 3 (tests/test_callbacks.py::test_a_huge_body_needs_little_memory). Not by ijson: it ends
at the first element that is no JSON, such as NaN, needs a prompt's whole length, and is slower.

The event loop is shared with health checks and pages: all bodies together get one slice of SLICE_SECONDS per turn of
the loop. A thread would be worse, as every read of the loop would wait for the interpreter's lock.
"""

import asyncio
import contextlib
import hashlib
import json
import re
import time
import zlib
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import orjson
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from billing_tailer.errors import ConfigError
from billing_tailer.model import DeadLetterReason
from billing_tailer.spool import Spool, SpoolError
from billing_tailer.web.access import CHALLENGE, is_loopback, wrong_bearer

PATH = "/v1/callbacks/litellm"
SMALL_BYTES_MAX = 1 << 20
"""A body up to this size is parsed in one go."""
HELD_BYTES_MAX = 8 << 20
"""Of all such bodies together, while they arrive; beyond it, bodies are taken apart as large ones are."""
BODIES_MAX = 16
"""So many are read at a time, first come, first served: the others wait where they cost least, with the sender."""
PATIENCE_SECONDS = 5.0
"""Who waited so long is read as well: slow senders must not keep everybody out."""
FLUSH_BYTES = 256 << 10
"""So much goes to the spool before more of the body is read."""
SLICE_SECONDS = 0.005
BODY_SECONDS_MAX = 60.0
ELEMENTS_MAX = 1_000_000
"""Elements of one body."""
ELEMENT_BYTES_MAX = 4 << 20
"""What is held of one element, without prompts and answers. A real one has 15 KB."""
STRING_BYTES_MAX = 1 << 20
"""A string that arrives in pieces is cut soon after this; the fields of a bill are far shorter."""
DEPTH_MAX = 500
PIECE_BYTES = 32 << 10
"""Taken apart between two pauses; it bounds a pause where there are brackets only, to 20 ms."""
CLIENT_LEFT = 499
"""Counted, as nginx does, where nobody is left to be answered."""

Slim = Callable[[Mapping[str, Any]], dict[str, Any]]
"""An event -> the few fields of it that may be stored, all of them plain JSON."""


def callback_routes(
    token: str | None,
    spool: Spool,
    slim: Slim,
    body_bytes_max: int,
    count: Callable[[int], None],
    *,
    body_seconds_max: float = BODY_SECONDS_MAX,
) -> list[Route]:
    """The endpoint, also with a slash at the end: a redirect would lose the body. token: None lets only clients on this
    machine in. body_bytes_max: as sent, and again after decompression. count: told the status of every answer. Raises
    ConfigError for an empty token."""
    if token is not None and not token:
        raise ConfigError("BILLING_TAILER_CALLBACK_TOKEN is empty", "set a token, or leave the variable out")
    callbacks = _Callbacks(token, spool, slim, body_bytes_max, body_seconds_max)

    async def endpoint(request: Request) -> Response:
        status = 500
        try:
            response = await callbacks.answer(request)
            status = response.status_code
        finally:
            count(status)
        return response

    return [Route(path, endpoint, methods=["POST"]) for path in (PATH, f"{PATH}/")]


class _TooLarge(Exception):
    """The body has more bytes than it may have."""


class _Broken(Exception):
    """The body cannot be decompressed from here on."""


# --- a body -> its elements


class Element(NamedTuple):
    """One element of a body. data: what was kept of its text. size, sha256: of all of it, as it came. reason, detail:
    why it cannot be used, in our own words."""

    data: bytes
    size: int
    sha256: str
    reason: DeadLetterReason | None = None
    detail: str = ""


# A whole string is one step; one without an end stops before its quote. Not possessive (`*+`), although no byte needs a
# second look: CPython before 3.11.5 matches those wrongly inside groups.
_STRING = rb'[^"\\]*(?:\\.[^"\\]*)*'
_INSIDE = re.compile(rb'[^"{}\[\]]*(?:"%b"[^"{}\[\]]*)*' % _STRING, re.DOTALL)
_BETWEEN = re.compile(rb'[^"{}\[\],\n]*(?:"%b"[^"{}\[\],\n]*)*' % _STRING, re.DOTALL)
_STRING_REST = re.compile(_STRING, re.DOTALL)
_BLANK = re.compile(rb"[ \t\r]*")
_DROPPED_KEY = re.compile(rb'(?<!\\)"(?:messages|response)"\s*:\s*\Z')
_DROPPED_KEY_BYTES_MAX = 32
_QUOTE, _COMMA, _NEWLINE, _ARRAY, _ARRAY_END = b'",\n[]'
_OPENING = b"[{"


class Elements:
    """Finds the elements of a body that arrives in chunks, by its brackets and strings alone.

    What stands between these is the parser's business, so that an element that is no JSON ends where it ends and the
    next one is found. A top-level array is a sequence of elements, and so is a sequence of top-level values. Once one
    of these stood on a line of its own, or with by_line from the start, a newline ends an element whatever is open.
    """

    def __init__(self, *, by_line: bool = False) -> None:
        self._by_line = by_line
        self._compact = False  # the last element had no newline in it
        self._array = False
        self._open = False  # within an element, so many brackets deep:
        self._depth = 0
        self._in_string = False
        self._escaped = False  # the chunk ended behind a backslash
        self._string_bytes = 0
        self._cut = False  # the rest of this string is dropped
        self._dropped = False  # this value is dropped
        self._mark = 0  # from here on, what the chunk has of the element is not noted yet
        self._clear()

    def _clear(self) -> None:
        self._kept = bytearray()
        self._size = 0
        self._hash = hashlib.sha256()
        self._trouble: tuple[DeadLetterReason, str] | None = None

    def feed(self, chunk: bytes) -> Iterator[Element]:
        """The elements that end in this chunk."""
        position = 0
        while position < len(chunk):
            newline = chunk.find(b"\n", position) if self._by_line else -1
            end = newline if newline >= 0 else len(chunk)
            position = yield from self._scan(chunk, position, end)
            if position == newline:
                yield from self.end()
                position += 1

    def end(self, *, broken: bool = False) -> Iterator[Element]:
        """What the end of the body, or of a line, leaves. broken: it is known that more should have come."""
        if self._open:
            if self._depth or self._in_string:
                self._reject(DeadLetterReason.UNTERMINATED, "it has no end")
            yield self._finish()
        elif self._array or broken:
            yield Element(b"", 0, hashlib.sha256().hexdigest(), DeadLetterReason.UNTERMINATED, "the body breaks off")
        self._array = self._in_string = self._escaped = self._cut = self._dropped = False
        self._depth = 0

    def _scan(self, chunk: bytes, position: int, end: int) -> Generator[Element, None, int]:
        """Take chunk[position:end]; returns how far it came: less than that where lines begin to count."""
        by_line = self._by_line
        self._mark = position
        while position < end:
            if self._in_string:
                position = self._through_string(chunk, position, end)
            elif not self._open:
                position = self._to_element(chunk, position, end)
                if self._by_line != by_line:
                    return position
            else:
                position = _after(_INSIDE if self._depth else _BETWEEN, chunk, position, end)
                if position == end:
                    break
                position, complete = self._step(chunk, position)
                if complete:
                    self._note(chunk, position)
                    yield self._finish()
        if self._open:
            self._note(chunk, end)
        return end

    def _to_element(self, chunk: bytes, position: int, end: int) -> int:
        """Pass what separates elements."""
        position = _after(_BLANK, chunk, position, end)
        if position == end:
            return end
        byte = chunk[position]
        if byte == _NEWLINE:
            self._by_line = self._by_line or (self._compact and not self._array)
        elif byte == _ARRAY and not self._array:
            self._array = True
        elif byte == _ARRAY_END and self._array:
            self._array = False
        elif byte != _COMMA:
            self._open = True
            self._mark = position
            return position
        return position + 1

    def _step(self, chunk: bytes, position: int) -> tuple[int, bool]:
        """Pass a quote, bracket or separator of an element -> where it goes on, whether the element is complete."""
        byte = chunk[position]
        if self._depth == 0 and (byte in (_COMMA, _NEWLINE) or (byte == _ARRAY_END and self._array)):
            return position, True
        after = position + 1
        if byte == _QUOTE:
            self._in_string = True
            self._string_bytes = 0
        elif byte in _OPENING:
            self._depth += 1
            if self._depth == 2 and not self._dropped:
                self._drop_unwanted(chunk, position)
            elif self._depth > DEPTH_MAX and not self._dropped:
                self._reject(DeadLetterReason.TOO_LONG, f"more than {DEPTH_MAX} levels")
        elif self._depth:
            self._depth -= 1
            if self._dropped and self._depth == 1:
                self._note(chunk, after)
                self._dropped = False
            return after, self._depth == 0
        return after, False  # a closing bracket too many belongs to an element that is no JSON

    def _drop_unwanted(self, chunk: bytes, position: int) -> None:
        """At the bracket of a value in an element: drop prompts and answers."""
        start = max(self._mark, position - _DROPPED_KEY_BYTES_MAX)
        if _DROPPED_KEY.search(bytes(self._kept[-_DROPPED_KEY_BYTES_MAX:]) + chunk[start:position]):
            self._note(chunk, position)
            self._kept += b"null"
            self._dropped = True

    def _through_string(self, chunk: bytes, position: int, end: int) -> int:
        """Pass the rest of a string that began in an earlier chunk, or has no end in this one."""
        stop = _after(_STRING_REST, chunk, position + self._escaped, end)
        self._escaped = stop < end and chunk[stop] != _QUOTE  # the last byte is a backslash
        if stop == end or self._escaped:
            self._string_bytes += end - position
            if self._string_bytes > STRING_BYTES_MAX and not self._cut:
                self._note(chunk, end)
                self._end_before_escape()
                self._cut = True
            return end
        if self._cut:
            self._note(chunk, stop)
            self._cut = False
        self._in_string = False
        return stop + 1

    def _end_before_escape(self) -> None:
        """What is kept of a cut string must not end within `\\u0041`."""
        at = self._kept.find(b"\\", max(0, len(self._kept) - 5))
        if at >= 0:
            self._kept = self._kept[:at].rstrip(b"\\")

    def _note(self, chunk: bytes, end: int) -> None:
        piece = chunk[self._mark : end]
        self._mark = end
        self._hash.update(piece)
        self._size += len(piece)
        if not (self._cut or self._dropped or self._trouble):
            self._kept += piece
            if len(self._kept) > ELEMENT_BYTES_MAX:
                self._reject(DeadLetterReason.TOO_LONG, f"more than {ELEMENT_BYTES_MAX} bytes without its messages")

    def _reject(self, reason: DeadLetterReason, detail: str) -> None:
        self._trouble = self._trouble or (reason, detail)
        self._kept = bytearray()

    def _finish(self) -> Element:
        self._compact = self._trouble is None and b"\n" not in self._kept
        element = Element(bytes(self._kept), self._size, self._hash.hexdigest(), *(self._trouble or (None, "")))
        self._open = False
        self._clear()
        return element


def _after(pattern: re.Pattern[bytes], chunk: bytes, position: int, end: int) -> int:
    match = pattern.match(chunk, position, end)
    return position if match is None else match.end()


def _take_apart(body: bytes, *, by_line: bool) -> Iterator[Element | None]:
    """The elements of a body that is at hand; None is a pause. Where lines may be meant, brackets or newlines decide
    what an element is, whichever gives more: a torn first line must not take the others with it."""
    if not by_line and b"\n" in body.strip() and body.lstrip()[:1] != b"[":
        objects = [0, 0]
        for way in (False, True):
            for element in _all_elements(body, by_line=way):
                objects[way] += element is not None and element.reason is None and _is_object(element.data)
                yield None
        by_line = objects[True] > objects[False]
    yield from _all_elements(body, by_line=by_line)


def _all_elements(body: bytes, *, by_line: bool) -> Iterator[Element | None]:
    elements = Elements(by_line=by_line)
    for start in range(0, len(body), PIECE_BYTES):
        yield from elements.feed(body[start : start + PIECE_BYTES])
        yield None
    yield from elements.end()


# --- elements -> lines


@dataclass(slots=True)
class _Intake:
    """What became of one body. lines: not yet given to the spool; one piece, since what orjson returns holds 8 KiB
    however short it is. parsed: something in the body was JSON."""

    slim: Slim
    lines: bytearray = field(default_factory=bytearray)
    accepted: int = 0
    rejected: int = 0
    parsed: bool = False

    def whole(self, body: bytes, *, by_line: bool) -> Iterator[None]:
        """Take a body at once if nothing is wrong with it, else element by element. Goes on at every step."""
        payloads = _payloads(body)
        lines = bytearray()
        for payload in payloads or ():
            line = self._line(payload)
            if line is None:
                payloads = None
                break
            lines += line
            yield
        if payloads is None:
            yield from self.each(_take_apart(body, by_line=by_line))
            return
        self.parsed = True
        self.accepted += len(payloads)
        self.lines += lines

    def each(self, elements: Iterator[Element | None]) -> Iterator[None]:
        """Take elements, one at every step."""
        for element in elements:
            if element is not None:
                self._take(element)
            yield

    def _take(self, element: Element) -> None:
        seen = self.accepted + self.rejected
        if seen >= ELEMENTS_MAX:
            if seen == ELEMENTS_MAX:
                self._reject(element, DeadLetterReason.TOO_LONG, f"from here on: more than {ELEMENTS_MAX} elements")
            return
        if element.reason is not None:
            self._reject(element, element.reason, element.detail)
            return
        try:
            value = _parsed(element.data)
        except (ValueError, RecursionError):
            self._reject(element, DeadLetterReason.INVALID_JSON, "")
            return
        self.parsed = True
        line = self._line(value) if isinstance(value, dict) else None
        if line is not None:
            self.accepted += 1
            self.lines += line
        elif isinstance(value, dict):
            self._reject(element, DeadLetterReason.BAD_VALUE, "its fields cannot be stored")
        else:
            self._reject(element, DeadLetterReason.NOT_AN_OBJECT, "")

    def _line(self, payload: Mapping[str, Any]) -> bytes | None:
        """None where slim or JSON cannot cope with it."""
        try:
            stored = {"received_at": time.time(), "payload": self.slim(payload)}
            return orjson.dumps(stored, option=orjson.OPT_APPEND_NEWLINE)
        except Exception:  # noqa: BLE001  # whatever it is: it costs this element only, and its text may be a prompt
            return None

    def _reject(self, element: Element, reason: DeadLetterReason, detail: str) -> None:
        self.rejected += 1
        rejected = {"reason": reason, "detail": detail, "sha256": element.sha256, "bytes": element.size}
        stored = {"received_at": time.time(), "rejected": rejected}
        self.lines += orjson.dumps(stored, option=orjson.OPT_APPEND_NEWLINE)


def _payloads(body: bytes) -> list[dict[str, Any]] | None:
    """None unless everything in the body is an object."""
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    elements = value if isinstance(value, list) else [value]
    return elements if all(isinstance(element, dict) for element in elements) else None


def _parsed(data: bytes) -> object:
    """Raises ValueError or RecursionError."""
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        # Python writes NaN, and halves of surrogate pairs where an answer was cut; they mostly stand where nobody looks
        return json.loads(data.decode(errors="replace").removeprefix("\ufeff"))


def _is_object(data: bytes) -> bool:
    try:
        return isinstance(_parsed(data), dict)
    except (ValueError, RecursionError):
        return False


# --- the endpoint


class _Callbacks:
    def __init__(
        self, token: str | None, spool: Spool, slim: Slim, body_bytes_max: int, body_seconds_max: float
    ) -> None:
        self._token = None if token is None else token.encode()
        self._spool = spool
        self._slim = slim
        self._body_bytes_max = body_bytes_max
        self._body_seconds_max = body_seconds_max
        self._turn = asyncio.Lock()
        self._places = asyncio.Semaphore(BODIES_MAX)
        self._held_bytes = 0

    async def answer(self, request: Request) -> Response:
        """What the module's docstring says."""
        refusal = self._refusal(request)
        if refusal is not None:
            return refusal
        intake = _Intake(self._slim)
        try:
            async with self._place(), asyncio.timeout(self._body_seconds_max):
                await self._read(request, intake)
            if not intake.parsed:
                return _error(400, "nothing in the body is JSON: an array, an object per line or a single object is")
            await self._flush(intake)
        except SpoolError as error:
            return _error(503, f"not stored: {error.message}", {"Retry-After": "1"})
        except (TimeoutError, ClientDisconnect, _TooLarge) as end:
            with contextlib.suppress(SpoolError):
                await self._flush(intake)
            if isinstance(end, _TooLarge):
                return self._too_large()
            if isinstance(end, ClientDisconnect):
                return _error(CLIENT_LEFT, "the client left")
            return _error(408, f"the body took longer than {self._body_seconds_max:g} s", {"Connection": "close"})
        return JSONResponse({"accepted": intake.accepted, "rejected": intake.rejected})

    def _refusal(self, request: Request) -> Response | None:
        """An answer that needs no look at the body."""
        stranger = self._why_stranger(request)
        if stranger is not None:
            return _error(401, stranger, CHALLENGE)
        encoding = _encoding(request)
        if encoding not in ("", "identity", "gzip"):
            return _error(415, f"Content-Encoding {encoding[:40]!r}: only gzip", {"Accept-Encoding": "gzip, identity"})
        length = request.headers.get("content-length", "")
        return self._too_large() if length.isdecimal() and int(length) > self._body_bytes_max else None

    def _why_stranger(self, request: Request) -> str | None:
        if self._token is None:
            if request.client is None or not is_loopback(request.client.host):
                return "no CALLBACK_TOKEN is configured: only clients on this machine may post"
            # LiteLLM sends no Origin, a browser always does: a page from elsewhere must not post with its hands
            if "origin" in request.headers:
                return "no CALLBACK_TOKEN is configured: nothing is taken from a browser"
            return None
        return wrong_bearer(request, self._token, "CALLBACK_TOKEN")

    def _too_large(self) -> Response:
        return _error(413, f"the body has more than {self._body_bytes_max} bytes (CALLBACK_BYTES_MAX)")

    @contextlib.asynccontextmanager
    async def _place(self) -> AsyncGenerator[None, None]:
        """One of BODIES_MAX, or none after PATIENCE_SECONDS."""
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                await self._places.acquire()
        except TimeoutError:
            yield
            return
        try:
            yield
        finally:
            self._places.release()

    async def _read(self, request: Request, intake: _Intake) -> None:
        """Take the whole body. Raises ClientDisconnect, SpoolError, _TooLarge."""
        by_line = any(word in request.headers.get("content-type", "") for word in ("ndjson", "jsonl", "json-lines"))
        elements = Elements(by_line=by_line)
        with _Held(self) as held:
            small, broken = True, False
            try:
                async with contextlib.aclosing(self._pieces(request)) as pieces:
                    async for piece in pieces:
                        small = small and held.add(piece)
                        if not small:
                            await self._take(intake, elements, held.release())
                            await self._take(intake, elements, piece)
            except _Broken:
                broken = True
            if small and not broken:
                await self._work(intake, intake.whole(bytes(held.data), by_line=by_line))
                return
            await self._take(intake, elements, held.release())
            await self._work(intake, intake.each(elements.end(broken=broken)))

    async def _pieces(self, request: Request) -> AsyncGenerator[bytes, None]:
        """The body as it arrives, decompressed. Raises ClientDisconnect, _Broken, _TooLarge."""
        unzip = _Unzip() if _encoding(request) == "gzip" else None
        sent = size = 0
        async for chunk in request.stream():
            sent += len(chunk)
            for piece in (chunk,) if unzip is None else unzip.pieces(chunk):
                size += len(piece)
                if max(sent, size) > self._body_bytes_max:
                    raise _TooLarge
                yield piece
        if unzip is not None:
            yield unzip.rest()

    async def _take(self, intake: _Intake, elements: Elements, data: bytes) -> None:
        for start in range(0, len(data), PIECE_BYTES):
            await self._work(intake, intake.each(elements.feed(data[start : start + PIECE_BYTES])))

    async def _work(self, intake: _Intake, steps: Iterator[None]) -> None:
        """Go through all steps, in slices: one per turn of the event loop, of one body at a time."""
        async with self._turn:
            done = False
            while not done:
                done = _slice(steps)
                await asyncio.sleep(0)
                if len(intake.lines) >= FLUSH_BYTES:
                    await self._flush(intake)

    async def _flush(self, intake: _Intake) -> None:
        """Returns when everything taken so far is on disk. Raises SpoolError."""
        if intake.lines:
            data = bytes(intake.lines)
            intake.lines.clear()
            await asyncio.wrap_future(self._spool.append(data))

    def hold(self, change: int) -> bool:
        """Count bytes that are held for a while; False where there are too many."""
        if change > 0 and self._held_bytes + change > HELD_BYTES_MAX:
            return False
        self._held_bytes += change
        return True


class _Held:
    """A small body while it arrives."""

    def __init__(self, owner: _Callbacks) -> None:
        self._owner = owner
        self.data = bytearray()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def add(self, piece: bytes) -> bool:
        """False where it is not small, or too many are held."""
        if len(self.data) + len(piece) > SMALL_BYTES_MAX or not self._owner.hold(len(piece)):
            return False
        self.data += piece
        return True

    def release(self) -> bytes:
        """What was held, which is from now on the caller's."""
        data = bytes(self.data)
        self._owner.hold(-len(data))
        self.data = bytearray()
        return data


class _Unzip:
    """gzip, in bounded pieces."""

    def __init__(self) -> None:
        self._zip = zlib.decompressobj(wbits=31)

    def pieces(self, chunk: bytes) -> Iterator[bytes]:
        """Raises _Broken."""
        while chunk:
            if self._zip.eof:
                self._zip = zlib.decompressobj(wbits=31)  # gzip files may be joined
            try:
                piece = self._zip.decompress(chunk, PIECE_BYTES)
            except zlib.error:
                raise _Broken from None
            chunk = self._zip.unconsumed_tail or self._zip.unused_data
            yield piece

    def rest(self) -> bytes:
        """Raises _Broken where the end is missing."""
        piece = self._zip.flush()
        if not self._zip.eof:
            raise _Broken
        return piece


def _slice(steps: Iterator[None]) -> bool:
    """Go on for SLICE_SECONDS; True at the end."""
    end = time.perf_counter() + SLICE_SECONDS
    return all(time.perf_counter() < end for _ in steps)


def _encoding(request: Request) -> str:
    return request.headers.get("content-encoding", "").strip().lower()


def _error(status: int, reason: str, headers: Mapping[str, str] | None = None) -> Response:
    return JSONResponse({"error": reason}, status, headers=headers)
