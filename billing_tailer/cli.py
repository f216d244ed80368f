"""The verbs. Reads take `--json` (a stable shape), writes take `--reason` and have `--dry-run`.

Exit codes: 0 ok, 1 failed or unhealthy, 2 usage or configuration, 3 another owner.
"""

import sys
from importlib import import_module
from typing import Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from billing_tailer import __version__
from billing_tailer.errors import ConfigError, TailerError
from billing_tailer.options import AsJson
from billing_tailer.printing import complain, print_json, print_line, write_escapes

ROOMS = {
    "run": "run_cli",
    "healthcheck": "healthcheck_cli",
    "check": "state_cli",
    "migrate": "state_cli",
    "status": "state_cli",
    "files": "offsets_cli",
    "offsets": "offsets_cli",
    "dead-letters": "letters_cli",
    "verify": "proof_cli",
    "backfill": "backfill_cli",
    "explain": "money_cli",
    "receipts": "money_cli",
    "adjust": "money_cli",
    "reconcile": "money_cli",
    "export": "export_cli",
    "prune": "money_cli",
    "exceptions": "money_cli",
}
"""The module of each verb, in whose `verbs` it is."""


class Verbs(TyperGroup):
    """Loads the module of a verb when it is asked for: neither `version` nor a completion waits for Postgres' driver,
    and no verb but `run` for the daemon's rooms (tests/test_completion.py)."""

    _names_only = False

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        """The verbs that begin so, by their names alone."""
        self._names_only = True
        try:
            return super().shell_complete(ctx, incomplete)
        finally:
            self._names_only = False

    def list_commands(self, ctx: Any) -> list[str]:
        """In the order of the help."""
        return [*ROOMS, *super().list_commands(ctx)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A verb, or a group of them; None where there is no such."""
        room = ROOMS.get(cmd_name)
        if room is None:
            return super().get_command(ctx, cmd_name)
        if self._names_only:
            return TyperCommand(cmd_name)
        verbs = import_module(f"billing_tailer.{room}").verbs
        return typer.main.get_group(verbs).get_command(ctx, cmd_name)


cli = typer.Typer(cls=Verbs, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__.splitlines()[0])


@cli.callback()
def _root() -> None:
    """Keeps `version` a verb beside the others."""


def main() -> NoReturn:
    """The console script: our own errors become one message and their exit code."""
    write_escapes()
    try:
        cli(standalone_mode=True)
    except TailerError as error:
        complain(f"billing-tailer: {error}")
        sys.exit(error.exit_code)
    except UnicodeEncodeError:  # what was typed, on its way to Postgres: it is not repeated, it may be a secret
        wrong = ConfigError("an argument or a variable is not UTF-8", "write it so, in a locale such as C.UTF-8")
        complain(f"billing-tailer: {wrong}")
        sys.exit(wrong.exit_code)
    sys.exit(0)


@cli.command()
def version(as_json: AsJson = False) -> None:
    """Print the version."""
    if as_json:
        print_json({"version": __version__})
    else:
        print_line(__version__)
