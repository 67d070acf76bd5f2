"""Linear maps from the student's hidden states to the teacher's width, and where they start.

They serve training alone: the student must not need them afterwards, so they are saved beside a checkpoint
and never with the model.

Shapes: N tokens, G the student's hidden size, H the teacher's, V shared vocabulary.
"""

from collections.abc import Iterable

import torch
from accelerate.utils import broadcast
from torch import nn

INITS = ("least_squares", "heads", "orthogonal")
# Of the mean variance of the student's dimensions: small enough to be exact where the teacher's states are a
# linear image of the student's, large enough for directions in which the first completions do not vary.
RIDGE = 1e-6


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


class LeastSquares:
    """The affine map with the least squared error on states that come batch by batch.

    Keeps sums of products in float64, not the states. A ridge of `RIDGE` times the mean variance makes it
    unique where there are fewer tokens than dimensions.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.sums: list[torch.Tensor] | None = None

    def add(self, student_NG: torch.Tensor, teacher_NH: torch.Tensor) -> None:
        g, h = student_NG.double(), teacher_NH.double()
        sums = [g.sum(0), h.sum(0), g.T @ g, g.T @ h]
        self.sums = (
            sums if self.sums is None else [a + b for a, b in zip(self.sums, sums, strict=True)]
        )
        self.tokens += len(g)

    def solve(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight (H, G) and bias (H,) in float64.

        Raises:
            ValueError: no token was added.
        """
        if self.tokens == 0:
            raise ValueError("least squares needs at least one token")
        student_G, teacher_H, squares_GG, products_GH = (total / self.tokens for total in self.sums)
        covariance_GG = squares_GG - torch.outer(student_G, student_G)
        variances_G = covariance_GG.diagonal()  # a view
        variances_G += RIDGE * variances_G.mean() + torch.finfo(torch.float64).tiny
        cross_GH = products_GH - torch.outer(student_G, teacher_H)
        weight_HG = torch.linalg.solve(covariance_GG, cross_GH).T
        return weight_HG, teacher_H - weight_HG @ student_G


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
    diagonal_H += RIDGE * diagonal_H.mean()
    return torch.linalg.solve(squares_HH, teacher_VH.T @ student_VG)
