"""What the HTTP side stands: callbacks per second with an fsync before each answer, clients that wait for runs, and the
activity page over many receipts."""

import asyncio
import json
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tests.bench import logs
from tests.bench.client import Client, Poster, port_of
from tests.bench.machine import fsyncs_per_second
from tests.bench.processes import memory_mb
from tests.bench.readings import Delays, Reading, delay_readings, median
from tests.bench.world import FACTS, RECEIPTS, World, daemon, value, wait_for_count, wait_until_ready
from tests.support.callbacks import PATH
from tests.support.daemon import Daemon

FSYNCS: Final = 200
NO_GOALS: Final = (None, None, None)
PAGES: Final = {
    "day": ("/", "the last 24 hours"),
    "week": ("/?range=7d", "7 days"),
    "month": ("/?range=30d", "30 days"),
    "account": ("/?range=7d&account=account-7", "7 days of an account"),
    "model": (f"/?range=7d&model={logs.MODELS[0]}", "7 days of a model"),
}
PAGE_SECONDS_MAX: Final = 60.0


# --- callbacks


def callbacks(world: World) -> list[Reading]:
    """One event per POST, as many as are answered: after the fsync that serves all who wait at that moment."""
    readings = []
    disk: list[float] = []
    rates: dict[int, list[float]] = {}
    with world.database() as dsn, world.volume() as volume:
        (volume / "audit.jsonl").touch()
        with daemon(dsn, volume) as running:
            wait_until_ready(running)
            port = port_of(running.url)
            for _ in range(world.amounts.rounds):
                disk.append(fsyncs_per_second(volume, FSYNCS))
                for posters in world.amounts.posters:
                    rate, delays = asyncio.run(_post(port, posters, world.amounts.posting_seconds))
                    rates.setdefault(posters, []).append(rate)
                    if len(rates[posters]) == world.amounts.rounds:
                        readings += delay_readings(
                            [delays], f"answer_{posters}", f"an answer, {posters} at once", NO_GOALS
                        )
    return [
        median("fdatasyncs_per_s", "appends with an fdatasync each, nothing else", "1/s", disk),
        *(
            median(f"posts_per_s_{posters}", f"callbacks answered, {posters} at once", "1/s", found)
            for posters, found in rates.items()
        ),
        *readings,
    ]


async def _post(port: int, posters: int, seconds: float) -> tuple[float, Delays]:
    """Each poster waits for the answer before its next POST."""
    delays = Delays()
    ending = time.perf_counter() + seconds

    async def work(body: bytes, placeholder: bytes) -> None:
        async with Client(port) as client:
            while (began := time.perf_counter()) < ending:
                status, said = await client.request("POST", PATH, body.replace(placeholder, uuid.uuid4().hex.encode()))
                assert (status, json.loads(said)["accepted"]) == (200, 1), said
                delays.milliseconds.append(1000 * (time.perf_counter() - began))

    bodies = []
    for number in range(posters):
        placeholder = f"@{number:031d}"
        bodies.append((json.dumps([logs.callback(placeholder, number)]).encode(), placeholder.encode()))
    began = time.perf_counter()
    await asyncio.gather(*(work(*body) for body in bodies))
    return len(delays.milliseconds) / (time.perf_counter() - began), delays


# --- clients that wait for runs


def waiters(world: World) -> list[Reading]:
    """Many clients wait for one run until its last call settles, and as many for a run each."""
    count = world.amounts.waiters
    readings = []
    for key, words, runs in (("one", "the same run", 1), ("each", "a run each", count)):
        with world.database() as dsn, world.volume() as volume:
            (volume / "audit.jsonl").touch()
            with daemon(dsn, volume) as running:
                wait_until_ready(running)
                before = memory_mb(running.pid)[0]
                delays, waiting = asyncio.run(_wait(running, dsn, volume, count, runs))
        what = f"{count} clients wait for {words}"
        readings += [
            Reading(f"{key}_memory_mb", f"{what}: memory", waiting, "MB", note=f"{before:.1f} MB before"),
            *delay_readings([delays], f"{key}_answered", f"{what}: settling to answer", NO_GOALS),
        ]
    return readings


async def _wait(running: Daemon, dsn: str, volume: Path, clients: int, runs: int) -> tuple[Delays, float]:
    """From the write of the last lines, whose callbacks are there, to each answer; memory while all wait."""
    port = port_of(running.url)
    calls = [uuid.uuid4().hex for _ in range(runs)]
    await asyncio.to_thread(_post_all, port, calls)
    answered: list[float] = []

    async def ask(number: int) -> None:
        run = f"waited-{number % runs}"
        async with Client(port) as client:
            status, said = await client.request("GET", f"/v1/runs/{run}?calls=1&wait_seconds=60")
        answered.append(time.perf_counter())
        assert status == 200, said
        assert json.loads(said)["complete"] is True, said

    asking = [asyncio.create_task(ask(number)) for number in range(clients)]
    await asyncio.sleep(0.5 + clients / 250)  # all wait by then; who does not yet is answered at once, and counts too
    assert not answered, "nothing has settled yet"
    waiting = memory_mb(running.pid)[0]
    lines = b"".join(_line_of_run(call_id, f"waited-{number}") for number, call_id in enumerate(calls))
    began = time.perf_counter()
    with (volume / "audit.jsonl").open("ab", buffering=0) as out:
        out.write(lines)
    await asyncio.gather(*asking)
    await asyncio.to_thread(wait_for_count, running, dsn, RECEIPTS, runs)
    return Delays([1000 * (moment - began) for moment in answered]), waiting


def _post_all(port: int, calls: Sequence[str]) -> None:
    poster = Poster(port)
    poster.post([logs.callback(call_id) for call_id in calls])
    poster.close()


def _line_of_run(call_id: str, run: str) -> bytes:
    fields = json.loads(logs.line(call_id.encode()))
    fields |= {"run_id": run, "spend_logs_metadata": json.dumps({"run_id": run})}
    return json.dumps(fields, separators=(",", ":")).encode() + b"\n"


# --- the page


def page(world: World) -> list[Reading]:
    """The activity page over the most receipts that this run fills in."""
    receipts = max(world.amounts.receipts)
    dsn = world.filled(receipts)
    readings = []
    with world.volume() as volume:
        (volume / "audit.jsonl").write_bytes(logs.line(uuid.uuid4().hex.encode()))
        before = int(value(dsn, FACTS))
        with daemon(dsn, volume) as running:
            wait_until_ready(running)
            wait_for_count(running, dsn, FACTS, before + 1)
            for key, (path, words) in PAGES.items():
                what = f"the page over {receipts:,} receipts, {words}"
                readings.append(_loads(running, path, f"{key}_s", what, world.amounts.page_loads))
    return readings


def _loads(running: Daemon, path: str, key: str, what: str, times: int) -> Reading:
    """Seconds until the page is there; what takes too long is refused by the daemon, which is told as it is."""
    seconds: list[float] = []
    for _ in range(times):
        began = time.perf_counter()
        answer = running.get(path, timeout=PAGE_SECONDS_MAX)
        seconds.append(time.perf_counter() - began)
        if answer.status_code == 422:
            return Reading(key, what, None, "s", note=f"refused (422) after {seconds[-1]:.1f} s: too much to add up")
        assert answer.status_code == 200, f"{path}: {answer.status_code} {answer.text[:500]}"
    return median(key, what, "s", seconds)
