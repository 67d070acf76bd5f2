"""What the loss is made of, token by token: values and the gradient in the student's logits.

Shapes: N completion tokens of the batch, R tokens of a block, V vocabulary: the shared one, or with a
`Fold` each side's own.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from medistill_trl.losses.chunked import require_same_vocabulary
from medistill_trl.losses.divergences import Distribution, Divergence
from medistill_trl.losses.overlap import Fold

# (student, teacher at temperature 1) → temperatures (R,)
TemperatureRule = Callable[[Distribution, Distribution], torch.Tensor]


@dataclass(frozen=True)
class InverseConfidence:
    """T_t = clip(base / (c_t + ε), minimum, maximum), with c_t = max_v p_S(v) at temperature 1.

    The report's AdaKD: the surer the student, the lower the temperature. A `TemperatureRule`.

    Raises:
        ValueError: unless base > 0, ε ≥ 0 and 0 < minimum ≤ maximum.
    """

    base: float
    minimum: float
    maximum: float
    epsilon: float = 1e-6

    def __post_init__(self):
        if not (self.base > 0 and self.epsilon >= 0 and 0 < self.minimum <= self.maximum):
            raise ValueError(
                f"base > 0, epsilon >= 0 and 0 < minimum <= maximum must hold, got {self}"
            )

    def __call__(self, student: Distribution, teacher: Distribution) -> torch.Tensor:
        temperature_R = self.base / (student.confidence + self.epsilon)
        return temperature_R.clamp(self.minimum, self.maximum)


@dataclass(frozen=True)
class Objective:
    """(1−α)·CE + α·w·T²·D per token.

    Args:
        alpha: α, in [0, 1].
        divergence: D.
        temperature: T, (N,), or a rule that gives it per block; None for 1, which saves two softmaxes.
        weights_N: w; None for 1.
        fold: Takes D over the outcomes two vocabularies share; None for one vocabulary.
        metrics: Also compute what is only logged.
    """

    alpha: float
    divergence: Divergence
    temperature: torch.Tensor | TemperatureRule | None = None
    weights_N: torch.Tensor | None = None
    fold: Fold | None = None
    metrics: bool = True

    def __post_init__(self):
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must lie between 0 and 1, got {self.alpha}")

    @property
    def names(self) -> list[str]:
        """The quantities kept per token."""
        names = ["ce"] if self.alpha < 1 or self.metrics else []
        names += ["student_entropy"] if self.metrics else []
        names += ["correct"] if self.alpha == 0 and self.metrics else []
        names += ["divergence", "temperature"] if self.alpha > 0 else []
        names += ["kl", "teacher_entropy", "agreed"] if self.alpha > 0 and self.metrics else []
        names += ["teacher_shared_mass"] if "kl" in names and self.fold is not None else []
        return names

    def total(self, terms: dict[str, torch.Tensor]) -> torch.Tensor:
        """The loss, from the terms of all tokens."""
        parts = []
        if self.alpha < 1:
            parts.append((1 - self.alpha) * terms["ce"].sum())
        if self.alpha > 0:
            weights_N = 1 if self.weights_N is None else self.weights_N
            divergence_N = weights_N * terms["temperature"].square() * terms["divergence"]
            parts.append(self.alpha * divergence_N.sum())
        return sum(parts)

    def block(
        self,
        student_RV: torch.Tensor,
        teacher_RV: torch.Tensor | None,
        targets_R: torch.Tensor,
        tokens: slice,
        terms: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        """One block of tokens.

        Args:
            student_RV: Logits.
            teacher_RV: Logits; None if α = 0.
            targets_R: Token ids.
            tokens: The block's place among the N.
            terms: Vectors (N,) by name; the block's part is filled in.

        Returns:
            The loss's gradient in the student's logits, (R, V).
        """
        student = Distribution.of(student_RV)
        if "ce" in terms:
            target_R1 = student.shifted.gather(1, targets_R[:, None])
            terms["ce"][tokens] = (student.log_norm - target_R1)[:, 0]
            if "correct" in terms:  # shifted logits are 0 at the likeliest token
                terms["correct"][tokens] = (target_R1[:, 0] == 0).to(terms["correct"].dtype)
        if "student_entropy" in terms:
            terms["student_entropy"][tokens] = student.entropy()
        if self.alpha == 0:
            return _minus_one_hot_(student.probs, targets_R, 1.0)
        gradient_RV = self.compare(student, teacher_RV, tokens, terms)
        if self.alpha == 1:
            return gradient_RV
        gradient_RV.add_(student.probs, alpha=1 - self.alpha)
        return _minus_one_hot_(gradient_RV, targets_R, 1 - self.alpha)

    def compare(
        self,
        student: Distribution,
        teacher_RV: torch.Tensor | None,
        tokens: slice,
        terms: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        """The divergence's part of `block`: fills in its terms; its gradient in the student's logits, (R, V)."""
        teacher = Distribution.of(teacher_RV)
        if self.fold is None:
            require_same_vocabulary(student.shifted, teacher_RV)
            compared = student, teacher
        else:
            compared = self.fold.fold(student, teacher)
        if "kl" in terms:
            self._record(compared, teacher, tokens, terms)
        temperature_R1 = self._temperature(tokens, *compared)
        terms["temperature"][tokens] = 1 if temperature_R1 is None else temperature_R1[:, 0]
        softened = compared
        if temperature_R1 is not None:
            softened = [side.softened(temperature_R1) for side in compared]
        terms["divergence"][tokens], gradient_RV = self.divergence(*softened)
        if self.fold is not None:
            gradient_RV = self.fold.unfold(gradient_RV, compared[0], student)
        return gradient_RV.mul_(self.divergence_factor(tokens, temperature_R1))

    def _record(
        self,
        compared: tuple[Distribution, Distribution],
        teacher: Distribution,
        tokens: slice,
        terms: dict[str, torch.Tensor],
    ) -> None:
        """What the log gets of the two at temperature 1."""
        terms["teacher_entropy"][tokens] = entropy_R = teacher.entropy()
        if self.fold is not None:
            terms["teacher_shared_mass"][tokens] = self.fold.teacher_mass(teacher)
            entropy_R = compared[1].entropy()
        terms["kl"][tokens] = compared[0].cross_entropy(compared[1]) - entropy_R
        terms["agreed"][tokens] = _same_top(*compared).to(entropy_R.dtype)

    def _temperature(
        self, tokens: slice, student: Distribution, teacher: Distribution
    ) -> torch.Tensor | None:
        """(R, 1), or None for 1."""
        if self.temperature is None:
            return None
        if callable(self.temperature):
            return self.temperature(student, teacher)[:, None]
        return self.temperature[tokens, None]

    def divergence_factor(
        self, tokens: slice, temperature_R1: torch.Tensor | None
    ) -> torch.Tensor | float:
        """α·w·T: of T², one T is lost since ∂D/∂logits = (1/T)·∂D/∂(logits / T)."""
        factor = self.alpha if temperature_R1 is None else self.alpha * temperature_R1
        return factor if self.weights_N is None else factor * self.weights_N[tokens, None]


def _same_top(student: Distribution, teacher: Distribution) -> torch.Tensor:
    """Is the student's likeliest token the teacher's too, or tied with it? (R,), bool."""
    # Shifted logits are 0 at the likeliest token and negative elsewhere, so their sum is 0 only where both
    # are. On a CPU two argmaxes would be the dearest thing in the block.
    return (student.shifted + teacher.shifted).amax(-1) == 0


def _minus_one_hot_(
    gradient_RV: torch.Tensor, targets_R: torch.Tensor, amount: float
) -> torch.Tensor:
    """Subtract `amount` at each row's target, in place."""
    index_R1 = targets_R[:, None]
    return gradient_RV.scatter_add_(1, index_R1, gradient_RV.new_full(index_R1.shape, -amount))
