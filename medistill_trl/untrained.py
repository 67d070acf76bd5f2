"""What a student answers before it has learnt anything: the same in every run, so written once, like the teacher's
completions."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from medistill_trl.inputs import student_identity
from medistill_trl.model_source import ModelSource
from medistill_trl.prompts import PromptFormat
from medistill_trl.setting import Setting
from medistill_trl.teacher import Completion, Sampling, complete
from medistill_trl.writer import Writer


@dataclass(frozen=True)
class UntrainedStudent(Writer):
    """A student as the completion store asks it: without its adapter, which changes nothing until it is trained.

    Args:
        model: A `PeftModel` or a plain one, neither trained yet.
        form: Its prompt format.
        identity: Names its exact weights, dtype, quantisation and whether it writes under autocast.
        autocast: It writes under bfloat16 autocast.
    """

    model: PreTrainedModel
    form: PromptFormat
    identity: str
    autocast: bool

    @classmethod
    def of(cls, setting: Setting, source: ModelSource) -> "UntrainedStudent":
        """Of a run before training.

        Args:
            source: Of the student.
        """
        autocast = setting.heldout.autocast
        identity = student_identity(source, setting.arguments.student)
        identity += " autocast" if autocast else ""
        return cls(setting.student, setting.form, identity, autocast)

    def complete(
        self, prompts: Sequence[str], sampling: Sampling, seed: int = 0
    ) -> list[Completion]:
        model = self.model
        plain = model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()
        with plain, torch.autocast(model.device.type, torch.bfloat16, enabled=self.autocast):
            return complete(model, self.form, prompts, sampling, seed)


def untrained_answers(setting: Setting, source: ModelSource) -> list[str]:
    """What `HeldoutCheck.examples` gives before training, by way of the completion store.

    Args:
        source: Of the student.
    """
    args = setting.arguments.teacher
    drawn = setting.store.draw(
        UntrainedStudent.of(setting, source),
        setting.heldout.example_prompts(),
        Sampling(args.teacher_max_new_tokens),
        batch_size=args.teacher_batch_size,
        label="answers before training",
    )
    return [samples[0].text for samples in drawn]
