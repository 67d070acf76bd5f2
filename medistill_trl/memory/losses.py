"""What methods do with a micro-batch, for the memory plan: by the functions that train.

A method names its own in `METHOD`; those of one method alone stand in its folder. What the trainer does around
these functions is done again in few lines, in its order, since what is alive at a time depends on it.

Shapes: B examples, T tokens of one, N completion tokens of all, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig

from medistill_trl.heldout import compare_logits
from medistill_trl.losses import token_kl
from medistill_trl.losses.heads import OutputHead
from medistill_trl.losses.overlap import Fold, Side
from medistill_trl.losses.policy import policy_loss
from medistill_trl.losses.span_kl import Reading, SpanBatch, span_distillation_loss
from medistill_trl.losses.token_kl import distillation_loss
from medistill_trl.memory.step import LOSS, STUDENT, TEACHER, Step
from medistill_trl.rollouts import longest_completion
from medistill_trl.setting import Arguments
from medistill_trl.teacher import completion_log_probs, completion_logits

# Vocabularies that differ by more are planned as those of different tokenizers; padding of embeddings is less.
SAME_VOCABULARY = 0.05


@dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy; and what the others change.

    Args:
        evaluates: Whether `Trainer` takes the loss of held-out examples too.
    """

    evaluates: bool = True

    def modules(
        self, arguments: Arguments, student: PretrainedConfig, teacher: PretrainedConfig
    ) -> dict[str, nn.Module]:
        """Trained besides the student, on the meta device, by the name they have in the plan."""
        return {}

    def copies(self, arguments: Arguments) -> dict[str, int]:
        """Frozen copies of what is trained: name in the plan → bytes of a number, 0 for as many as it has."""
        return {}

    def completion_tokens(self, arguments: Arguments) -> int:
        """Of the longest completion that is trained on."""
        return arguments.teacher.teacher_max_new_tokens

    def trained_rows(self, arguments: Arguments, rows: int) -> int:
        """Of micro-batches of so many rows, those that are trained on, at most."""
        return rows

    def student_rows(self, arguments: Arguments) -> int:
        """Prompts the student answers at a time; 0 where it writes nothing."""
        return 0

    def writes_online(self, arguments: Arguments) -> bool:
        """Whether the teacher answers a whole accumulation window while training."""
        return arguments.teacher.teacher_completions == "online"

    def pairs(
        self, arguments: Arguments, student: PretrainedConfig, teacher: PretrainedConfig
    ) -> list[tuple[int, int]]:
        """Layers that are compared."""
        return []

    def loss(self, step: Step, rows: int) -> torch.Tensor:
        """Of a micro-batch.

        Args:
            rows: Examples.
        """
        inputs = step.inputs(rows)
        return cross_entropy(step, step.student_hidden(inputs), inputs["labels"])

    def score(self, step: Step) -> None:
        """What is read without gradients: here the held-out check, a completion at a time."""
        example = step.example()
        prompt, completion = (
            example["input_ids"][: step.lengths.prompt],
            example["input_ids"][step.lengths.prompt :],
        )
        with step.meter.label(TEACHER):
            teacher_logits = completion_logits(step.teacher, prompt, completion)
        with step.meter.label(STUDENT), step.autocast():
            student_logits = completion_logits(step.student, prompt, completion)
        shared = min(teacher_logits.shape[1], student_logits.shape[1])
        targets = torch.ones(len(completion), dtype=torch.long)
        with step.meter.label(LOSS):
            compare_logits(student_logits[:, :shared], teacher_logits[:, :shared], targets)


@dataclass(frozen=True)
class Distillation(CrossEntropy):
    """Both models' logits a chunk at a time (`losses.token_kl`, `losses.span_kl`)."""

    def student_rows(self, arguments):
        rows = window(arguments) if arguments.training.lmbda > 0 else 0
        return min(rows, arguments.teacher.teacher_batch_size or rows)

    def loss(self, step, rows):
        inputs = step.inputs(rows)
        ours = Reading(*step.student_states(inputs), step.student_head)
        theirs = Reading(*step.teacher_states(inputs), OutputHead.of(step.teacher))
        alpha, chunk = step.arguments.training.alpha, step.arguments.training.loss_chunk_size
        sizes = sorted(m.config.get_text_config().vocab_size for m in (step.student, step.teacher))
        with step.meter.label(LOSS), step.autocast():
            if sizes[0] < sizes[1] * (1 - SAME_VOCABULARY):
                fold = Fold(_shared(sizes[0]), _shared(sizes[0]))
                return span_distillation_loss(
                    ours, theirs, _spans(len(ours.tokens)), fold,
                    alpha=alpha, temperature=2.0, chunk_size=chunk,
                )[0]  # fmt: skip
            return distillation_loss(
                ours.states, ours.tokens, ours.head, theirs.states, theirs.head,
                alpha=alpha, temperature=2.0, vocab_size=sizes[0], chunk_size=chunk,
                divergence_weights_N=torch.ones(len(ours.tokens)),
            )[0]  # fmt: skip


def _shared(count: int) -> Side:
    none = torch.zeros(0, dtype=torch.long)
    return Side(torch.arange(count), none, none, count)


def _spans(tokens: int) -> SpanBatch:
    """As if every token were a span of its own."""
    starts = torch.arange(tokens)
    spans_G4 = torch.stack([starts, starts + 1, starts, starts + 1], 1)
    return SpanBatch(spans_G4, torch.ones(tokens, dtype=torch.bool))


def cross_entropy(step: Step, hidden_BTH: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Of `losses.token_kl` without a teacher."""
    chunk = step.arguments.training.loss_chunk_size
    with step.meter.label(LOSS), step.autocast():
        return token_kl.cross_entropy(hidden_BTH, labels_BT, step.student_head, chunk)[0]


@dataclass(frozen=True)
class Policy(CrossEntropy):
    """The student's own samples (`losses.policy`), which the teacher reads (`rewards`)."""

    evaluates: bool = False

    def student_rows(self, arguments):
        rows = self.samples(arguments)
        return min(rows, arguments.teacher.teacher_batch_size or rows)

    def completion_tokens(self, arguments):
        return longest_completion(arguments)

    def samples(self, arguments: Arguments) -> int:
        """Drawn together on each process."""
        return window(arguments)

    def writes_online(self, arguments):
        return False

    def loss(self, step, rows):
        states_NH, tokens_N = step.student_states(step.inputs(rows))
        with step.meter.label(LOSS), step.autocast():
            return self.objective(step, states_NH, tokens_N)

    def objective(
        self, step: Step, states_NH: torch.Tensor, tokens_N: torch.Tensor
    ) -> torch.Tensor:
        args = step.arguments.training
        return policy_loss(
            states_NH,
            tokens_N,
            step.student_head,
            torch.ones(len(tokens_N)),
            entropy_coef=args.entropy_coef,
            chunk_size=args.loss_chunk_size,
        )[0]

    def score(self, step):
        super().score(step)
        chunk = step.arguments.training.loss_chunk_size
        examples = [step.example()] * step.rows
        sides = ((STUDENT, step.student), (TEACHER, step.teacher))
        for label, model in sides:
            with step.meter.label(label), step.autocast():
                completion_log_probs(model, examples, batch_size=step.rows, chunk_size=chunk)


def window(arguments: Arguments) -> int:
    """Examples of an accumulation window on each process."""
    args = arguments.training
    return args.per_device_train_batch_size * args.gradient_accumulation_steps
