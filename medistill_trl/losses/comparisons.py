"""A batch's completions as student and teacher read them, ready to be compared: token by token where they
share a tokenizer, span by span where they do not. A trainer asks either for the same things.

Shapes: B examples, N student tokens, M teacher tokens, G spans, C what is compared: N or G.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from medistill_trl.losses.divergences import Divergence
from medistill_trl.losses.overlap import Fold
from medistill_trl.losses.span_kl import Reading, SpanBatch, span_distillation_loss, span_scores
from medistill_trl.losses.token_kl import distillation_loss, token_scores
from medistill_trl.losses.token_terms import TemperatureRule
from medistill_trl.losses.top_k import TopK, top_k_distillation_loss


class Comparison(Protocol):
    """What two models say of the same completions."""

    student: Reading

    def of_examples(self, chosen_B: torch.Tensor) -> "Comparison":
        """The same of some examples, (B,) bool."""

    def scores(self, score: str) -> torch.Tensor:
        """How far they are apart, (C,), see `token_scores`."""

    def loss(
        self,
        alpha: float,
        temperature: float | torch.Tensor | TemperatureRule,
        divergence: Divergence,
        weights_C: torch.Tensor | None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """A sum over the student's tokens, and sums for the log, see `distillation_loss`."""


@dataclass(frozen=True)
class TokenComparison:
    """Of models with the same tokenizer.

    Args:
        student, teacher: The same tokens, N = M.
        compared_N: 0 where the cross-entropy alone counts.
        counts_B: Completion tokens of each example.
        vocab_size: Tokens the models share.
        chunk_size: Tokens whose logits exist at a time.
    """

    student: Reading
    teacher: Reading
    compared_N: torch.Tensor
    counts_B: torch.Tensor
    vocab_size: int
    chunk_size: int

    def of_examples(self, chosen_B: torch.Tensor) -> "TokenComparison":
        rows_N = chosen_B.repeat_interleave(self.counts_B)
        return TokenComparison(
            self.student.rows(rows_N),
            self.teacher.rows(rows_N),
            self.compared_N[rows_N],
            self.counts_B[chosen_B],
            self.vocab_size,
            self.chunk_size,
        )

    def scores(self, score: str) -> torch.Tensor:
        return token_scores(
            self.student.states,
            self.teacher.states,
            self.student.head,
            self.teacher.head,
            score=score,
            vocab_size=self.vocab_size,
            chunk_size=self.chunk_size,
        )

    def loss(self, alpha, temperature, divergence, weights_C):
        weights_N = self.compared_N.float()
        return distillation_loss(
            self.student.states,
            self.student.tokens,
            self.student.head,
            self.teacher.states,
            self.teacher.head,
            alpha=alpha,
            temperature=temperature,
            divergence=divergence,
            divergence_weights_N=weights_N if weights_C is None else weights_C * weights_N,
            vocab_size=self.vocab_size,
            chunk_size=self.chunk_size,
        )


@dataclass(frozen=True)
class TopKComparison:
    """Of models with the same tokenizer, where of the teacher the likeliest tokens are kept. All examples are compared
    at one temperature: it has neither scores nor parts.

    Args:
        student: N tokens.
        teacher: Of the same tokens.
        compared_N, vocab_size, chunk_size: As in `TokenComparison`.
    """

    student: Reading
    teacher: TopK
    compared_N: torch.Tensor
    vocab_size: int
    chunk_size: int

    def loss(self, alpha, temperature, divergence, weights_C):
        return top_k_distillation_loss(
            self.student.states,
            self.student.tokens,
            self.student.head,
            self.teacher,
            alpha=alpha,
            temperature=temperature,
            divergence=divergence,
            divergence_weights_N=self.compared_N.float(),
            vocab_size=self.vocab_size,
            chunk_size=self.chunk_size,
        )


@dataclass(frozen=True)
class SpanComparison:
    """Of models with different tokenizers.

    Args:
        student, teacher: The same completions in N and in M tokens.
        batch: Their spans.
        counts_B2: Completion tokens of each example, for either side.
        fold: The outcomes the vocabularies share.
        chunk_size: Tokens whose logits exist at a time.
    """

    student: Reading
    teacher: Reading
    batch: SpanBatch
    counts_B2: torch.Tensor
    fold: Fold
    chunk_size: int

    def of_examples(self, chosen_B: torch.Tensor) -> "SpanComparison":
        masks = [chosen_B.repeat_interleave(count_B) for count_B in self.counts_B2.unbind(1)]
        # Rows that are left before each row: where a span's boundaries have moved to.
        before = [torch.nn.functional.pad(mask.long().cumsum(0), (1, 0)) for mask in masks]
        kept_G = masks[0][self.batch.spans_G4[:, 0]]
        columns = self.batch.spans_G4[kept_G].unbind(1)
        moved = [before[side][column] for side, column in zip((0, 0, 1, 1), columns, strict=True)]
        return SpanComparison(
            self.student.rows(masks[0]),
            self.teacher.rows(masks[1]),
            SpanBatch(torch.stack(moved, 1), self.batch.one_to_one_G[kept_G]),
            self.counts_B2[chosen_B],
            self.fold,
            self.chunk_size,
        )

    def scores(self, score: str) -> torch.Tensor:
        return span_scores(
            self.student,
            self.teacher,
            self.batch,
            self.fold,
            score=score,
            chunk_size=self.chunk_size,
        )

    def loss(self, alpha, temperature, divergence, weights_C):
        return span_distillation_loss(
            self.student,
            self.teacher,
            self.batch,
            self.fold,
            alpha=alpha,
            temperature=temperature,
            divergence=divergence,
            weights_G=weights_C,
            chunk_size=self.chunk_size,
        )
