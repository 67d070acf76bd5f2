"""Stops a run whose numbers have gone wrong, before they reach the weights."""

import torch
from transformers import Trainer, TrainerCallback

from medistill_trl.errors import RunFailed


class FiniteGuard(TrainerCallback):
    """Raises before the optimizer step if the loss or a gradient is NaN or infinite.

    Left alone, transformers logs `loss: 0.0, grad_norm: nan`, writes NaN into the weights and exits
    with status 0. One synchronisation per optimizer step.

    Args:
        trainer: Its accumulated loss is what the log would show.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        loss = self.trainer._tr_loss  # summed since the last log, over all micro-batches
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if bool(torch.isfinite(loss).all() & torch.isfinite(norm).all()):
            return
        raise RunFailed(
            f"step {state.global_step + 1}: the loss is {loss.item()} and the gradient norm {norm.item()}. "
            "The optimizer step was not taken, and the last checkpoint is intact. Lower learning_rate, "
            "check the dtypes (float16 overflows, bfloat16 does not), then --resume or start anew."
        )
