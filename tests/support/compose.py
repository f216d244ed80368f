"""compose.yml as tests read it, and the options of `podman run` that its flags are."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import yaml

from tests.support.daemon import ROOT

FILE: Final = ROOT / "compose.yml"
ELSEWHERE: Final = frozenset({"build", "image", "pull_policy", "command", "networks", "ports", "depends_on", "restart"})
"""What says nothing of how a process is confined, or is the caller's business."""


def compose() -> dict[str, Any]:
    """The whole file."""
    content: dict[str, Any] = yaml.safe_load(FILE.read_text("utf-8"))
    return content


def service(name: str) -> dict[str, Any]:
    """One service."""
    found: dict[str, Any] = compose()["services"][name]
    return found


def seconds(text: str) -> float:
    """`1m30s`, `15s`."""
    units = {"h": 3600, "m": 60, "s": 1}
    assert re.fullmatch(r"([0-9]+[hms])+", text), text
    return float(sum(int(number) * units[unit] for number, unit in re.findall(r"([0-9]+)([hms])", text)))


def podman_options(name: str, volume: Mapping[str, str], secrets: Path) -> list[str]:
    """The options of `podman run` for a service. volume: compose's name of a volume -> podman's. secrets: the directory
    of their files. A flag that is not known here is an error, since it would be left out in silence."""
    flags: dict[str, Callable[[Any], list[str]]] = {
        "user": lambda value: [f"--user={value}"],
        "read_only": lambda value: [f"--read-only={str(value).lower()}"],
        "cap_drop": lambda value: [f"--cap-drop={one}" for one in value],
        "security_opt": lambda value: [f"--security-opt={one.removesuffix(':true')}" for one in value],
        "environment": lambda value: [f"--env={variable}={text}" for variable, text in value.items()],
        "secrets": lambda value: [f"--volume={secrets / one}:/run/secrets/{one}:ro" for one in value],
        "volumes": lambda value: [_volume(one, volume) for one in value],
        "tmpfs": lambda value: [f"--tmpfs={one}" for one in value],
        "mem_limit": lambda value: [f"--memory={value}"],
        "pids_limit": lambda value: [f"--pids-limit={value}"],
        "healthcheck": _healthcheck,
        "stop_grace_period": lambda value: [f"--stop-timeout={seconds(value):.0f}"],
    }
    said = {key: value for key, value in service(name).items() if key not in ELSEWHERE}
    if unknown := said.keys() - flags.keys():
        raise LookupError(f"compose.yml: {name}: {sorted(unknown)} is not known to tests/support/compose.py")
    return [option for key, value in said.items() for option in flags[key](value)]


def _healthcheck(value: Mapping[str, Any]) -> list[str]:
    if value == {"disable": True}:
        return ["--no-healthcheck"]
    assert value["test"][0] == "CMD"
    times = [f"--health-{one.replace('_', '-')}={text}" for one, text in value.items() if one != "test"]
    return [f"--health-cmd={' '.join(value['test'][1:])}", *times]


def _volume(text: str, volume: Mapping[str, str]) -> str:
    source, rest = text.split(":", 1)
    return f"--volume={volume[source]}:{rest}"
