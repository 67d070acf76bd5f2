"""The critic: one linear layer on the student's last hidden states, a part of the student while it trains.

Shapes: N completion tokens, H hidden size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from medistill_trl.losses.advantages import Moments

NAME = "value_head"  # of the student's submodule
FILE = "value_head.pt"  # beside a checkpoint


class ValueHead(nn.Module):
    """V = mean + scale · (w·h/‖h‖ + b), float32, with mean and scale those of the first returns there are.

    It begins by expecting the mean. A completion's mean log-probability is a few nats, its sum hundreds: in units of the
    scale value loss, its clipping and its gradient mean the same for every reward. The input has length 1, so that
    a learning rate means the same whatever the model's width and last norm.

    Args:
        hidden_size: H.
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("scale", torch.zeros(()))  # 0: not set yet

    def forward(self, states_NH: torch.Tensor) -> torch.Tensor:
        """(V − mean) / scale, (N,), from states that predict tokens: what is expected from these tokens on."""
        # Autocast would round it to bfloat16.
        with torch.autocast(states_NH.device.type, enabled=False):
            directions_NH = F.normalize(states_NH.float(), dim=-1)
            return self.linear(directions_NH)[:, 0]

    def set_units(self, returns: Moments) -> None:
        """Once, from the first returns; later calls change nothing."""
        if self.scale == 0:
            self.mean.copy_(returns.mean)
            # Returns that are nearly alike at first need not stay so.
            scale = max(returns.variance.sqrt().item(), abs(returns.mean.item()) / 10)
            self.scale.fill_(scale or 1.0)

    def in_nats(self, units: torch.Tensor) -> torch.Tensor:
        return self.mean + self.scale * units

    def in_units(self, nats: torch.Tensor) -> torch.Tensor:
        return (nats - self.mean) / self.scale


def attach(student: PreTrainedModel) -> ValueHead:
    """Make a value head a part of the student, so that optimizer, clipping and DDP see it."""
    head = ValueHead(student.config.get_text_config().hidden_size).to(student.device)
    student.add_module(NAME, head)
    return head


@contextmanager
def detached(student: PreTrainedModel) -> Iterator[None]:
    """The student as everyone else knows it, to be saved or loaded; the value head is back afterwards."""
    head = student.get_submodule(NAME)
    delattr(student, NAME)
    try:
        yield
    finally:
        student.add_module(NAME, head)


def without(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A student's weights but those of its value head."""
    return {name: weight for name, weight in state_dict.items() if not name.startswith(f"{NAME}.")}


def save(head: ValueHead, folder: Path) -> None:
    # Copies: under DeepSpeed they are views of all that is trained, and torch would save that.
    torch.save({name: tensor.clone() for name, tensor in head.state_dict().items()}, folder / FILE)


def load(head: ValueHead, folder: Path) -> None:
    """Raises FileNotFoundError if the checkpoint is of another method."""
    head.load_state_dict(torch.load(folder / FILE, map_location="cpu", weights_only=True))
