"""Where costs come from. Callbacks are fast and lossy, spend logs slow and lossy in other ways: both are best, one is
needed."""

import os
from collections.abc import Iterator
from pathlib import Path
from threading import Event

from billing_tailer import configured
from billing_tailer.checks.finding import Finding, failed, fine, warned
from billing_tailer.checks.volume import who
from billing_tailer.litellm import SpendLogs
from billing_tailer.settings import HEADER_LIMITS, Settings

TOKEN_CHARACTERS_MIN = 8
"""A random token has more different characters than this."""
_PASSING = {"tmpfs": "memory", "ramfs": "memory", "overlay": "the container's own layer", "aufs": "the container"}
"""File systems that end with the container, and where they are."""


def check_sources(settings: Settings) -> Iterator[Finding]:
    """Whether there is any."""
    if settings.cost_source == "header":
        hint = "set COST_SOURCE=litellm, with CALLBACK_TOKEN, or LITELLM_URL and LITELLM_API_KEY"
        yield warned("cost source", HEADER_LIMITS, hint)
    elif configured.spool_directory(settings) is None and settings.litellm_url is None:
        hint = "set CALLBACK_TOKEN, or LITELLM_URL and LITELLM_API_KEY"
        yield warned("cost source", "there is none: calls are recorded but never charged", hint)


def check_callbacks(settings: Settings) -> Iterator[Finding]:
    """Whether they are taken, and from whom."""
    if settings.cost_source == "header":
        return
    if settings.callback_token is not None:
        if len(set(settings.callback_token.get_secret_value())) < TOKEN_CHARACTERS_MIN:
            what = "CALLBACK_TOKEN has few different characters: whoever guesses it can write spend records"
            yield warned("callbacks", what, "make one with `openssl rand -hex 32`, here and in LiteLLM")
        else:
            yield fine("callbacks", "taken with CALLBACK_TOKEN")
    elif settings.spool_dir is not None:
        hint = "set CALLBACK_TOKEN where LiteLLM runs on another machine"
        yield warned("callbacks", "taken from this machine only", hint)
    elif settings.litellm_url is not None:
        what = "off: spend logs are slower, and lose calls whose provider repeats an id, which then stay overdue"
        yield warned("callbacks", what, "set CALLBACK_TOKEN, also in LiteLLM")


def check_spool(settings: Settings) -> Iterator[Finding]:
    """Whether what was acknowledged can be written, and outlives the process."""
    directory = configured.spool_directory(settings)
    if directory is None or settings.cost_source == "header":
        return
    there = directory
    while not os.path.exists(there) and there != there.parent:  # noqa: PTH110  # Path's raises where it may not look
        there = there.parent
    if not os.access(there, os.W_OK | os.X_OK, effective_ids=True):
        what = f"{who()} may not write to {there}"
        yield failed("spool", what if there == directory else f"{what}, where {directory} is to be made", _hint(there))
        return
    kind = _file_system(there)
    if kind in _PASSING:
        what = f"{directory} is on {kind}, {_PASSING[kind]}: what was acknowledged is lost with it"
        yield warned("spool", what, "set BILLING_TAILER_SPOOL_DIR to a volume that persists")
    else:
        yield fine("spool", f"{directory} can be written")


def _hint(directory: Path) -> str:
    return f"chown {directory} to that user, or set BILLING_TAILER_SPOOL_DIR to a directory that it may write to"


def _file_system(path: Path) -> str | None:
    """The kind of the file system that a path is on; None where the system does not tell."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text("utf-8", "surrogateescape").splitlines()
    except OSError:
        return None
    real = path.resolve()
    found: tuple[int, str | None] = (-1, None)
    for mount in mounts:
        before, _, behind = mount.partition(" - ")
        point = Path(before.split()[4].encode("utf-8", "surrogateescape").decode("unicode_escape"))
        if real.is_relative_to(point):
            found = max(found, (len(point.parts), behind.split()[0]), key=lambda one: one[0])
    return found[1]


def check_spend_logs(settings: Settings) -> Iterator[Finding]:
    """Whether LiteLLM answers, and lets this key see all."""
    if settings.cost_source == "header" or (settings.litellm_url is None and settings.callback_token is None):
        return
    if settings.litellm_url is None or settings.litellm_api_key is None:
        hint = "set LITELLM_URL and LITELLM_API_KEY: callbacks that LiteLLM drops are found there"
        yield warned("spend logs", "not asked: what callbacks lose stays overdue", hint)
        return
    with SpendLogs(settings.litellm_url, settings.litellm_api_key.get_secret_value(), stop=Event()) as logs:
        trouble = logs.reachable()
        version = None if trouble is not None else logs.version()
    if trouble is None:
        told = "" if version is None else f", LiteLLM {version}"
        yield fine("spend logs", f"{settings.litellm_url} answers, and takes the key{told}")
        return
    message, _, hint = trouble.partition("\n  -> ")
    yield failed("spend logs", message, hint or "look at LITELLM_URL and LITELLM_API_KEY")
