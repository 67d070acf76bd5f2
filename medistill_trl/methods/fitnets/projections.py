"""Linear maps from the student's hidden states to the teacher's width, and where they start.

They serve training alone: the student must not need them afterwards, so they are saved beside a checkpoint
and never with the model.

Shapes: N tokens, G the student's hidden size, H the teacher's, V shared vocabulary.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import torch
from accelerate.utils import broadcast
from torch import nn

# Times the mean variance of the student's dimensions. The least is exact where the teacher's states are a linear
# image of the student's; the others are for completions too few to tell.
RIDGES = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
WITHOUT_VALIDATION = 1e-1  # what validation chooses on the embedded pair
HEAD_RIDGE = 1e-6  # of the mean squared weight, for columns of a head that depend on each other


class Projections(nn.ModuleList):
    """One affine map s = W g + b for each pair of layers, in float32.

    Args:
        count: Pairs.
        student_width: G.
        teacher_width: H.
        seed: Of the orthogonal matrices they are made with.
    """

    def __init__(self, count: int, student_width: int, teacher_width: int, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for _ in range(count):
            # On the meta device first, whose initialisation draws no random numbers from the run's own.
            linear = nn.Linear(student_width, teacher_width, device="meta").to_empty(device="cpu")
            nn.init.orthogonal_(linear.weight, generator=generator)
            nn.init.zeros_(linear.bias)
            self.append(linear)

    @torch.no_grad()
    def start_at(self, maps: Iterable[tuple[torch.Tensor, torch.Tensor | None]]) -> None:
        """Set weights (H, G) and biases (H,), None for 0, pair by pair: the main process's on all of them."""
        for linear, (weight_HG, bias_H) in zip(self, maps, strict=True):
            linear.weight.copy_(broadcast(weight_HG.to(linear.weight).contiguous()))
            if bias_H is None:
                linear.bias.zero_()
            else:
                linear.bias.copy_(broadcast(bias_H.to(linear.bias)))


@dataclass
class Moments:
    """Sums over tokens that determine least squares, in float64; the states themselves are not kept."""

    tokens: int
    student_G: torch.Tensor
    teacher_H: torch.Tensor
    squares_GG: torch.Tensor
    products_GH: torch.Tensor
    energy: torch.Tensor  # Σ ‖h‖²

    @classmethod
    def of(cls, student_NG: torch.Tensor, teacher_NH: torch.Tensor) -> "Moments":
        g, h = student_NG.double(), teacher_NH.double()
        return cls(len(g), g.sum(0), h.sum(0), g.T @ g, g.T @ h, h.square().sum())

    def __add__(self, other: "Moments") -> "Moments":
        names = [each.name for each in fields(self)]
        return Moments(*(getattr(self, name) + getattr(other, name) for name in names))

    def maps(self, ridges: Sequence[float]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Weight (H, G) and bias (H,) with the least squared error, for each ridge."""
        student_G, teacher_H = self.student_G / self.tokens, self.teacher_H / self.tokens
        covariance_GG = self.squares_GG / self.tokens - torch.outer(student_G, student_G)
        cross_GH = self.products_GH / self.tokens - torch.outer(student_G, teacher_H)
        values_G, vectors_GG = torch.linalg.eigh(covariance_GG)
        values_G = values_G.clamp_min(0)
        rotated_GH = vectors_GG.T @ cross_GH
        tiny = torch.finfo(torch.float64).tiny  # states that do not vary at all
        found = []
        for ridge in ridges:
            damped_G = values_G + ridge * values_G.mean() + tiny
            weight_HG = (vectors_GG @ (rotated_GH / damped_G[:, None])).T
            found.append((weight_HG, teacher_H - weight_HG @ student_G))
        return found

    def error(self, weight_HG: torch.Tensor, bias_H: torch.Tensor) -> torch.Tensor:
        """Σ ‖W g + b − h‖² of a map."""
        mapped = (weight_HG @ self.squares_GG * weight_HG).sum() + self.tokens * bias_H @ bias_H
        mapped += 2 * bias_H @ (weight_HG @ self.student_G)
        shared = (weight_HG.T * self.products_GH).sum() + bias_H @ self.teacher_H
        return mapped - 2 * shared + self.energy


class LeastSquares:
    """The affine map with the least squared error, with the ridge that serves other completions best.

    A first batch has hardly more tokens than the states have dimensions. An exact fit to it then amplifies
    whatever is new: on the embedded pair it is 1.1 to 2.4 times as wrong on other completions, and the loss rises as soon
    as the student moves. So every fourth completion is held out to choose the ridge, and then fitted too.
    """

    def __init__(self) -> None:
        self.fitted: Moments | None = None
        self.validation: Moments | None = None
        self.completions = 0

    def add(self, student_NG: torch.Tensor, teacher_NH: torch.Tensor) -> None:
        """The states of one completion; may be none."""
        self.completions += 1
        if len(student_NG) == 0:
            return
        moments = Moments.of(student_NG, teacher_NH)
        if self.completions % 4 == 0:
            self.validation = moments + self.validation if self.validation else moments
        else:
            self.fitted = moments + self.fitted if self.fitted else moments

    def solve(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight (H, G) and bias (H,) in float64.

        Raises:
            ValueError: no token was added.
        """
        if self.fitted is None:
            raise ValueError("least squares needs at least one token")
        if self.validation is None:
            return self.fitted.maps([WITHOUT_VALIDATION])[0]
        errors = [self.validation.error(*found) for found in self.fitted.maps(RIDGES)]
        ridge = RIDGES[int(torch.stack(errors).argmin())]
        return (self.fitted + self.validation).maps([ridge])[0]


@torch.no_grad()
def map_between_heads(student_head_VG: torch.Tensor, teacher_head_VH: torch.Tensor) -> torch.Tensor:
    """The teacher head's pseudo-inverse times the student's head: W with teacher_head @ W ≈ student_head.

    A projected state then means, to the teacher's head, what the state means to the student's. DSKD starts its
    projectors so (Zhang et al. 2025, arXiv 2504.11426). It speaks of states after the final norm; here they are
    taken before it, and from inner layers, so this is a start and no more.

    Returns:
        (H, G), float64.
    """
    teacher_VH, student_VG = teacher_head_VH.double(), student_head_VG.double()
    squares_HH = teacher_VH.T @ teacher_VH
    diagonal_H = squares_HH.diagonal()  # a view
    diagonal_H += HEAD_RIDGE * diagonal_H.mean()
    return torch.linalg.solve(squares_HH, teacher_VH.T @ student_VG)
