"""What SPIN does with a micro-batch, for the memory plan.

Shapes: R completions, two of each of B examples, T tokens of one, V vocabulary.
"""

from dataclasses import dataclass

import torch

from medistill_trl.losses.preference import PairValues, sequence_log_probs, spin_loss
from medistill_trl.memory.losses import CrossEntropy
from medistill_trl.memory.step import LOSS, STUDENT, Step


@dataclass(frozen=True)
class PreferenceMemory(CrossEntropy):
    """Two completions of each prompt with logits of the completions, of the policy and of its reference (`losses.preference`)."""

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
        kept = step.lengths.completion + 1  # logits from the last token of the prompts on
        with step.meter.label(STUDENT):
            step.mark_moments()
            logits_RTV = step.student(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                logits_to_keep=kept,
                use_cache=False,
            ).logits
        with step.meter.label(LOSS):
            mask_RT = (inputs["labels"] >= 0).long()
            ids_RT = inputs["input_ids"]
            log_probs = sequence_log_probs(logits_RTV, ids_RT[:, -kept:], mask_RT[:, -kept:])
        return PairValues(*log_probs.chunk(2))
