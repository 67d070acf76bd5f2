"""Distillation from the k likeliest tokens of the teacher and the probability of all others together.

    L = Σ_t (1−α) CE_t + α w_t T² D(p_T, p_S; T)_t

as in `token_kl`, but D is between two distributions over k + 1 outcomes: the teacher's k likeliest tokens, and
the *tail*, any other token. Both are softened over the whole vocabulary first, so that nothing is renormalised over
what was kept. For the forward KL the chain rule says what is lost:

    D over the vocabulary − D over k + 1 outcomes = Q · KL(q ‖ p)

with Q the teacher's probability of the tail at temperature T, and q, p the two models' distributions within it. So it
is never more than the whole divergence, and equal to it where nothing is in the tail. Within the tail the student
keeps its own proportions:

    ∂D/∂u_v = ∂D/∂(log P) · p_v / P,   P the student's probability of the tail

Sums for the log are those of `token_kl`; `kl`, `divergence` and `teacher_entropy` are over the k + 1 outcomes, and
`teacher_tail_mass` is the teacher's probability of the tail at temperature 1.

Shapes: N completion tokens of the batch, R tokens of a block, K kept tokens, V shared vocabulary, X temperatures.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from medistill_trl.losses.chunked import CHUNK_SIZE, Side, token_sum
from medistill_trl.losses.divergences import Distribution, Divergence, forward_kl
from medistill_trl.losses.heads import OutputHead
from medistill_trl.losses.token_kl import sums_for_log, temperature_per_token, validate
from medistill_trl.losses.token_terms import Objective


class TopK(NamedTuple):
    """What is kept of a teacher's next-token distributions.

    Args:
        ids: (N, K), the likeliest tokens, likeliest first.
        log_probs: (N, K), their log-probabilities over the shared vocabulary at temperature 1, nats.
        log_tails: (N, X), log Σ p^(1/T) over all other tokens of the vocabulary, p at temperature 1, for each
            temperature T it was made for: 1 is the first, the loss's the last, and if that is 1 there is one.
            Of an empty tail any number below −80.
    """

    ids: torch.Tensor
    log_probs: torch.Tensor
    log_tails: torch.Tensor

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "TopK":
        """The same change to all three."""
        return TopK(*map(change, self))

    def outcomes(self, temperature_R1: torch.Tensor | None) -> Distribution:
        """The teacher over K + 1 outcomes, the tail last; at the loss's temperature, or None for 1."""
        if temperature_R1 is None:
            kept_RK, tail_R1 = self.log_probs, self.log_tails[:, :1]
        else:
            kept_RK, tail_R1 = self.log_probs / temperature_R1, self.log_tails[:, -1:]
        return Distribution.of(torch.cat([kept_RK, tail_R1], 1))


def largest(logits_CV: torch.Tensor, top_k: int, temperatures: Sequence[float]) -> TopK:
    """What is kept of these logits; overwrites them.

    Args:
        logits_CV: (C, V), float32 or wider.
        top_k: K, at most V.
        temperatures: As in `TopK`: 1 first.
    """
    logits_CV -= logits_CV.logsumexp(-1, keepdim=True)
    kept = logits_CV.topk(top_k)
    logits_CV.scatter_(1, kept.indices, float("-inf"))
    floor = torch.finfo(torch.float32).tiny  # of an empty tail the logarithm stays finite
    tails = [(logits_CV / t).exp_().sum(-1).clamp_min_(floor).log_() for t in temperatures]
    return TopK(kept.indices, kept.values, torch.stack(tails, 1))


@dataclass(frozen=True)
class TopKObjective(Objective):
    """`Objective` with what is kept of the teacher in place of its logits.

    Args:
        teacher: Of all N tokens.
    """

    teacher: TopK | None = None

    @property
    def names(self) -> list[str]:
        names = super().names
        return [*names, "teacher_tail_mass"] if "kl" in names else names

    def compare(self, student, teacher_RV, tokens, terms):
        teacher = self.teacher.each(lambda tensor: tensor[tokens])
        temperature_R1 = self._temperature(tokens, student, None)
        terms["temperature"][tokens] = 1 if temperature_R1 is None else temperature_R1[:, 0]
        if "kl" in terms:
            self._record_kept(student, teacher, tokens, terms)
        if temperature_R1 is None:  # the cross-entropy needs the student's probabilities whole
            softened = student._replace(probs=student.probs.clone())
        else:
            softened = student.softened(temperature_R1)
        ours, tail_R1 = fold(softened, teacher.ids)
        theirs = teacher.outcomes(temperature_R1)
        terms["divergence"][tokens], gradient_RK = self.divergence(ours, theirs)
        gradient_RK.mul_(self.divergence_factor(tokens, temperature_R1))
        tiny = torch.finfo(tail_R1.dtype).tiny
        gradient_RV = softened.probs.mul_(gradient_RK[:, -1:] / tail_R1.clamp_min(tiny))
        return gradient_RV.scatter_(1, teacher.ids, gradient_RK[:, :-1])

    def _record_kept(
        self, student: Distribution, teacher: TopK, tokens: slice, terms: dict[str, torch.Tensor]
    ) -> None:
        """What the log gets of the two at temperature 1."""
        kept_RK = student.probs.gather(1, teacher.ids)
        ours, _ = fold(student, teacher.ids)
        student.probs.scatter_(1, teacher.ids, kept_RK)
        theirs = teacher.outcomes(None)
        terms["teacher_entropy"][tokens] = entropy_R = theirs.entropy()
        terms["kl"][tokens] = ours.cross_entropy(theirs) - entropy_R
        terms["teacher_tail_mass"][tokens] = theirs.probs[:, -1]
        # Shifted logits are 0 at the likeliest token.
        same_R = student.shifted.gather(1, teacher.ids[:, :1])[:, 0] == 0
        terms["agreed"][tokens] = same_R.to(entropy_R.dtype)


def fold(student: Distribution, ids_RK: torch.Tensor) -> tuple[Distribution, torch.Tensor]:
    """The student over K + 1 outcomes, the tail last, and its probability of the tail, (R, 1).

    Leaves 0 in `student.probs` at the kept tokens: added up like this a small tail keeps its digits, which it would
    not as 1 minus the kept.
    """
    kept_RK = student.shifted.gather(1, ids_RK) - student.log_norm
    tail_R1 = student.probs.scatter_(1, ids_RK, 0).sum(-1, keepdim=True)
    log_tail_R1 = tail_R1.clamp_min(torch.finfo(tail_R1.dtype).tiny).log_()
    return Distribution.of(torch.cat([kept_RK, log_tail_R1], 1)), tail_R1


def top_k_distillation_loss(
    student_hidden_NH: torch.Tensor,
    targets_N: torch.Tensor,
    student_head: OutputHead,
    teacher: TopK,
    *,
    alpha: float,
    temperature: float = 1.0,
    divergence: Divergence = forward_kl,
    divergence_weights_N: torch.Tensor | None = None,
    vocab_size: int | None = None,
    chunk_size: int = CHUNK_SIZE,
    metrics: bool = True,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """`token_kl.distillation_loss` from what is kept of the teacher, which takes the place of its states and head.

    Args:
        teacher: Of the N tokens, over the same `vocab_size` tokens, made for this temperature.
        temperature: One for all tokens: the tail is known at no other.

    Raises:
        ValueError: arguments out of range, or that do not fit each other.
    """
    student = Side.of(student_hidden_NH, student_head, vocab_size)
    teacher = TopK(
        teacher.ids.long(), teacher.log_probs.to(student.dtype), teacher.log_tails.to(student.dtype)
    )
    objective = TopKObjective(
        alpha,
        divergence,
        temperature_per_token(temperature, targets_N, student.dtype),
        divergence_weights_N,
        metrics=metrics,
        teacher=teacher,
    )
    validate(objective, [len(student_hidden_NH), len(targets_N), *map(len, teacher)], chunk_size)
    loss, terms = token_sum(objective, student, targets_N, None, chunk_size)
    sums = sums_for_log(terms, temperature) if metrics else {}
    sums["tokens"] = torch.tensor(float(len(targets_N)), device=loss.device)
    return loss, sums
