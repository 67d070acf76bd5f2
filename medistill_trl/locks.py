"""Locks on files, which the kernel lets go of when a process ends, however it ends."""

import fcntl
from typing import IO


def try_lock(file: IO) -> bool:
    """Take the exclusive lock on an open file, unless another process has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
