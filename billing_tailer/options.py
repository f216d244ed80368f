"""The options that verbs share, and what is accepted behind them."""

import os
import pwd
from datetime import datetime
from typing import Annotated

import typer

from billing_tailer.errors import ConfigError
from billing_tailer.given import BadValue, moment
from billing_tailer.model import SETTLER

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Reason = Annotated[str, typer.Option(help="Why; kept with the change.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")]
By = Annotated[str | None, typer.Option(help="Who decides; by default the user of this process.")]
Limit = Annotated[int, typer.Option(min=1, max=100_000, help="At most so many.")]


def said(option: str, given: str) -> str:
    """Words that are kept: not empty, and such as Postgres takes."""
    words = given.strip()
    if not words or "\0" in words or not words.isprintable():
        raise ConfigError(f"{option} is empty or not printable", "write it in plain words: it is kept with the change")
    return words


def person_named(by: str | None) -> str:
    """Who decides: as said, else the user of this process. Raises ConfigError."""
    if by is None:
        try:
            by = pwd.getpwuid(os.getuid()).pw_name
        except KeyError:
            by = f"uid {os.getuid()}"
    name = said("--by", by)
    if name == SETTLER:
        raise ConfigError(f"--by {SETTLER} is the program itself", "name a person")
    return name


def time_given(option: str, given: str | None) -> datetime | None:
    """A moment, UTC unless it says otherwise. Raises ConfigError."""
    if given is None:
        return None
    try:
        return moment(option, given)
    except BadValue as bad:
        raise ConfigError(f"{option} {given!r} is no time", f"it {bad.remedy}") from None
