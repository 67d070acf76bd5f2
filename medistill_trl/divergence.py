"""Watches the log of a run for numbers that get worse and worse: loss, KL, reward.

A number is judged by its mean over the last few logs against the best such mean so far:

    loss                         above `divergence_factor` times the lowest; not of methods that train on the
                                 student's own samples, whose loss says nothing
    kl_to_teacher_nats,          the same: the student's samples, and the held-out check at evaluations
    heldout_kl_nats
    reward_mean                  below the highest by `divergence_factor` times the spread of rewards
"""

import logging
from collections import deque

from transformers import TrainerCallback

from medistill_trl.arguments import RunArguments
from medistill_trl.errors import RunFailed

logger = logging.getLogger(__name__)

RISING = ("loss", "kl_to_teacher_nats", "heldout_kl_nats")
REWARD, SPREAD = "reward_mean", "reward_std"
EVALUATED = "heldout_kl_nats"  # seldom measured, on many tokens: each one counts


class Watched:
    """One number of the log.

    Args:
        window: Logs its mean is taken over.
        sign: 1 if it is to fall, −1 if it is to rise.
    """

    def __init__(self, window: int, sign: int = 1):
        self.recent: deque[float] = deque(maxlen=window)
        self.sign = sign
        self.best: float | None = None
        self.best_step = 0

    def add(self, value: float, step: int) -> float | None:
        """The mean over the window; None before there are enough values."""
        self.recent.append(value)
        if len(self.recent) < self.recent.maxlen:
            return None
        mean = sum(self.recent) / len(self.recent)
        if self.best is None or self.sign * mean < self.sign * self.best:
            self.best, self.best_step = mean, step
        return mean


class DivergenceWatch(TrainerCallback):
    """Warns, or stops the run, once a number has gone far from the best it was.

    All it knows is in the trainer's log, so a resumed run goes on where it was.

    Args:
        run: `divergence_action`, `divergence_window`, `divergence_factor`.
        loss_counts: Whether a falling loss is what the method trains for.
    """

    def __init__(self, run: RunArguments, loss_counts: bool):
        self.run = run
        self.rising = RISING if loss_counts else RISING[1:]

    def on_train_begin(self, args, state, control, **kwargs):
        window = self.run.divergence_window
        self._numbers = {name: Watched(1 if name == EVALUATED else window) for name in self.rising}
        self._reward, self._spread = Watched(window, sign=-1), Watched(window)
        self._warned: set[str] = set()
        self._seen = 0
        for name, _ in self._new_problems(state.log_history):
            self._warned.add(name)  # by an earlier launch

    def on_log(self, args, state, control, **kwargs):
        for name, problem in self._new_problems(state.log_history):
            text = f"step {state.global_step}: {problem}. Lower learning_rate, or start from an earlier checkpoint"
            if self.run.divergence_action == "stop":
                raise RunFailed(f"{text}; divergence_action: warn lets such a run go on")
            if self.run.divergence_action == "warn" and name not in self._warned:
                self._warned.add(name)
                logger.warning("%s; divergence_action: stop ends such a run", text)

    def _new_problems(self, log: list[dict]) -> list[tuple[str, str]]:
        """(number, what is wrong with it) of every entry that has come since the last call."""
        entries, self._seen = log[self._seen :], len(log)
        return [found for entry in entries for found in self._judge(entry)]

    def _judge(self, entry: dict) -> list[tuple[str, str]]:
        found, factor, step = [], self.run.divergence_factor, entry.get("step", 0)
        for name in self.rising:
            number = self._numbers[name]
            mean = number.add(entry[name], step) if name in entry else None
            if mean is not None and number.best > 0 and mean > factor * number.best:
                found.append((name, self._said(name, mean, number)))
        if REWARD in entry:
            mean, spread = (
                watched.add(entry[name], step)
                for watched, name in ((self._reward, REWARD), (self._spread, SPREAD))
            )
            if mean is not None and mean < self._reward.best - factor * spread:
                found.append((REWARD, self._said(REWARD, mean, self._reward)))
        return found

    def _said(self, name: str, mean: float, number: Watched) -> str:
        logs = number.recent.maxlen
        return f"{name} is {mean:.3g}, the mean of {logs} logs, and was {number.best:.3g} at step {number.best_step}"
