"""Distillation between models of different tokenizers, over the spans of `medistill_trl.spans`.

    L = Σ_i (1−α) CE_i + α Σ_g w_g T_g² D_g      over the student's tokens i and the spans g

*A one-to-one span* is one token that both vocabularies have: D is between the two next-token distributions
over the outcomes the vocabularies share (`overlap`). *A merged span* is the same text in several tokens on one
side or both. By the chain rule a model's probability of that text is P = exp Σ log p(token), a product over
the span's tokens. D is between the two outcomes "this text" and "any other": the distributions (P_S, 1 − P_S)
and (P_T, 1 − P_T). Probabilities of texts are taken at temperature 1, where they do not depend on how the text is
cut; T softens the distributions over the outcomes. With b = σ(logit(P) / T), D the forward KL and i a token
of a merged span

    D = b_T log(b_T / b_S) + (1−b_T) log((1−b_T) / (1−b_S))
    ∂(T² D)/∂(logits of i) = T (b_S − b_T) / (1 − P_S) · (1[token i] − p_i)

whose absolute values sum to at most 2T, as 1 − p_i(token i) ≤ 1 − P_S. A span counts once, however many tokens
it has: at T = 1 two outcomes are a coarsening of all that its tokens distinguish, so D is at most the sum of the
same-tokenizer divergences of these tokens. Tokens in no span get the cross-entropy alone.

Shapes: N student tokens, M teacher tokens, G spans.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from medistill_trl.losses.chunked import CHUNK_SIZE
from medistill_trl.losses.divergences import Distribution, Divergence, forward_kl, kl
from medistill_trl.losses.heads import OutputHead
from medistill_trl.losses.overlap import Fold
from medistill_trl.losses.policy import policy_loss, token_log_probs
from medistill_trl.losses.token_kl import (
    distillation_loss,
    score_by_name,
    sums_for_log,
    token_scores,
)
from medistill_trl.losses.token_means import add_sums
from medistill_trl.losses.token_terms import TemperatureRule

NEARLY_CERTAIN = 1e-5  # P is kept this far from 1, where log(1 − P) loses its digits in float32


@dataclass(frozen=True)
class Reading:
    """A batch's completions as one model reads them.

    Args:
        states: Hidden states that predict the tokens, (N, H), from `completion_states`.
        tokens: (N,).
        head: From states to logits.
    """

    states: torch.Tensor
    tokens: torch.Tensor
    head: OutputHead

    def rows(self, index: torch.Tensor) -> "Reading":
        return Reading(self.states[index], self.tokens[index], self.head)


@dataclass(frozen=True)
class SpanBatch:
    """What ties two readings together.

    Args:
        spans_G4: Rows [start, end) of the student's reading and of the teacher's.
        one_to_one_G: True where a span is one token that both vocabularies have.
    """

    spans_G4: torch.Tensor
    one_to_one_G: torch.Tensor

    @cached_property
    def pairs_G4(self) -> torch.Tensor:
        return self.spans_G4[self.one_to_one_G]

    @cached_property
    def merged_G4(self) -> torch.Tensor:
        return self.spans_G4[~self.one_to_one_G]

    def split(
        self, value: float | torch.Tensor | Callable | None
    ) -> tuple[float | torch.Tensor | Callable | None, float | torch.Tensor | Callable | None]:
        """What is given per span, for the one-to-one spans and for the merged; anything else twice."""
        if isinstance(value, torch.Tensor):
            return value[self.one_to_one_G], value[~self.one_to_one_G]
        return value, value


def span_distillation_loss(
    student: Reading,
    teacher: Reading,
    batch: SpanBatch,
    fold: Fold,
    *,
    alpha: float,
    temperature: float | torch.Tensor | TemperatureRule = 1.0,
    divergence: Divergence = forward_kl,
    weights_G: torch.Tensor | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss above, a sum, with gradients for the student's states and head.

    The one-to-one spans go through both heads once; the student's other tokens twice, as their gradient needs
    the whole span's probability first.

    Args:
        alpha: α; at 0 the teacher is not looked at.
        temperature: T: one for all; (G,), one per span; or a rule.
        divergence: D.
        weights_G: w, on the divergence alone; None for 1.
        chunk_size: Tokens whose logits exist at a time.

    Returns:
        The loss, and sums without gradient: those of `distillation_loss`, `agreed`, `teacher_entropy`
        and `teacher_shared_mass` over the one-to-one spans, `kl` and `divergence` over all; and counts:
        `tokens`, `spans`, `one_to_one` and `merged`, the student's tokens in either kind.
    """
    if alpha == 0:
        loss, sums = distillation_loss(
            student.states, student.tokens, student.head, alpha=0.0, chunk_size=chunk_size
        )
        return loss, sums | _counts(student, batch)
    (pair_temperature, temperature), (pair_weights, weights_G) = (
        batch.split(given) for given in (temperature, weights_G)
    )
    ours, theirs = student.rows(batch.pairs_G4[:, 0]), teacher.rows(batch.pairs_G4[:, 2])
    loss, sums = distillation_loss(
        ours.states,
        ours.tokens,
        ours.head,
        theirs.states,
        theirs.head,
        alpha=alpha,
        temperature=pair_temperature,
        divergence=divergence,
        divergence_weights_N=pair_weights,
        fold=fold,
        chunk_size=chunk_size,
    )
    outcomes = _outcomes(student, teacher, batch, chunk_size)
    terms, slope_G = _compare_outcomes(outcomes, divergence, temperature)
    scale_G = alpha * terms["temperature"].square()
    scale_G = scale_G if weights_G is None else scale_G * weights_G
    rest, of_rest = _rest(student, batch, alpha, scale_G * slope_G, chunk_size)
    loss = loss + rest + (scale_G * terms["divergence"]).sum()
    sums = add_sums(sums, of_rest | sums_for_log(terms, temperature))
    return loss, sums | _counts(student, batch)


def span_scores(
    student: Reading,
    teacher: Reading,
    batch: SpanBatch,
    fold: Fold,
    *,
    score: str = "forward_kl",
    chunk_size: int = CHUNK_SIZE,
) -> torch.Tensor:
    """How far the two are apart on each span at temperature 1, (G,), without gradient; see `token_scores`."""
    ours, theirs = student.rows(batch.pairs_G4[:, 0]), teacher.rows(batch.pairs_G4[:, 2])
    of_pairs = token_scores(
        ours.states,
        theirs.states,
        ours.head,
        theirs.head,
        score=score,
        fold=fold,
        chunk_size=chunk_size,
    )
    scores_G = of_pairs.new_empty(len(batch.spans_G4))
    scores_G[batch.one_to_one_G] = of_pairs
    outcomes = _outcomes(student, teacher, batch, chunk_size)
    with torch.autocast(of_pairs.device.type, enabled=False):
        scores_G[~batch.one_to_one_G] = score_by_name(score)(*outcomes)
    return scores_G


# --- merged spans ----------------------------------------------------------------------------------


@torch.no_grad()
def text_log_probs(
    reading: Reading, ranges_G2: torch.Tensor, chunk_size: int = CHUNK_SIZE
) -> torch.Tensor:
    """log P of each span's text at temperature 1: the sum over its tokens, (G,), nats.

    Args:
        ranges_G2: Rows [start, end) of each span.
    """
    index_GL, inside_GL = _members(ranges_G2)
    rows = reading.rows(index_GL[inside_GL])
    found = token_log_probs(rows.states, rows.tokens, rows.head, chunk_size=chunk_size)
    table_GL = found.new_zeros(index_GL.shape)
    table_GL[inside_GL] = found
    return table_GL.sum(1)


def _members(ranges_G2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of each span side by side, (G, longest), and which of these are in it."""
    longest = int((ranges_G2[:, 1] - ranges_G2[:, 0]).max()) if len(ranges_G2) else 0
    index_GL = ranges_G2[:, :1] + torch.arange(longest, device=ranges_G2.device)
    return index_GL, index_GL < ranges_G2[:, 1:]


def _outcomes(
    student: Reading, teacher: Reading, batch: SpanBatch, chunk_size: int
) -> tuple[Distribution, Distribution]:
    """Each side's (P, 1 − P) of the merged spans, (G, 2)."""
    ranges = batch.merged_G4[:, :2], batch.merged_G4[:, 2:]
    return tuple(
        two_outcomes(text_log_probs(reading, range_G2, chunk_size))
        for reading, range_G2 in zip((student, teacher), ranges, strict=True)
    )


def two_outcomes(log_prob_G: torch.Tensor) -> Distribution:
    """(P, 1 − P) from log P, (G, 2)."""
    log_prob_G = log_prob_G.clamp(max=math.log1p(-NEARLY_CERTAIN))
    log_other_G = torch.where(
        log_prob_G > -math.log(2),
        log_prob_G.expm1().neg().log(),
        log_prob_G.exp().neg().log1p(),
    )
    return Distribution.of(torch.stack([log_prob_G, log_other_G], -1))


@torch.no_grad()
def _compare_outcomes(
    outcomes: tuple[Distribution, Distribution],
    divergence: Divergence,
    temperature: float | torch.Tensor | TemperatureRule,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Terms of each merged span, as those of a token, and ∂D/∂log P_S; all (G,)."""
    student, teacher = outcomes
    with torch.autocast(student.probs.device.type, enabled=False):
        if callable(temperature):
            temperature = temperature(student, teacher)
        temperature_G1 = (
            torch.as_tensor(temperature).to(student.log_norm).expand(len(student.probs))
        )
        temperature_G1 = temperature_G1[:, None]
        found_G, gradient_G2 = divergence(
            student.softened(temperature_G1), teacher.softened(temperature_G1)
        )
        # ∂ log(1 − P)/∂ log P = −P / (1 − P)
        odds_G = student.shifted.diff(dim=1)[:, 0].neg().exp()
        slope_G = (gradient_G2[:, 0] - gradient_G2[:, 1] * odds_G) / temperature_G1[:, 0]
        terms = {
            "divergence": found_G,
            "kl": kl(teacher, student),
            "temperature": temperature_G1[:, 0],
        }
    return terms, slope_G


def _rest(
    student: Reading, batch: SpanBatch, alpha: float, slope_G: torch.Tensor, chunk_size: int
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(1−α)·CE of the student's tokens outside the one-to-one spans, with a gradient that is also that of the
    merged spans' divergence, and sums for the log.

    Args:
        slope_G: ∂(divergence term)/∂log P_S of each merged span.
    """
    outside_N = torch.ones_like(student.tokens, dtype=torch.bool)
    outside_N[batch.pairs_G4[:, 0]] = False
    # log P_S is the sum of its tokens' log-probabilities, so each has the slope of the sum.
    weights_N = torch.full_like(student.tokens, 1 - alpha, dtype=slope_G.dtype)
    index_GL, inside_GL = _members(batch.merged_G4[:, :2])
    weights_N[index_GL[inside_GL]] -= slope_G[:, None].expand_as(inside_GL)[inside_GL]
    rows = student.rows(outside_N)
    weighted, terms = policy_loss(
        rows.states, rows.tokens, rows.head, weights_N[outside_N], chunk_size=chunk_size
    )
    ce = -terms["log_prob"].sum()
    sums = {"ce": ce.float(), "student_entropy": terms["entropy"].sum().float()}
    return weighted - weighted.detach() + (1 - alpha) * ce, sums


def _counts(student: Reading, batch: SpanBatch) -> dict[str, torch.Tensor]:
    merged = (batch.merged_G4[:, 1] - batch.merged_G4[:, 0]).sum()
    counts = {
        "tokens": len(student.tokens),
        "spans": len(batch.spans_G4),
        "one_to_one": len(batch.pairs_G4),
        "merged": merged,
    }
    device = student.states.device
    return {name: torch.as_tensor(n, device=device).float() for name, n in counts.items()}
