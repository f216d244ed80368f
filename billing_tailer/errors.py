"""What can go wrong in the world, with the exit code and the operator's next step.

Trouble inside a log line is a value (`model.Rejected`); trouble in the world is one of these.
"""


class TailerError(Exception):
    """A failure with a `hint`: what the operator should do next. Exit code 1."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  -> {self.hint}" if self.hint else self.message


class ConfigError(TailerError):
    """Wrong or missing configuration, or wrong usage. Exit code 2. Invariant MISCONFIGURATION_IS_A_HARD_ERROR."""

    exit_code = 2


class NotOwner(TailerError):
    """Another process moved a position, or owns the data directory. Exit code 3."""

    exit_code = 3


class LedgerUnavailable(TailerError):
    """Postgres cannot be reached, or the connection broke: wait and try again, nothing is lost."""


class Overlap(TailerError):
    """The batch contains a call that is already recorded: commit it again through staging."""


class PositionMoved(TailerError):
    """A compare-and-set on a committed offset failed: read the positions again."""


class RowRejected(TailerError):
    """Postgres refused the rows of a batch for what they contain."""


class TooMuch(TailerError):
    """More was asked for than is read in the time that a question may take."""
