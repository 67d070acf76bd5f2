"""A full disk, in words: the libraries that write a run's files say it each in their own way, or not at all."""

import errno
import os
import sqlite3
import tempfile
from pathlib import Path

from safetensors import SafetensorError

from medistill_trl.errors import RunFailed, UserError, first_line

# torch.save raises a RuntimeError about positions in a zip file, safetensors and SQLite errors of their own.
SAYING_LITTLE = (OSError, RuntimeError, sqlite3.Error, SafetensorError)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
PROBE_BYTES = 2**20


class explained:
    """Turns what a library raises within the block when it cannot write into a message; other errors pass.

    Args:
        folders: Where the block writes.
        how_to_go_on: Once there is space.

    Raises:
        RunFailed: the disk of one of the folders is full.
    """

    def __init__(self, *folders: Path, how_to_go_on: str):
        self.folders = folders
        self.how_to_go_on = how_to_go_on

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, traceback) -> None:
        # Looked at whatever its class is: tokenizers raises a bare Exception.
        if not isinstance(error, Exception) or isinstance(error, UserError):
            return
        for folder in self.folders:
            reason = _reason(error, folder)
            if reason is not None:
                raise RunFailed(
                    f"{folder}: {reason} ({type(error).__name__}: {first_line(error)}). What was saved before is whole: "
                    f"free some space, then {self.how_to_go_on}"
                ) from error


def is_full(error: Exception) -> bool:
    """Is that what a system call or SQLite says?"""
    if isinstance(error, sqlite3.OperationalError):
        return error.sqlite_errorcode == sqlite3.SQLITE_FULL
    return isinstance(error, OSError) and error.errno in FULL


def _reason(error: Exception, folder: Path) -> str | None:
    """Why a folder takes no more, in the system's words; None if it does."""
    for number in FULL:
        # safetensors removes what it could not finish: by now there may be space again.
        if os.strerror(number) in str(error):
            return os.strerror(number)
    if not isinstance(error, SAYING_LITTLE):
        return None
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(bytes(PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as refusal:
        return os.strerror(refusal.errno) if refusal.errno in FULL else None
    return None
