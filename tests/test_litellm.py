"""LiteLLM's spend logs, played by a small HTTP server with the paging and the failures of the real one."""

import contextlib
import email.utils
import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import httpx
import orjson
import pytest
from hypothesis import event, example, given, settings
from hypothesis import strategies as st

from billing_tailer import litellm
from billing_tailer.errors import ConfigError, TailerError
from billing_tailer.litellm import LiteLLMContract, LiteLLMStopped, LiteLLMUnavailable, SpendLogs

KEY = "sk-very-secret-1234"
BEGIN = datetime(2026, 11, 22, 0, 59, 58, tzinfo=UTC)
Answer = tuple[int, dict[str, str], bytes]


class FakeLiteLLM:
    """Rows in memory, and what the tests need to know and to break."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.queries: list[dict[str, str]] = []
        self.page_rows_max = 1000
        self.count_cap = 10_000
        self.sorted_as_asked = True
        self.tie: Callable[[Any], Any] = str
        """Orders rows of one time; may give another order at every call, as Postgres may."""
        self.grow: Callable[[], object] = lambda: None
        """Called before the count and between count and rows."""
        self.scripted: list[Answer | Callable[[Handler], Answer]] = []
        """Given instead of real answers, first come first served."""
        self.truncated = False
        self.teams_forbidden = False

    def add(self, milliseconds: int, **fields: Any) -> str:
        """A row that starts so long after BEGIN; its request id."""
        name = f"chatcmpl-{len(self.rows)}"
        at = BEGIN + timedelta(milliseconds=milliseconds)
        row = {"request_id": name, "startTime": at.strftime("%Y-%m-%dT%H:%M:%S.%f"), "litellm_call_id": f"call-{name}"}
        self.rows.append({**row, "metadata": {}, "spend": 0.000225, **fields})
        return name

    def ids(self) -> set[str]:
        return {row["request_id"] for row in self.rows}

    def answer(self, path: str, query: dict[str, str], authorization: str) -> Answer:
        if authorization != f"Bearer {KEY}":
            message = f"Authentication Error, Invalid proxy server token passed. Received API Key = {authorization}"
            return as_json({"error": {"message": message, "code": "401"}}, 401)
        if path == "/spend/logs/v2":
            return self._page(query)
        if path == "/spend/logs":
            wanted = query["request_id"]
            found = [row for row in self.rows if wanted in (row["request_id"], row.get("litellm_call_id"))]
            return as_json(found, headers={"x-litellm-spend-logs-truncated": "true"} if self.truncated else {})
        return as_json({"detail": "Not Found"}, 404)

    def _page(self, query: dict[str, str]) -> Answer:
        if "team_id" in query and self.teams_forbidden:
            return as_json({"error": {"message": "Not authorized to view team spend"}}, 403)
        size, number = int(query["page_size"]), int(query.get("page", "1"))
        if size > self.page_rows_max:
            problem = {"type": "less_than_equal", "loc": ["query", "page_size"], "ctx": {"le": self.page_rows_max}}
            return as_json({"detail": [problem]}, 422)
        try:
            start, end = (
                datetime.strptime(query[name], "%Y-%m-%d %H:%M:%S").replace(tzinfo=UTC)
                for name in ("start_date", "end_date")
            )
        except ValueError:
            return as_json({"error": {"message": "Invalid date format"}}, 400)
        self.grow()
        total = min(len(self._matching(start, end, query)), self.count_cap)
        self.grow()
        matching = self._matching(start, end, query)
        matching.sort(key=lambda row: self.tie(row["request_id"]))
        if self.sorted_as_asked:
            matching.sort(key=lambda row: str(row["startTime"]))
        page = {
            "data": matching[(number - 1) * size : number * size],
            "total": total,
            "page": number,
            "page_size": size,
            "total_pages": -(-total // size),
            "total_is_capped": total == self.count_cap,
        }
        return as_json(page)

    def _matching(self, start: datetime, end: datetime, query: dict[str, str]) -> list[dict[str, Any]]:
        def at(row: dict[str, Any]) -> datetime:
            return datetime.fromisoformat(row["startTime"]).replace(tzinfo=UTC)

        return [] if "team_id" in query else [row for row in self.rows if start <= at(row) <= end]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True
    fake: FakeLiteLLM

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        query = dict(parse_qsl(address.query, keep_blank_values=True))
        self.fake.paths.append(self.path)
        self.fake.queries.append(query)
        answer: Any = self.fake.scripted.pop(0) if self.fake.scripted else None
        if callable(answer):
            answer = answer(self)
        status, headers, body = answer or self.fake.answer(address.path, query, self.headers["Authorization"])
        with contextlib.suppress(OSError):  # the client left
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)
            self.wfile.flush()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the name is http.server's
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients that break off are part of the tests


class FakeStop(threading.Event):
    """Time passes only in its `wait`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.waits: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.waits.append(timeout)
        self.now += timeout
        return self.is_set()


def as_json(value: object, status: int = 200, headers: dict[str, str] | None = None) -> Answer:
    return status, {"Content-Type": "application/json", **(headers or {})}, orjson.dumps(value)


def page_of(**changes: object) -> Answer:
    """A v2 answer that is sound but for the changes; None removes."""
    page = {"data": [], "total": 0, "page": 1, "page_size": 10, "total_pages": 0, "total_is_capped": False, **changes}
    return as_json({name: value for name, value in page.items() if value is not None})


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[FakeLiteLLM, str]]:
    fake = FakeLiteLLM()
    server = Server(("127.0.0.1", 0), type("OwnHandler", (Handler,), {"fake": fake}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield fake, f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def fake(served: tuple[FakeLiteLLM, str]) -> FakeLiteLLM:
    served[0].reset()
    return served[0]


@pytest.fixture
def url(served: tuple[FakeLiteLLM, str]) -> str:
    return served[1]


def logs_at(url: str, *, stop: threading.Event | None = None, key: str = KEY, **options: Any) -> SpendLogs:
    """Unbounded and without pauses, unless told otherwise."""
    stop = stop or FakeStop()
    return SpendLogs(url, key, stop=stop, **{"requests_per_minute": 1_000_000, "page_size": 10, **options})


@pytest.fixture
def logs(url: str) -> Iterator[SpendLogs]:
    with logs_at(url) as logs:
        yield logs


def read(logs: SpendLogs, seconds: float = 10) -> list[str]:
    return [row["request_id"] for rows in logs.window(BEGIN, BEGIN + timedelta(seconds=seconds)) for row in rows]


def read_into(logs: SpendLogs, outcome: list[BaseException]) -> None:
    try:
        read(logs)
    except BaseException as error:  # noqa: BLE001  # the test looks at it
        outcome.append(error)


def read_by_offset(client: httpx.Client, page_size: int) -> list[str]:
    """What the documentation of LiteLLM suggests, for comparison."""
    found: list[str] = []
    dates = {"start_date": "2026-11-22 00:59:58", "end_date": "2026-11-22 01:00:08"}
    for number in itertools.count(1):
        query = {**dates, "sort_by": "startTime", "sort_order": "asc", "page": str(number), "page_size": str(page_size)}
        answer = client.get("/spend/logs/v2", params=query).json()
        found += [row["request_id"] for row in answer["data"]]
        if number >= answer["total_pages"]:
            return found
    raise AssertionError


# --- paging: nothing is missed ---------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@example(  # a second that overflows its page only after a part of it was read
    existing=0, coming=[2, 4, 4, 4], milliseconds=2000, page_size=8, count_cap=20, ties_change=True, seed=0
)
@given(
    existing=st.integers(0, 120),
    coming=st.lists(st.integers(0, 4), max_size=40),
    milliseconds=st.sampled_from([900, 2000, 9000]),
    page_size=st.integers(8, 16),
    count_cap=st.sampled_from([20, 10_000]),
    ties_change=st.booleans(),
    seed=st.integers(0, 1 << 32),
)
def test_every_row_that_existed_at_the_begin_is_returned(
    served: tuple[FakeLiteLLM, str],
    existing: int,
    coming: list[int],
    milliseconds: int,
    page_size: int,
    count_cap: int,
    ties_change: bool,
    seed: int,
) -> None:
    """Whatever is inserted between two statements of LiteLLM, and however rows of one time change places."""
    fake, url = served
    fake.reset()
    fake.count_cap = count_cap
    dice = random.Random(seed)

    def add(count: int) -> None:
        for _ in range(count):
            fake.add(dice.randrange(0, milliseconds, 20))

    add(existing)
    before = fake.ids()
    waiting = list(coming)
    fake.grow = lambda: add(waiting.pop()) if waiting else None
    if ties_change:
        fake.tie = lambda name: dice.random()
    with logs_at(url, page_size=page_size) as logs:
        try:
            found = read(logs)
        except LiteLLMContract as error:  # a time was at the border of two pages in every pass: said, not hidden
            event(error.message.partition(":")[0])
            return
    event("second by page number" if any(query["page"] != "1" for query in fake.queries) else "first pages only")
    assert before <= set(found)
    assert len(found) == len(set(found)), "a row came twice"


def test_rows_that_change_places_between_pages(fake: FakeLiteLLM, url: str) -> None:
    """Rows of one time come in another order at every query: paging by offset loses some, we do not."""
    for moment in range(0, 900, 30):
        for _ in range(3):
            fake.add(moment)
    dice = random.Random(1)
    fake.tie = lambda name: dice.random()
    lost = 0
    with logs_at(url) as logs, httpx.Client(base_url=url, headers={"Authorization": f"Bearer {KEY}"}) as client:
        for _ in range(10):
            lost += len(fake.ids() - set(read_by_offset(client, 10)))
            assert sorted(read(logs)) == sorted(fake.ids())
    assert lost > 0, "this test does not show what it is for"


def test_a_full_page_may_have_lost_a_counted_row(fake: FakeLiteLLM, logs: SpendLogs) -> None:
    """Ten rows are counted and ten come, but one of them is new."""
    for moment in range(10):
        fake.add(1000 * moment)
    before = fake.ids()
    calls = itertools.count()
    fake.grow = lambda: fake.add(500) if next(calls) == 1 else None
    assert before <= set(read(logs))
    assert len(fake.rows) == 11


def test_a_second_that_never_stops_growing(fake: FakeLiteLLM, logs: SpendLogs) -> None:
    """The poll ends all the same, and has what was there when it began."""
    for moment in range(50):
        fake.add(moment * 19)
    before, dice = fake.ids(), random.Random(1)
    fake.grow = lambda: fake.add(dice.randrange(999))
    assert before <= set(read(logs))


def test_a_second_that_grows_faster_than_it_is_read(fake: FakeLiteLLM, logs: SpendLogs, monkeypatch: Any) -> None:
    monkeypatch.setattr(litellm, "PASS_PAGES_MAX", 20)
    fake.add(0)
    fake.grow = lambda: [fake.add(0) for _ in range(10)]
    with pytest.raises(LiteLLMUnavailable, match="no last page"):
        read(logs)
    assert len(fake.queries) == 21


def test_more_rows_of_one_time_than_a_page_holds(fake: FakeLiteLLM, logs: SpendLogs) -> None:
    """They are handed out, but not called complete."""
    for _ in range(35):
        fake.add(1500)
    found: list[str] = []
    with pytest.raises(LiteLLMContract, match=r"00:59:59\.5"):  # noqa: PT012  # what came before the error counts
        for rows in logs.window(BEGIN, BEGIN + timedelta(seconds=5)):
            found += [row["request_id"] for row in rows]
    assert sorted(found) == sorted(fake.ids())


def test_more_rows_than_litellm_counts(fake: FakeLiteLLM, logs: SpendLogs) -> None:
    fake.count_cap = 25
    for moment in range(100):
        fake.add(moment * 80)  # the end lies beyond the cap, by number and by time
    for moment in range(40):
        fake.add(3000 + moment)  # more in one second than are counted
    assert sorted(read(logs)) == sorted(fake.ids())


def test_each_step_is_a_first_page(fake: FakeLiteLLM, logs: SpendLogs) -> None:
    for moment in range(40):
        fake.add(moment * 250)
    assert sorted(read(logs)) == sorted(fake.ids())
    assert {query["page"] for query in fake.queries} == {"1"}
    assert [query["start_date"] for query in fake.queries][:2] == ["2026-11-22 00:59:58", "2026-11-22 01:00:00"]
    assert fake.queries[0] == {
        "start_date": "2026-11-22 00:59:58",
        "end_date": "2026-11-22 01:00:08",
        "sort_by": "startTime",
        "sort_order": "asc",
        "page": "1",
        "page_size": "10",
    }


def test_a_window_is_widened_to_whole_seconds_in_utc(fake: FakeLiteLLM, logs: SpendLogs) -> None:
    berlin = datetime.fromisoformat("2026-11-22T01:59:58.700+01:00")
    assert list(logs.window(berlin, berlin + timedelta(seconds=1.4))) == []
    assert list(logs.window(BEGIN, BEGIN)) == []
    assert [(query["start_date"], query["end_date"]) for query in fake.queries] == [
        ("2026-11-22 00:59:58", "2026-11-22 01:00:01"),
        ("2026-11-22 00:59:58", "2026-11-22 00:59:58"),
    ]


def test_rows_at_both_ends_of_the_window_belong_to_it(fake: FakeLiteLLM, logs: SpendLogs) -> None:
    for moment in (-1, 0, 2000, 2001):
        fake.add(moment)
    assert read(logs, seconds=2) == ["chatcmpl-1", "chatcmpl-2"]


def test_times_with_and_without_z(fake: FakeLiteLLM, logs: SpendLogs) -> None:
    for text in ("2026-11-22T00:59:58.5Z", "2026-11-22T00:59:59", "2026-11-22T00:59:59.250000+00:00"):
        fake.add(0, startTime=text)
    assert len(read(logs)) == 3


@pytest.mark.parametrize(
    ("start", "end"),
    [
        (BEGIN, BEGIN - timedelta(microseconds=1)),
        (BEGIN.replace(tzinfo=None), BEGIN),
        (BEGIN, BEGIN.replace(tzinfo=None) + timedelta(1)),
    ],
)
def test_impossible_windows_are_refused_at_once(logs: SpendLogs, start: datetime, end: datetime) -> None:
    with pytest.raises(ValueError, match="no window"):
        logs.window(start, end)


# --- page sizes ------------------------------------------------------------------------------------------------------


def test_an_older_litellm_gives_100_rows_at_most(fake: FakeLiteLLM, url: str) -> None:
    fake.page_rows_max = 100
    for moment in range(250):
        fake.add(moment * 30)
    with logs_at(url, page_size=500) as logs:
        assert sorted(read(logs)) == sorted(fake.ids())
        assert sorted(read(logs)) == sorted(fake.ids())
    assert [query["page_size"] for query in fake.queries].count("500") == 1, "the limit is remembered"


def test_a_page_that_is_too_long_is_asked_for_in_parts(fake: FakeLiteLLM, url: str) -> None:
    for moment in range(60):
        fake.add(moment * 10, metadata={"filler": "x" * (5000 if moment == 30 else 100)})
    with logs_at(url, page_size=32, answer_bytes_max=7000) as logs:
        assert sorted(read(logs)) == sorted(fake.ids())
        assert int(fake.queries[-1]["page_size"]) < 32
    with (
        logs_at(url, page_size=32, answer_bytes_max=4000) as logs,
        pytest.raises(LiteLLMContract, match="longer than 4000"),
    ):
        read(logs)


# --- one call --------------------------------------------------------------------------------------------------------


def test_rows_of_a_call_are_those_with_its_call_id(fake: FakeLiteLLM, logs: SpendLogs) -> None:
    fake.add(0, litellm_call_id="wanted")
    fake.add(1, litellm_call_id="wanted", metadata={"litellm_call_id": "other"})
    fake.add(2, litellm_call_id="other", request_id="wanted", metadata={"litellm_call_id": "wanted"})
    fake.add(3, litellm_call_id=None, request_id="wanted", metadata={"litellm_call_id": "wanted"})
    fake.add(4, litellm_call_id="", request_id="wanted", metadata='{"litellm_call_id": "wanted"}')
    without: list[Any] = [None, [], {}, "", "{", "null", '["litellm_call_id"]', {"litellm_call_id": None}]
    for metadata in without:
        fake.add(5, litellm_call_id=None, request_id="wanted", metadata=metadata)
    times = [row["startTime"][-6:] for row in logs.by_call_id("wanted")]
    assert times == ["000000", "001000", "003000", "004000"]
    assert logs.by_call_id("unknown") == []


def test_a_call_id_is_quoted(fake: FakeLiteLLM, logs: SpendLogs) -> None:
    for call_id in ("a&summarize=true", "x y/../z?#", "100%", "+", "ä€"):
        fake.add(0, litellm_call_id=call_id)
        assert [row["litellm_call_id"] for row in logs.by_call_id(call_id)] == [call_id]
        assert fake.queries[-1] == {"request_id": call_id}


def test_a_call_id_that_no_row_can_have(fake: FakeLiteLLM, logs: SpendLogs) -> None:
    assert logs.by_call_id("a\0b") == []
    with pytest.raises(ValueError, match="not empty"):
        logs.by_call_id("")
    assert fake.queries == []


def test_older_versions_say_null_for_none(fake: FakeLiteLLM, logs: SpendLogs) -> None:
    fake.scripted = [as_json([None])]
    assert logs.by_call_id("x") == []


def test_truncated_rows_are_no_answer(fake: FakeLiteLLM, logs: SpendLogs) -> None:
    fake.truncated = True
    with pytest.raises(LiteLLMContract, match="truncated"):
        logs.by_call_id("x")


@pytest.mark.parametrize("answer", [{}, {"data": []}, None, "text", 1, [1], [[]], ["x"]])
def test_rows_of_a_call_must_be_a_list_of_objects(fake: FakeLiteLLM, logs: SpendLogs, answer: object) -> None:
    fake.scripted = [as_json(answer)]
    with pytest.raises(LiteLLMContract, match="/spend/logs "):
        logs.by_call_id("x")


# --- answers that break the contract ---------------------------------------------------------------------------------

ROW = {"request_id": "a", "startTime": "2026-11-22T01:00:00"}


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (as_json([]), "no list `data`"),
        (as_json(None), "no list `data`"),
        (page_of(data=None), "no list `data`"),
        (page_of(data={}), "no list `data`"),
        (page_of(total=None), "no sound `total`"),
        (page_of(total="1"), "no sound `total`"),
        (page_of(total=True), "no sound `total`"),
        (page_of(total=-1), "no sound `total`"),
        (page_of(total=3), "no rows, though it counts 3"),
        (page_of(page=2), "not the page asked for"),
        (page_of(page_size=5), "not the page asked for"),
        (page_of(data=[ROW] * 11, total=11), "not the page asked for"),
        (page_of(data=[None], total=1), "no objects"),
        (page_of(data=["row"], total=1), "no objects"),
        (page_of(data=[{**ROW, "request_id": 1}], total=1), "no objects with a `request_id`"),
        (page_of(data=[{"request_id": "a"}], total=1), "startTime"),
        (page_of(data=[{**ROW, "startTime": 5}], total=1), "startTime"),
        (page_of(data=[{**ROW, "startTime": "yesterday"}], total=1), "startTime"),
        (page_of(data=[{**ROW, "startTime": "2026-11-22T02:00:00"}], total=1), "outside of"),
        (page_of(data=[{**ROW, "startTime": "2026-11-22T00:59:57.999"}], total=1), "outside of"),
        ((200, {}, b""), "not answer with JSON"),
        ((200, {}, b"<html>Welcome</html>"), "not answer with JSON"),
        ((200, {}, b'{"data": ['), "not answer with JSON"),
        ((200, {"Content-Encoding": "gzip"}, b"\x1f\x8b"), "compressed"),
        ((204, {}, b""), "204"),
    ],
)
def test_a_broken_contract_is_loud(fake: FakeLiteLLM, logs: SpendLogs, answer: Answer, words: str) -> None:
    fake.scripted = [answer]
    with pytest.raises(LiteLLMContract, match=words) as caught:
        read(logs)
    assert "BILLING_TAILER_LITELLM_URL" in caught.value.hint or "LiteLLM 1.106" in caught.value.hint
    assert len(fake.queries) == 1, "asking again would not help"


def test_a_litellm_that_cannot_sort(fake: FakeLiteLLM, logs: SpendLogs) -> None:
    """From November 2025 to February 2026 v2 knew no `sort_by` and ignored it."""
    fake.sorted_as_asked = False
    fake.add(1000)
    fake.add(0)
    with pytest.raises(LiteLLMContract, match="older than February 2026"):
        read(logs)


# --- failures, retries, time-outs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "body", "kind", "words"),
    [
        (400, b'{"error":{"message":"Start date and end date are required"}}', LiteLLMContract, "Start date and end"),
        (401, b"{}", LiteLLMContract, "refuses our key"),
        (403, b"", LiteLLMContract, "refuses our key"),
        (404, b'{"detail":"Not Found"}', LiteLLMContract, "does not exist"),
        (405, b"", LiteLLMContract, "does not exist"),
        (422, b'{"detail":[{"loc":["query","page_size"]}]}', LiteLLMContract, "422"),
        (422, b'{"detail":[{"loc":["query","page"]}]}', LiteLLMContract, "422"),
        (418, b"\xff\x00tea\npot", LiteLLMContract, "tea pot"),
        (408, b"", LiteLLMUnavailable, "408"),
        (429, b'{"error":{"message":"Max RPM reached"}}', LiteLLMUnavailable, "Max RPM"),
        (500, b'{"error":{"message":"/spend/logs Error"}}', LiteLLMUnavailable, "500 /spend/logs Error"),
        (502, b"<html>" + b"x" * 200_000, LiteLLMUnavailable, "502"),
        (503, b"", LiteLLMUnavailable, "503"),
        (401, b'{"error":{"message":"Prisma Client is not initialized"}}', LiteLLMUnavailable, "without a database"),
        (500, b'{"error":{"message":"Database not connected. ..."}}', LiteLLMUnavailable, "without a database"),
    ],
)
def test_errors_by_status(
    fake: FakeLiteLLM, logs: SpendLogs, status: int, body: bytes, kind: type[TailerError], words: str
) -> None:
    fake.scripted = [(status, {}, body)] * 20
    with pytest.raises(kind, match=words) as caught:
        read(logs)
    assert len(fake.queries) == (litellm.ATTEMPTS_MAX if kind is LiteLLMUnavailable else 1)
    assert len(caught.value.message) < 400
    assert caught.value.message.isprintable()
    assert caught.value.hint


def test_it_is_tried_again_with_growing_pauses(fake: FakeLiteLLM, url: str) -> None:
    fake.add(0)
    fake.scripted = [(503, {}, b""), (500, {}, b""), (502, {}, b"")]
    stop = FakeStop()
    with logs_at(url, stop=stop) as logs:
        assert len(read(logs)) == 1
    assert len(stop.waits) == 3
    assert all(0 < pause <= limit for pause, limit in zip(stop.waits, (0.5, 1, 2), strict=True))


def test_retry_after_is_honoured_up_to_a_bound(fake: FakeLiteLLM, url: str) -> None:
    soon = email.utils.format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    values = ["7", "86400", soon]
    fake.scripted = [(429, {"Retry-After": value}, b"") for value in values]
    stop = FakeStop()
    with logs_at(url, stop=stop) as logs:
        read(logs)
    assert stop.waits[0] == 7
    assert stop.waits[1] == litellm.RETRY_AFTER_SECONDS_MAX
    assert 25 < stop.waits[2] <= 30


@pytest.mark.parametrize("value", ["", "-5", "soon", "1e9", "NaN", "99999999999999999999", "Wed, 99 Foo 2026"])
def test_a_senseless_retry_after_is_ignored(fake: FakeLiteLLM, url: str, value: str) -> None:
    fake.scripted = [(503, {"Retry-After": value}, b"")]
    stop = FakeStop()
    with logs_at(url, stop=stop) as logs:
        read(logs)
    assert max(stop.waits) <= 1


def test_nobody_listens(url: str) -> None:
    with logs_at("http://127.0.0.1:9") as logs, pytest.raises(LiteLLMUnavailable, match="cannot be reached"):
        read(logs)


def test_an_answer_that_does_not_come(fake: FakeLiteLLM, url: str) -> None:
    def sleep(handler: Handler) -> Answer:
        time.sleep(0.3)
        return page_of()

    fake.scripted = [sleep] * 3
    with logs_at(url, timeout_seconds=0.05) as logs:
        assert read(logs) == [], "the fourth attempt is answered"
    fake.scripted = [sleep] * 4
    with (
        logs_at(url, timeout_seconds=0.05) as logs,
        pytest.raises(LiteLLMUnavailable, match=r"no answer within 0\.05 s"),
    ):
        read(logs)


def test_an_answer_that_trickles_is_ended(fake: FakeLiteLLM, url: str) -> None:
    """Each read is in time, the whole is not."""

    def trickle(handler: Handler) -> Answer:
        handler.send_response(200)
        handler.send_header("Content-Length", "100000")
        handler.end_headers()
        for _ in range(200):
            handler.wfile.write(b" ")
            handler.wfile.flush()
            time.sleep(0.02)
        raise ConnectionAbortedError

    fake.scripted = [trickle] * 4
    began = time.monotonic()
    with logs_at(url, timeout_seconds=0.05) as logs, pytest.raises(LiteLLMUnavailable, match="too slowly"):
        read(logs)
    assert time.monotonic() - began < 5


def test_an_answer_that_breaks_off(fake: FakeLiteLLM, url: str) -> None:
    fake.scripted = [(200, {"Content-Length": "1000", "Connection": "close"}, b'{"data":')] * 4
    with logs_at(url) as logs, pytest.raises(LiteLLMUnavailable, match="cannot be reached"):
        read(logs)


@pytest.mark.parametrize(("status", "kind"), [(200, LiteLLMContract), (500, LiteLLMUnavailable)])
def test_an_answer_without_end_is_not_kept_in_memory(
    fake: FakeLiteLLM, url: str, status: int, kind: type[TailerError]
) -> None:
    sent = 0

    def flood(handler: Handler) -> Answer:
        nonlocal sent
        handler.send_response(status)
        handler.send_header("Content-Length", str(1 << 40))
        handler.end_headers()
        for _ in range(1000):
            handler.wfile.write(b" " * 65536)
            sent += 65536
        raise ConnectionAbortedError

    fake.scripted = [flood] * 4
    with logs_at(url, page_size=1, answer_bytes_max=1 << 20) as logs, pytest.raises(kind):
        read(logs)
    assert sent < 32 << 20


def test_redirects_are_not_followed(fake: FakeLiteLLM, logs: SpendLogs, url: str) -> None:
    fake.scripted = [(307, {"Location": url + "/spend/logs/v2?elsewhere"}, b"")]
    with pytest.raises(LiteLLMContract, match="redirects") as caught:
        read(logs)
    assert "BILLING_TAILER_LITELLM_URL" in caught.value.hint
    assert len(fake.queries) == 1


def test_proxies_of_the_environment_are_not_used(fake: FakeLiteLLM, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    fake.add(0)
    with logs_at(url) as logs:
        assert len(read(logs)) == 1


# --- never hammer -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_minute", [1, 2, 7, 10, 60, 120, 999])
def test_requests_per_minute_are_bounded(per_minute: int) -> None:
    """In no 60 seconds start more than that, whatever the pattern of demand; and the rate is used up."""
    clock = FakeStop()
    bucket = litellm._Bucket(per_minute, lambda: clock.now)
    dice, starts = random.Random(per_minute), list[float]()
    while len(starts) < 4 * per_minute + 10:
        clock.now += bucket.seconds_to_wait()
        starts.append(clock.now)
        if dice.random() < 0.01:
            clock.now += dice.random() * 200
    for first, after in zip(starts, starts[per_minute:], strict=False):
        assert after - first >= 60 - 1e-6
    clock.now += 1000
    began = clock.now
    for _ in range(per_minute + 1):
        clock.now += bucket.seconds_to_wait()
    assert clock.now - began == pytest.approx(60)


def test_retries_and_all_questions_share_the_bound(fake: FakeLiteLLM, url: str) -> None:
    stop = FakeStop()
    began = stop.now
    fake.scripted = [(503, {}, b"")] * 2
    with logs_at(url, stop=stop, requests_per_minute=6, monotonic=lambda: stop.now) as logs:
        read(logs)
        for _ in range(3):
            logs.by_call_id("x")
        assert logs.reachable() is None
    assert len(fake.queries) == 9
    assert stop.now - began >= 8 * 10 - 1e-6


def test_threads_share_the_bound(fake: FakeLiteLLM, url: str) -> None:
    with logs_at(url, stop=threading.Event(), requests_per_minute=600) as logs:  # 60 at once, then 9 a second
        began = time.monotonic()
        threads = [threading.Thread(target=lambda: [logs.by_call_id("x") for _ in range(16)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(fake.queries) == 64
        assert time.monotonic() - began >= 0.3


# --- stop ------------------------------------------------------------------------------------------------------------


def test_nothing_is_asked_after_stop(fake: FakeLiteLLM, url: str) -> None:
    stop = FakeStop()
    with logs_at(url, stop=stop) as logs:
        for moment in range(30):
            fake.add(moment * 100)
        pages = logs.window(BEGIN, BEGIN + timedelta(seconds=10))
        next(pages)
        stop.set()
        with pytest.raises(LiteLLMStopped):
            next(pages)
        with pytest.raises(LiteLLMStopped):
            logs.by_call_id("x")
    assert len(fake.queries) == 1


@pytest.mark.parametrize("answer", [(503, {"Retry-After": "50"}, b""), None])
def test_stop_ends_a_pause(fake: FakeLiteLLM, url: str, answer: Answer | None) -> None:
    """The pause before the next attempt, and that for the next token."""
    fake.scripted = [answer] if answer else []
    stop = threading.Event()
    with logs_at(url, stop=stop, requests_per_minute=1000 if answer else 1) as logs:
        timer = threading.Timer(0.1, stop.set)
        timer.start()
        began = time.monotonic()
        with pytest.raises(LiteLLMStopped):  # noqa: PT012  # the first or the second of them
            logs.by_call_id("x")
            logs.by_call_id("x")
        assert time.monotonic() - began < 2
        timer.join()
    assert len(fake.queries) == 1


@pytest.mark.parametrize("attempts_before", [0, litellm.ATTEMPTS_MAX - 1])
def test_stop_and_close_end_a_request_in_flight(fake: FakeLiteLLM, url: str, attempts_before: int) -> None:
    release = threading.Event()

    def hang(handler: Handler) -> Answer:
        release.wait(20)
        return page_of()

    for _ in range(5):
        stop, outcome = FakeStop(), list[BaseException]()
        fake.scripted = [page_of(), *[(503, {}, b"")] * attempts_before, hang]
        logs = logs_at(url, stop=stop)
        assert read(logs) == []  # the connection is used again

        thread = threading.Thread(target=read_into, args=(logs, outcome))
        thread.start()
        while fake.scripted:
            time.sleep(0.005)
        stop.set()
        logs.close()
        thread.join(2)
        assert not thread.is_alive()
        assert [type(error) for error in outcome] == [LiteLLMStopped]
    release.set()


# --- what is shown ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [KEY, "another-secret-1234"])
@pytest.mark.parametrize("status", [200, 204, 301, 400, 401, 403, 404, 409, 422, 429, 500, 503])
def test_the_key_is_in_no_message(fake: FakeLiteLLM, url: str, status: int, key: str) -> None:
    """Even where the answer repeats it, or its hash, as LiteLLM does."""

    def echo(handler: Handler) -> Answer:
        sent = handler.headers["Authorization"]
        said = f"page_size {sent}, Received API Key = sk-...1234, Key Hash (Token) = {'0af1' * 16}"
        if status == 200:
            return 200, {}, said.encode()
        return as_json({"error": {"message": said}}, status, {"Location": f"http://x/?key={sent}"})

    fake.scripted = [echo] * 8
    with logs_at(url, key=key) as logs:
        with pytest.raises(TailerError) as caught:
            read(logs)
        shown = [str(caught.value), repr(caught.value), str(logs.reachable()), repr(logs), str(logs)]
    for text in shown:
        for secret in (key, "1234", "0af1"):
            assert secret not in text.replace(url, "")


@pytest.mark.parametrize("key", ["", "sk 1", "sk-ä-secret", "sk-secret\n", "sk-secret\r\nX: y"])
def test_a_key_that_cannot_be_sent(key: str) -> None:
    with pytest.raises(ConfigError, match="BILLING_TAILER_LITELLM_API_KEY") as caught:
        logs_at("http://litellm:4000", key=key)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "address",
    [
        "",
        "litellm:4000",
        "ftp://litellm",
        "http://",
        "http://user:hidden@litellm",
        "http://litellm/?key=hidden",
        "http://a b",
    ],
)
def test_an_address_that_is_none(address: str) -> None:
    with pytest.raises(ConfigError, match="BILLING_TAILER_LITELLM_URL") as caught:
        logs_at(address)
    assert "hidden" not in str(caught.value)


def test_an_address_may_have_a_path(fake: FakeLiteLLM, url: str) -> None:
    with (
        logs_at(url + "/gateway/") as logs,
        pytest.raises(LiteLLMContract, match="/gateway/spend/logs/v2 does not exist"),
    ):
        read(logs)
    assert fake.paths[0].startswith("/gateway/spend/logs/v2?")


def test_tls_certificates_are_verified() -> None:
    context = litellm._tls("https://litellm")
    assert context.check_hostname
    assert context.get_ca_certs()
    assert litellm._tls("http://litellm").check_hostname


# --- check -----------------------------------------------------------------------------------------------------------


def test_reachable(fake: FakeLiteLLM, logs: SpendLogs) -> None:
    fake.add(0)
    assert logs.reachable() is None
    assert len(fake.queries) == 3


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((401, {}, b""), "BILLING_TAILER_LITELLM_API_KEY"),
        ((403, {}, b""), "proxy admin"),
        ((404, {}, b""), "BILLING_TAILER_LITELLM_URL"),
        ((404, {}, b""), "older than November 2025"),
        ((500, {}, b'{"error":{"message":"Database not connected"}}'), "DATABASE_URL"),
        ((401, {}, b'{"error":{"message":"Prisma Client is not initialized"}}'), "without a database"),
        ((502, {}, b"bad gateway"), "502 bad gateway"),
        ((200, {}, b"<html>"), "JSON"),
    ],
)
def test_unreachable_in_words(fake: FakeLiteLLM, logs: SpendLogs, answer: Answer, words: str) -> None:
    fake.scripted = [answer]
    assert words in str(logs.reachable())
    assert len(fake.queries) == 1, "check does not wait for retries"


def test_unreachable_when_nobody_listens() -> None:
    with logs_at("http://127.0.0.1:9") as logs:
        assert "refused" in str(logs.reachable())


def test_unreachable_with_the_wrong_key(fake: FakeLiteLLM, url: str) -> None:
    with logs_at(url, key="sk-other-secret") as logs:
        said = str(logs.reachable())
    assert "refuses our key" in said
    assert "other" not in said


def test_unreachable_with_a_key_that_sees_only_its_own_rows(fake: FakeLiteLLM, logs: SpendLogs) -> None:
    """LiteLLM answers an internal user's key with 200 and that user's rows; only other teams are forbidden to it."""
    fake.teams_forbidden = True
    assert "only a part" in str(logs.reachable())
