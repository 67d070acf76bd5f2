"""Losses on pairs of completions, one preferred to the other, and the log-probabilities they take.

Shapes: B pairs, R rows (sequences) of a batch, T tokens of its longest row, N completion tokens of all rows, H hidden
size, V vocabulary.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from medistill_trl.losses.chunked import CHUNK_SIZE, Side, evaluate
from medistill_trl.losses.divergences import Distribution
from medistill_trl.losses.heads import OutputHead


class PairValues(NamedTuple):
    """One number for each completion of each pair, (B,) each."""

    chosen: torch.Tensor
    rejected: torch.Tensor


def sequence_log_probs(
    hidden_RTH: torch.Tensor,
    input_ids_RT: torch.Tensor,
    completion_mask_RT: torch.Tensor,
    head: OutputHead,
    chunk_size: int = CHUNK_SIZE,
) -> torch.Tensor:
    """Σ_t log p(y_t | x, y_<t) over each row's completion, (R,), float32, nats.

    Gradients reach the states and the head where they want them.

    Args:
        hidden_RTH: Last hidden states, after the final norm; position t predicts token t + 1.
        completion_mask_RT: 1 on the completion's tokens, 0 on prompt and padding.
        head: Of the same model.
        chunk_size: Tokens whose logits exist at a time.
    """
    mask_RT = completion_mask_RT[:, 1:].bool()
    states_NH, tokens_N = hidden_RTH[:, :-1][mask_RT], input_ids_RT[:, 1:][mask_RT]
    inputs = states_NH, *head.parameters
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        log_probs_N = TokenLogProbs.apply(head, tokens_N, chunk_size, *inputs)
    else:
        # Not `token_log_probs`: by the same arithmetic, equal models have equal numbers, and a margin of exactly 0.
        none = [False] * len(inputs)
        with torch.no_grad():
            terms, _ = evaluate(
                _WeightedLogProb(), Side(states_NH, head), None, tokens_N, chunk_size, none
            )
        log_probs_N = terms["log_prob"]
    per_token_RT = log_probs_N.new_zeros(mask_RT.shape).masked_scatter(mask_RT, log_probs_N)
    return per_token_RT.sum(1)


@dataclass(frozen=True)
class _WeightedLogProb:
    """Σ_t w_t log p(y_t), an `Objective`.

    Args:
        weights_N: w; None for 1.
    """

    weights_N: torch.Tensor | None = None
    names = ["log_prob"]

    def total(self, terms: dict[str, torch.Tensor]) -> torch.Tensor:
        weights_N = 1 if self.weights_N is None else self.weights_N
        return (weights_N * terms["log_prob"]).sum()

    def block(self, student_RV, teacher_RV, targets_R, tokens, terms) -> torch.Tensor:
        policy, index_R1 = Distribution.of(student_RV), targets_R[:, None]
        terms["log_prob"][tokens] = (policy.shifted.gather(1, index_R1) - policy.log_norm)[:, 0]
        gradient_RV = policy.probs.neg_()
        gradient_RV.scatter_add_(1, index_R1, gradient_RV.new_ones(index_R1.shape))
        return gradient_RV if self.weights_N is None else gradient_RV * self.weights_N[tokens, None]


class TokenLogProbs(torch.autograd.Function):
    """log p(token) of each token, (N,), a chunk of logits at a time.

    A token's log-probability depends on its own state alone. So the pass that makes the logits also gives the gradient
    in the states, which backward multiplies by what each token turns out to count. The gradient in the head is a sum
    over all tokens: where it is wanted, backward makes the logits again.
    """

    @staticmethod
    def forward(ctx, head, tokens_N, chunk_size, hidden_NH, *parameters):
        side = Side(hidden_NH, head)
        wanted = [True] + [False] * len(parameters)
        terms, gradients = evaluate(_WeightedLogProb(), side, None, tokens_N, chunk_size, wanted)
        ctx.save_for_backward(tokens_N, hidden_NH, gradients[0])
        ctx.head, ctx.chunk_size = head, chunk_size
        device = hidden_NH.device.type
        ctx.autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        return terms["log_prob"]

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient_N):
        tokens_N, hidden_NH, states_gradient_NH = ctx.saved_tensors
        in_states_NH = (states_gradient_NH * gradient_N[:, None]).to(hidden_NH.dtype)
        wanted = ctx.needs_input_grad[4:]
        if not any(wanted):
            return None, None, None, in_states_NH, *(None for _ in wanted)
        with torch.autocast(*ctx.autocast):
            _, gradients = evaluate(
                _WeightedLogProb(gradient_N), Side(hidden_NH, ctx.head), None, tokens_N, ctx.chunk_size, [False, *wanted]
            )  # fmt: skip
        in_head = [
            None if gradient is None else gradient.to(parameter.dtype)
            for gradient, parameter in zip(gradients[1:], ctx.head.parameters, strict=True)
        ]
        return None, None, None, in_states_NH, *in_head


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
