"""Runs that share a store on disk take turns."""

import contextlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from medistill_trl.locks import try_lock

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0


@contextlib.contextmanager
def turn(lock: Path, what: Path) -> Iterator[None]:
    """One run at a time: its main process holds a lock file, the others hear of each attempt, so
    that none of them waits past the process group's timeout.

    Args:
        lock: The lock file; its folder exists.
        what: The run fills, for the message to those who wait.
    """
    state = PartialState()
    with lock.open("w") as file:
        waited = 0
        while not broadcast_object_list([state.is_main_process and try_lock(file)])[0]:
            if waited == 0:
                logger.warning("waiting for another run that is filling %s", what)
            waited += 1
            time.sleep(POLL_SECONDS)
        yield
