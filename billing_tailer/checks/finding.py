"""What a check has found, and how checks are kept apart: one that fails says so, and hides no other."""

from collections.abc import Iterable
from dataclasses import dataclass

from billing_tailer.errors import TailerError


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. message: with the value; hint: the next step, of all that is not well. warning: it
    works, but not as well as it could."""

    ok: bool
    topic: str
    message: str
    hint: str = ""
    warning: bool = False


def fine(topic: str, message: str) -> Finding:
    """Nothing to do."""
    return Finding(True, topic, message)


def warned(topic: str, message: str, hint: str) -> Finding:
    """It works, but should be looked at."""
    return Finding(True, topic, message, hint, warning=True)


def failed(topic: str, message: str, hint: str) -> Finding:
    """Has to be mended."""
    return Finding(False, topic, message, hint)


def collected(topic: str, findings: Iterable[Finding]) -> list[Finding]:
    """What a check finds, and, where it breaks off, that it did and why."""
    found: list[Finding] = []
    try:
        found.extend(findings)
    except TailerError as error:
        found.append(failed(topic, error.message, error.hint or "look at what is said above, and run it again"))
    except Exception as error:  # noqa: BLE001  # whatever is wrong with one thing, the others are still looked at
        what = f"this check broke off: {type(error).__name__}: {error}"
        found.append(failed(topic, what, "the other findings hold; please report this one"))
    return found
