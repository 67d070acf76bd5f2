"""How far the student's hidden states are from the teacher's: sums over tokens, float32.

    mse             Σ_t ‖s_t − h_t‖² / H, or Σ_t ‖s_t − h_t‖² with reduction `sum`
                    (FitNets, Romero et al. 2015, arXiv 1412.6550; the report sums)
    normalised_mse  Σ_t ‖s_t − h_t‖² / ‖h_t‖²
    cosine          Σ_t 1 − cos(s_t, h_t); half of PKD's squared distance of unit vectors (arXiv 1908.09355)
    cka             N (1 − CKA), linear (Kornblith et al. 2019, arXiv 1905.00414)

with h_t the teacher's state of token t and s_t the student's, projected to the teacher's width; CKA compares
the tokens' similarities to each other, so it takes states of different widths.

Shapes: N tokens that are compared, H the teacher's hidden size, G the student's.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

EPSILON = 1e-12  # no smaller: what a zero state is divided by must not make its gradient infinite


@dataclass(frozen=True)
class FeatureLoss:
    """One of the losses above.

    Args:
        kind: Its name.
        reduction: `mean` over tokens, and for mse over dimensions, or `sum` over both.

    Raises:
        ValueError: an unknown kind or reduction.
    """

    kind: str
    reduction: str = "mean"

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(
                f"feature loss {self.kind!r} does not exist; one of {', '.join(KINDS)}"
            )
        if self.reduction not in ("mean", "sum"):
            raise ValueError(f"reduction must be mean or sum, got {self.reduction!r}")

    def token_sum(self, student_NH: torch.Tensor, teacher_NH: torch.Tensor) -> torch.Tensor:
        """The sum over tokens (for mse of the mean over dimensions); 0, with a graph, of no tokens.

        Args:
            student_NH: Gets the gradient; (N, G) will do for cka.
            teacher_NH: Gets none.
        """
        dtype = torch.float64 if student_NH.dtype == torch.float64 else torch.float32
        with torch.autocast(student_NH.device.type, enabled=False):
            total = KINDS[self.kind](student_NH.to(dtype), teacher_NH.detach().to(dtype))
        return total / teacher_NH.shape[1] if self.kind == "mse" else total

    def reduce(
        self, token_sum: torch.Tensor, tokens: torch.Tensor | int, width: int
    ) -> torch.Tensor:
        """What is trained, from `token_sum`.

        Args:
            tokens: Of the accumulation window, over all processes.
            width: H.
        """
        if self.reduction == "mean":
            return token_sum / tokens
        return token_sum * width if self.kind == "mse" else token_sum

    def __str__(self) -> str:
        over = "tokens and dimensions" if self.kind == "mse" else "tokens"
        return f"{self.kind}, {self.reduction} over {over}"


def squared_error(student_NH: torch.Tensor, teacher_NH: torch.Tensor) -> torch.Tensor:
    """Σ_t ‖s_t − h_t‖²"""
    return (student_NH - teacher_NH).square().sum()


def normalised_squared_error(student_NH: torch.Tensor, teacher_NH: torch.Tensor) -> torch.Tensor:
    """Σ_t ‖s_t − h_t‖² / ‖h_t‖²: 1 a token for a student that gives 0, whatever the layer's scale."""
    energy_N = teacher_NH.square().sum(-1).clamp_min(EPSILON)
    return ((student_NH - teacher_NH).square().sum(-1) / energy_N).sum()


def cosine_distance(student_NH: torch.Tensor, teacher_NH: torch.Tensor) -> torch.Tensor:
    """Σ_t 1 − cos(s_t, h_t)"""
    return (1 - F.cosine_similarity(student_NH, teacher_NH, dim=-1)).sum()


def cka_distance(student_NG: torch.Tensor, teacher_NH: torch.Tensor) -> torch.Tensor:
    """N (1 − CKA), with CKA = ⟨K, L⟩ / (‖K‖ ‖L‖) of the centred Gram matrices over tokens.

    It is invariant to rotation, scale and shift of either side. Needs two tokens that differ: with fewer
    there is nothing to compare, and the distance is 0.
    """
    if len(student_NG) < 2:
        return student_NG.sum() * 0
    gram_NN, teacher_gram_NN = (
        centred @ centred.T
        for centred in (states - states.mean(0) for states in (student_NG, teacher_NH))
    )
    norms = (gram_NN.norm() * teacher_gram_NN.norm()).clamp_min(EPSILON)
    return len(student_NG) * (1 - (gram_NN * teacher_gram_NN).sum() / norms)


KINDS = {
    "mse": squared_error,
    "normalised_mse": normalised_squared_error,
    "cosine": cosine_distance,
    "cka": cka_distance,
}
