"""The pages over real Postgres: who gets in, what is refused, what strangers' texts become, what is slow."""

import html
import http.client
import json
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

from billing_tailer.web import rendering, sessions
from billing_tailer.web.commands import exception_commands, shell_word
from billing_tailer.web.pages import EXPORTS_MAX
from tests.support.proof import rows
from tests.support.site import DAY, TOKEN, Site, site
from tests.support.verbs import Verb

PAGES = ("/", "/exceptions", "/dead-letters", "/reconciliation", "/calls/call-00000001")
HOSTILE_ID = (
    """<script>document.title='x'</script>"><img/src=x/onerror=alert(1)>';drop/**/table/**/x;--{{7*7}}/\u202egpj"""
)
HOSTILE = HOSTILE_ID + "{% raw %} ${7*7} \u202etxt.exe\u2066 \u2028"
BARE = re.compile(r"<script>|<img|\u202e|\u2066|\u2028|--49")
"""What a page must not have of it."""


@pytest.fixture
def page(dsn: str, tmp_path: Path) -> Iterator[Site]:
    with site(dsn, tmp_path) as page:
        yield page


@pytest.fixture
def guarded(dsn: str, tmp_path: Path) -> Iterator[Site]:
    with site(dsn, tmp_path, TOKEN) as page:
        yield page


def log_in(page: Site, token: str = TOKEN, **headers: str) -> httpx.Response:
    return page.client.post("/login", data={"token": token}, headers=headers)


# --- who gets in


def test_strangers_are_led_to_the_form(guarded: Site) -> None:
    guarded.bill(1)
    for path in PAGES:
        answer = guarded.get(path, 303)
        assert answer.headers["location"].startswith("/login")
        guarded.get(path, 401, authorization="Bearer wrong")
        guarded.get(path, 200, authorization=f"Bearer {TOKEN}")
    guarded.get("/export.csv", 303)
    guarded.get("/v1/activity", 401)
    guarded.get("/v1/activity", 200, authorization=f"Bearer {TOKEN}")
    guarded.get("/login")
    guarded.get("/static/page.css")
    assert guarded.get("/exceptions?kind=overdue", 303).headers["location"] == (
        "/login?next=%2Fexceptions%3Fkind%3Doverdue"
    )


def test_sessions(guarded: Site, dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = log_in(guarded)
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    cookie = answer.headers["set-cookie"]
    assert re.search(r"; HttpOnly; Max-Age=43200; Path=/; SameSite=strict$", cookie), cookie
    assert TOKEN not in cookie
    value = guarded.client.cookies[sessions.COOKIE]
    guarded.get("/")
    guarded.get("/v1/activity")
    expiry, nonce, signature = value.split(".")
    for forged in (
        "",
        "x",
        "..",
        f"{int(expiry) + 9}.{nonce}.{signature}",
        f"{expiry}.{nonce}.{signature[:-1]}",
        "é.é.é",
    ):
        guarded.client.cookies.clear()
        guarded.get("/", 303, cookie=f"{sessions.COOKIE}={forged}".encode())
    assert sessions.Sessions(TOKEN)._signature(expiry, nonce) == signature  # a restart ends no session
    assert sessions.Sessions(TOKEN + "2")._signature(expiry, nonce) != signature
    monkeypatch.setattr(time, "time", lambda: float(expiry) + 1)
    guarded.get("/", 303, cookie=f"{sessions.COOKIE}={value}")


def test_logging_out(guarded: Site) -> None:
    log_in(guarded)
    guarded.get("/")
    elsewhere = guarded.client.post("/logout", headers={"origin": "https://evil.example"})
    assert "set-cookie" not in elsewhere.headers
    guarded.get("/")
    answer = guarded.client.post("/logout", headers={"origin": str(guarded.client.base_url).rstrip("/")})
    assert answer.headers["location"] == "/login"
    guarded.get("/", 303)
    assert guarded.client.get("/logout").status_code == 405


def test_https_makes_the_cookie_secure(guarded: Site) -> None:
    assert "; Secure" not in log_in(guarded).headers["set-cookie"]
    assert "; Secure" in log_in(guarded, **{"x-forwarded-proto": "https"}).headers["set-cookie"]
    through_a_proxy = {"origin": "https://billing.example", "sec-fetch-site": "same-origin", "host": "10.0.0.7:9108"}
    assert "; Secure" in log_in(guarded, **through_a_proxy).headers["set-cookie"]


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
def test_a_login_from_elsewhere_is_refused(guarded: Site, headers: dict[str, str]) -> None:
    answer = log_in(guarded, **headers)
    assert answer.status_code == 403
    assert "set-cookie" not in answer.headers


@pytest.mark.parametrize("target", ["//evil.example", "https://evil.example", "/\\evil.example", "/\tx", "x", ""])
def test_a_login_leads_nowhere_else(guarded: Site, target: str) -> None:
    answer = guarded.client.post("/login", params={"next": target}, data={"token": TOKEN})
    assert answer.headers["location"] == "/"


def test_a_login_leads_back(guarded: Site) -> None:
    answer = guarded.client.post("/login", params={"next": "/exceptions?kind=overdue"}, data={"token": TOKEN})
    assert answer.headers["location"] == "/exceptions?kind=overdue"


def test_guessing_is_slow(guarded: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(sessions.FAILURES_MAX):
        assert log_in(guarded, "guess").status_code == 401
    refused = log_in(guarded)  # the right one: nobody is told
    assert refused.status_code == 429
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + sessions.FAILURE_SECONDS + 1)
    assert log_in(guarded).status_code == 303


def test_failures_are_bounded() -> None:
    failures = sessions.Failures()
    for number in range(3 * sessions.ADDRESSES_MAX):
        failures.add(f"10.0.0.{number}")
    assert len(failures._times) == sessions.ADDRESSES_MAX


def test_a_login_takes_little(guarded: Site) -> None:
    assert guarded.client.post("/login", content=b"token=" + b"x" * 100_000).status_code == 401
    assert guarded.client.post("/login", content=b"\xff\xfe").status_code == 401
    assert guarded.client.post("/login", content=b"&" * 50).status_code == 401


def test_dns_rebinding(page: Site) -> None:
    """Without a token only this machine's own names are answered."""
    port = page.server.port
    for host in ("localhost", "127.0.0.1", "[::1]", f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}"):
        page.get("/v1/activity", 200, host=host)
    for host in (
        "evil.example",
        f"evil.example:{port}",
        "localhost.evil.example",
        "10.0.0.1",
        "[::1",
        "",
        "127.0.0.1@evil",
    ):
        page.get("/v1/activity", 403, host=host)
        page.get("/", 403, host=host)


def test_headers(guarded: Site) -> None:
    log_in(guarded)
    for method, path, status in (
        *(("GET", path, 200) for path in (*PAGES[:4], "/login", "/export.csv", "/v1/activity", "/livez")),
        *(("GET", path, 404) for path in ("/nowhere", "/static/x", "/static/..%2fserver.py", "/calls/x")),
        *((method, path, 405) for method in ("POST", "OPTIONS") for path in ("/", "/v1/activity", "/metrics")),
        ("GET", "/?range=x", 400),
        ("HEAD", "/export.csv", 200),
    ):
        answer = guarded.client.request(method, path)
        assert answer.status_code == status, (method, path)
        headers = answer.headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert headers["cache-control"] == "no-store"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "same-origin"


def test_no_page_needs_inline_code() -> None:
    """Nothing that the policy would block."""
    templates = Path(rendering.__file__).parent / "templates"
    for path in templates.iterdir():
        text = path.read_text()
        assert not re.search(r"\sstyle=|<style|\son[a-z]+=|javascript:|\|\s*safe|autoescape", text), path.name


# --- parameters


@pytest.mark.parametrize(
    ("query", "name"),
    [
        ("range=2d", "range"),
        ("from=yesterday", "from"),
        ("from=2026-11-22&to=2026-11-21", "from"),
        ("range=1h&from=2026-11-22", "range"),
        ("acount=x", "acount"),
        ("account=a&account=b", "account"),
        ("account=%00", "account"),
        ("model=" + "x" * 2000, "model"),
    ],
)
def test_bad_parameters(page: Site, query: str, name: str) -> None:
    answer = page.get(f"/v1/activity?{query}", 400).json()
    assert answer["parameter"] == name
    assert answer["remedy"]
    assert f"{name} = " in html.unescape(page.get(f"/?{query}", 400).text)


def test_bad_places(page: Site) -> None:
    for path in (
        "/?before=x",
        "/exceptions?before=2026-11-22~overdue~x~y",
        "/exceptions?kind=none",
        "/exceptions?all=1",
        "/dead-letters?before=x",
        "/reconciliation?to=x",
        "/export.xls",
        "/calls/%00",
    ):
        page.get(path, 400)
    page.get("/calls/unknown", 404)


def test_empty_parameters_are_not_given(page: Site) -> None:
    """As a form sends its empty fields."""
    page.get("/?from=&to=&account=&model=")


# --- what is shown


def test_the_page_and_the_api_say_the_same(page: Site, verb: Verb) -> None:
    page.bill(1, 2)
    page.bill(3, cost=1234.5678901234567, end_user="account-2", model_group="dear")
    verb("exceptions", "release", "call-00000003", "--cost-usd", "1234.567890123456", "--reason", "real")
    found = page.activity()
    assert found["totals"]["calls"] == 3
    assert found["totals"]["provider_cost_usd"] == "1234.568340123456"
    assert found["totals"]["capture_rate"] == "1.000000"
    assert found["previous"]["calls"] == 0
    assert [one["model"] for one in found["models"]] == ["dear", "up-gpt-4o-mini"]
    assert found["as_of"]["exceptions"] == 0
    text = page.get(f"/?{DAY}").text
    for shown in ("1,234.568340123456", "1,234.57", "1,234.567890123456", "0.000225", "100.0000 %", "none before"):
        assert shown in text, shown
    assert f"{int(found['totals']['charged_credits']):,}" in text


def test_cost_is_never_absent(page: Site) -> None:
    """Of a settled call, also where nothing else is known of it."""
    page.bill(1, cost=0.5, model_group=None, model=None, prompt_tokens=None, completion_tokens=None)
    text = page.get(f"/?{DAY}").text
    [cell] = re.findall(r'<td class="cost">(.*?)</td>', text)
    assert "0.500000" in cell


def test_paging(page: Site) -> None:
    page.bill(*range(120))
    found, path = [], f"/?{DAY}"
    for _ in range(9):
        text = page.get(path).text
        found += re.findall(r'<td class="call"><a href="/calls/(call-[0-9]+)"', text)
        older = re.search(r'<a rel="next" href="([^"]+)#receipts"', text)
        if older is None:
            break
        path = html.unescape(older[1])
    assert found == [f"call-{number:08d}" for number in reversed(range(120))]


def test_a_place_after_the_range(page: Site) -> None:
    """Nothing of later is shown."""
    page.bill(1)
    assert "call-00000001" not in page.get("/?from=2026-11-20&to=2026-11-21&before=2026-12-01~x").text
    assert "call-00000001" in page.get(f"/?{DAY}&before=2026-12-01~x").text


def test_pages_of_exceptions_and_letters(page: Site) -> None:
    page.log(*range(120), end_user="")
    page.spend(*range(120))
    with (page.volume / "audit.jsonl").open("ab") as log:
        log.write(b"not json <b>\n" * 60)
    page.rig.turn()
    for path, pattern, count in (
        ("/exceptions?kind=unattributed", r'<h2><span class="tag">unattributed</span> <a href="([^"]+)"', 120),
        ("/dead-letters", r"Dead letter ([0-9]+)</h2>", 60),
    ):
        found: list[str] = []
        next_path: str | None = path
        while next_path:
            text = page.get(next_path).text
            found += re.findall(pattern, text)
            older = re.search(r'<a rel="next" href="([^"]+)"', text)
            next_path = html.unescape(older[1]) if older else None
        assert len(found) == len(set(found)) == count
    assert "not json &lt;b&gt;" in page.get("/dead-letters").text


def test_a_call_is_explained(page: Site, verb: Verb) -> None:
    page.bill(1)
    verb("adjust", "call-00000001", "--credits", "-7", "--reason", "goodwill")
    text = page.get("/calls/call-00000001").text
    assert (page.volume / "audit.jsonl").read_text().rstrip("\n") in html.unescape(text)
    for shown in ("2,243", "goodwill", "2,250 credits", "the only source with records", "0.000225"):
        assert shown in text, shown


def test_the_commands_work(page: Site, verb: Verb) -> None:
    """What the page says, typed into a shell, decides the call."""
    page.log(1, 2, 3)
    page.spend(1, cost=0.0)
    page.spend(2, cost=-1.0)
    page.rig.turn()
    text = html.unescape(page.get("/exceptions").text)
    commands = re.findall(r'<code class="command" tabindex="0">(.*?)</code>', text)
    release = next(one for one in commands if "release" in one and "call-00000001" in one)
    close = next(one for one in commands if "close" in one and "call-00000002" in one)
    for command in (release.replace("USD", "0.25"), close):
        words = subprocess.run(["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, check=True).stdout
        verb(*words.decode().split("\0")[1:-1])
    assert page.activity()["totals"]["provider_cost_usd"] == "0.250000000000"
    assert page.activity()["totals"]["closed"] == 1


def test_commands_are_quoted() -> None:
    """A shell reads them back as they were, and nothing in them acts on the way."""
    for text in ("a b", "'; rm -rf /", "$(x)`y`", "-rf", "\x1b[2J\n", "\u202egpj", "it's", HOSTILE):
        word = shell_word(text)
        assert word.isascii()
        assert word.isprintable()
        script = f"LC_ALL=C.UTF-8; printf '%s' {word}"
        done = subprocess.run(["bash", "-c", script], capture_output=True, check=True, env={"LC_ALL": "C.UTF-8"})
        assert done.stdout.decode() == text
    row = {"call_id": "-x", "kind": "cost_mismatch", "closed_at": None, "detail": {"delta_cost_usd": "-0.5"}}
    assert exception_commands(row)[0] == "billing-tailer adjust --reason 'WHY' --cost-usd=-0.5 -- -x"


def test_hostile_texts(page: Site, dsn: str) -> None:
    """Through every field that a line or a record can carry."""
    fields = ("run_id", "end_user", "litellm_model_group", "litellm_cache_key", "requested_model")
    metadata = json.dumps({"graph_id": HOSTILE, "run_id": HOSTILE})
    hostile = {**dict.fromkeys(fields, HOSTILE), "spend_logs_metadata": metadata}
    billed, free = HOSTILE_ID, HOSTILE_ID + "2"
    page.log(1, uri=f"/v1/chat/completions?{HOSTILE}", litellm_call_id=billed, nginx_request_id=billed, **hostile)
    named = dict.fromkeys(("model_group", "model", "custom_llm_provider", "id", "end_user"), HOSTILE)
    page.spend(1, litellm_call_id=billed, **named)
    page.log(2, litellm_call_id=free, **{**hostile, "end_user": ""})
    page.spend(2, litellm_call_id=free, **named)
    page.log(3, status=HOSTILE)
    page.rig.turn()
    assert len(rows(dsn, "select from charge_receipts")) == 1
    quoted = rendering.call_link(billed)
    account = quoted.removeprefix("/calls/")
    for path in (f"/?{DAY}", "/exceptions?all=true", "/dead-letters", quoted, f"/?{DAY}&account={account}"):
        text = page.get(path).text
        assert "&lt;script&gt;" in text, path
        assert not BARE.search(text), path
    assert "drop/**/table" in page.get(f"/export.csv?{DAY}").text


# --- numbers as text


def test_amounts_are_written_exactly() -> None:
    assert rendering.usd(Decimal("1234567.5")) == "1,234,567.500000"
    assert rendering.usd("0.000000000001") == "0.000000000001"
    assert rendering.usd(Decimal("-0.25")) == "-0.250000"
    assert rendering.decimals([Decimal("0.1"), Decimal("0.00000012")]) == 8
    assert rendering.usd_short(Decimal("98765.4321")) == "98,765.43"
    assert rendering.number(12_345_678_901_234_567_890) == "12,345,678,901,234,567,890"
    assert rendering.percent(Decimal("0.999999")) == "99.9999 %"


def test_changes() -> None:
    assert rendering.change(150, 100) == "▲ +50.0 %"
    assert rendering.change(Decimal(50), Decimal(200)) == "▼ -75.0 %"
    assert rendering.change(99_999, 100_000) == "▼ less than 0.1 %"
    assert rendering.change(5, 0) == "none before"
    assert rendering.change(0, 0) == "unchanged"
    assert rendering.change(5, None) == "no comparison"
    assert rendering.change(5000, 1) == "▲ \N{MULTIPLICATION SIGN} 5,000"
    assert rendering.points(Decimal("0.99"), Decimal("0.995")) == "▼ -0.50 points"
    assert [rendering.duration(timedelta(seconds=s)) for s in (60, 3600, 86_400, 7 * 86_400, 90)] == [
        "1 min",
        "1 h",
        "24 h",
        "7 days",
        "0:01:30",
    ]


# --- what is slow, or away


def test_what_takes_too_long_says_so(page: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    page.bill(1)
    monkeypatch.setattr("billing_tailer.activity.summary.__defaults__", (-1.0,))
    answer = page.get(f"/v1/activity?{DAY}", 422).json()
    assert "narrow the range" in answer["hint"]
    text = page.get(f"/?{DAY}", 422).text
    assert "narrow the range" in text
    page.get("/?before=2026-11-22T01:00:00Z~x&" + DAY)  # receipts alone need no sums


def test_postgres_away(dsn: str, tmp_path: Path) -> None:
    with site(dsn, tmp_path) as page:
        page.reads._dsn = None
        assert page.get("/", 503).headers["retry-after"] == "1"
        assert page.get("/v1/activity", 503).json()["error"].startswith("this cannot be read now: the database")
        page.get("/static/page.js")


def test_an_export_that_fails_is_incomplete(page: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody takes a part for the whole."""
    monkeypatch.setattr("billing_tailer.activity.CHUNK_ROWS", 5)
    page.bill(*range(20))
    real, asked = page.reads.submit, []

    def failing(read: Any) -> object:
        asked.append(read)
        if len(asked) == 3:
            page.reads._dsn = None
        return real(read)

    monkeypatch.setattr(page.reads, "submit", failing)
    with pytest.raises((httpx.RemoteProtocolError, http.client.IncompleteRead)):
        page.client.get(f"/export.csv?{DAY}")


def test_so_many_exports_at_once(page: Site, dsn: str) -> None:
    """However close together they are asked for, and whatever became of earlier ones; HEAD reads nothing."""
    page.bill(1, 2)
    statuses: list[int] = []

    def ask() -> None:
        statuses.append(page.client.get(f"/export.csv?{DAY}").status_code)

    askers = [threading.Thread(target=ask) for _ in range(12)]
    with psycopg.connect(dsn) as other:
        other.execute("lock table billing.charge_receipts")
        for one in askers:
            one.start()
        deadline = time.monotonic() + 4
        while len(statuses) < 12 - EXPORTS_MAX and time.monotonic() < deadline:
            time.sleep(0.02)
        assert statuses == [422] * (12 - EXPORTS_MAX)
        assert page.client.head(f"/export.csv?{DAY}").status_code == 200
        with pytest.raises(httpx.ReadTimeout):  # leaves while it waits
            page.client.get("/", timeout=0.1)
    for one in askers:
        one.join()
    assert statuses[-EXPORTS_MAX:] == [200] * EXPORTS_MAX
    for _ in range(EXPORTS_MAX + 1):
        with page.client.stream("GET", f"/export.csv?{DAY}"):
            pass  # and this one leaves without its rows
    deadline = time.monotonic() + 5
    while page.client.get(f"/export.csv?{DAY}").status_code != 200 and time.monotonic() < deadline:
        time.sleep(0.05)
    page.get(f"/export.csv?{DAY}")
