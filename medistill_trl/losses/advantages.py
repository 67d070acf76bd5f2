"""Actor and critic: advantages from rewards and a value function, and the value function's own loss.

    δ_t = r_t + γ V_{t+1} − V_t,   A_t = Σ_{u≥t} (γλ)^{u−t} δ_u,   R_t = A_t + V_t

V_t is what the critic expects from token t on, before it is written. After the last token of a completion there is
nothing to earn: V is 0 there, whether the completion ended by itself or was cut at the length limit, which is a part of
the task (Schulman et al. 2016, arXiv 1506.02438).

Shapes: B completions, T tokens of the longest, N completion tokens of the batch.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from medistill_trl.losses.policy import discounted_returns


def gae(
    rewards_BT: torch.Tensor,
    values_BT: torch.Tensor,
    mask_BT: torch.Tensor,
    gamma: float,
    lam: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation.

    Args:
        rewards_BT: r_t.
        values_BT: V_t.
        mask_BT: 1 on completion tokens, which stand together at the left.
        gamma: γ in [0, 1].
        lam: λ in [0, 1]; 0 trusts the critic after one token, A_t = δ_t; 1 never, R_t = Σ_{u≥t} γ^{u−t} r_u.

    Returns:
        Advantages A_t and the critic's targets R_t, (B, T) each; 0 where masked.

    Raises:
        ValueError: γ or λ out of range.
    """
    for name, factor in (("gamma", gamma), ("lam", lam)):
        if not 0 <= factor <= 1:
            raise ValueError(f"{name} must lie between 0 and 1, got {factor}")
    values_BT = values_BT * mask_BT
    after_BT = torch.zeros_like(values_BT)
    after_BT[:, :-1] = values_BT[:, 1:]
    errors_BT = rewards_BT + gamma * after_BT - values_BT
    advantages_BT = discounted_returns(errors_BT, mask_BT, gamma * lam)
    return advantages_BT, advantages_BT + values_BT


class Moments(NamedTuple):
    """Of some numbers, float64: their mean and (population) variance; 0 if there are none."""

    mean: torch.Tensor
    variance: torch.Tensor

    @classmethod
    def of(
        cls,
        values_N: torch.Tensor,
        total: Callable[[torch.Tensor], torch.Tensor] = lambda sums: sums,
    ) -> "Moments":
        """
        Args:
            total: Adds up a vector over processes, so that the moments are those of everyone's numbers.
        """
        values_N = values_N.double()
        powers = (torch.ones_like(values_N), values_N, values_N.square())
        count, first, second = total(torch.stack([power.sum() for power in powers]))
        count = count.clamp_min(1)
        mean = first / count
        return cls(mean, (second / count - mean.square()).clamp_min(0))


def whiten(values_N: torch.Tensor, moments: Moments) -> torch.Tensor:
    """Values with mean 0 and variance 1, in their dtype; numbers that are all alike become 0."""
    whitened_N = (values_N.double() - moments.mean) * (moments.variance + 1e-8).rsqrt()
    return whitened_N.to(values_N.dtype)


def explained_variance(returns: Moments, errors: Moments) -> float:
    """1 − Var(R − V) / Var(R): 1 for a critic that knows what comes, 0 for one that says the same of
    everything, below 0 for one that misleads; 0 too if all returns are alike."""
    if returns.variance == 0:
        return 0.0
    return (1 - errors.variance / returns.variance).item()


def value_loss(
    values_N: torch.Tensor,
    old_values_N: torch.Tensor,
    returns_N: torch.Tensor,
    clip: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Σ ½ max((V − R)², (V_clip − R)²) with V_clip = V_old + clamp(V − V_old, −clip, clip), to be divided by the
    caller.

    A value that has moved by more than `clip` towards its target gets no gradient; one that has moved away
    is still called back. As in the reference implementation of PPO (arXiv 1707.06347, openai/baselines).

    Args:
        values_N: V, with gradient.
        old_values_N: V_old, what the critic said when the samples were drawn.
        returns_N: R.
        clip: In the units of the values; None for ½(V − R)².

    Returns:
        The loss, a scalar, and where there is no gradient because of the bounds, (N,), bool.
    """
    errors_N = (values_N - returns_N).square()
    if clip is None:
        return 0.5 * errors_N.sum(), torch.zeros_like(errors_N, dtype=torch.bool)
    moved_N = values_N - old_values_N
    bounded_N = old_values_N + moved_N.clamp(-clip, clip)
    # Within the bounds it is the value itself, not what rounding makes of adding the difference again.
    bounded_N = torch.where(moved_N.abs() > clip, bounded_N, values_N)
    bounded_errors_N = (bounded_N - returns_N).square()
    return 0.5 * torch.maximum(errors_N, bounded_errors_N).sum(), bounded_errors_N > errors_N
