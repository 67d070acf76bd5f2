"""Cross-entropy and distillation from hidden states, without a batch × time × vocabulary tensor.

    L = Σ_t (1−α) CE_t + α w_t T_t² D(p_T, p_S; T_t)

over completion tokens t, with CE at temperature 1 and the divergence D between the two models'
distributions at temperature T_t (Hinton et al. 2015, arXiv 1503.02531). Logits exist for one chunk of
tokens at a time, and so does their gradient: it is known in closed form, so the same pass that makes the
logits turns them into gradients of the hidden states and of the head. Backward only scales those.

Two sizes: a *chunk* of tokens is what the head products take (large, for the products' sake); a *block*
of rows within it is what the elementwise arithmetic takes (small, so that its passes stay in the
processor's cache: 2 to 3 times faster than over the whole chunk).

Shapes: B batch, T time, N completion tokens of the batch, C tokens of a chunk, R tokens of a block,
H hidden size (each model has its own), V shared vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable

from medistill_trl.losses.divergences import Distribution, Divergence, forward_kl, hellinger, kl
from medistill_trl.losses.heads import OutputHead, Projection
from medistill_trl.losses.token_terms import InverseConfidence, Objective, TemperatureRule

IGNORE_INDEX = -100  # label of a token that is not trained on, as in Transformers
# From 128 tokens on the products do not get faster; at 256 the logits of both models take 100 MB with a
# vocabulary of 49,152.
CHUNK_SIZE = 256
# A block's float32 buffer: 0.5 MB per CPU thread, so that the four or five alive at a time stay in its L2
# cache; on a GPU enough to fill it.
CPU_BLOCK_ELEMENTS_PER_THREAD = 2**17
GPU_BLOCK_ELEMENTS = 2**24


def completion_states(
    hidden_BTH: torch.Tensor, labels_BT: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The hidden states that predict completion tokens, and those tokens.

    The causal shift happens here and nowhere else: the state at position t predicts token t + 1.

    Args:
        hidden_BTH: Last hidden states, after the final norm.
        labels_BT: Token ids, `IGNORE_INDEX` outside the completion.

    Returns:
        (N, H) and (N,), in reading order. A teacher with prompts of its own has labels of its own; its
        rows correspond to the student's one to one if the completions are the same.
    """
    predicted_BT = labels_BT[:, 1:] != IGNORE_INDEX
    return hidden_BTH[:, :-1][predicted_BT], labels_BT[:, 1:][predicted_BT]


def distillation_loss(
    student_hidden_NH: torch.Tensor,
    targets_N: torch.Tensor,
    student_head: OutputHead,
    teacher_hidden_NH: torch.Tensor | None = None,
    teacher_head: OutputHead | None = None,
    *,
    alpha: float,
    temperature: float | torch.Tensor | TemperatureRule = 1.0,
    divergence: Divergence = forward_kl,
    divergence_weights_N: torch.Tensor | None = None,
    vocab_size: int | None = None,
    chunk_size: int = CHUNK_SIZE,
    metrics: bool = True,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Σ over tokens of (1−α)·CE + α·w·T²·D, to be divided by the caller, and sums for the log.

    Args:
        student_hidden_NH: States that predict the targets, from `completion_states`. N may be 0.
        targets_N: Token ids below `vocab_size`.
        student_head: Gets gradients where its tensors require them.
        teacher_hidden_NH: The teacher's states for the same tokens; None (and not looked at) if α = 0.
        teacher_head: Never gets gradients.
        alpha: Weight of the divergence, 0 to 1; at 0 the teacher is not projected.
        temperature: Of the divergence: one for all; (N,), one per token; or a rule evaluated on each
            block's log-probabilities. The gradient takes it as a constant.
        divergence: From `divergences.by_name`.
        divergence_weights_N: w, on the divergence alone; 0 leaves a token to the cross-entropy. To drop
            a token altogether, give it no target. None for 1.
        vocab_size: Tokens the models share; both distributions are renormalised over them. None if both
            heads have the same rows.
        chunk_size: Tokens whose logits exist at a time.
        metrics: Also return sums for the log.

    Returns:
        The loss, a scalar, and without gradient `tokens`; with `metrics`, sums over tokens: `ce`,
        `student_entropy` and, if α > 0, `teacher_entropy`, `kl` (forward, at temperature 1),
        `divergence` (at the temperature used, without α, w and T²), `agreed` (same likeliest token);
        and if temperatures differ, `temperature` (sum), `temperature_min`, `temperature_max`, and
        for a rule with bounds `clipped_low`, `clipped_high` (counts of tokens at a bound).

    Raises:
        ValueError: arguments out of range, or that do not fit each other.
    """
    if alpha > 0 and (teacher_hidden_NH is None or teacher_head is None):
        raise ValueError(f"alpha {alpha} needs the teacher's hidden states and head")
    student = _Side.of(student_hidden_NH, student_head, vocab_size)
    teacher = _Side.of(teacher_hidden_NH, teacher_head, vocab_size) if alpha > 0 else None
    objective = Objective(
        alpha,
        divergence,
        _temperature_per_token(temperature, targets_N, student.dtype),
        divergence_weights_N,
        metrics,
    )
    lengths = [len(student_hidden_NH), len(targets_N)]
    _validate(
        objective, lengths if teacher is None else [*lengths, len(teacher_hidden_NH)], chunk_size
    )
    inputs = (student_hidden_NH, *student.head.parameters)
    wanted = [tensor.requires_grad and torch.is_grad_enabled() for tensor in inputs]
    with torch.no_grad():
        terms, gradients = _evaluate(objective, student, teacher, targets_N, chunk_size, wanted)
        loss = objective.total(terms)
        sums = _sums(terms, temperature) if metrics else {}
    sums["tokens"] = torch.tensor(float(len(targets_N)), device=loss.device)
    return (_KnownGradients.apply(loss, gradients, *inputs) if any(wanted) else loss), sums


@torch.no_grad()
def token_scores(
    student_hidden_NH: torch.Tensor,
    teacher_hidden_NH: torch.Tensor,
    student_head: OutputHead,
    teacher_head: OutputHead,
    *,
    score: str = "forward_kl",
    vocab_size: int | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> torch.Tensor:
    """How far student and teacher are apart on each token at temperature 1, without gradient.

    For temperatures and token selections that compare a token with the others (AdaKD, arXiv 2510.11615),
    so need all scores first. It costs both head products once more.

    Args:
        score: `forward_kl` (nats) or `hellinger` (0 to 1).

    Returns:
        (N,), float32.
    """
    scores = {"forward_kl": lambda student, teacher: kl(teacher, student), "hellinger": hellinger}
    if score not in scores:
        raise ValueError(f"score {score!r} does not exist; one of {', '.join(scores)}")
    student = _Side.of(student_hidden_NH, student_head, vocab_size)
    teacher = _Side.of(teacher_hidden_NH, teacher_head, vocab_size)
    result_N = student_hidden_NH.new_empty(len(student_hidden_NH), dtype=student.dtype)
    for start in range(0, len(result_N), chunk_size):
        chunk = slice(start, start + chunk_size)
        student_CV, teacher_CV = student.project(chunk).logits_CV, teacher.project(chunk).logits_CV
        _require_same_vocabulary(student_CV, teacher_CV)
        with torch.autocast(student_CV.device.type, enabled=False):
            for rows in _blocks(student_CV):
                pair = Distribution.of(student_CV[rows]), Distribution.of(teacher_CV[rows])
                result_N[chunk][rows] = scores[score](*pair)
    return result_N


@dataclass(frozen=True)
class _Side:
    """One of the two models: its hidden states (N, H) and its head over the shared vocabulary."""

    hidden_NH: torch.Tensor
    head: OutputHead

    @classmethod
    def of(cls, hidden_NH: torch.Tensor, head: OutputHead, vocab_size: int | None) -> "_Side":
        return cls(hidden_NH, head if vocab_size is None else head.narrow(vocab_size))

    @property
    def dtype(self) -> torch.dtype:
        """Of logits and sums."""
        return torch.float64 if self.hidden_NH.dtype == torch.float64 else torch.float32

    def project(self, chunk: slice, track: bool = False) -> Projection:
        return self.head.project(self.hidden_NH[chunk], self.dtype, track)


class _KnownGradients(torch.autograd.Function):
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


def _temperature_per_token(
    temperature: float | torch.Tensor | TemperatureRule, targets_N: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor | TemperatureRule | None:
    """As `Objective` takes it: None for 1."""
    if not isinstance(temperature, int | float):
        return temperature
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if temperature == 1:
        return None
    return targets_N.new_full(targets_N.shape, temperature, dtype=dtype)


def _evaluate(
    objective: Objective,
    student: _Side,
    teacher: _Side | None,
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
    student: _Side,
    teacher: _Side | None,
    targets_N: torch.Tensor,
    chunk: slice,
    terms: dict[str, torch.Tensor],
    gradients: list[torch.Tensor | None],
) -> None:
    """One chunk's share of `_evaluate`; a function of its own so that its logits are freed on return."""
    track = any(gradient is not None for gradient in gradients)
    projection = student.project(chunk, track)
    student_CV = projection.logits_CV
    teacher_CV = None
    if teacher is not None:
        teacher_CV = teacher.project(chunk).logits_CV
        _require_same_vocabulary(student_CV, teacher_CV)
    # Autocast is for the products; it would turn dot products of float32 probabilities into bfloat16.
    with torch.autocast(student_CV.device.type, enabled=False):
        for rows in _blocks(student_CV):
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


def block_elements(device_type: str) -> int:
    """Numbers of a block's buffer; a block holds some ten buffers at a time."""
    if device_type == "cpu":
        return CPU_BLOCK_ELEMENTS_PER_THREAD * torch.get_num_threads()
    return GPU_BLOCK_ELEMENTS


def _blocks(logits_CV: torch.Tensor) -> Iterator[slice]:
    """Rows of a chunk to work on together."""
    num_rows, vocab_size = logits_CV.shape
    size = max(1, block_elements(logits_CV.device.type) // vocab_size)
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))


def _sums(
    terms: dict[str, torch.Tensor], temperature: float | torch.Tensor | TemperatureRule
) -> dict[str, torch.Tensor]:
    """What the log gets, float32."""
    sums = {name: term_N.sum().float() for name, term_N in terms.items()}
    if isinstance(temperature, int | float) or "temperature" not in terms:
        sums.pop("temperature", None)
        return sums
    temperature_N = terms["temperature"].float()
    infinity = temperature_N.new_tensor([float("inf")])  # of no tokens
    sums["temperature_min"] = torch.cat([temperature_N, infinity]).min()
    sums["temperature_max"] = torch.cat([temperature_N, -infinity]).max()
    if isinstance(temperature, InverseConfidence):
        sums["clipped_low"] = (temperature_N <= temperature.minimum).sum().float()
        sums["clipped_high"] = (temperature_N >= temperature.maximum).sum().float()
    return sums


def _require_same_vocabulary(student_CV: torch.Tensor, teacher_CV: torch.Tensor) -> None:
    if student_CV.shape[1] != teacher_CV.shape[1]:
        raise ValueError(
            f"the heads have {student_CV.shape[1]} (student) and {teacher_CV.shape[1]} (teacher) rows; "
            "pass vocab_size, the number of tokens they share"
        )


def _validate(objective: Objective, lengths: Sequence[int], chunk_size: int) -> None:
    """Refuse what does not fit; the number of tokens must be the same throughout `lengths`."""
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    if len(set(lengths)) > 1:
        raise ValueError(
            f"student, targets and teacher must be of the same tokens, got {list(lengths)} of them"
        )
    vectors = {
        "temperature": objective.temperature,
        "divergence_weights_N": objective.weights_N,
    }
    for name, vector in vectors.items():
        if isinstance(vector, torch.Tensor) and vector.shape != (lengths[0],):
            raise ValueError(f"{name} must be ({lengths[0]},), got {tuple(vector.shape)}")
