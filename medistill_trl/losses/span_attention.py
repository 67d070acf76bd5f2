"""Attention of two models with different tokenizers, compared span by span.

A span is the smallest piece of text that both models have cut into whole tokens. A column of span numbers says to which
span the token at each position belongs, `IGNORE_INDEX` outside of spans; a sequence's numbers count from 0, in order,
and a span's tokens stand side by side. With A a model's
map over its own tokens, of which span g has the tokens G_g,

    P[h, g, k] = mean over i in G_g of Σ over j in G_k of A[h, i, j]

is its map over spans: how a span, on average, spreads its attention over the spans up to itself. Its rows sum to 1,
since every token up to a span is in one. `map_mse` and `row_kl` compare P as they compare A where tokens are
shared. `relations` are taken of queries, keys and values averaged over each span's tokens: the score of two spans is then
the mean of the scores of their tokens' pairs. Where every span is one token on both sides all three are those of
`losses.attention`.

Rows exist for one chunk at a time here too: as many spans as have `chunk_size` tokens on neither side, or one.

Shapes: B batch, H heads, K key heads, T time, D size of a head; S spans of a sequence; of a chunk: C tokens, L tokens that it
sees, R spans.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from medistill_trl.losses.attention import (
    CHUNK_SIZE,
    AttentionInputs,
    Products,
    RowDistance,
    accurate,
    attention_loss,
    check_options,
    map_distance,
    map_products,
    scaled_scores,
)
from medistill_trl.losses.chunked import KnownGradients
from medistill_trl.losses.token_kl import IGNORE_INDEX


class Tokens(NamedTuple):
    """A sequence's tokens in spans, which stand side by side.

    Args:
        start: Position of the first.
        spans: The span of each, from 0 on, in order.
        ends_S: Tokens up to the end of each span.
    """

    start: int
    spans: torch.Tensor
    ends_S: list[int]

    @classmethod
    def of(cls, spans_T: torch.Tensor) -> "Tokens":
        at = (spans_T != IGNORE_INDEX).nonzero()[:, 0]
        spans = spans_T[at]
        start = int(at[0]) if len(at) else 0
        return cls(start, spans, spans.bincount().cumsum(0).tolist())

    def up_to(self, span: int) -> int:
        """Tokens before a span."""
        return self.ends_S[span - 1] if span else 0


def span_attention_loss(
    student: AttentionInputs,
    teacher: AttentionInputs,
    student_spans_BT: torch.Tensor,
    teacher_spans_BT: torch.Tensor,
    rows_BS: torch.Tensor,
    *,
    kind: str = "map_mse",
    mean_heads: bool = False,
    relation_heads: int | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> torch.Tensor:
    """The distance of one layer of each model, summed over spans; the caller divides.

    Args:
        student: Gets gradients where its tensors require them.
        teacher: Never does; its times are its own.
        student_spans_BT: The span of each token, prompt included; `IGNORE_INDEX` on padding and behind the last span.
        teacher_spans_BT: The same spans in the teacher's tokens.
        rows_BS: True where a span's row counts.
        kind, mean_heads, relation_heads: As for `attention_loss`.
        chunk_size: Tokens whose rows exist at a time; a span that has more is taken alone.

    Returns:
        A scalar, float32 (float64 for such queries); 0 if no row counts.

    Raises:
        ValueError: as `attention_loss`.
    """
    check_options(kind, relation_heads, chunk_size)
    if kind == "relations":
        span_S = torch.arange(rows_BS.shape[1], device=rows_BS.device)
        return attention_loss(
            _averaged(student, student_spans_BT, len(span_S)),
            _averaged(teacher, teacher_spans_BT, len(span_S)),
            rows_BS,
            span_S <= student_spans_BT.amax(1, keepdim=True),
            kind=kind,
            relation_heads=relation_heads,
            chunk_size=chunk_size,
        )
    distance = map_distance(kind, mean_heads, student, teacher)
    sides = map_products(student), map_products(teacher)
    inputs = sides[0][:2]
    track = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    dtype = accurate(inputs[0])
    total = torch.zeros((), dtype=dtype, device=rows_BS.device)
    gradients = [torch.zeros_like(tensor, dtype=dtype) for tensor in inputs] if track else None
    with torch.autocast(rows_BS.device.type, enabled=False):
        for b, columns in enumerate(zip(student_spans_BT, teacher_spans_BT, strict=True)):
            tokens = [Tokens.of(spans_T) for spans_T in columns]
            for spans in _chunks(rows_BS[b], *tokens, chunk_size):
                total += _chunk(b, sides, tokens, distance, rows_BS[b, spans], spans, gradients)
    return KnownGradients.apply(total, gradients, *inputs) if track else total


def span_rows(spans_BT: torch.Tensor, counted_BT: torch.Tensor) -> torch.Tensor:
    """(B, S), True for spans with tokens that count."""
    sequence, time = (counted_BT & (spans_BT != IGNORE_INDEX)).nonzero(as_tuple=True)
    width = int(spans_BT.max().clamp_min(0)) + 1
    rows_BS = torch.zeros(len(spans_BT), width, dtype=torch.bool, device=spans_BT.device)
    rows_BS[sequence, spans_BT[sequence, time]] = True
    return rows_BS


def _averaged(inputs: AttentionInputs, spans_BT: torch.Tensor, width: int) -> AttentionInputs:
    """Queries, keys and values of spans, (B, H, S, D), 0 where a sequence has fewer."""
    sequence_B1 = torch.arange(len(spans_BT), device=spans_BT.device)[:, None]
    kept_BT = spans_BT != IGNORE_INDEX
    place_N, places = (spans_BT + sequence_B1 * width)[kept_BT], len(spans_BT) * width
    lengths = place_N.bincount(minlength=places).clamp_min(1)[:, None, None]

    def averaged(states_BHTD: torch.Tensor) -> torch.Tensor:
        states_NHD = states_BHTD.transpose(1, 2)[kept_BT].to(accurate(states_BHTD))
        sums = states_NHD.new_zeros(places, *states_NHD.shape[1:]).index_add(0, place_N, states_NHD)
        return (sums / lengths).unflatten(0, (-1, width)).transpose(1, 2)

    return AttentionInputs(*(averaged(states) for states in inputs[:3]), inputs.scaling)


def _chunks(
    rows_S: torch.Tensor, student: Tokens, teacher: Tokens, chunk_size: int
) -> Iterator[slice]:
    """Spans to work on together, from the first to the last whose row counts."""
    counted = rows_S.nonzero()[:, 0].tolist()
    if not counted:
        return
    start, end = counted[0], counted[-1] + 1
    while start < end:
        stop = start + 1
        while stop < end and all(
            side.ends_S[stop] - side.up_to(start) <= chunk_size for side in (student, teacher)
        ):
            stop += 1
        yield slice(start, stop)
        start = stop


def _chunk(
    sequence: int,
    sides: tuple[Products, Products],
    tokens: list[Tokens],
    distance: RowDistance,
    rows_R: torch.Tensor,
    spans: slice,
    gradients: list[torch.Tensor] | None,
) -> torch.Tensor:
    """One chunk of one sequence; a function of its own so that its rows are freed on return."""
    track = gradients is not None
    dtype = accurate(sides[0].left_BHTD)
    own, theirs = (
        [states.detach().to(dtype) for states in _seen(side, sequence, held, spans)]
        for side, held in zip(sides, tokens, strict=True)
    )
    teacher_HRS = _pooled(*theirs, sides[1].scaling, tokens[1], spans)
    with torch.set_grad_enabled(track):
        own = [states.requires_grad_(track) for states in own]
        student_HRS = _pooled(*own, sides[0].scaling, tokens[0], spans)
        value = (distance(student_HRS, teacher_HRS) * rows_R).sum()
    if track:
        places = _seen(Products(*gradients, 1.0), sequence, tokens[0], spans)
        for total, gradient in zip(places, torch.autograd.grad(value, own), strict=True):
            total += gradient
    return value.detach()


def _seen(
    side: Products, sequence: int, tokens: Tokens, spans: slice
) -> tuple[torch.Tensor, torch.Tensor]:
    """The queries of a chunk, (1, H, C, D), and the keys up to its end, (1, K, L, D); views."""
    first, last = tokens.up_to(spans.start), tokens.ends_S[spans.stop - 1]
    one = slice(sequence, sequence + 1)
    queries = slice(tokens.start + first, tokens.start + last)
    keys = slice(tokens.start, tokens.start + last)
    return side.left_BHTD[one, :, queries], side.right_BKTD[one, :, keys]


def _pooled(
    queries_BHCD: torch.Tensor,
    keys_BKLD: torch.Tensor,
    scaling: float,
    tokens: Tokens,
    spans: slice,
) -> torch.Tensor:
    """log P of a chunk's spans, (1, H, R, S), which stands for their scores: its softmax is P."""
    seen, asking = keys_BKLD.shape[2], queries_BHCD.shape[2]
    position_L = torch.arange(seen, device=keys_BKLD.device)
    visible_BCL = (position_L <= position_L[seen - asking :, None])[None]
    probs_BHCL = scaled_scores(queries_BHCD, keys_BKLD, scaling, visible_BCL).softmax(-1)
    of_key_L = tokens.spans[:seen]
    of_query_C = of_key_L[seen - asking :] - spans.start
    shape = [*probs_BHCL.shape[:2], asking, spans.stop]
    by_key = probs_BHCL.new_zeros(shape).index_add(3, of_key_L, probs_BHCL)
    shape[2] = spans.stop - spans.start
    summed = by_key.new_zeros(shape).index_add(2, of_query_C, by_key)
    means = summed / of_query_C.bincount()[:, None]
    return means.clamp_min(torch.finfo(means.dtype).tiny).log()
