"""How far apart two models' attention is, row by row, from their queries, keys and values.

A row is one position of one sequence, and how it attends to the keys at or before it. Of a row i:

    map_mse    Σ_h ‖A_S[h,i] − A_T[h,i]‖²            A = softmax(Q Kᵀ · scaling), the attention maps
    row_kl     1/H Σ_h KL(A_T[h,i] ‖ A_S[h,i])
    relations  Σ_X 1/R Σ_r KL(R_T[r,i] ‖ R_S[r,i])   R = softmax(X Xᵀ / √d), X in Q, K, V

`map_mse` is the report's, `row_kl` MiniLM's (arXiv 2002.10957), `relations` those of MiniLMv2 (arXiv
2012.15828), here causal: a row sees no later position.

Rows exist for one chunk of positions at a time, and the loss is differentiated within the chunk: no map of
time × time is ever held, and backward only scales gradients that are known by then.

Shapes: B batch, H heads, K key heads (H is a multiple of K), R relation heads, T time, D size of a head,
C positions of a chunk, S positions that a chunk sees.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from medistill_trl.losses.chunked import KnownGradients

CHUNK_SIZE = 64
KINDS = ("map_mse", "row_kl", "relations")


class AttentionInputs(NamedTuple):
    """What one attention layer works on.

    Args:
        queries_BHTD: After the rotary embedding.
        keys_BKTD: After the rotary embedding. Query head h reads key head h // (H / K).
        values_BKTD: As projected.
        scaling: Factor on the dot products, 1/√D as a rule.
    """

    queries_BHTD: torch.Tensor
    keys_BKTD: torch.Tensor
    values_BKTD: torch.Tensor
    scaling: float


class Products(NamedTuple):
    """Whose dot products, times `scaling`, are the scores of the rows."""

    left_BHTD: torch.Tensor
    right_BKTD: torch.Tensor
    scaling: float


# (student's, teacher's scores (B, H, C, S)) → (B, C)
RowDistance = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def attention_loss(
    student: AttentionInputs,
    teacher: AttentionInputs,
    rows_BT: torch.Tensor,
    keys_BT: torch.Tensor,
    *,
    kind: str = "map_mse",
    mean_heads: bool = False,
    relation_heads: int | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> torch.Tensor:
    """The distance of one layer of each model, summed over rows; the caller divides.

    Args:
        student: Gets gradients where its tensors require them.
        teacher: Never does.
        rows_BT: True where a row counts; such a position must be a key too.
        keys_BT: True where there is a token, False on padding of either side.
        kind: One of `KINDS`.
        mean_heads: Compare the means over heads, where `map_mse` and `row_kl` cannot compare head by head.
        relation_heads: R, which must divide the models' query, key and value widths; for `relations`.
        chunk_size: Positions whose rows exist at a time.

    Returns:
        A scalar, float32 (float64 for such queries); 0 if no row counts.

    Raises:
        ValueError: arguments that do not fit each other.
    """
    check_options(kind, relation_heads, chunk_size)
    if kind == "relations":
        sides = [_relations(inputs, relation_heads) for inputs in (student, teacher)]
        distance = row_kl
    else:
        sides = [[map_products(inputs)] for inputs in (student, teacher)]
        distance = map_distance(kind, mean_heads, student, teacher)
    return sum(
        _row_sum(*pair, distance, rows_BT, keys_BT, chunk_size) for pair in zip(*sides, strict=True)
    )


def check_options(kind: str, relation_heads: int | None, chunk_size: int) -> None:
    """Refuse, with a ValueError, what does not exist or does not go together."""
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} does not exist; one of {', '.join(KINDS)}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    if kind == "relations" and relation_heads is None:
        raise ValueError("relations need relation_heads")


def map_distance(
    kind: str, mean_heads: bool, student: AttentionInputs, teacher: AttentionInputs
) -> RowDistance:
    """`map_mse` or `row_kl`, of every head or of their means.

    Raises:
        ValueError: heads that cannot be compared one by one.
    """
    heads = [inputs.queries_BHTD.shape[1] for inputs in (student, teacher)]
    if heads[0] != heads[1] and not mean_heads:
        raise ValueError(
            f"the student has {heads[0]} heads and the teacher {heads[1]}, which cannot be compared "
            "one by one; compare their means, or relations"
        )
    return partial({"map_mse": map_mse, "row_kl": row_kl}[kind], mean_heads=mean_heads)


def map_mse(
    student_BHCS: torch.Tensor, teacher_BHCS: torch.Tensor, mean_heads: bool = False
) -> torch.Tensor:
    """Σ over heads of ‖softmax(student) − softmax(teacher)‖² in each row, (B, C)."""
    student, teacher = (scores.softmax(-1) for scores in (student_BHCS, teacher_BHCS))
    if mean_heads:
        student, teacher = (probs.mean(1, keepdim=True) for probs in (student, teacher))
    return (student - teacher).square().sum((1, 3))


def row_kl(
    student_BHCS: torch.Tensor, teacher_BHCS: torch.Tensor, mean_heads: bool = False
) -> torch.Tensor:
    """Mean over heads of KL(softmax(teacher) ‖ softmax(student)) in each row, (B, C), nats."""
    student, teacher = (scores.log_softmax(-1) for scores in (student_BHCS, teacher_BHCS))
    if mean_heads:
        student, teacher = (_log_mean_heads(log_probs) for log_probs in (student, teacher))
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1).mean(1)


def _log_mean_heads(log_probs_BHCS: torch.Tensor) -> torch.Tensor:
    """log of the mean probability, (B, 1, C, S)."""
    return log_probs_BHCS.logsumexp(1, keepdim=True) - math.log(log_probs_BHCS.shape[1])


def most_relation_heads(widths: list[int], limit: int) -> int:
    """The largest number of relation heads, up to a limit, that divides all widths."""
    common = math.gcd(*widths)
    return max(number for number in range(1, limit + 1) if common % number == 0)


def map_products(inputs: AttentionInputs) -> Products:
    """Whose scores are those of the attention maps."""
    return Products(inputs.queries_BHTD, inputs.keys_BKTD, inputs.scaling)


def _relations(inputs: AttentionInputs, relation_heads: int) -> list[Products]:
    """Q-Q, K-K and V-V."""
    return [_relation(states, relation_heads) for states in inputs[:3]]


def _relation(states_BHTD: torch.Tensor, relation_heads: int) -> Products:
    """The heads of one projection side by side, cut anew into as many as asked for.

    Grouped keys and values count once: repeating them would not add what they do not have.
    """
    width = states_BHTD.shape[1] * states_BHTD.shape[3]
    if width % relation_heads:
        raise ValueError(f"{relation_heads} relation heads do not divide a width of {width}")
    joined_BTW = states_BHTD.transpose(1, 2).flatten(2)
    states_BRTD = joined_BTW.unflatten(2, (relation_heads, -1)).transpose(1, 2)
    return Products(states_BRTD, states_BRTD, (width // relation_heads) ** -0.5)


def _row_sum(
    student: Products,
    teacher: Products,
    distance: RowDistance,
    rows_BT: torch.Tensor,
    keys_BT: torch.Tensor,
    chunk_size: int,
) -> torch.Tensor:
    """The distance summed over rows, with known gradients."""
    inputs = student[:2]
    track = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    dtype = accurate(inputs[0])
    total = torch.zeros((), dtype=dtype, device=rows_BT.device)
    gradients = [torch.zeros_like(tensor, dtype=dtype) for tensor in inputs] if track else None
    # Autocast would turn float32 products into bfloat16.
    with torch.autocast(rows_BT.device.type, enabled=False):
        for chunk in _chunks(rows_BT, chunk_size):
            total += _chunk(student, teacher, distance, rows_BT, keys_BT, chunk, gradients)
    return KnownGradients.apply(total, gradients, *inputs) if track else total


def accurate(tensor: torch.Tensor) -> torch.dtype:
    """What is summed in: float32, or float64 where that is given."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _chunks(rows_BT: torch.Tensor, chunk_size: int) -> Iterator[slice]:
    """Positions to work on together, from the first to the last where a row counts."""
    counted = rows_BT.any(0).nonzero()[:, 0].tolist()
    if counted:
        for start in range(counted[0], counted[-1] + 1, chunk_size):
            yield slice(start, min(start + chunk_size, counted[-1] + 1))


def _chunk(
    student: Products,
    teacher: Products,
    distance: RowDistance,
    rows_BT: torch.Tensor,
    keys_BT: torch.Tensor,
    chunk: slice,
    gradients: list[torch.Tensor] | None,
) -> torch.Tensor:
    """One chunk's share of `_row_sum`; a function of its own so that its rows are freed on return."""
    seen, track = slice(chunk.stop), gradients is not None
    position_S = torch.arange(chunk.stop, device=rows_BT.device)
    visible_BCS = keys_BT[:, None, seen] & (position_S <= position_S[chunk, None])
    dtype = accurate(student.left_BHTD)
    sides = [
        [
            side.left_BHTD[:, :, chunk].detach().to(dtype),
            side.right_BKTD[:, :, seen].detach().to(dtype),
        ]
        for side in (student, teacher)
    ]
    teacher_BHCS = scaled_scores(*sides[1], teacher.scaling, visible_BCS)
    with torch.set_grad_enabled(track):
        inputs = [states.requires_grad_(track) for states in sides[0]]
        student_BHCS = scaled_scores(*inputs, student.scaling, visible_BCS)
        value = (distance(student_BHCS, teacher_BHCS) * rows_BT[:, chunk]).sum()
    if track:
        found = torch.autograd.grad(value, inputs)
        for total, part, gradient in zip(gradients, (chunk, seen), found, strict=True):
            total[:, :, part] += gradient
    return value.detach()


def scaled_scores(
    left_BHCD: torch.Tensor, right_BKSD: torch.Tensor, scaling: float, visible_BCS: torch.Tensor
) -> torch.Tensor:
    """Scaled dot products, (B, H, C, S), as good as −∞ where nothing is seen."""
    groups = left_BHCD.shape[1] // right_BKSD.shape[1]
    # The heads that share a key head stand below each other, so that keys need not be repeated.
    stacked = (left_BHCD * scaling).unflatten(1, (-1, groups)).flatten(2, 3)
    scores_BHCS = (stacked @ right_BKSD.mT).unflatten(2, (groups, -1)).flatten(1, 2)
    # Finite: in a row of padding alone, −∞ would make NaN, which no mask takes away again.
    hidden = torch.finfo(scores_BHCS.dtype).min / 2
    return scores_BHCS.masked_fill(~visible_BCS[:, None], hidden)
