"""What FitNets does with a micro-batch, for the memory plan.

Shapes: B examples, T tokens of one, N completion tokens of all, G the student's hidden size, H the teacher's.
"""

from dataclasses import dataclass

import torch
from torch import nn

from medistill_trl.layers import captured, pairs_of, run_through
from medistill_trl.losses.features import FeatureLoss
from medistill_trl.losses.token_kl import completion_states
from medistill_trl.memory.losses import CrossEntropy, cross_entropy
from medistill_trl.memory.step import LOSS, TEACHER, Step


@dataclass(frozen=True)
class FeatureMemory(CrossEntropy):
    """States of the mapped layers of both models, and the projections between them (`losses.features`)."""

    def modules(self, arguments, student, teacher):
        if not arguments.training.projects:
            return {}
        widths = student.get_text_config().hidden_size, teacher.get_text_config().hidden_size
        count = len(self.pairs(arguments, student, teacher))
        with torch.device("meta"):
            return {"projections": nn.ModuleList(nn.Linear(*widths) for _ in range(count))}

    def pairs(self, arguments, student, teacher):
        return pairs_of(arguments.training, student.get_text_config(), teacher.get_text_config())

    def loss(self, step, rows):
        args, inputs = step.arguments.training, step.inputs(rows)
        theirs = self._teacher_states(step, inputs)
        with captured(step.student, [layer for layer, _ in step.pairs]) as states:
            hidden_BTH = step.student_hidden(inputs)
        ours = [completion_states(states[layer], inputs["labels"])[0] for layer, _ in step.pairs]
        distance, loss = FeatureLoss(args.feature_loss), 0.0
        with step.meter.label(LOSS):
            for n, (own_NG, its_NH) in enumerate(zip(ours, theirs, strict=True)):
                if args.projects:
                    own_NG = step.student.get_submodule("projections")[n](own_NG.float())
                loss = loss + distance.token_sum(own_NG, its_NH)
        if args.alpha < 1:
            loss = loss + cross_entropy(step, hidden_BTH, inputs["labels"])
        return loss

    @torch.no_grad()
    def _teacher_states(self, step: Step, inputs: dict) -> list[torch.Tensor]:
        layers = [layer for _, layer in step.pairs]
        with step.meter.label(TEACHER):
            with captured(step.teacher, layers) as states:
                run_through(
                    step.teacher, max(layers), inputs["input_ids"], inputs["attention_mask"]
                )
            return [completion_states(states[layer], inputs["labels"])[0] for layer in layers]
