"""Templates and how numbers, times and strangers' texts are written on a page.

Everything is escaped, and every text loses what would act without being seen: what is not printable, a direction
override for one, stands there as its escape (tests/test_pages.py::test_hostile_texts). Numbers are written from
Decimal and int, never by way of a float.
"""

from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from decimal import ROUND_HALF_EVEN, Decimal
from typing import Any
from urllib.parse import quote, urlencode

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from starlette.responses import Response

from billing_tailer import __version__
from billing_tailer.printing import text
from billing_tailer.web import commands

ABSENT = "\N{EN DASH}"
DECIMALS_MIN = 6


def page(template: str, status: int = 200, headers: Mapping[str, str] | None = None, **words: Any) -> Response:
    """A page from a template of ours."""
    body = _ENVIRONMENT.get_template(template).render(version=__version__, **words)
    return Response(body, status, headers, "text/html")


def link(path: str, **parameters: object) -> str:
    """A path with those of the parameters that are given."""
    given = {
        name.rstrip("_"): stamp(value) if isinstance(value, datetime) else value
        for name, value in parameters.items()
        if value not in (None, "", False)
    }
    return f"{path}?{urlencode(given)}" if given else path


def call_link(call_id: str) -> str:
    """The page of a call."""
    return f"/calls/{quote(call_id, safe='')}"


def stamp(moment: datetime) -> str:
    """A time in an address, as precise as it is."""
    return moment.isoformat().replace("+00:00", "Z")


# --- numbers


def number(value: int | str) -> str:
    """12,345"""
    return f"{int(value):,}"


def usd(value: Decimal | str, decimals: int = DECIMALS_MIN) -> str:
    """Exact, with so many decimals or as many more as there are: 1,234.500000"""
    whole, _, fraction = f"{Decimal(value):,f}".partition(".")
    return f"{whole}.{fraction.rstrip('0').ljust(decimals, '0')}"


def decimals(amounts: Iterable[Decimal]) -> int:
    """With how many decimals a column of amounts is written, so that their points stand below each other."""
    return max((len(usd(amount).partition(".")[2]) for amount in amounts), default=DECIMALS_MIN)


def usd_short(value: Decimal) -> str:
    """Rounded to what is read at a glance; the exact amount must stand beside it."""
    places = 2 if abs(value) >= 1000 else 4 if abs(value) >= 1 else DECIMALS_MIN
    return f"{value.quantize(Decimal(1).scaleb(-places), ROUND_HALF_EVEN):,f}"


def axis(value: Decimal) -> str:
    """A round amount beside a chart, as short as it is: 0.5"""
    return f"{value.normalize():,f}"


def percent(value: Decimal | None) -> str:
    """A rate such as 0.998123 as 99.8123 %: a rate has six decimals."""
    return ABSENT if value is None else f"{value * 100:.4f} %"


def share(part: Decimal, whole: Decimal) -> str:
    """Of a whole, in percent."""
    return f"{(part * 100 / whole).quantize(Decimal('0.1'), ROUND_HALF_EVEN)} %" if whole else ABSENT


def change(now: Decimal | int | None, before: Decimal | int | None) -> str:
    """From one amount to another: +12.3 %."""
    if now is None or before is None:
        return "no comparison"
    if now == before:
        return "unchanged"
    if not before:
        return "none before"
    moved = (Decimal(now) - before) * 100 / abs(Decimal(before))
    if moved >= 1000:
        return f"{'▲' if moved > 0 else '▼'} \N{MULTIPLICATION SIGN} {(Decimal(now) / before).quantize(Decimal(1)):,f}"
    arrow, rounded = "▲" if moved > 0 else "▼", moved.quantize(Decimal("0.1"), ROUND_HALF_EVEN)
    return f"{arrow} {rounded:+} %" if rounded else f"{arrow} less than 0.1 %"


def points(now: Decimal | None, before: Decimal | None) -> str:
    """From one rate to another, in percentage points."""
    if now is None or before is None:
        return "no comparison"
    moved = ((now - before) * 100).quantize(Decimal("0.01"), ROUND_HALF_EVEN)
    return f"{'▲' if moved > 0 else '▼'} {moved:+} points" if moved else "unchanged"


# --- times


def instant(moment: datetime | str) -> str:
    """2026-11-22 12:03:41, UTC, the rest of the second cut off."""
    found = datetime.fromisoformat(moment) if isinstance(moment, str) else moment
    return f"{found:%Y-%m-%d %H:%M:%S}"


def clock(moment: datetime, now: datetime) -> str:
    """Without the date where it is today's."""
    return f"{moment:%H:%M:%S}" if moment.date() == now.date() else instant(moment)


def tick(moment: datetime, bucket: timedelta) -> str:
    """A label of a chart's axis."""
    return f"{moment:%d %b %H:%M}" if bucket < timedelta(hours=6) else f"{moment:%d %b %Y}"


def duration(span: timedelta) -> str:
    """7 days, 24 h, 1 min"""
    seconds = int(span.total_seconds())
    for unit, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds % unit == 0 and seconds > (unit if unit == 86400 else 0):
            return f"{seconds // unit} {name}"
    return f"{span}"


# --- what templates may use


def _shown(value: object) -> object:
    """Of every value that a template writes."""
    if isinstance(value, Markup):
        return value
    return ABSENT if value is None else text(value)


_ENVIRONMENT = Environment(
    loader=PackageLoader("billing_tailer.web"),
    autoescape=True,
    undefined=StrictUndefined,
    finalize=_shown,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.filters |= {one.__name__: one for one in (number, axis, usd, usd_short, percent, instant, duration)}
_ENVIRONMENT.globals |= {one.__name__: one for one in (link, call_link, decimals, share, change, points, clock, tick)}
_ENVIRONMENT.globals |= {
    "exception_commands": commands.exception_commands,
    "letter_commands": commands.letter_commands,
}
