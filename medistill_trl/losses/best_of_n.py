"""Best-of-N: which of a prompt's samples win, and how much of log π each sample is to be given.

Drawing N samples of a policy π and keeping the one that earns most is a distribution of its own. With P_≤(y) and
P_<(y) the probability that a draw of π earns at most, or less than, what y earns,

    π_BoN(y) = π(y) · (P_≤(y)^N − P_<(y)^N) / (P_≤(y) − P_<(y))

(BOND, Sessa et al. 2024, arXiv 2407.14622; where no two draws earn the same it tends to N · π · P_≤^(N−1)).
BOND brings a policy near the π_BoN of an anchor π_a by the Jeffreys divergence

    (1−β) KL(π_BoN ‖ π) + β KL(π ‖ π_BoN)

whose gradient is that of −log π on the best of N anchor samples, and of −A log π on samples of π, with
A = (N−1) log P_≤ − log(π / π_a): P_≤ is estimated from the same anchor samples.

Every loss built on this is −Σ_k w_k Σ_t log π(a_kt) over the tokens t of samples k; these functions give w.

Shapes: G prompts, N samples of each, B = G·N samples with those of a prompt side by side, F samples of the
student to be compared with anchor samples, Y outcomes of a policy that can be enumerated.
"""

import torch

from medistill_trl.losses.policy import baseline

RANK_REWARDS = ("winner", "rank")


def winners(scores_GN: torch.Tensor) -> torch.Tensor:
    """1 on the best of each prompt's samples, 0 on the others, (G, N), float.

    Of samples that tie for best the first wins: they were drawn alike, so which one it is does not change the
    distribution of what is won.
    """
    best_G1 = scores_GN.argmax(1, keepdim=True)  # the first one, on any device
    return torch.zeros_like(scores_GN).scatter(1, best_G1, 1)


def rank_weights(scores_GN: torch.Tensor, kind: str) -> torch.Tensor:
    """Rewards of samples by their place among the prompt's, minus their mean, (G, N): they sum to 0.

    The mean is the same constant for every prompt, 1/N or 1/2, whatever was drawn: subtracting it leaves the
    expected gradient as it was.

    Args:
        scores_GN: Larger is better; −inf is allowed.
        kind: `winner`, 1 for the best, which samples that tie for best share; or `rank`, from 0 for the
            worst to 1 for the best in equal steps, samples that tie all get the mean of their places.

    Raises:
        ValueError: another kind, or fewer than two samples.
    """
    if kind not in RANK_REWARDS:
        raise ValueError(f"rank reward {kind!r} does not exist; one of {', '.join(RANK_REWARDS)}")
    num_samples = scores_GN.shape[1]
    if num_samples < 2:
        raise ValueError(f"a rank needs at least 2 samples of a prompt, got {num_samples}")
    if kind == "winner":
        best_GN = (scores_GN == scores_GN.amax(1, keepdim=True)).to(scores_GN.dtype)
        return best_GN / best_GN.sum(1, keepdim=True) - 1 / num_samples
    mine_GN1, theirs_G1N = scores_GN[:, :, None], scores_GN[:, None, :]
    beaten_GN = (mine_GN1 > theirs_G1N).sum(2)
    tied_GN = (mine_GN1 == theirs_G1N).sum(2) - 1  # itself
    return (beaten_GN + tied_GN / 2) / (num_samples - 1) - 0.5


def log_quantile(scores_F: torch.Tensor, anchor_scores_FN: torch.Tensor) -> torch.Tensor:
    """Estimate of log P_≤, nats, (F,): of how likely a draw of the anchor earns at most as much.

    With c of the N anchor samples earning at most as much it is −Σ_{i=c+1..N} 1/i, from 0 to about −log N − 0.58:
    finite also where none does, and without bias for the first N terms of log p = −Σ_j (1−p)^j / j. What it lacks
    is below (1−p)^(N+1) / (p (N+1)) and matters only for samples worse than nearly all of the anchor's,
    which it finds less bad than they are. (The paper's own estimate, −log 16 for a sample worse than both
    of N = 2, agrees with log p at the median.)

    Args:
        scores_F: Rewards of the samples.
        anchor_scores_FN: Rewards of anchor samples of the same prompt.
    """
    num_samples = anchor_scores_FN.shape[1]
    at_most_F = (anchor_scores_FN <= scores_F[:, None]).sum(1)
    whole_F = torch.full_like(at_most_F, num_samples + 1)
    return torch.digamma(at_most_F + 1.0) - torch.digamma(whole_F.float())


def backward_weights(
    log_quantiles_F: torch.Tensor,
    log_ratios_F: torch.Tensor,
    num_samples: int,
    beta: float,
    anchor_kl_coef: float = 0.0,
) -> torch.Tensor:
    """w of fresh samples of the student, (F,), for β KL(π ‖ π_BoN) + γ KL(π ‖ π_a).

    What each sample earns, β ((N−1) log P_≤ − log(π / π_a)) − γ log(π / π_a), minus the mean of the others:
    quantiles mean the same for every prompt, so all of them are a baseline for each other.

    Args:
        log_quantiles_F: log P_≤, from `log_quantile`.
        log_ratios_F: log π(y) − log π_a(y) of the whole samples, nats.
        num_samples: N.
        beta: β.
        anchor_kl_coef: γ.
    """
    earned_F = beta * (num_samples - 1) * log_quantiles_F - (beta + anchor_kl_coef) * log_ratios_F
    return leave_one_out(earned_F, len(earned_F))


def leave_one_out(values_B: torch.Tensor, num_samples: int) -> torch.Tensor:
    """Each value minus the mean of the others of its group, (B,); alone in a group it stays as it is."""
    values_B1 = values_B[:, None]
    means_B1 = baseline(values_B1, torch.ones_like(values_B1), num_samples, "leave_one_out")
    return (values_B1 - means_B1)[:, 0]


def best_of_n_distribution(
    probs_Y: torch.Tensor, rewards_Y: torch.Tensor, num_samples: int
) -> torch.Tensor:
    """π_BoN of a policy whose outcomes can be enumerated, (Y,).

    Outcomes of equal reward share what they win together by their probability. Where all rewards differ this is
    P_≤^N − P_<^N.

    Args:
        probs_Y: π, positive.
        rewards_Y: Of the outcomes.
        num_samples: N.
    """
    at_most_Y = (probs_Y * (rewards_Y[None, :] <= rewards_Y[:, None])).sum(1)
    equal_Y = (probs_Y * (rewards_Y[None, :] == rewards_Y[:, None])).sum(1)
    below_Y = at_most_Y - equal_Y
    return probs_Y / equal_Y * (at_most_Y**num_samples - below_Y**num_samples)
