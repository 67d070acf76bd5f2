"""What SPIN does with a micro-batch, for the memory plan.

Shapes: R completions, two of each of B examples, T tokens of one, H hidden size.
"""

from dataclasses import dataclass

import torch

from medistill_trl.losses.preference import PairValues, sequence_log_probs, spin_loss
from medistill_trl.memory.losses import CrossEntropy
from medistill_trl.memory.step import LOSS, Step


@dataclass(frozen=True)
class PreferenceMemory(CrossEntropy):
    """Two completions of each prompt, read by the policy and its reference (`losses.preference`)."""

    evaluates: bool = False

    def copies(self, arguments):
        return {"reference": 0} if arguments.training.reference == "previous" else {}

    def completion_tokens(self, arguments):
        own = arguments.training.max_new_tokens or 0
        return max(own, super().completion_tokens(arguments))

    def student_rows(self, arguments):
        most = arguments.training.generation_batch_size
        return min(most, arguments.teacher.teacher_batch_size or most)

    def loss(self, step, rows):
        inputs = step.inputs(2 * rows)
        before = None
        if step.arguments.training.reference == "previous":
            with torch.no_grad():
                before = self._log_probs(step, inputs)
        losses_B, _ = spin_loss(self._log_probs(step, inputs), before, 0.1)
        return losses_B.sum()

    def _log_probs(self, step: Step, inputs: dict) -> PairValues:
        hidden_RTH = step.student_hidden(inputs)
        mask_RT = (inputs["labels"] >= 0).long()
        chunk = step.arguments.training.loss_chunk_size
        with step.meter.label(LOSS), step.autocast():
            log_probs_R = sequence_log_probs(
                hidden_RTH, inputs["input_ids"], mask_RT, step.student_head, chunk
            )
        return PairValues(*log_probs_R.chunk(2))
