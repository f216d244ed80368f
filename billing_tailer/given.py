"""What people and programs write into options and parameters: how a value is refused, and times."""

import re
from datetime import UTC, datetime

EARLIEST, LATEST = datetime(1970, 1, 1, tzinfo=UTC), datetime(2999, 1, 1, tzinfo=UTC)


class BadValue(ValueError):
    """A value that cannot be used: its name, the value, and what is allowed."""

    def __init__(self, name: str, value: str, remedy: str) -> None:
        super().__init__(f"{name} = {value!r}: {remedy}")
        self.name, self.value, self.remedy = name, value, remedy


def moment(name: str, given: str) -> datetime:
    """A time from EARLIEST to before LATEST, UTC where it says nothing else. Raises BadValue."""
    try:
        found = datetime.fromisoformat(given)
        found = found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)
    except (ValueError, OverflowError):
        found = LATEST
    if not re.match("[0-9]", given) or not EARLIEST <= found < LATEST:
        remedy = "must be a time from 1970 on, such as 2026-11-22 or 2026-11-22T13:00:00Z; UTC where it says no zone"
        raise BadValue(name, given, remedy)
    return found
