"""Loads the named statements of `sql/*.sql` and the numbered migrations."""

import hashlib
import re
from dataclasses import dataclass
from importlib.resources import files
from typing import LiteralString, cast

_SQL = files("billing_tailer.ledger") / "sql"


def _load(*names: str) -> dict[str, LiteralString]:
    found: dict[str, LiteralString] = {}
    for file in names:
        parts = re.split(r"^-- name: (\w+)$", (_SQL / file).read_text(), flags=re.MULTILINE)[1:]
        for name, body in zip(parts[::2], parts[1::2], strict=True):
            assert name not in found, f"{name} stands twice"
            found[name] = cast("LiteralString", body.strip())
    return found


QUERIES = _load("queries.sql", "activity.sql")


@dataclass(frozen=True, slots=True)
class Migration:
    """One numbered file of `sql/migrations`."""

    version: int
    name: str
    text: LiteralString

    @property
    def sha256(self) -> str:
        """Of the text: an applied migration must never be edited."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def migrations() -> list[Migration]:
    """All migrations, in order."""
    found = [
        Migration(int(entry.name[:4]), entry.name.removesuffix(".sql"), entry.read_text())
        for entry in (_SQL / "migrations").iterdir()
        if entry.name.endswith(".sql")
    ]
    return sorted(found, key=lambda migration: migration.version)
