"""A signal during training: the step is finished, a checkpoint is saved, then the process ends.

    SIGTERM, SIGINT         exit status 143, 130
    the launcher's death    as SIGTERM
    a second signal         ends the process at once, by the kernel

Nothing is marked complete, and --resume goes on from the very step.

A run that loses its teacher's server saves the step before, see `LastBoundary`.
"""

import logging
import os
import random
import signal
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather
from transformers import Trainer, TrainerCallback

from medistill_trl import launch
from medistill_trl.checkpoints import problem
from medistill_trl.errors import Interrupted

logger = logging.getLogger(__name__)


class StopRequest:
    """Within the block a signal is noted, not obeyed.

    Attributes:
        number: Of the first signal; None while there was none.
    """

    def __init__(self):
        self.number: int | None = None
        self._process = os.getpid()

    def __enter__(self) -> "StopRequest":
        heeded = [*launch.heeded_signals(), launch.LAUNCHER_DIED]
        self._before = {number: signal.signal(number, self._note) for number in heeded}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame) -> None:
        if os.getpid() != self._process:  # a data loader's worker has inherited this
            os._exit(128 + number)
        if number == launch.LAUNCHER_DIED:
            self.number = self.number or signal.SIGTERM
            return
        self.number = number
        # The second one is the kernel's: it also ends a process that hangs in a library.
        for heeded in launch.heeded_signals():
            signal.signal(heeded, signal.SIG_DFL)
        # Not by way of the logger: the signal may have come while it was writing.
        text = f"\nmedistill_trl: {signal.Signals(number).name}: the run ends after this step; to end it at once: kill {os.getpid()}\n"
        os.write(2, text.encode())


class StopCallback(TrainerCallback):
    """Saves and ends the run at the boundary of a step after a signal to any of its processes.

    It belongs behind `CheckpointCallback`, which completes the checkpoint.
    """

    def __init__(self, request: StopRequest):
        self.request = request
        self._agreed: int | None = None

    def on_step_end(self, args, state, control, **kwargs):
        if state.epoch % 1 == 0:  # first what comes at an epoch's end
            return control
        return self._stop_if_asked(control)

    def on_epoch_end(self, args, state, control, **kwargs):
        return self._stop_if_asked(control)

    def _stop_if_asked(self, control):
        self._agreed = _agreed(self.request.number)
        control.should_save |= self._agreed is not None
        return control

    def on_save(self, args, state, control, **kwargs):
        if self._agreed is not None:
            raise Interrupted(
                f"stopped by {signal.Signals(self._agreed).name} after step {state.global_step} of "
                f"{state.max_steps}, and saved; continue with --resume",
                self._agreed,
            )


class LastBoundary(TrainerCallback):
    """Remembers the random state of each boundary between steps, so that one can be saved after it was passed.

    The next step may have begun: of an epoch's first one, the data have been shuffled already.
    """

    def __init__(self):
        self._random: tuple | None = None

    def on_step_end(self, args, state, control, **kwargs):
        self._random = _random_state()

    on_evaluate = on_epoch_end = on_step_end  # both come after it

    def save(self, trainer: Trainer) -> None:
        """Save the last whole step of a run that cannot go on, unless that was done when it ended.

        With several processes nothing is saved: the others may not be at this step.
        """
        state = trainer.state
        folder = Path(trainer.args.output_dir) / f"checkpoint-{state.global_step}"
        saved = folder.exists() and problem(folder) is None
        begun = self._random is not None and state.global_step > 0  # evaluated it may be before
        if not begun or saved or PartialState().num_processes > 1:
            return
        _set_random_state(self._random)
        trainer._save_checkpoint(trainer.model, trial=None)
        trainer.callback_handler.on_save(trainer.args, state, trainer.control)
        logger.info("saved after step %d of %d", state.global_step, state.max_steps)


def _random_state() -> tuple:
    """All that a checkpoint holds of random states."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def _set_random_state(state: tuple) -> None:
    python, numpy, cpu, cuda = state
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    torch.cuda.set_rng_state_all(cuda)


def _agreed(number: int | None) -> int | None:
    """The signal that any process has had: all stop at the same step."""
    state = PartialState()
    if state.num_processes > 1:
        number = int(gather(torch.tensor([number or 0], device=state.device)).max())
    return number or None
