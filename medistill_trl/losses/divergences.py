"""Divergences between a student's and its teacher's next-token distributions, with their gradients.

Every one is a mean over the vocabulary of some function of the student's probabilities p, so with
u the student's logits divided by the temperature and g_i = ∂D/∂p_i, the softmax gives

    ∂D/∂u_i = p_i (g_i − Σ_j p_j g_j)

in closed form. Constants in g drop out.

Shapes: R tokens (rows), V vocabulary. p is the student, q the teacher, m a mixture of both.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch


class Distribution(NamedTuple):
    """Next-token probabilities of some rows.

    Args:
        shifted: (R, V), logits (divided by the temperature) minus the row's largest.
        log_norm: (R, 1), log Σ exp(shifted), so that log p = shifted − log_norm.
        probs: (R, V).
    """

    shifted: torch.Tensor
    log_norm: torch.Tensor
    probs: torch.Tensor

    @classmethod
    def of(cls, logits_RV: torch.Tensor) -> "Distribution":
        """softmax(logits)"""
        return cls._normalised(logits_RV - logits_RV.amax(-1, keepdim=True))

    @classmethod
    def _normalised(cls, shifted_RV: torch.Tensor) -> "Distribution":
        # Not softmax and log_softmax: these cost three passes each, and two exponentials of everything.
        probs_RV = shifted_RV.exp()
        norm_R1 = probs_RV.sum(-1, keepdim=True)
        return cls(shifted_RV, norm_R1.log(), probs_RV.div_(norm_R1))

    def softened(self, temperature_R1: torch.Tensor) -> "Distribution":
        """softmax(logits / temperature)"""
        return self._normalised(self.shifted / temperature_R1)

    @property
    def log_probs(self) -> torch.Tensor:
        """(R, V), made anew."""
        return self.shifted - self.log_norm

    @property
    def confidence(self) -> torch.Tensor:
        """The largest probability, (R,)."""
        return self.log_norm[:, 0].neg().exp()

    def cross_entropy(self, of: "Distribution") -> torch.Tensor:
        """−Σ q log p of this p under another distribution's q, (R,), nats."""
        return self.log_norm[:, 0] - torch.linalg.vecdot(of.probs, self.shifted)

    def entropy(self) -> torch.Tensor:
        """−Σ p log p, (R,), nats."""
        return self.cross_entropy(self)


# (student, teacher) → (divergence (R,) in nats, ∂divergence/∂(student logits / temperature) (R, V))
Divergence = Callable[[Distribution, Distribution], tuple[torch.Tensor, torch.Tensor]]


def kl(of: Distribution, against: Distribution) -> torch.Tensor:
    """KL(of ‖ against), (R,), nats."""
    ratio_RV, norm_R1 = _log_ratio(of, against)
    return torch.linalg.vecdot(of.probs, ratio_RV) + norm_R1[:, 0]


def _log_ratio(one: Distribution, other: Distribution) -> tuple[torch.Tensor, torch.Tensor]:
    """log p₁ − log p₂ in two parts, (R, V) and (R, 1): adding them would be one more pass."""
    return one.shifted - other.shifted, other.log_norm - one.log_norm


def forward_kl(student: Distribution, teacher: Distribution) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(p_T ‖ p_S), Hinton et al. 2015 (arXiv 1503.02531). g = −q/p, so ∂D/∂u = p − q."""
    return kl(teacher, student), student.probs - teacher.probs


def reverse_kl(student: Distribution, teacher: Distribution) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(p_S ‖ p_T), MiniLLM (arXiv 2306.08543). g = log p − log q."""
    ratio_RV, norm_R1 = _log_ratio(student, teacher)
    mean_R, gradient_RV = _centred(student, ratio_RV)  # a constant drops out of the gradient
    return mean_R + norm_R1[:, 0], gradient_RV


def jsd(
    student: Distribution, teacher: Distribution, beta: float = 0.5
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised Jensen-Shannon divergence of GKD (arXiv 2306.13649, eq. 1).

        β KL(p_T ‖ m) + (1−β) KL(p_S ‖ m),   m = β p_T + (1−β) p_S

    g = (1−β)(log p − log m). As β → 0, jsd/β → forward KL; as β → 1, jsd/(1−β) → reverse KL; the
    value itself goes to 0, so β = 0 and 1 (where TRL switches to the two KLs) are refused here.

    Args:
        beta: In (0, 1); 0.5 is the symmetric divergence.
    """
    log_m_RV = _log_mixture(teacher, student, beta)
    from_teacher_R = torch.linalg.vecdot(teacher.probs, teacher.log_probs - log_m_RV)
    from_student_R, gradient_RV = _centred(student, student.log_probs - log_m_RV)
    return (
        beta * from_teacher_R + (1 - beta) * from_student_R,
        gradient_RV.mul_(1 - beta),
    )


def skew_kl(
    student: Distribution, teacher: Distribution, skew: float = 0.1
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(p_T ‖ λ p_T + (1−λ) p_S), DistiLLM (arXiv 2402.03898). g = −(1−λ) q/m.

    Args:
        skew: λ in (0, 1); the paper's choice is 0.1. λ → 0 is the forward KL.
    """
    log_m_RV = _log_mixture(teacher, student, skew)
    value_R = torch.linalg.vecdot(teacher.probs, teacher.log_probs - log_m_RV)
    slope_RV = (teacher.log_probs - log_m_RV).exp_().mul_(skew - 1)
    return value_R, _centred(student, slope_RV)[1]


def skew_reverse_kl(
    student: Distribution, teacher: Distribution, skew: float = 0.1
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(p_S ‖ (1−λ) p_T + λ p_S), DistiLLM (arXiv 2402.03898). g = log p − log m − λ p/m.

    Args:
        skew: λ in (0, 1); the paper's choice is 0.1. λ → 0 is the reverse KL.
    """
    log_ratio_RV = student.log_probs - _log_mixture(student, teacher, skew)
    value_R = torch.linalg.vecdot(student.probs, log_ratio_RV)
    slope_RV = log_ratio_RV.sub_(log_ratio_RV.exp(), alpha=skew)
    return value_R, _centred(student, slope_RV)[1]


def hellinger(student: Distribution, teacher: Distribution) -> torch.Tensor:
    """Hellinger distance √(½ Σ (√p − √q)²), (R,), between 0 and 1. A score: it has no gradient here."""
    difference_RV = student.probs.sqrt() - teacher.probs.sqrt()
    return torch.linalg.vecdot(difference_RV, difference_RV).mul_(0.5).sqrt_()


DIVERGENCES = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "skew_kl": skew_kl,
    "skew_reverse_kl": skew_reverse_kl,
}
_PARAMETER = {"jsd": "beta", "skew_kl": "skew", "skew_reverse_kl": "skew"}


def by_name(name: str, **parameters: float) -> Divergence:
    """The divergence of that name, its parameter (`beta` of jsd, `skew` of the skew KLs) fixed.

    Raises:
        ValueError: an unknown name, a parameter it does not have, or one outside (0, 1).
    """
    if name not in DIVERGENCES:
        raise ValueError(f"divergence {name!r} does not exist; one of {', '.join(DIVERGENCES)}")
    for parameter, value in parameters.items():
        if parameter != _PARAMETER.get(name):
            raise ValueError(f"divergence {name} has no parameter {parameter!r}")
        if not 0 < value < 1:
            raise ValueError(
                f"{parameter} of {name} must lie between 0 and 1, both excluded, got {value}; the "
                "limits are forward_kl and reverse_kl"
            )
    return partial(DIVERGENCES[name], **parameters) if parameters else DIVERGENCES[name]


def _centred(student: Distribution, slope_RV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Σ p g and p (g − Σ p g); overwrites g."""
    mean_R = torch.linalg.vecdot(student.probs, slope_RV)
    return mean_R, slope_RV.sub_(mean_R.unsqueeze(-1)).mul_(student.probs)


def _log_mixture(first: Distribution, second: Distribution, share: float) -> torch.Tensor:
    """log(share · first + (1 − share) · second).

    Where both probabilities underflow the floor keeps the logarithm finite; their weight is 0 there.
    """
    mixture_RV = torch.lerp(second.probs, first.probs, share)
    return mixture_RV.clamp_min_(torch.finfo(mixture_RV.dtype).tiny).log_()
