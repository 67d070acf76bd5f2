"""Losses on pairs of completions, one preferred to the other, and the log-probabilities they take.

Shapes: B pairs, R rows (sequences) of a batch, T tokens of its longest row, V vocabulary.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F


class PairValues(NamedTuple):
    """One number for each completion of each pair, (B,) each."""

    chosen: torch.Tensor
    rejected: torch.Tensor


def sequence_log_probs(
    logits_RTV: torch.Tensor, input_ids_RT: torch.Tensor, completion_mask_RT: torch.Tensor
) -> torch.Tensor:
    """Σ_t log p(y_t | x, y_<t) over each row's completion, (R,), float32, nats.

    Args:
        logits_RTV: Position t predicts token t + 1.
        completion_mask_RT: 1 on the completion's tokens, 0 on prompt and padding.
    """
    mask_RT = completion_mask_RT[:, 1:].bool()
    # Only completion positions are copied to float32.
    log_probs_N = -F.cross_entropy(
        logits_RTV[:, :-1][mask_RT].float(), input_ids_RT[:, 1:][mask_RT], reduction="none"
    )
    per_token_RT = log_probs_N.new_zeros(mask_RT.shape).masked_scatter(mask_RT, log_probs_N)
    return per_token_RT.sum(1)


def spin_loss(
    policy: PairValues, reference: PairValues | None, beta: float
) -> tuple[torch.Tensor, PairValues]:
    """−log σ(β [(log π(y⁺) − log π_ref(y⁺)) − (log π(y⁻) − log π_ref(y⁻))]) of each pair.

    SPIN with the logistic loss (arXiv 2401.01335), whose reference is the previous iterate;
    without the reference's terms, the report's formula. Same form as DPO's loss.

    Args:
        policy: log π of y⁺ and y⁻, nats.
        reference: log π_ref of the same, without gradient; None leaves these terms out.
        beta: β, positive.

    Returns:
        The losses (B,), and the rewards β (log π − log π_ref), detached; their difference is the margin.
    """
    ratios = policy
    if reference is not None:
        ratios = PairValues(policy.chosen - reference.chosen, policy.rejected - reference.rejected)
    losses_B = -F.logsigmoid(beta * (ratios.chosen - ratios.rejected))
    return losses_B, PairValues(*(beta * ratio.detach() for ratio in ratios))
