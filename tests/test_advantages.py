"""Generalised advantages, whitening over processes, and the critic's loss: hand-computed numbers."""

import pytest
import torch
from test_policy import Enumerated

from medistill_trl.losses.advantages import Moments, explained_variance, gae, value_loss, whiten
from medistill_trl.losses.policy import discounted_returns

REWARDS = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 99.0], [99.0, 99.0, 99.0]])
VALUES = torch.tensor([[1.0, 2.0, 4.0], [2.0, 1.0, 77.0], [77.0, 77.0, 77.0]])
MASK = torch.tensor([[1, 1, 1], [1, 1, 0], [0, 0, 0]])


def test_gae_of_completions_of_three_lengths():
    """γ = λ = ½. First row: δ = 1+1−1, 2+2−2, 3−4; A = 1+¼·1.75, 2−¼, −1. Nothing follows the last token."""
    advantages, returns = gae(REWARDS, VALUES, MASK, 0.5, 0.5)
    assert advantages.tolist() == [[1.4375, 1.75, -1.0], [3.5, 4.0, 0.0], [0.0, 0.0, 0.0]]
    assert returns.tolist() == [[2.4375, 3.75, 3.0], [5.5, 5.0, 0.0], [0.0, 0.0, 0.0]]


def test_the_ends_of_lambda_are_what_was_earned_and_one_token():
    earned = discounted_returns(REWARDS, MASK, 0.9)
    advantages, returns = gae(REWARDS, VALUES, MASK, 0.9, 1.0)
    torch.testing.assert_close(returns, earned)
    torch.testing.assert_close(advantages, (earned - VALUES) * MASK)
    advantages, _ = gae(REWARDS, VALUES, MASK, 0.9, 0.0)
    torch.testing.assert_close(
        advantages, torch.tensor([[1.8, 3.6, -1.0], [2.9, 4.0, 0.0], [0.0, 0.0, 0.0]])
    )


def test_no_tokens_and_factors_out_of_range():
    advantages, returns = gae(REWARDS[:, :0], VALUES[:, :0], MASK[:, :0], 1.0, 0.95)
    assert advantages.shape == returns.shape == (3, 0)
    with pytest.raises(ValueError, match=r"gamma must lie between 0 and 1, got 1\.1"):
        gae(REWARDS, VALUES, MASK, 1.1, 0.5)
    with pytest.raises(ValueError, match=r"lam must lie between 0 and 1, got -0\.1"):
        gae(REWARDS, VALUES, MASK, 1.0, -0.1)


def test_any_critic_leaves_the_expected_gradient_as_it_is():
    """At λ = 1, summed over every completion of a small world; a good critic makes it vary less."""
    world = Enumerated()
    exact = torch.autograd.grad(world.minus_kl(), world.student)[0].flatten()
    log_p = world.log_probs(world.student).detach()
    chances = log_p.sum(1).exp()
    rewards = (world.log_probs(world.teacher) - log_p).detach()
    scores = torch.autograd.functional.jacobian(world.log_probs, world.student.detach()).flatten(2)
    earned = discounted_returns(rewards, world.mask, 1.0)
    good = torch.zeros_like(earned)  # what is earned on average after the tokens before
    for row, path in enumerate(world.paths):
        for t in range(len(path)):
            alike = [n for n, other in enumerate(world.paths) if other[:t] == path[:t]]
            alike = [n for n in alike if len(world.paths[n]) > t]
            good[row, t] = (chances[alike] @ earned[alike, t]) / chances[alike].sum()
    position = torch.arange(3).double().expand_as(earned)
    variances = {}
    for name, values in (("none", 0 * good), ("wrong", 3 - 2 * position), ("good", good)):
        advantages, _ = gae(rewards, values, world.mask, 1.0, 1.0)
        found = torch.einsum("rt,rtp->rp", advantages, scores)
        torch.testing.assert_close(chances @ found, exact)
        variances[name] = (chances @ (found - exact).square().sum(1)).item()
    assert variances["good"] < 0.5 * variances["none"] < variances["wrong"]


def test_whitening_is_over_everyones_numbers():
    here, there = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([11.0])
    all_sums = torch.tensor([4.0, 20.0, 162.0], dtype=torch.double)
    moments = Moments.of(here, lambda sums: sums + torch.tensor([1.0, 11.0, 121.0]))
    assert moments == Moments.of(torch.cat([here, there])) == (5.0, all_sums[2] / 4 - 25)
    white = torch.cat([whiten(part, moments) for part in (here, there)])
    torch.testing.assert_close(white, (torch.cat([here, there]) - 5) / 15.5**0.5)
    assert white.dtype == torch.float32


def test_what_is_all_alike_or_nothing_whitens_to_nothing():
    alike = torch.full((7,), 0.1)
    assert whiten(alike, Moments.of(alike)).abs().max() < 1e-4
    assert Moments.of(alike[:0]) == (0, 0)
    assert whiten(alike[:0], Moments.of(alike[:0])).shape == (0,)


def test_explained_variance():
    returns = torch.tensor([1.0, 2.0, 3.0, 6.0])

    def explained(values):
        return explained_variance(Moments.of(returns), Moments.of(returns - values))

    assert explained(returns + 5) == 1  # a constant error is the mean's, not the variance's
    assert explained(torch.full_like(returns, 9.0)) == 0
    assert explained(returns / 2) == pytest.approx(0.75)
    assert explained(-returns) == pytest.approx(-3)
    assert explained_variance(Moments.of(torch.ones(3)), Moments.of(returns)) == 0


def test_value_loss_of_moves_within_and_beyond_the_bounds():
    """Beyond the bounds a value gets no gradient if it went towards its target, and all of it if it went away."""
    old = torch.zeros(5)
    values = torch.tensor([0.1, 0.5, 0.5, -0.5, -0.2], requires_grad=True)
    targets = torch.tensor([1.0, 1.0, -1.0, -1.0, -1.0])
    loss, bounded = value_loss(values, old, targets, clip=0.2)
    assert loss.item() == pytest.approx(0.5 * (0.9**2 + 0.8**2 + 1.5**2 + 0.8**2 + 0.8**2))
    assert bounded.tolist() == [False, True, False, True, False]
    loss.backward()
    torch.testing.assert_close(values.grad, torch.tensor([-0.9, 0.0, 1.5, 0.0, 0.8]))


def test_value_loss_without_bounds_is_half_the_square():
    values = torch.tensor([1.0, -2.0], requires_grad=True)
    loss, bounded = value_loss(values, torch.zeros(2), torch.tensor([3.0, 1.0]))
    assert loss.item() == 0.5 * (4 + 9)
    assert not bounded.any()
    assert torch.autograd.grad(loss, values)[0].tolist() == [-2.0, -3.0]
    loss, _ = value_loss(values[:0], values[:0], values[:0], clip=0.2)
    assert loss.item() == 0
