"""Takes the screenshots of docs/: a daemon on an embedded Postgres bills a day of made calls, Chromium looks at it.

python -m tests.e2e.screenshots
"""

import json
import random
import struct
import tempfile
import time
import zlib
from pathlib import Path

import httpx
from playwright.sync_api import Browser, ViewportSize

from tests.e2e.browser import browser
from tests.support.daemon import ROOT, Daemon
from tests.support.loglines import line
from tests.support.spendlines import payload

DOCS = ROOT / "docs"
CALLS = 6000
MODELS = {  # cost in USD, weight
    "claude-sonnet-4-5": (0.0187, 9),
    "gpt-4.1": (0.0092, 8),
    "gemini-2.5-flash": (0.0011, 14),
    "gpt-4o-mini": (0.000335, 22),
    "claude-haiku-4-5": (0.0024, 10),
    "o3": (0.0261, 2),
    "text-embedding-3-small": (0.00002, 12),
}
ACCOUNTS = ("acme", "northwind", "initech", "umbrella", "globex", "hooli", "stark", "wayne", "tyrell", "wonka")
WIDE = ViewportSize(width=1200, height=960)
NARROW = ViewportSize(width=360, height=780)


def write_day(log: Path, now: float) -> list[dict[str, object]]:
    """Two days of lines, busier at noon; returns LiteLLM's events about all but a few of the calls."""
    chance = random.Random(7)
    moments = sorted(now - 20 - chance.betavariate(1.1, 1.25) * 172_800 for _ in range(CALLS))
    events: list[dict[str, object]] = []
    with log.open("wb") as file:
        for number, moment in enumerate(moments):
            model = chance.choices(list(MODELS), [weight for _, weight in MODELS.values()])[0]
            account = chance.choices(ACCOUNTS, [30, 22, 15, 9, 7, 5, 4, 3, 3, 2])[0]
            size = chance.lognormvariate(0, 0.7)
            words = {"msec": f"{moment:.3f}", "end_user": account, "litellm_model_group": model}
            words |= {"run_id": f"run-{number // 6}", "spend_logs_metadata": ""}
            file.write(line(number, **words))
            tokens = {"prompt_tokens": int(2400 * size), "completion_tokens": int(310 * size)}
            cost = 0.0 if number in (CALLS - 40, CALLS - 700) else round(MODELS[model][0] * size, 9)
            event = payload(number, cost, model_group=model, model=model, startTime=moment - 0.4, endTime=moment)
            events.append({**event, **tokens})
    return events


def take(running: Browser, url: str, name: str, path: str, viewport: ViewportSize, scheme: str, scale: float) -> None:
    """One picture of the upper part of a page."""
    context = running.new_context(
        base_url=url,
        viewport=viewport,
        color_scheme="dark" if scheme == "dark" else "light",
        device_scale_factor=scale,
    )
    page = context.new_page()
    page.goto(path)
    (DOCS / name).write_bytes(squeezed(page.screenshot()))
    context.close()
    print(f"docs/{name}: {(DOCS / name).stat().st_size} bytes")


def squeezed(png: bytes) -> bytes:
    """The same picture with its data compressed as far as zlib can."""
    start, chunks, data = 8, [], b""
    while start < len(png):
        (size,) = struct.unpack(">I", png[start : start + 4])
        kind, body = png[start + 4 : start + 8], png[start + 8 : start + 8 + size]
        start += size + 12
        if kind == b"IDAT":
            data += body
        else:
            chunks.append((kind, body))
    chunks.insert(-1, (b"IDAT", zlib.compress(zlib.decompress(data), 9)))
    packed = (struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in chunks)
    return png[:8] + b"".join(packed)


def main() -> None:
    """Write all of them."""
    with tempfile.TemporaryDirectory(prefix="billing-tailer-screenshots-") as found:
        directory = Path(found)
        directory.chmod(0o755)
        events = write_day(directory / "audit.jsonl", time.time())
        variables = {"AUDIT_GLOBS": f"{directory}/audit*.jsonl", "DATA_DIR": f"{directory}/data"}
        variables |= {"SPOOL_DIR": f"{directory}/spool"}
        named = {f"BILLING_TAILER_{name}": value for name, value in variables.items()}
        with Daemon(named, directory / "log") as daemon, browser() as running:
            with httpx.Client(base_url=daemon.url, trust_env=False, timeout=60) as client:
                for start in range(0, CALLS, 500):
                    body = json.dumps(events[start : start + 500])
                    client.post("/v1/callbacks/litellm", content=body).raise_for_status()
            settled = "billing_tailer_receipts_total"
            daemon.wait_until(lambda: (daemon.metric(settled) or 0) >= CALLS - 2, timeout=120, what="receipts")
            time.sleep(3)
            take(running, daemon.url, "activity-light.png", "/", WIDE, "light", 1)
            take(running, daemon.url, "activity-dark.png", "/", WIDE, "dark", 1)
            take(running, daemon.url, "activity-360.png", "/", NARROW, "light", 1.5)
            take(running, daemon.url, "call.png", f"/calls/call-{CALLS - 3:08d}", WIDE, "light", 1)
            daemon.terminate()


if __name__ == "__main__":
    main()
