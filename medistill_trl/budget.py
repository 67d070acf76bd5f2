"""Ends a run when its tokens or its time are used up, at a step's boundary, as max_steps would."""

from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback
from transformers.trainer_callback import DefaultFlowCallback

from medistill_trl.arguments import RunArguments
from medistill_trl.checkpoints import Totals


class BudgetCallback(TrainerCallback):
    """Lets a run end by `max_completion_tokens` or `max_seconds`.

    Totals are kept with each checkpoint, so what earlier launches of a run have used counts. The main
    process decides for all: their clocks differ. The run is complete, with the reason in run.json; the
    learning rate has come as far as it has, since its schedule runs to max_steps.

    Args:
        run: With the limits.
        totals: What the run has used, of this process.
    """

    def __init__(self, run: RunArguments, totals: Totals):
        self.run = run
        self.totals = totals

    def on_step_end(self, args, state, control, **kwargs):
        if self.run.max_completion_tokens is None and self.run.max_seconds is None:
            return control
        self.totals.lap()
        reason = broadcast_object_list([used_up(self.run, self.totals)])[0]
        if reason is None:
            return control
        entry = {"ended_by": reason, "epoch": state.epoch, "step": state.global_step}
        state.log_history.append(entry)
        if state.global_step >= state.max_steps:  # it ends here anyhow
            return control
        # It was to end here: what ends any run follows, and a resumed one does not go on.
        state.max_steps = state.global_step
        return DefaultFlowCallback().on_step_end(args, state, control)


def used_up(run: RunArguments, totals: Totals) -> str | None:
    """The limit that is reached; None if none is."""
    if run.max_completion_tokens is not None and totals.trained >= run.max_completion_tokens:
        return "max_completion_tokens"
    seconds = totals.seconds - totals.seconds_drawing
    if run.max_seconds is not None and seconds >= run.max_seconds:
        return "max_seconds"
    return None


def ended_by(log_history: list[dict]) -> str:
    """What ended a finished run: a limit of the budget, or `schedule`, its steps or epochs."""
    return next((e["ended_by"] for e in reversed(log_history) if "ended_by" in e), "schedule")
