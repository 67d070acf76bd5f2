"""A signal during training: the step is finished, a checkpoint is saved, then the process ends.

    SIGTERM, SIGINT         exit status 143, 130
    the launcher's death    as SIGTERM
    a second signal         ends the process at once, by the kernel

Nothing is marked complete, and --resume goes on from the very step.
"""

import os
import signal

import torch
from accelerate import PartialState
from accelerate.utils import gather
from transformers import TrainerCallback

from medistill_trl import launch
from medistill_trl.errors import Interrupted


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


def _agreed(number: int | None) -> int | None:
    """The signal that any process has had: all stop at the same step."""
    state = PartialState()
    if state.num_processes > 1:
        number = int(gather(torch.tensor([number or 0], device=state.device)).max())
    return number or None
