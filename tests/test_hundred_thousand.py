"""Many calls through everything at once: lines, callbacks in random order, spend logs, kills; the bill is exact."""

import random
import socket
import threading
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.daemon import Daemon
from tests.support.loglines import lines
from tests.support.proof import are_read, assert_sound, count, outcomes, rows
from tests.support.spendlines import failure, payload
from tests.support.spendlogs import row, spend_logs

CALLS = 100_000
KILLS = 20
TOKEN = "callback-token-0123456789"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _events(dice: random.Random) -> list[dict[str, Any]]:
    """One event per call, costs as LiteLLM makes them (floats of per-token prices), some with a paid failure before."""
    events = []
    for number in range(CALLS):
        cost = dice.randrange(1, 4000) * 0.00000015 + dice.randrange(1, 900) * 0.0000006
        times: dict[str, Any] = {"startTime": 1795307911.6 + number / 1000, "endTime": 1795307912 + number / 1000}
        events.append(payload(number, cost, **times))
        if number % 50 == 0:
            events.append(failure(number, 0.0000081, attempt=1, **times))
    return events


def _post(port: int, events: list[dict[str, Any]]) -> None:
    """Until it is acknowledged: LiteLLM would not send it again, but we only count what got its 200."""
    while True:
        try:
            with httpx.Client(trust_env=False, timeout=10) as client:
                answer = client.post(
                    f"http://127.0.0.1:{port}/v1/callbacks/litellm",
                    json=events,
                    headers={"authorization": f"Bearer {TOKEN}"},
                )
            if answer.status_code == 200:
                assert answer.json() == {"accepted": len(events), "rejected": 0}
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.05)


def _post_all(port: int, events: list[dict[str, Any]]) -> None:
    for at in range(0, len(events), 400):
        _post(port, events[at : at + 400])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_hundred_thousand_calls_are_billed_exactly_once(dsn: str, tmp_path: Path) -> None:
    """Callbacks in random order, 5 % twice, 3 % lost (the spend logs have them), 2 % after the deadline; 20 kills."""
    dice = random.Random(3)
    events = _events(dice)
    fate = {number: dice.random() for number in range(CALLS)}
    number_of = {id(event): int(event["litellm_call_id"].removeprefix("call-")) for event in events}
    lost = [event for event in events if fate[number_of[id(event)]] < 0.03]
    late = [event for event in events if 0.03 <= fate[number_of[id(event)]] < 0.05]
    sent = [event for event in events if fate[number_of[id(event)]] >= 0.05]
    sent += dice.sample(sent, len(sent) // 20)
    dice.shuffle(sent)
    port = _free_port()
    variables = {
        "BILLING_TAILER_AUDIT_GLOBS": f"{tmp_path}/audit*.jsonl*",
        "BILLING_TAILER_DATABASE_URL": dsn,
        "BILLING_TAILER_SPOOL_DIR": f"{tmp_path}/spool",
        "BILLING_TAILER_CALLBACK_TOKEN": TOKEN,
        "BILLING_TAILER_HTTP_PORT": str(port),
        "BILLING_TAILER_LITELLM_API_KEY": "sk-master",
        "BILLING_TAILER_SETTLE_DEADLINE_SECONDS": "5",
        "BILLING_TAILER_FAILURE_QUIET_SECONDS": "3600",
        "BILLING_TAILER_LOG_LEVEL": "warning",
    }
    (tmp_path / "audit.jsonl").write_bytes(lines(0, CALLS))
    known = [row(event) for event in lost] + [row(event) for event in dice.sample(sent, 3000)]
    with spend_logs(known) as url, Daemon({**variables, "BILLING_TAILER_LITELLM_URL": url}, tmp_path / "log") as daemon:
        poster = threading.Thread(target=_post_all, args=(port, sent), daemon=True)
        poster.start()
        for _ in range(KILLS):
            time.sleep(dice.uniform(0.7, 2.0))
            daemon.kill()
            daemon.start()
        poster.join(300)
        assert not poster.is_alive()
        waiting = len({event["litellm_call_id"] for event in late})
        daemon.wait_until(lambda: count(dsn, "charge_receipts") == CALLS - waiting, timeout=200)
        daemon.wait_until(
            lambda: (
                rows(dsn, "select count(*) as n from call_exceptions where kind = 'overdue' and closed_at is null")
                == [{"n": waiting}]
            ),
            timeout=60,
        )
        _post_all(port, late)
        daemon.wait_until(lambda: are_read(dsn, (tmp_path / "spool").glob("callbacks-*")))
        daemon.wait_until(lambda: count(dsn, "charge_receipts") == CALLS, timeout=60)
        daemon.wait_until(lambda: count(dsn, "touched_calls") == 0)
        assert daemon.terminate() == 0
    _assert_exact(dsn, events)
    assert outcomes(dsn)["fact"] == CALLS
    assert_sound(dsn)


def _assert_exact(dsn: str, events: list[dict[str, Any]]) -> None:
    """Receipts plus adjustments equal an independent computation, call by call, to the credit."""
    exact: dict[str, Fraction] = {}
    for event in events:
        key = event["litellm_call_id"]
        # a float of a price sum is off by less than 1e-18: the price it means ends within 12 decimals
        exact[key] = exact.get(key, Fraction(0)) + Fraction(round(event["response_cost"] * 10**12), 10**12)
    found = rows(
        dsn,
        "select r.source_reference as id, r.charged_credits + coalesce(sum(a.delta_credits), 0)::bigint as credits "
        "from charge_receipts r left join charge_adjustments a using (source_reference) "
        "group by r.source_system, r.source_reference",
    )
    assert len(found) == CALLS
    wrong = [one for one in found if one["credits"] != -(-exact[one["id"]] * 10**7 // 1)]
    assert wrong == []
    assert count(dsn, "llm_charge_details") == CALLS
    assert count(dsn, "unsettled_facts") == 0
    assert rows(dsn, "select 1 from call_exceptions where closed_at is null") == []
