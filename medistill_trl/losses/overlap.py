"""Two next-token distributions over different vocabularies, brought to the outcomes they share.

The probabilities of the tokens that count for one outcome are added; the tail, of which no token is shared, is the
last outcome. Tokens without an outcome are left out and the others renormalised. Adding is done at temperature 1,
where a text's probability does not depend on how it is cut; a temperature then softens the distribution over the
outcomes.

Shapes: R tokens (rows), V a side's own vocabulary, K outcomes, S of them shared tokens.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from medistill_trl.losses.divergences import Distribution
from medistill_trl.overlap import Overlap


@dataclass(frozen=True)
class Side:
    """One vocabulary's way to the outcomes.

    Args:
        shared_S: The token each outcome but the tail is named by.
        others_X: Further tokens that count for an outcome.
        outcomes_X: Which.
        num_outcomes: K.
    """

    shared_S: torch.Tensor
    others_X: torch.Tensor
    outcomes_X: torch.Tensor
    num_outcomes: int

    @classmethod
    def of(
        cls, shared: list[int], outcomes: dict[int, int], num_outcomes: int, device: torch.device
    ) -> "Side":
        others = sorted(outcomes.keys() - set(shared))
        columns = shared, others, [outcomes[id] for id in others]
        tensors = (torch.tensor(c, dtype=torch.long, device=device) for c in columns)
        return cls(*tensors, num_outcomes)

    def fold(self, probs_RV: torch.Tensor) -> torch.Tensor:
        """(R, K), before it is renormalised."""
        folded_RK = probs_RV.index_select(1, self.shared_S)
        if self.num_outcomes > len(self.shared_S):
            folded_RK = F.pad(folded_RK, (0, 1))
        if len(self.others_X):
            folded_RK.index_add_(1, self.outcomes_X, probs_RV.index_select(1, self.others_X))
        return folded_RK

    def mass(self, probs_RV: torch.Tensor) -> torch.Tensor:
        """Probability of all tokens that have an outcome, (R,)."""
        named_R = probs_RV.index_select(1, self.shared_S).sum(-1)
        return named_R + probs_RV.index_select(1, self.others_X).sum(-1)

    def unfold(self, factor_RK: torch.Tensor, probs_RV: torch.Tensor) -> torch.Tensor:
        """Each token's probability times its outcome's factor, 0 without an outcome, (R, V)."""
        factor_RV = torch.zeros_like(probs_RV)
        factor_RV.index_copy_(1, self.shared_S, factor_RK[:, : len(self.shared_S)])
        if len(self.others_X):
            factor_RV.index_copy_(1, self.others_X, factor_RK.index_select(1, self.outcomes_X))
        return factor_RV.mul_(probs_RV)


@dataclass(frozen=True)
class Fold:
    """Both vocabularies' way."""

    student: Side
    teacher: Side

    @classmethod
    def of(cls, overlap: Overlap, device: torch.device | str = "cpu") -> "Fold":
        sides = (
            (overlap.student_ids, overlap.student_outcomes),
            (overlap.teacher_ids, overlap.teacher_outcomes),
        )
        return cls(*(Side.of(*side, overlap.num_outcomes, device) for side in sides))

    def fold(
        self, student: Distribution, teacher: Distribution
    ) -> tuple[Distribution, Distribution]:
        """Both over the K outcomes."""
        return (
            _from_probs(self.student.fold(student.probs)),
            _from_probs(self.teacher.fold(teacher.probs)),
        )

    def unfold(
        self, gradient_RK: torch.Tensor, folded: Distribution, student: Distribution
    ) -> torch.Tensor:
        """The gradient in the logits over the outcomes as one in the student's own, (R, V).

        An outcome's logit is the log-sum-exp of its tokens', so each token gets its share of it.
        """
        tiny = torch.finfo(folded.probs.dtype).tiny
        mass_R1 = self.student.mass(student.probs)[:, None]
        factor_RK = gradient_RK / (folded.probs * mass_R1).clamp_min_(tiny)
        return self.student.unfold(factor_RK, student.probs)

    def teacher_mass(self, teacher: Distribution) -> torch.Tensor:
        """Probability of the shared tokens themselves, (R,)."""
        return teacher.probs.index_select(1, self.teacher.shared_S).sum(-1)


def _from_probs(probs_RK: torch.Tensor) -> Distribution:
    """Renormalised; an outcome whose probability underflows keeps a finite logarithm."""
    return Distribution.of(probs_RK.clamp_min(torch.finfo(probs_RK.dtype).tiny).log_())
