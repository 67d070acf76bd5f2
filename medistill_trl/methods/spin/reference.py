"""The previous iterate: a second, frozen adapter beside the one in training, or a frozen copy of the model.

Disabling the adapter would give the start policy instead, which is the previous iterate in the first
iteration only.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_model, save_model
from torch import nn
from transformers import PreTrainedModel
from trl.trainer.utils import use_adapter

from medistill_trl.checkpoints import adapter_files

ADAPTER = "ref"  # the name DPOTrainer gives it
WEIGHTS = "reference.safetensors"  # in a checkpoint, where all weights are trained


def for_constructor(student: PreTrainedModel, wanted: bool) -> nn.Module | None:
    """What `DPOTrainer`'s constructor is given as `ref_model`.

    None makes it copy a student's adapter into a frozen second one. For a student without an adapter it
    would load the reference anew from the student's source, which a pruned student has not; that gets a
    copy. Where no reference is wanted, an empty module keeps it from making one.
    """
    if not wanted:
        return nn.Module()
    if isinstance(student, PeftModel):
        return None
    return copy.deepcopy(student).requires_grad_(False).eval()


class PreviousIterate:
    """The reference of one trainer.

    Args:
        student: The model in training, unwrapped.
        model: The frozen copy where all weights are trained; None for the second adapter.
    """

    def __init__(self, student: PreTrainedModel, model: PreTrainedModel | None):
        self.student = student
        self.model = model
        for policy, reference in self._parameters():
            # TRL casts the adapter in training to bfloat16 if the student is quantised, and this one not.
            reference.data = reference.data.to(policy.dtype)

    def _parameters(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        if self.model is not None:
            return list(zip(self.student.parameters(), self.model.parameters(), strict=True))
        return [
            (parameter, self.student.get_parameter(name.replace(".default.", f".{ADAPTER}.")))
            for name, parameter in self.student.named_parameters()
            if ".default." in name
        ]

    def weights(self) -> list[torch.Tensor]:
        """Its weights, in the order of the student's trainable parameters."""
        return [reference.data for _, reference in self._parameters()]

    def follow(self) -> None:
        """Make the policy as it is now the reference."""
        for policy, reference in self._parameters():
            reference.data.copy_(policy.data)

    @contextmanager
    def in_place(self) -> Iterator[nn.Module]:
        """The model to run for the reference's predictions, within the block."""
        if self.model is not None:
            yield self.model
            return
        with use_adapter(self.student, ADAPTER):
            yield self.student

    def save(self, folder: Path) -> None:
        """Put it beside a checkpoint's weights. The second adapter is saved with the first."""
        if self.model is not None:
            save_model(self.model, folder / WEIGHTS)

    def files(self) -> set[str]:
        """What of it a checkpoint holds."""
        return {WEIGHTS} if self.model is not None else adapter_files(ADAPTER)

    def load(self, folder: Path) -> None:
        """Undo of `save`; the second adapter was loaded with the first."""
        if self.model is not None:
            load_model(self.model, folder / WEIGHTS)
