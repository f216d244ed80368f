"""The licences of everything that the daemon needs at run time, from the installed packages' own metadata.

`python -m tests.licences --write` puts the table into docs/licences.md; tests/test_supply_chain.py holds it, and fails
on a licence that is not allowed.
"""

import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Final

from packaging.requirements import Requirement

ROOT: Final = Path(__file__).parents[1]
DOCUMENT: Final = ROOT / "docs/licences.md"

ALLOWED: Final = frozenset(
    {"MIT", "BSD-2-Clause", "BSD-3-Clause", "BSD", "Apache-2.0", "ISC", "PSF-2.0", "MPL-2.0", "LGPL-3.0-only"}
)
"""SPDX names. MPL and LGPL cover the packages' own files: used as they are, they ask nothing of ours."""
_CLASSIFIERS: Final = {
    "MIT License": "MIT",
    "BSD License": "BSD",
    "Apache Software License": "Apache-2.0",
    "ISC License (ISCL)": "ISC",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
}


def normal(name: str) -> str:
    """A package's name as the lock has it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def runtime() -> dict[str, str]:
    """Package -> licence, of all that `billing-tailer[embedded]` needs here. Raises PackageNotFoundError."""
    found: dict[str, str] = {}
    waiting = [("billing-tailer", frozenset({"embedded"}))]
    while waiting:
        name, extras = waiting.pop()
        package = metadata.distribution(name)
        found[normal(name)] = licence(package.metadata)
        for requirement in map(Requirement, package.requires or ()):
            wanted = [{"extra": extra} for extra in ("", *extras)]
            needed = requirement.marker is None or any(requirement.marker.evaluate(one) for one in wanted)
            if needed and normal(requirement.name) not in found:
                waiting.append((requirement.name, frozenset(requirement.extras)))
    del found["billing-tailer"]
    return found


def licence(said: metadata.PackageMetadata) -> str:
    """The SPDX expression where there is one, else what the classifiers or the text say; "" for nothing."""
    fields = said.json
    if fields.get("license_expression"):
        return str(fields["license_expression"])
    classifiers = [str(one).rpartition(" :: ")[2] for one in fields.get("classifier", []) if "License :: " in str(one)]
    if classifiers:
        return " OR ".join(_CLASSIFIERS.get(one, one) for one in classifiers)
    return str(fields.get("license", "")).strip()


def allowed(expression: str) -> bool:
    """Whether every licence of an expression is on the list, whatever AND and OR say between them."""
    names = re.split(r"\s+(?:AND|OR|WITH)\s+", expression.replace("(", " ").replace(")", " ").strip())
    return all(name.strip() in ALLOWED for name in names)


def document() -> str:
    """docs/licences.md."""
    rows = "".join(f"| {name} | {expression} |\n" for name, expression in sorted(runtime().items()))
    return (
        "# Licences\n\nOf everything that is installed with the daemon and its embedded Postgres, by the packages' own "
        "metadata. Generated\nby `python -m tests.licences --write`; `make test` fails on a licence that is not on the "
        "list of tests/licences.py.\n\n| package | licence |\n| --- | --- |\n" + rows
    )


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        DOCUMENT.write_text(document(), "utf-8")
    else:
        print(document())
