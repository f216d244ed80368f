"""`python -m tests.vulnerabilities`: asks pip-audit for known vulnerabilities of what requirements.lock pins.

Exit code 0: none that is not accepted in accepted.toml, or NOT CHECKED, which is said loudly, where the data (OSV's)
cannot be reached. 1: there are some. An audit without any data finds nothing either: so a package that is known to be
vulnerable is asked for first, and only if it is reported the others are believed.
"""

import json
import os
import socket
import subprocess
import sys
import tomllib
import venv
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

HERE: Final = Path(__file__).resolve().parent
LOCK: Final = HERE.parents[1] / "requirements.lock"
DATA_HOST: Final = "api.osv.dev"
CONNECT_SECONDS_MAX: Final = 5
AUDIT_SECONDS_MAX: Final = 300
KNOWN_BAD: Final = "jinja2==2.11.2"
"""Has had published vulnerabilities since 2021."""


def unreachable() -> str | None:
    """Why the data cannot be asked for, before anything is installed; None where a connection was made."""
    try:
        socket.create_connection((DATA_HOST, 443), CONNECT_SECONDS_MAX).close()
    except OSError as error:
        return f"{DATA_HOST}: {error}"
    return None


def open_findings(report: Mapping[str, Any], accepted: Mapping[str, Any], today: date) -> list[str]:
    """pip-audit's report (JSON) -> what is not accepted, or not any more; also packages it could not look up."""
    found: list[str] = []
    for package in report["dependencies"]:
        what = f"{package['name']} {package.get('version', '')}".strip()
        if "skip_reason" in package:
            found.append(f"{what}: not looked up: {package['skip_reason']}")
        for one in package.get("vulns", ()):
            names = [one["id"], *one.get("aliases", ())]
            entry = next((accepted[name] for name in names if name in accepted), None)
            if entry is None or not entry.get("reason") or today >= entry["until"]:
                fixed = ", ".join(one.get("fix_versions", ())) or "no version"
                found.append(f"{what}: {one['id']}, fixed in {fixed}" + (": accepted no longer" if entry else ""))
    return found


def is_believable(report: Mapping[str, Any]) -> bool:
    """Whether a report on KNOWN_BAD says that it is bad."""
    return any(package.get("vulns") for package in report["dependencies"])


def audit(python: Path, arguments: Sequence[str]) -> Mapping[str, Any]:
    """pip-audit's report. Raises ValueError with what it said where there is none."""
    options = ["--disable-pip", "--vulnerability-service", "osv", "--format", "json", "--progress-spinner", "off"]
    command = [str(python), "-m", "pip_audit", *options, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=AUDIT_SECONDS_MAX, check=False)
    except subprocess.TimeoutExpired:
        raise ValueError(f"pip-audit gave no report within {AUDIT_SECONDS_MAX} s") from None
    try:
        report: Mapping[str, Any] = json.loads(done.stdout)
    except json.JSONDecodeError:
        raise ValueError(f"pip-audit gave no report: {done.stderr[-600:]}") from None
    return report


def not_checked(reason: str) -> int:
    """Says so, where nobody can overlook it."""
    print(f"\n=== KNOWN VULNERABILITIES: NOT CHECKED ===\n{reason}\n", file=sys.stderr)
    if os.environ.get("GITHUB_ACTIONS"):
        print(f"::warning title=known vulnerabilities not checked::{reason}")
    return 0


def main() -> int:
    """The exit code."""
    if (reason := unreachable()) is not None:
        return not_checked(reason)
    with TemporaryDirectory() as directory:
        venv.create(directory, with_pip=True)
        python = Path(directory, "bin/python")
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--require-hashes"]
        try:
            subprocess.run([*install, "-r", str(HERE / "requirements.txt")], check=True, timeout=AUDIT_SECONDS_MAX)
        except subprocess.SubprocessError as error:
            return not_checked(f"pip-audit cannot be installed: {error}")
        bad = Path(directory, "known-bad.txt")
        bad.write_text(f"{KNOWN_BAD}\n")
        try:
            if not is_believable(audit(python, ["--no-deps", "--requirement", str(bad)])):
                return not_checked(f"{KNOWN_BAD} is not reported: the data is not there")
            report = audit(python, ["--require-hashes", "--requirement", str(LOCK)])
        except ValueError as error:
            return not_checked(str(error))
    accepted = tomllib.loads((HERE / "accepted.toml").read_text("utf-8"))
    found = open_findings(report, accepted, datetime.now(UTC).date())
    print("\n".join(found) or f"no known vulnerability in {len(report['dependencies'])} packages")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
