"""The verb that is the daemon."""

import typer

from billing_tailer import app
from billing_tailer.settings import load

verbs = typer.Typer()


@verbs.command()
def run() -> None:
    """Follow the log until SIGTERM."""
    raise typer.Exit(app.run(load()))
