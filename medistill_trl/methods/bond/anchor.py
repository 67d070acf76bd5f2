"""The anchor: a second, frozen adapter that follows the one in training as an exponential moving average."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from transformers import TrainerCallback
from trl.trainer.utils import use_adapter

ADAPTER = "anchor"


class Anchor:
    """θ_a ← (1−η) θ_a + η θ over the adapter's parameters; it begins as the student does.

    A checkpoint of the student holds it, as PEFT saves every adapter and loads it again.

    Args:
        student: The model in training, unwrapped; it gets the adapter.
        rate: η, from 0, an anchor that stays where it is, to 1, the student itself.
    """

    def __init__(self, student: PeftModel, rate: float):
        self.student = student
        self.rate = rate
        student.add_adapter(ADAPTER, student.peft_config["default"])
        self._pairs = [
            (parameter, student.get_parameter(name.replace(".default.", f".{ADAPTER}.")))
            for name, parameter in student.named_parameters()
            if ".default." in name
        ]
        for policy, anchor in self._pairs:
            # float32 whatever the policy has: bfloat16 would round a small step away, and it would never move.
            anchor.data = policy.data.to(torch.float32, copy=True)

    def follow(self) -> None:
        """One step towards the policy as it is now."""
        for policy, anchor in self._pairs:
            anchor.data.lerp_(policy.data.to(anchor.dtype), self.rate)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the block the student is the anchor."""
        with use_adapter(self.student, ADAPTER):
            yield


class AnchorFollows(TrainerCallback):
    """Moves the anchor after every optimizer step, before anything is saved."""

    def __init__(self, anchor: Anchor):
        self.anchor = anchor

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.anchor.follow()
