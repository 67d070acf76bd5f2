"""Policy gradients: credit of rewards to tokens, and the loss from hidden states.

    L = − Σ_t ρ_t A_t log π(a_t) − β Σ_t H_t

with the advantage A_t and the importance ratio ρ_t = π(a_t) / π_old(a_t) as constants. Where the samples are
fresh ρ is 1 and this is REINFORCE (Williams 1992, doi 10.1007/BF00992696). Where they are reused, a token
whose ratio has left [1 − ε, 1 + ε] in the direction its advantage pushes gets no gradient: the gradient is
that of PPO's clipped surrogate −min(ρA, clip(ρ) A) (Schulman et al. 2017, arXiv 1707.06347). The
entropy H_t is over the whole vocabulary.

The gradient in the logits u of one token is known in closed form, so no batch × time × vocabulary tensor
exists (see `chunked`):

    ∂L/∂u_i = ρA (p_i − 1[i = a]) + β p_i (log p_i + H)

Shapes: B completions, T tokens of the longest, C of one, D of the same text in a teacher's own tokens, G prompts,
K completions of each prompt (B = G·K, those of a prompt side by side), N completion tokens of the batch, R tokens of a block, H hidden size, V vocabulary.
"""

from dataclasses import dataclass

import torch

from medistill_trl.losses.chunked import CHUNK_SIZE, Side, token_sum
from medistill_trl.losses.divergences import Distribution
from medistill_trl.losses.heads import OutputHead
from medistill_trl.losses.token_kl import IGNORE_INDEX

BASELINES = ("none", "group_mean", "leave_one_out")


# --- credit ----------------------------------------------------------------------------------------


def discounted_returns(
    rewards_BT: torch.Tensor, mask_BT: torch.Tensor, gamma: float
) -> torch.Tensor:
    """Causal credit: R_t = Σ_{u≥t} γ^{u−t} r_u over a completion's tokens, (B, T); 0 where masked.

    Args:
        mask_BT: 1 on completion tokens, which stand together at the left.
        gamma: γ in [0, 1]; 0 credits a token with its own reward only, 1 with all that follows.
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must lie between 0 and 1, got {gamma}")
    rewards_BT = rewards_BT * mask_BT
    returns_BT = torch.zeros_like(rewards_BT)
    following_B = rewards_BT.new_zeros(len(rewards_BT))
    for t in reversed(range(rewards_BT.shape[1])):
        following_B = rewards_BT[:, t] + gamma * following_B
        returns_BT[:, t] = following_B
    return returns_BT


def at_last(values_B: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """(B, T) with each value at its completion's last token; that of an empty completion is nowhere."""
    if mask_BT.shape[1] == 0:
        return torch.zeros_like(mask_BT, dtype=values_B.dtype)
    last_B1 = (mask_BT.sum(1, keepdim=True) - 1).clamp_min(0).long()
    placed_BT = torch.zeros_like(mask_BT, dtype=values_B.dtype)
    return placed_BT.scatter(1, last_B1, values_B[:, None]) * mask_BT


def span_rewards(
    student_log_probs_C: torch.Tensor,
    teacher_log_probs_D: torch.Tensor,
    student_spans_C: torch.Tensor,
    teacher_spans_D: torch.Tensor,
) -> torch.Tensor:
    """log p_T − log p_S of each span of text, (C,), at the span's last student token; 0 elsewhere.

    Two models with different tokenizers split a completion into C and D tokens; the log-probability of a span is
    the sum of those of its tokens on either side. So the rewards sum to the log-ratio of all text in spans.

    Args:
        student_spans_C, teacher_spans_D: The span of each token, counted from 0; tokens outside of spans, at
            `IGNORE_INDEX`, earn nothing.
    """
    spans_C = student_spans_C
    inside_C, inside_D = spans_C != IGNORE_INDEX, teacher_spans_D != IGNORE_INDEX
    # No more spans than the student has tokens.
    ratios_S = torch.zeros_like(student_log_probs_C)
    ratios_S = ratios_S.index_add(0, teacher_spans_D[inside_D], teacher_log_probs_D[inside_D])
    ratios_S = ratios_S.index_add(0, spans_C[inside_C], -student_log_probs_C[inside_C])
    following_C = torch.cat([spans_C[1:], spans_C.new_tensor([IGNORE_INDEX])])[: len(spans_C)]
    last_C = inside_C & (spans_C != following_C)
    return torch.where(last_C, ratios_S[spans_C.clamp_min(0)], 0.0)


def baseline(
    values_BT: torch.Tensor, mask_BT: torch.Tensor, num_generations: int, kind: str
) -> torch.Tensor:
    """What is subtracted from each value, (B, T): a mean over the prompt's completions, place by place.

    `leave_one_out` is the mean of the others that have a value there, 0 if none has (Ahmadian et al. 2024,
    arXiv 2402.14740). It does not depend on the sample it is subtracted from, so the expected gradient
    stays what it was. `group_mean` is that of all K, the sample itself included (GRPO, arXiv 2402.03300); one
    that has ended has nothing left to earn and counts as 0. It shrinks the expected gradient by 1 − 1/K.

    Args:
        values_BT: Returns of tokens, or (B, 1), scores of completions.
        mask_BT: 1 where a value counts.
        num_generations: K.
        kind: One of `BASELINES`.

    Raises:
        ValueError: an unknown kind, or B is not a multiple of K.
    """
    if kind not in BASELINES:
        raise ValueError(f"baseline {kind!r} does not exist; one of {', '.join(BASELINES)}")
    if len(values_BT) % num_generations:
        raise ValueError(
            f"{len(values_BT)} completions do not make groups of num_generations {num_generations}"
        )
    if kind == "none":
        return torch.zeros_like(values_BT)
    groups = (-1, num_generations, values_BT.shape[1])
    mask_GKT = mask_BT.to(values_BT.dtype).reshape(groups)
    values_GKT = values_BT.reshape(groups) * mask_GKT
    if kind == "group_mean":
        means_GKT = values_GKT.mean(1, keepdim=True).expand_as(values_GKT)
    else:
        others_GKT = values_GKT.sum(1, keepdim=True) - values_GKT
        means_GKT = others_GKT / (mask_GKT.sum(1, keepdim=True) - mask_GKT).clamp_min(1)
    return means_GKT.reshape(values_BT.shape)


def token_advantages(
    rewards_BT: torch.Tensor, mask_BT: torch.Tensor, gamma: float, num_generations: int, kind: str
) -> torch.Tensor:
    """A_t = R_t − baseline of R_t at the same place, (B, T), where every token has a reward of its own."""
    returns_BT = discounted_returns(rewards_BT, mask_BT, gamma)
    return (returns_BT - baseline(returns_BT, mask_BT, num_generations, kind)) * mask_BT


def sequence_advantages(
    scores_B: torch.Tensor, mask_BT: torch.Tensor, gamma: float, num_generations: int, kind: str
) -> torch.Tensor:
    """A_t = γ^{T_i − t} (R − baseline of R), (B, T), where a completion of T_i tokens has one score R, which
    comes with its last token."""
    scores_B1 = scores_B[:, None]
    counted_B1 = torch.ones_like(scores_B1)  # an empty completion has a score too
    centred_B1 = scores_B1 - baseline(scores_B1, counted_B1, num_generations, kind)
    at_last_BT = at_last(centred_B1[:, 0], mask_BT)
    return discounted_returns(at_last_BT, mask_BT, gamma)


# --- the loss --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PolicyObjective:
    """−w log π(a) − β H per token, with w = ρ A or, where clipped, 0.

    Args:
        advantages_N: A.
        old_log_probs_N: log π_old(a); None for fresh samples, whose ratio is exactly 1.
        clip: How far below and above 1 the ratio may go, (ε_low, ε_high); None for any.
        entropy_coef: β.
    """

    advantages_N: torch.Tensor
    old_log_probs_N: torch.Tensor | None = None
    clip: tuple[float, float] | None = None
    entropy_coef: float = 0.0

    @property
    def names(self) -> list[str]:
        return ["log_prob", "entropy", "ratio", "clipped", "weight"]

    def total(self, terms: dict[str, torch.Tensor]) -> torch.Tensor:
        bonus = self.entropy_coef * terms["entropy"].sum()
        return -(terms["weight"] * terms["log_prob"]).sum() - bonus

    def block(self, student_RV, teacher_RV, targets_R, tokens, terms) -> torch.Tensor:
        policy = Distribution.of(student_RV)
        index_R1 = targets_R[:, None]
        log_prob_R = (policy.shifted.gather(1, index_R1) - policy.log_norm)[:, 0]
        entropy_R, weight_R = policy.entropy(), self._weight(log_prob_R, tokens, terms)
        terms["log_prob"][tokens], terms["entropy"][tokens] = log_prob_R, entropy_R
        if self.entropy_coef == 0:
            gradient_RV = policy.probs.mul_(weight_R[:, None])
        else:
            gradient_RV = policy.log_probs.add_(entropy_R[:, None]).mul_(self.entropy_coef)
            gradient_RV.add_(weight_R[:, None]).mul_(policy.probs)
        return gradient_RV.scatter_add_(1, index_R1, -weight_R[:, None])

    def _weight(
        self, log_prob_R: torch.Tensor, tokens: slice, terms: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        advantage_R = self.advantages_N[tokens].to(log_prob_R.dtype)
        if self.old_log_probs_N is None:
            terms["ratio"][tokens] = 1
            terms["weight"][tokens] = advantage_R
            return advantage_R
        ratio_R = (log_prob_R - self.old_log_probs_N[tokens]).exp()
        weight_R = ratio_R * advantage_R
        if self.clip is not None:
            low, high = self.clip
            clipped_R = ((ratio_R > 1 + high) & (advantage_R > 0)) | (
                (ratio_R < 1 - low) & (advantage_R < 0)
            )
            terms["clipped"][tokens] = clipped_R.to(ratio_R.dtype)
            weight_R = weight_R.masked_fill(clipped_R, 0)
        terms["ratio"][tokens], terms["weight"][tokens] = ratio_R, weight_R
        return weight_R


def policy_loss(
    hidden_NH: torch.Tensor,
    tokens_N: torch.Tensor,
    head: OutputHead,
    advantages_N: torch.Tensor,
    *,
    old_log_probs_N: torch.Tensor | None = None,
    clip: tuple[float, float] | None = None,
    entropy_coef: float = 0.0,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """−Σ ρ A log π(a) − β Σ H, to be divided by the caller, and what it is made of.

    Args:
        hidden_NH: States that predict the tokens, from `completion_states`. N may be 0.
        tokens_N: What was sampled.
        head: Gets gradients where its tensors require them.
        advantages_N: A.
        old_log_probs_N: log π_old(a) of reused samples; None for fresh ones, whose ratio is exactly 1.
        clip: (ε_low, ε_high); None for a ratio without bounds.
        entropy_coef: β.
        chunk_size: Tokens whose logits exist at a time.

    Returns:
        The loss, a scalar, and without gradient (N,) each: `log_prob`, `entropy` (nats), `ratio`, `clipped`
        (1 where the gradient of the first term is zero because of the bounds), `weight` (what log π is
        multiplied by).

    Raises:
        ValueError: vectors of different length.
    """
    old = [] if old_log_probs_N is None else [old_log_probs_N]
    lengths = [len(vector) for vector in (hidden_NH, tokens_N, advantages_N, *old)]
    if len(set(lengths)) > 1:
        raise ValueError(f"states, tokens and advantages must be of the same tokens, got {lengths}")
    objective = PolicyObjective(advantages_N, old_log_probs_N, clip, entropy_coef)
    return token_sum(objective, Side.of(hidden_NH, head, None), tokens_N, None, chunk_size)


class _LogProb:
    """log p(a) per token; there is nothing to differentiate."""

    names = ["log_prob"]

    def total(self, terms: dict[str, torch.Tensor]) -> torch.Tensor:
        return terms["log_prob"].sum()

    def block(self, student_RV, teacher_RV, targets_R, tokens, terms) -> None:
        log_norm_R = student_RV.logsumexp(-1)
        terms["log_prob"][tokens] = student_RV.gather(1, targets_R[:, None])[:, 0] - log_norm_R


@torch.no_grad()
def token_log_probs(
    hidden_NH: torch.Tensor,
    tokens_N: torch.Tensor,
    head: OutputHead,
    *,
    vocab_size: int | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> torch.Tensor:
    """log p(token), (N,), float32, nats, without gradient.

    Args:
        hidden_NH: States that predict the tokens, from `completion_states`.
        tokens_N: Token ids below `vocab_size`.
        vocab_size: Leading tokens that the distribution is over; None for all.
        chunk_size: Tokens whose logits exist at a time.
    """
    side = Side.of(hidden_NH, head, vocab_size)
    return token_sum(_LogProb(), side, tokens_N, None, chunk_size)[1]["log_prob"]
