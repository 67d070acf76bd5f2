"""A sum over tokens and its gradients from hidden states, without a batch × time × vocabulary tensor.

Logits exist for one chunk of tokens at a time, and so does their gradient: an `Objective` knows it in
closed form, so the same pass that makes the logits turns them into gradients of the hidden states and of
the head. Backward only scales those.

Two sizes: a *chunk* of tokens is what the head products take (large, for the products' sake); a *block*
of rows within it is what the elementwise arithmetic takes (small, so that its passes stay in the
processor's cache: 2 to 3 times faster than over the whole chunk).

Shapes: N completion tokens of the batch, C tokens of a chunk, R tokens of a block, H hidden size (each
model has its own), V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.autograd.function import once_differentiable

from medistill_trl.losses.heads import OutputHead, Projection

# From 128 tokens on the products do not get faster; at 256 the logits of both models take 100 MB with a
# vocabulary of 49,152.
CHUNK_SIZE = 256
# A block's float32 buffer: 0.5 MB per CPU thread, so that the four or five alive at a time stay in its L2
# cache; on a GPU enough to fill it.
CPU_BLOCK_ELEMENTS_PER_THREAD = 2**17
GPU_BLOCK_ELEMENTS = 2**24


class Objective(Protocol):
    """A loss that is a sum over tokens of a function of their logits."""

    @property
    def names(self) -> list[str]:
        """The quantities kept per token."""

    def total(self, terms: dict[str, torch.Tensor]) -> torch.Tensor:
        """The loss, from the terms of all tokens."""

    def block(
        self,
        student_RV: torch.Tensor,
        teacher_RV: torch.Tensor | None,
        targets_R: torch.Tensor,
        tokens: slice,
        terms: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        """Fill in the terms of a block's tokens; return the loss's gradient in the student's logits."""


@dataclass(frozen=True)
class Side:
    """One of the two models: its hidden states (N, H) and its head over the shared vocabulary."""

    hidden_NH: torch.Tensor
    head: OutputHead

    @classmethod
    def of(cls, hidden_NH: torch.Tensor, head: OutputHead, vocab_size: int | None) -> "Side":
        return cls(hidden_NH, head if vocab_size is None else head.narrow(vocab_size))

    @property
    def dtype(self) -> torch.dtype:
        """Of logits and sums."""
        return torch.float64 if self.hidden_NH.dtype == torch.float64 else torch.float32

    def project(self, chunk: slice, track: bool = False) -> Projection:
        return self.head.project(self.hidden_NH[chunk], self.dtype, track)


def token_sum(
    objective: Objective,
    student: Side,
    targets_N: torch.Tensor,
    teacher: Side | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss, with gradients for the student's hidden states and head where they want them.

    Args:
        targets_N: Token ids.
        teacher: Never gets gradients; None for objectives that do not look at it.

    Returns:
        A scalar, and the terms (N,) of every token, without gradient.
    """
    inputs = (student.hidden_NH, *student.head.parameters)
    wanted = [tensor.requires_grad and torch.is_grad_enabled() for tensor in inputs]
    with torch.no_grad():
        terms, gradients = evaluate(objective, student, teacher, targets_N, chunk_size, wanted)
        loss = objective.total(terms)
    return (KnownGradients.apply(loss, gradients, *inputs) if any(wanted) else loss), terms


class KnownGradients(torch.autograd.Function):
    """A scalar whose gradients are known already; backward scales them."""

    @staticmethod
    def forward(ctx, value, gradients, *inputs):
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [tensor.dtype for tensor in inputs]
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        scaled = [
            None if known is None else (known * gradient).to(dtype)
            for known, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return None, None, *scaled


def evaluate(
    objective: Objective,
    student: Side,
    teacher: Side | None,
    targets_N: torch.Tensor,
    chunk_size: int,
    wanted: Sequence[bool],
) -> tuple[dict[str, torch.Tensor], list[torch.Tensor | None]]:
    """The terms of every token, and the loss's gradients in the hidden states and head parameters.

    Args:
        wanted: Which gradients: of the student's hidden states, then of its head's parameters.
    """
    dtype, device = student.dtype, targets_N.device
    terms = {
        name: torch.zeros(len(targets_N), dtype=dtype, device=device) for name in objective.names
    }
    inputs = (student.hidden_NH, *student.head.parameters)
    gradients = [
        torch.zeros_like(tensor, dtype=dtype) if want else None
        for tensor, want in zip(inputs, wanted, strict=True)
    ]
    for start in range(0, len(targets_N), chunk_size):
        chunk = slice(start, min(start + chunk_size, len(targets_N)))
        _chunk(objective, student, teacher, targets_N, chunk, terms, gradients)
    return terms, gradients


def _chunk(
    objective: Objective,
    student: Side,
    teacher: Side | None,
    targets_N: torch.Tensor,
    chunk: slice,
    terms: dict[str, torch.Tensor],
    gradients: list[torch.Tensor | None],
) -> None:
    """One chunk's share of `evaluate`; a function of its own so that its logits are freed on return."""
    track = any(gradient is not None for gradient in gradients)
    projection = student.project(chunk, track)
    student_CV = projection.logits_CV
    teacher_CV = None if teacher is None else teacher.project(chunk).logits_CV
    # Autocast is for the products; it would turn dot products of float32 probabilities into bfloat16.
    with torch.autocast(student_CV.device.type, enabled=False):
        for rows in blocks(student_CV):
            tokens = slice(chunk.start + rows.start, chunk.start + rows.stop)
            teacher_RV = None if teacher_CV is None else teacher_CV[rows]
            gradient_RV = objective.block(
                student_CV[rows], teacher_RV, targets_N[tokens], tokens, terms
            )
            if track:  # the gradient takes the place of the logits
                student_CV[rows] = student.head.finish_backward_(gradient_RV, student_CV[rows])
    if track:
        hidden_gradient = None if gradients[0] is None else gradients[0][chunk]
        projection.backward(student_CV, hidden_gradient, gradients[1:])


_assumed_device: ContextVar[str | None] = ContextVar("assumed_device", default=None)


@contextmanager
def blocks_as_on(device_type: str) -> Iterator[None]:
    """For the memory plan: within it, blocks are as large as on another device, and only a chunk's first two are worked
    on."""
    token = _assumed_device.set(device_type)
    try:
        yield
    finally:
        _assumed_device.reset(token)


def block_elements(device_type: str) -> int:
    """Numbers of a block's buffer; a block holds some ten buffers at a time."""
    if (_assumed_device.get() or device_type) == "cpu":
        return CPU_BLOCK_ELEMENTS_PER_THREAD * torch.get_num_threads()
    return GPU_BLOCK_ELEMENTS


def blocks(logits_CV: torch.Tensor) -> Iterator[slice]:
    """Rows of a chunk to work on together."""
    num_rows, vocab_size = logits_CV.shape
    size = max(1, block_elements(logits_CV.device.type) // vocab_size)
    starts = range(0, num_rows, size)
    if _assumed_device.get() is not None:
        starts = starts[:2]  # the others would take the same memory
    for start in starts:
        yield slice(start, min(start + size, num_rows))


def require_same_vocabulary(student_CV: torch.Tensor, teacher_CV: torch.Tensor) -> None:
    if student_CV.shape[1] != teacher_CV.shape[1]:
        raise ValueError(
            f"the heads have {student_CV.shape[1]} (student) and {teacher_CV.shape[1]} (teacher) rows; "
            "pass vocab_size, the number of tokens they share"
        )
