"""What PPO does with a micro-batch, for the memory plan."""

from dataclasses import dataclass

import torch
from torch import nn

from medistill_trl.memory.losses import Policy


@dataclass(frozen=True)
class RolloutMemory(Policy):
    """And PPO's value head, and a rollout of several windows."""

    def modules(self, arguments, student, teacher):
        with torch.device("meta"):
            return {"value head": nn.Linear(student.get_text_config().hidden_size, 1)}

    def samples(self, arguments):
        return arguments.training.rollout_size

    def objective(self, step, states_NH, tokens_N):
        head = step.student.get_submodule("value_head")
        value = head(nn.functional.normalize(states_NH.detach().float(), dim=-1)).square().sum()
        return super().objective(step, states_NH, tokens_N) + value
