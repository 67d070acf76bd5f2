"""What attention transfer does with a micro-batch, for the memory plan.

Shapes: B examples, T tokens of one.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig, TrainingArguments

from medistill_trl.layers import pairs_of, run_through
from medistill_trl.losses.attention import AttentionInputs, attention_loss
from medistill_trl.memory.losses import CrossEntropy, cross_entropy
from medistill_trl.memory.step import LOSS, TEACHER, Step
from medistill_trl.methods.attention.capture import captured_attention


@dataclass(frozen=True)
class AttentionMemory(CrossEntropy):
    """What the mapped layers of both models attend with, and rows of their maps (`losses.attention`).

    Args:
        relation_heads: From config, student and teacher to R.
    """

    relation_heads: Callable[
        [TrainingArguments, PretrainedConfig, PretrainedConfig], int | None
    ] = None

    def pairs(self, arguments, student, teacher):
        return pairs_of(arguments.training, student.get_text_config(), teacher.get_text_config())

    def loss(self, step, rows):
        args, inputs = step.arguments.training, step.inputs(rows)
        configs = [model.config.get_text_config() for model in (step.student, step.teacher)]
        theirs = self._teacher_attention(step, inputs) if args.alpha > 0 else []
        with captured_attention(step.student, [layer for layer, _ in step.pairs]) as seen:
            hidden_BTH = step.student_hidden(inputs)
        loss = 0.0
        with step.meter.label(LOSS):
            ours = [seen[layer].inputs() for layer, _ in step.pairs]
        if args.alpha < 1:
            loss = cross_entropy(step, hidden_BTH, inputs["labels"])
        counted = inputs["labels"] if args.attention_rows == "completion" else None
        rows_BT = inputs["attention_mask"].bool() if counted is None else counted >= 0
        with step.meter.label(LOSS):
            for own, its in zip(ours, theirs, strict=True):
                loss = loss + attention_loss(
                    own, its, rows_BT, inputs["attention_mask"].bool(),
                    kind=args.attention_loss,
                    mean_heads=not args.match_all_heads,
                    relation_heads=self.relation_heads(args, *configs),
                    chunk_size=args.attention_chunk_size,
                )  # fmt: skip
        return loss

    @torch.no_grad()
    def _teacher_attention(self, step: Step, inputs: dict) -> list[AttentionInputs]:
        layers = [layer for _, layer in step.pairs]
        with step.meter.label(TEACHER):
            with captured_attention(step.teacher, layers) as seen:
                run_through(
                    step.teacher, max(layers), inputs["input_ids"], inputs["attention_mask"]
                )
            return [seen[layer].inputs() for layer in layers]
