"""Logit-KD from what is kept of the teacher's distributions: a step is the student's alone."""

from dataclasses import dataclass

import torch

from medistill_trl.losses.comparisons import TopKComparison
from medistill_trl.losses.heads import OutputHead
from medistill_trl.losses.span_kl import Reading
from medistill_trl.losses.token_kl import completion_states
from medistill_trl.losses.top_k import TopK
from medistill_trl.methods.logit_kd.trainer import LogitKDTrainer
from medistill_trl.pairs import PairCollator
from medistill_trl.prompts import IGNORED
from medistill_trl.teacher_logits import TeacherLogits


class StoredLogitKDTrainer(LogitKDTrainer):
    """`LogitKDTrainer` with what is kept of the teacher's distributions in place of the teacher.

    Args:
        logits: Of the examples, which hold their key as `top_k`.
    """

    asks_teacher = False

    def __init__(self, *args, logits: TeacherLogits, **kwargs):
        super().__init__(*args, **kwargs)
        self.data_collator = TopKCollator(self.data_collator, logits)

    def _comparison(self, student, hidden_BTH, inputs):
        states_NH, targets_N = completion_states(hidden_BTH, inputs["labels"])
        return TopKComparison(
            Reading(states_NH, targets_N, OutputHead.of(student)),
            TopK(*(inputs[f"teacher_{name}"] for name in TopK._fields)),
            inputs["compared"][:, 1:][inputs["labels"][:, 1:] != IGNORED],
            self.writer.shared,
            self.args.loss_chunk_size,
        )


@dataclass(frozen=True)
class TopKCollator:
    """Adds what is kept of the teacher to a batch of encoded pairs: `teacher_ids` (N, K) and so on.

    Args:
        pairs: Pads them; rows that are not encoded yet it leaves as they are.
    """

    pairs: PairCollator
    logits: TeacherLogits

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor] | list[dict]:
        batch = self.pairs(rows)
        if batch is rows:
            return rows
        top_k = self.logits.batch([row["top_k"] for row in rows])
        return batch | {f"teacher_{name}": column for name, column in top_k._asdict().items()}
