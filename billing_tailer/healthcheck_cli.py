"""The verb that Docker's HEALTHCHECK runs every minute: it loads little."""

from dataclasses import asdict

import typer

from billing_tailer.errors import ConfigError
from billing_tailer.healthcheck import ask
from billing_tailer.options import AsJson
from billing_tailer.printing import print_json, print_pairs
from billing_tailer.settings import load

verbs = typer.Typer()


@verbs.command()
def healthcheck(as_json: AsJson = False) -> None:
    """Ask the daemon at HTTP_HOST:HTTP_PORT whether it lives; exit code 1 if it does not. Never asks Postgres."""
    settings = load()
    if settings.http_port == 0:
        raise ConfigError("BILLING_TAILER_HTTP_PORT = 0 lets the system choose", "give the daemon a port of its own")
    answer = asdict(ask(settings.http_host, settings.http_port))
    if as_json:
        print_json(answer)
    else:
        print_pairs(answer)
    raise typer.Exit(0 if answer["alive"] else 1)
