"""A real Prometheus with the rules that deploy/prometheus hands out, hurried: only their durations are others.

How the durations are scaled (`hurried`), for a scrape and an evaluation every half a second:

- `for:` is divided by 300, to 2 s at least: a machine with all scenarios at once may miss a scrape or two;
- a range `[5m]` is divided by 300, to 2 s at least, or increase() would see no two samples, and to 10 s at most, or
  nothing would ever clear; 30 s are `[1d]`, how long a source that has gone is remembered, and the range in which
  changes() counts restarts, of which each takes seconds;
- seconds in an expression, written `n * 60`, are divided by 300, to 2 s at least.

Numbers that are no durations stay; `memory_bytes_max` is there for the one alert that would take a leak.
"""

import json
import re
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import httpx
import yaml

from tests.e2e.nginx import program
from tests.support.daemon import ROOT

RULES: Final = ROOT / "deploy/prometheus/rules"
FASTER: Final = 300
SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}
FIRE_SECONDS_MAX: Final = 90.0
POLL_SECONDS: Final = 0.1


def hurried(rules: Mapping[str, Any], memory_bytes_max: int | None = None) -> dict[str, Any]:
    """Rules with their durations scaled, as the module's docstring says."""
    groups = []
    for group in rules["groups"]:
        scaled = []
        for rule in group["rules"]:
            expr = re.sub(r"(changes\(.*)?\[(\d+)([smhd])\]", _range, rule["expr"])
            expr = re.sub(r"\b(\d+) \* 60\b", lambda m: f"{max(2, int(m[1]) * 60 / FASTER):g}", expr)
            if memory_bytes_max is not None:
                expr = expr.replace("128 * 1024 * 1024", str(memory_bytes_max))
            for_ = {"for": f"{_milliseconds(rule['for'])}ms"} if "for" in rule else {}
            scaled.append({**rule, "expr": expr, **for_})
        groups.append({**group, "rules": scaled})
    return {"groups": groups}


def _range(match: re.Match[str]) -> str:
    seconds = int(match[2]) * SECONDS[match[3]]
    long = match[1] or seconds == SECONDS["d"]
    return f"{match[1] or ''}[{30 if long else max(2, min(10, seconds // FASTER))}s]"


def _milliseconds(duration: str) -> int:
    return max(2000, int(duration[:-1]) * SECONDS[duration[-1]] * 1000 // FASTER)


class Prometheus:
    """A context manager: entering starts a server that scrapes `targets`, leaving kills it."""

    def __init__(self, directory: Path, port: int, memory_bytes_max: int | None = None) -> None:
        directory.mkdir()
        self._targets = directory / "targets.json"
        self._log = directory / "prometheus.log"
        self._directory = directory
        self._port = port
        self._memory_bytes_max = memory_bytes_max
        self._process: subprocess.Popen[bytes] | None = None
        self.fired: set[str] = set()
        self.cleared: set[str] = set()
        self.scrape(())

    def scrape(self, ports: Sequence[int]) -> None:
        """Scrape what listens on these ports from now on, and nothing else."""
        targets = [{"targets": [f"127.0.0.1:{port}" for port in ports]}] if ports else []
        unborn = self._targets.with_suffix(".new")
        unborn.write_text(json.dumps(targets), "utf-8")
        unborn.rename(self._targets)

    def __enter__(self) -> Self:
        for name in ("recording", "alerts"):
            rules = yaml.safe_load((RULES / f"{name}.yml").read_text("utf-8"))
            text = yaml.safe_dump(hurried(rules, self._memory_bytes_max), sort_keys=False)
            (self._directory / f"{name}.yml").write_text(text, "utf-8")
        config = {
            "global": {"scrape_interval": "500ms", "scrape_timeout": "450ms", "evaluation_interval": "500ms"},
            "rule_files": ["recording.yml", "alerts.yml"],
            "scrape_configs": [{"job_name": "billing_tailer", "file_sd_configs": [{"files": ["targets.json"]}]}],
        }
        (self._directory / "prometheus.yml").write_text(yaml.safe_dump(config), "utf-8")
        command = [
            program("prometheus"),
            f"--config.file={self._directory}/prometheus.yml",
            f"--storage.tsdb.path={self._directory}/data",
            f"--web.listen-address=127.0.0.1:{self._port}",
            "--log.level=warn",
        ]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    # --- what it says

    def _get(self, path: str, **parameters: str) -> Any:
        assert self._process is not None
        assert self._process.poll() is None, f"Prometheus ended:\n{self._log.read_text('utf-8')[-3000:]}"
        try:
            with httpx.Client(trust_env=False, timeout=10) as client:
                answer = client.get(f"http://127.0.0.1:{self._port}/api/v1/{path}", params=parameters)
        except httpx.TransportError:
            return None
        return answer.json()["data"] if answer.status_code == 200 else None

    def firing(self) -> list[dict[str, Any]]:
        """The alerts that fire now."""
        found = self._get("alerts")
        return [] if found is None else [one for one in found["alerts"] if one["state"] == "firing"]

    def value(self, expr: str) -> float | None:
        """Of the first series of an expression, None where there is none."""
        found = self._get("query", query=expr)
        assert found is not None, f"Prometheus has no answer to {expr}"
        return float(found["result"][0]["value"][1]) if found["result"] else None

    # --- what is expected of it

    def fires(self, name: str, trouble: Callable[[], object] = lambda: None, **labels: str) -> dict[str, str]:
        """Wait until an alert with these labels fires; its annotations, of which each template worked. trouble: what
        goes on meanwhile."""
        deadline = time.monotonic() + FIRE_SECONDS_MAX
        while time.monotonic() < deadline:
            for alert in self.firing():
                if alert["labels"]["alertname"] == name and labels.items() <= alert["labels"].items():
                    annotations: dict[str, str] = alert["annotations"]
                    assert not any(re.search("error|no value|%!", text) for text in annotations.values()), annotations
                    self.fired.add(name)
                    return annotations
            trouble()
            time.sleep(POLL_SECONDS)
        raise AssertionError(f"{name} {labels} does not fire; these do: {self._names()}")

    def clears(self, name: str, upkeep: Callable[[], object] = lambda: None) -> None:
        """Wait until nothing of that name fires that has fired. upkeep: what goes on meanwhile."""
        assert name in self.fired
        deadline = time.monotonic() + FIRE_SECONDS_MAX
        while time.monotonic() < deadline:
            if name not in self._names():
                self.cleared.add(name)
                return
            upkeep()
            time.sleep(POLL_SECONDS)
        raise AssertionError(f"{name} still fires: {[a for a in self.firing() if a['labels']['alertname'] == name]}")

    def is_quiet(self, seconds: float = 5.0) -> None:
        """Wait until everything is scraped, and then see that nothing fires for a while, which is longer than the
        shortest `for:` and thresholds."""
        deadline = time.monotonic() + FIRE_SECONDS_MAX
        while not self._get("query", query='sum(up{job="billing_tailer"}) == count(up{job="billing_tailer"})'):
            assert time.monotonic() < deadline, self._log.read_text("utf-8")[-3000:]
            time.sleep(POLL_SECONDS)
        while self.value('sum(up{job="billing_tailer"}) == count(up{job="billing_tailer"})') is None:
            assert time.monotonic() < deadline, self._log.read_text("utf-8")[-3000:]
            time.sleep(POLL_SECONDS)
        self._settle(deadline)
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            names = self._names()
            assert not names, names
            time.sleep(POLL_SECONDS)

    def _settle(self, deadline: float) -> None:
        """What a start sets off (nobody committed before) is over."""
        while self._names():
            assert time.monotonic() < deadline, self._names()
            time.sleep(POLL_SECONDS)

    def _names(self) -> set[str]:
        return {alert["labels"]["alertname"] for alert in self.firing()}
