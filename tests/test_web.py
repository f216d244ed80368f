"""What HTTP shows: health by status code, metrics by Prometheus's own parser and naming rules."""

import contextlib
import math
import re
import socket
import time
from collections.abc import Iterator

import httpx
import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from billing_tailer import __version__
from billing_tailer.errors import ConfigError
from billing_tailer.events import Events
from billing_tailer.health import LIVE_SECONDS_MAX, Health
from billing_tailer.model import FileState, Position
from billing_tailer.web import HttpServer

BASE_UNITS = ("_seconds", "_bytes", "_info", "_total", "_ratio")
UNITLESS = {
    "billing_tailer_files",
    "billing_tailer_active",
    "billing_tailer_dead_letters_open",
    "billing_tailer_pending_calls",
    "billing_tailer_call_exceptions_open",
    "billing_tailer_spool_alarm",
    "billing_tailer_gaps_recorded",
    "billing_tailer_unready_reasons",
}
LABELS_ALLOWED = {"file", "outcome", "reason", "source", "state", "version", "le", "kind", "code", "source_id", "topic"}


@pytest.fixture
def health() -> Health:
    return Health()


@pytest.fixture
def events() -> Events:
    return Events()


@pytest.fixture
def client(health: Health, events: Events) -> Iterator[httpx.Client]:
    server = HttpServer("127.0.0.1", 0, events, health)
    server.start()
    with httpx.Client(base_url=f"http://127.0.0.1:{server.port}", trust_env=False) as client:
        yield client
    server.stop()
    assert not server.alive()


def metrics(client: httpx.Client) -> dict[str, Metric]:
    return {family.name: family for family in text_string_to_metric_families(client.get("/metrics").text)}


def value(client: httpx.Client, series: str, **labels: str) -> float | None:
    found = [s.value for f in metrics(client).values() for s in f.samples if (s.name, s.labels) == (series, labels)]
    return found[0] if found else None


# --- health ----------------------------------------------------------------------------------------------------------


def test_ready_says_why_not(client: httpx.Client, health: Health) -> None:
    answer = client.get("/readyz")
    assert (answer.status_code, answer.headers["content-type"]) == (503, "application/json")
    assert answer.json() == {
        "ready": False,
        "reasons": {"starting": ["no look at the log directories yet"]},
        "version": __version__,
    }
    health.say("files", ["cannot list /billing: gone"])
    health.say("ledger", ["connecting: refused"])
    assert client.get("/readyz").json()["reasons"] == {
        "files": ["cannot list /billing: gone"],
        "ledger": ["connecting: refused"],
    }
    health.say("files", [])
    health.say("ledger", [])
    answer = client.get("/readyz")
    assert (answer.status_code, answer.json()["ready"], answer.json()["reasons"]) == (200, True, {})


def test_alive_while_the_loop_turns(client: httpx.Client, health: Health) -> None:
    health.say("files", [])
    assert client.get("/livez").status_code == 200
    health._last_tick -= LIVE_SECONDS_MAX + 1
    answer = client.get("/livez")
    assert (answer.status_code, answer.json()["alive"]) == (503, False)
    assert client.get("/readyz").status_code == 503, "a hanging loop is not ready either"
    health.tick()
    assert client.get("/livez").status_code == 200


@pytest.mark.parametrize("path", ["/", "/metrics/", "/livez/x", "/v1/runs", "//livez", "/%00"])
def test_an_unknown_path(client: httpx.Client, path: str) -> None:
    assert client.request("GET", path, follow_redirects=False).status_code == 404


def test_other_methods(client: httpx.Client) -> None:
    assert client.head("/livez").status_code == 200
    for method in ("POST", "PUT", "DELETE"):
        assert client.request(method, "/metrics").status_code == 405


def test_the_server_survives_rubbish(client: httpx.Client, capfd: pytest.CaptureFixture[str]) -> None:
    for rubbish in (b"\x16\x03\x01\x02\x00", b"GET / HTTP/9\r\n\r\n", b"X" * 200_000, b""):
        address = (client.base_url.host, client.base_url.port or 0)
        with socket.create_connection(address, timeout=5) as connection, contextlib.suppress(OSError):
            connection.sendall(rubbish)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):
                pass
    assert client.get("/livez").status_code == 200
    assert capfd.readouterr().err == ""


def test_the_port_is_taken_when_start_returns(events: Events, health: Health) -> None:
    first = HttpServer("127.0.0.1", 0, events, health)
    first.start()
    second = HttpServer("127.0.0.1", first.port, events, health)
    with pytest.raises(ConfigError, match=f"BILLING_TAILER_HTTP_PORT={first.port}: Address already in use"):
        second.start()
    first.stop()


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid"])
def test_an_address_that_is_not_ours(events: Events, health: Health, host: str) -> None:
    with pytest.raises(ConfigError, match=f"BILLING_TAILER_HTTP_HOST={host}"):
        HttpServer(host, 0, events, health).start()


@pytest.mark.parametrize("host", ["::1", "localhost", "0.0.0.0"])  # noqa: S104  # one may ask for it
def test_addresses(events: Events, health: Health, host: str) -> None:
    server = HttpServer(host, 0, events, health)
    try:
        server.start()
    except ConfigError as error:
        if host == "::1":
            pytest.skip(f"this machine has no IPv6: {error}")
        raise
    url = f"http://{'[::1]' if host == '::1' else '127.0.0.1'}:{server.port}/livez"
    assert httpx.get(url, trust_env=False).status_code == 200
    server.stop()


# --- metrics ---------------------------------------------------------------------------------------------------------


def test_metrics_say_what_the_health_checks_say(client: httpx.Client, health: Health) -> None:
    """A loop that hangs cannot say so itself, and what is not ready is worth an alarm."""
    health.tick()
    turned = value(client, "billing_tailer_last_turn_timestamp_seconds")
    assert turned == pytest.approx(time.time(), abs=1)
    assert value(client, "billing_tailer_unready_reasons", topic="starting") == 1
    health.say("files", ["/billing: cannot list", "/billing/b: cannot be read"])
    assert value(client, "billing_tailer_unready_reasons", topic="starting") == 0
    assert value(client, "billing_tailer_unready_reasons", topic="files") == 2
    health.say("files", [])
    assert value(client, "billing_tailer_unready_reasons", topic="files") == 0
    assert client.get("/readyz").status_code == 200
    time.sleep(0.05)
    assert value(client, "billing_tailer_last_turn_timestamp_seconds") == pytest.approx(turned, abs=0.04)


def test_metrics_by_prometheus_own_rules(client: httpx.Client) -> None:
    answer = client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    families = metrics(client)
    ours = {name: family for name, family in families.items() if name.startswith("billing_tailer_")}
    assert set(families) - set(ours) <= {name for name in families if name.startswith("process_")}
    assert len(ours) > 10
    for name, family in ours.items():
        assert re.fullmatch(r"[a-z][a-z0-9_]*[a-z0-9]", name), "snake case"
        assert family.documentation, f"{name} has no help"
        assert family.type != "unknown"
        assert not re.search(r"_(milli|micro|nano|kilo|mega|minutes|hours|ms|kb|mb)", name), "base units only"
        full = f"{name}_total" if family.type == "counter" else name
        assert full.endswith(BASE_UNITS) or full in UNITLESS, f"{full} names no unit"
        assert (family.type == "counter") == full.endswith("_total")
        for sample in family.samples:
            assert set(sample.labels) <= LABELS_ALLOWED, f"{name}: label that may grow without bound"
            assert not sample.name.endswith("_created")


def test_series_exist_before_they_count(client: httpx.Client) -> None:
    """Else rate() would not see the first increase."""
    assert value(client, "billing_tailer_lines_total", outcome="fact") == 0
    assert value(client, "billing_tailer_dead_letters_total", reason="invalid_json") == 0
    assert value(client, "billing_tailer_offset_resets_total", source="cli") == 0
    assert value(client, "billing_tailer_build_info", version=__version__) == 1
    assert math.isnan(value(client, "billing_tailer_oldest_uncommitted_timestamp_seconds") or 0.0)


def position(file_id: int, path: str) -> Position:
    return Position(file_id, path, 1, file_id, 1, None, b"", 0, b"\0" * 32, 0, 0, FileState.LIVE)


def test_a_file_name_cannot_break_the_exposition(client: httpx.Client, events: Events) -> None:
    odd = 'a"b\\c\nd} 1\nfake_metric 1'
    events.files({1: position(1, odd)}, {1: (odd, 3, 10)})
    assert value(client, "billing_tailer_lag_bytes", file=odd) == 7
    assert "fake_metric" not in metrics(client)


def test_many_files_are_summed(client: httpx.Client, events: Events) -> None:
    sizes = {number: (f"/billing/{number:03d}", 1, 11 if number % 2 else 1) for number in range(120)}
    events.files({number: position(number, path) for number, (path, _, _) in sizes.items()}, sizes)
    samples = {sample.labels["file"]: sample.value for sample in metrics(client)["billing_tailer_lag_bytes"].samples}
    assert len(samples) == 51
    assert samples["_other"] == 10 * 10, "files with unread bytes come first"
    assert sum(samples.values()) == 600
    events.files({}, {})
    assert metrics(client)["billing_tailer_lag_bytes"].samples == [], "series go with their files"
