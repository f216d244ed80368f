"""The activity page in real Chromium, of a real daemon that has billed what LiteLLM and nginx once wrote."""

import csv
import io
import json
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from playwright.sync_api import Browser, Page, ViewportSize, expect

from tests.e2e.browser import browser, chromium, quiet_page
from tests.support import database
from tests.support.daemon import ROOT, Daemon
from tests.support.loglines import line
from tests.support.proof import are_read, count, rows
from tests.support.spendlines import payload
from tests.test_pages import HOSTILE, HOSTILE_ID

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(chromium() is None, reason="Chromium is not installed (Debian package chromium)"),
]
SAMPLES = ROOT / "tests/data/litellm"
API_TOKEN = "api-token-of-the-browser-test"
CALLBACK_TOKEN = "callback-token-of-the-browser-test"
DAY = "/?from=2026-11-22&to=2026-11-23"
NARROW = ViewportSize(width=360, height=740)


@dataclass
class Billed:
    """A daemon, its database, and where it answers."""

    daemon: Daemon
    dsn: str
    url: str


@pytest.fixture(scope="module")
def billed(session_dir: Path, admin_dsn: str, template_database: str) -> Iterator[Billed]:
    """The recorded calls, 120 more, and one that is hostile in every field."""
    directory = session_dir / "page"
    directory.mkdir()
    log = directory / "audit.jsonl"
    more = b"".join(line(number, end_user=f"account-{number % 3}") for number in range(120))
    hostile_fields = ("run_id", "end_user", "litellm_model_group", "litellm_cache_key", "requested_model")
    hostile = line(
        500, litellm_call_id=HOSTILE_ID, nginx_request_id=HOSTILE_ID, **dict.fromkeys(hostile_fields, HOSTILE)
    )
    held = line(501, litellm_call_id=f"{HOSTILE_ID}2", end_user="")
    log.write_bytes((SAMPLES / "audit.jsonl").read_bytes() + more + hostile + held + line(502, status=HOSTILE))
    events = [payload(number) for number in range(120)]
    named: dict[str, Any] = dict.fromkeys(("model_group", "model", "custom_llm_provider", "id"), HOSTILE)
    events += [payload(500, litellm_call_id=HOSTILE_ID, **named), payload(501, litellm_call_id=f"{HOSTILE_ID}2")]
    with database.temporary(admin_dsn, template_database) as dsn:
        variables = {
            "DATABASE_URL": dsn,
            "AUDIT_GLOBS": f"{directory}/audit*.jsonl*",
            "SPOOL_DIR": f"{directory}/spool",
        }
        variables |= {"API_TOKEN": API_TOKEN, "CALLBACK_TOKEN": CALLBACK_TOKEN, "FAILURE_QUIET_SECONDS": "1"}
        named_fully = {f"BILLING_TAILER_{name}": value for name, value in variables.items()}
        with Daemon(named_fully, directory / "log") as daemon:
            bodies = [*(SAMPLES / "callback_bodies.jsonl").read_bytes().splitlines(), json.dumps(events).encode()]
            with httpx.Client(base_url=daemon.url, trust_env=False) as client:
                for body in bodies:
                    headers = {"authorization": f"Bearer {CALLBACK_TOKEN}", "content-type": "application/json"}
                    assert client.post("/v1/callbacks/litellm", content=body, headers=headers).status_code == 200
            daemon.wait_until(lambda: are_read(dsn, (directory / "spool").glob("callbacks-*")), what="all callbacks")
            daemon.wait_until(lambda: count(dsn, "charge_receipts") >= 121 + 20, what="receipts")
            daemon.wait_until(lambda: not rows(dsn, "select from touched_calls"), what="all settled")
            yield Billed(daemon, dsn, daemon.url)


@pytest.fixture(scope="module")
def chrome() -> Iterator[Browser]:
    with browser() as running:
        yield running


def log_in(page: Page, path: str = DAY) -> None:
    page.goto(path)
    expect(page).to_have_title("Log in · billing_tailer")
    page.get_by_label("API_TOKEN").fill(API_TOKEN)
    page.get_by_role("button", name="Log in").click()
    page.wait_for_url(f"**{path}")


def test_login_filter_paging_and_a_call(billed: Billed, chrome: Browser) -> None:
    with quiet_page(chrome, billed.url) as page:
        log_in(page)
        assert page.context.cookies()[0]["httpOnly"]
        assert page.evaluate("document.cookie") == ""
        expect(page.locator("#progress")).to_contain_text("0 bytes behind")
        expect(page.locator("#progress")).to_contain_text("1 dead letter")
        charged = rows(
            billed.dsn,
            "select (select sum(charged_credits) from charge_receipts)"
            " + coalesce((select sum(delta_credits) from charge_adjustments), 0) as n",
        )[0]["n"]
        expect(page.locator(".cards")).to_contain_text(f"{charged:,}")
        assert page.locator("svg.plot rect").count() > 0
        assert page.get_by_role("img", name="Cost over time by model").is_visible()
        for cost in page.locator("td.cost").all_inner_texts():
            assert re.fullmatch(r"[0-9,]+\.[0-9]{6,12}", cost)

        seen = page.locator("td.call a").evaluate_all("links => links.map(link => link.getAttribute('href'))")
        while page.get_by_role("link", name="Older").count():
            with page.expect_navigation():  # else the page that is left may be read once more
                page.get_by_role("link", name="Older").click()
            seen += page.locator("td.call a").evaluate_all("links => links.map(link => link.getAttribute('href'))")
        assert len(seen) == len(set(seen)) == count(billed.dsn, "charge_receipts")

        page.goto(DAY)
        page.get_by_role("textbox", name="Account").fill("account-2")
        page.get_by_role("button", name="Apply").click()
        page.wait_for_url("**account=account-2**")
        assert set(page.locator("td.account").all_inner_texts()) == {"account-2"}
        expect(page.locator("#receipts tbody tr")).to_have_count(40)
        page.locator("td.call a").first.click()
        expect(page.get_by_role("heading", level=1)).to_contain_text("Call call-00000119")
        expect(page.locator("pre.raw")).to_contain_text('"litellm_call_id":"call-00000119"')
        page.get_by_role("button", name="Log out").click()
        page.wait_for_url("**/login")
        page.goto("/exceptions")
        expect(page).to_have_title("Log in · billing_tailer")


def test_a_wrong_token(billed: Billed, chrome: Browser) -> None:
    """The answer is 401, which the console tells: not a quiet page."""
    context = chrome.new_context(base_url=billed.url)
    page = context.new_page()
    page.goto("/login")
    page.get_by_label("API_TOKEN").fill("wrong")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_have_text("this is not API_TOKEN")
    context.close()


def test_the_export_is_what_the_page_shows(billed: Billed, chrome: Browser) -> None:
    with quiet_page(chrome, billed.url) as page:
        log_in(page)
        with page.expect_download() as downloading:
            page.get_by_role("link", name="CSV").click()
        text = Path(downloading.value.path()).read_bytes().decode()
        found = list(csv.DictReader(io.StringIO(text, newline="")))
        assert len(found) == count(billed.dsn, "charge_receipts")
        assert [row["call_id"] for row in found if "script" in row["call_id"]] == [HOSTILE_ID]
        with page.expect_download() as downloading:
            page.get_by_role("link", name="JSON lines").click()
        lines = Path(downloading.value.path()).read_text().splitlines()
        assert [json.loads(one)["call_id"] for one in lines] == [row["call_id"] for row in found]


def test_hostile_lines_are_inert(billed: Billed, chrome: Browser) -> None:
    """No script runs, nothing is loaded, nobody's direction is turned: on any page."""
    with quiet_page(chrome, billed.url) as page:
        log_in(page)
        page.locator("td.call a", has_text="<script>").click()
        expect(page.get_by_role("heading", level=1)).to_contain_text("<script>document.title='x'</script>")
        assert "${7*7}" in page.inner_text("main")
        for path in (DAY, "/exceptions?all=true", "/dead-letters", page.url.removeprefix(billed.url)):
            page.goto(path)
            assert "<script>" in page.inner_text("main"), path
            assert not re.search("[\u202e\u2066\u2028]|--49", page.inner_text("body")), path
            assert page.evaluate("document.querySelectorAll('main script, main img').length") == 0
            assert page.title().endswith("billing_tailer")
        assert count(billed.dsn, "charge_receipts") > 0


def test_without_javascript(billed: Billed, chrome: Browser) -> None:
    with quiet_page(chrome, billed.url, java_script_enabled=False) as page:
        log_in(page)
        expect(page.locator(".cards")).to_contain_text("Credits")
        expect(page.get_by_label("refresh")).to_be_hidden()
        page.get_by_role("textbox", name="Model").fill("up-gpt-4o-mini")
        page.get_by_role("button", name="Apply").click()
        page.wait_for_url("**model=up-gpt-4o-mini**")
        assert set(page.locator("td.model bdi").all_inner_texts()) == {"up-gpt-4o-mini"}
        page.get_by_text("The same as a table").click()
        expect(page.get_by_role("region", name="Cost over time, as a table")).to_be_visible()


def test_refreshing(billed: Billed, chrome: Browser) -> None:
    with quiet_page(chrome, billed.url) as page:
        page.clock.install()
        log_in(page)
        page.get_by_text("What this means").click()
        page.evaluate("document.activeElement.blur()")
        page.get_by_label("refresh").check()
        page.evaluate("document.querySelector('#numbers').dataset.old = 'yes'; document.activeElement.blur()")
        with page.expect_response(lambda answer: answer.url.endswith(DAY)):
            page.clock.fast_forward(10_500)
        page.wait_for_function("document.querySelector('#numbers').dataset.old === undefined")
        expect(page.locator("#meaning")).to_have_attribute("open", "")


@pytest.mark.parametrize(
    "path", [DAY, "/exceptions", "/dead-letters", "/reconciliation", "/calls/call-00000001", "/calls/x"]
)
def test_narrow(billed: Billed, chrome: Browser, path: str) -> None:
    """At 360 and at 768 pixels no page is wider than the screen, and the filter leaves room for the numbers."""
    context = chrome.new_context(
        base_url=billed.url,
        viewport=NARROW,
        extra_http_headers={"authorization": f"Bearer {API_TOKEN}"},
    )
    page = context.new_page()
    page.goto(path)
    if path == DAY:
        page.goto("/")
        assert page.evaluate("document.querySelector('.filter').getBoundingClientRect().height") < 180
        page.goto(path)
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert page.evaluate("document.scrollingElement.scrollWidth") <= 360
    page.set_viewport_size({"width": 768, "height": 740})
    assert page.evaluate("document.scrollingElement.scrollWidth") <= 768
    context.close()


def test_dark_and_light(billed: Billed, chrome: Browser) -> None:
    """Text stands out from what it stands on: 4.5 to 1, in both."""
    grounds = {}
    for scheme in ("light", "dark"):
        with quiet_page(chrome, billed.url, color_scheme=scheme) as page:
            log_in(page)
            for selector in (
                "h2",
                ".quiet",
                ".card .value",
                ".card .moved",
                "td.cost",
                "td.call a",
                ".lead, .note",
                "footer p",
            ):
                ratio = page.evaluate(CONTRAST, selector)
                assert ratio >= 4.5, (scheme, selector, ratio)
            grounds[scheme] = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert grounds["light"] != grounds["dark"]


CONTRAST = """selector => {
    const light = color => {
        const part = value => (value /= 255) <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
        const [r, g, b] = color.match(/[0-9.]+/g).map(Number);
        return 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
    };
    const element = document.querySelector(selector);
    let ground = element;
    while (/, 0\\)$/.test(getComputedStyle(ground).backgroundColor)) ground = ground.parentElement;
    const [high, low] = [getComputedStyle(element).color, getComputedStyle(ground).backgroundColor]
        .map(light).sort((a, b) => b - a);
    return (high + 0.05) / (low + 0.05);
}"""


def test_keyboard(billed: Billed, chrome: Browser) -> None:
    """Everything can be reached, in the order of the page, and is seen when it is."""
    with quiet_page(chrome, billed.url) as page:
        log_in(page)
        page.keyboard.press("Tab")
        expect(page.locator("a.skip")).to_be_focused()
        box = page.locator("a.skip").bounding_box()
        assert box is not None
        assert box["width"] > 50
        page.keyboard.press("Enter")
        expect(page.locator("main")).to_be_focused()
        reached = []
        for _ in range(26):  # a time has a stop for each of its parts
            page.keyboard.press("Tab")
            name, outline = page.evaluate(
                "(e => [e.name || e.textContent.trim(), getComputedStyle(e).outlineStyle])(document.activeElement)"
            )
            assert outline != "none", name
            reached.append(name)
        assert reached[:4] == ["1h", "24h", "7d", "30d"]
        assert [name for name in reached if name in ("from", "to", "account", "model", "Apply")][-3:] == [
            "account",
            "model",
            "Apply",
        ]


def test_a_slow_page_delays_no_run(billed: Billed) -> None:
    """More pages than there are threads for wait for a locked table: the application does not."""
    headers = {"authorization": f"Bearer {API_TOKEN}"}
    with psycopg.connect(billed.dsn) as other:
        other.execute("lock table billing.llm_charge_details")
        pages = [threading.Thread(target=billed.daemon.get, args=(DAY, headers, 60)) for _ in range(4)]
        for one in pages:
            one.start()
        waiting = "select from pg_stat_activity where wait_event_type = 'Lock'"
        billed.daemon.wait_until(lambda: rows(billed.dsn, waiting), what="a page that waits")
        begun = time.monotonic()
        assert billed.daemon.get("/v1/runs/run-2", headers).json()["calls"] == 2
        assert time.monotonic() - begun < 2
    for one in pages:
        one.join()
