"""Errors a user can act on. Everything else is a bug and keeps its traceback."""


class UserError(Exception):
    """A mistake outside the code: a wrong recipe, a missing file, an unreachable model.

    The message says what happened, where, and what to do. The entry point prints it without a
    traceback and exits with `exit_code`.
    """

    exit_code = 2


def first_line(error: Exception) -> str:
    """The start of a library's message, which may go on for a page."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class RunFailed(UserError):
    """Training itself went wrong or was stopped; what was saved is intact."""

    exit_code = 1


class Interrupted(RunFailed):
    """A signal ended the work; the exit code is the one a shell gives.

    Args:
        number: Of the signal.
    """

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.number = number
        self.exit_code = 128 + number


class NonFinite(RunFailed):
    """A number is NaN or infinite.

    Args:
        rows: What it came from, JSON-able, for a reader to look at.
    """

    def __init__(self, message: str, rows: list[dict]):
        super().__init__(message)
        self.rows = rows


class StartAgain(RunFailed):
    """What the run needs was changed and recorded: started again, it goes on."""
