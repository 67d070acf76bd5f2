"""Best-of-N: hand-computed weights and ties, the distribution, estimators by enumeration, a toy policy."""

import math

import pytest
import torch

from medistill_trl.losses.best_of_n import (
    backward_weights,
    best_of_n_distribution,
    log_quantile,
    rank_weights,
    winners,
)

INF = math.inf

# --- by hand ---------------------------------------------------------------------------------------


def test_the_first_of_the_best_wins_alone():
    scores = torch.tensor(
        [[1.0, 3.0, 2.0], [5.0, 4.0, 5.0], [-INF, -INF, -INF], [-INF, -9.0, -INF]]
    )
    assert winners(scores).tolist() == [[0, 1, 0], [1, 0, 0], [1, 0, 0], [0, 1, 0]]


def test_the_winners_reward_is_shared_in_a_tie_and_sums_to_nothing():
    scores = torch.tensor([[1.0, 3.0, 2.0, 0.0], [5.0, 4.0, 5.0, -INF], [2.0, 2.0, 2.0, 2.0]])
    weights = rank_weights(scores, "winner")
    assert weights.tolist() == [
        [-0.25, 0.75, -0.25, -0.25], [0.25, -0.25, 0.25, -0.25], [0, 0, 0, 0],
    ]  # fmt: skip
    assert weights.sum(1).tolist() == [0, 0, 0]


def test_ranks_are_equal_steps_and_ties_get_the_mean_place():
    scores = torch.tensor([[-7.0, 30.0, 2.0], [5.0, 4.0, 5.0], [-INF, -INF, 1.0]])
    weights = rank_weights(scores, "rank")
    assert weights.tolist() == [[-0.5, 0.5, 0.0], [0.25, -0.5, 0.25], [-0.25, -0.25, 0.5]]


@pytest.mark.parametrize(
    ("shape", "kind", "message"),
    [((1, 3), "best", "one of winner, rank"), ((3, 1), "rank", "at least 2 samples .* got 1")],
)
def test_what_is_no_rank_is_refused(shape, kind, message):
    with pytest.raises(ValueError, match=message):
        rank_weights(torch.zeros(shape), kind)


def test_log_quantiles_by_hand():
    anchor = torch.tensor([1.0, 2.0, 3.0, 4.0]).expand(4, 4)
    found = log_quantile(
        torch.tensor([9.0, 3.0, 1.5, -INF]), anchor
    )  # 4, 3, 1, 0 earn at most as much
    expected = [0, -1 / 4, -(1 / 2 + 1 / 3 + 1 / 4), -(1 + 1 / 2 + 1 / 3 + 1 / 4)]
    assert found.tolist() == pytest.approx(expected, abs=1e-6)


def test_backward_weights_by_hand():
    """β ((N−1) q − ℓ) − γ ℓ with N = 3, β = 0.5, γ = 0.25, minus the mean of the others."""
    found = backward_weights(torch.tensor([-1.0, -3.0]), torch.tensor([2.0, 4.0]), 3, 0.5, 0.25)
    assert found.tolist() == pytest.approx([-2.5 - -6.0, -6.0 - -2.5])
    alone = backward_weights(torch.tensor([-1.0]), torch.tensor([2.0]), 3, 0.5)
    assert alone.tolist() == pytest.approx([-2.0])


# --- the distribution ------------------------------------------------------------------------------

PROBS = torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64)


@pytest.mark.parametrize("rewards", [[3.0, 1.0, 4.0, 2.0], [3.0, 1.0, 1.0, 3.0], [1.0] * 4])
def test_the_distribution_is_that_of_the_winner_of_n_draws(rewards):
    """Enumerated: every 3 draws, and which of them `winners` takes."""
    rewards = torch.tensor(rewards, dtype=torch.float64)
    draws = torch.cartesian_prod(*[torch.arange(4)] * 3)
    chance = PROBS[draws].prod(1)
    won = (draws * winners(rewards[draws])).sum(1).long()
    expected = torch.zeros(4, dtype=torch.float64).scatter_add(0, won, chance)
    torch.testing.assert_close(best_of_n_distribution(PROBS, rewards, 3), expected)


def test_where_rewards_differ_it_is_a_difference_of_powers():
    found = best_of_n_distribution(PROBS, torch.tensor([1.0, 2.0, 3.0, 4.0]), 2)
    assert found.tolist() == pytest.approx([0.01, 0.24, 0.24, 0.51])


# --- estimators against exact gradients ------------------------------------------------------------

OUTCOMES, DRAWS = 4, 3
REWARDS = torch.tensor([0.5, -1.0, 2.0, 1.0], dtype=torch.float64)
ANCHOR = torch.tensor([0.3, 0.2, 0.4, -0.5], dtype=torch.float64).softmax(0)
AT_MOST = (ANCHOR * (REWARDS[None] <= REWARDS[:, None])).sum(1)


def policy():
    return torch.tensor([0.1, 0.7, -0.2, 0.4], dtype=torch.float64, requires_grad=True)


def log_prob_gradients(logits):
    """(outcomes, parameters)"""
    return torch.autograd.functional.jacobian(lambda u: u.log_softmax(0), logits.detach())


def drawings(probs, count):
    """Every tuple of draws, (tuples, count), and its probability."""
    draws = torch.cartesian_prod(*[torch.arange(OUTCOMES)] * count).reshape(-1, count)
    return draws, probs[draws].prod(1)


def test_log_quantiles_are_unbiased_for_the_first_n_terms_of_the_series():
    draws, chance = drawings(ANCHOR, DRAWS)
    for outcome in range(OUTCOMES):
        scores = REWARDS[outcome].expand(len(draws))
        mean = (chance * log_quantile(scores, REWARDS[draws])).sum()
        above = 1 - AT_MOST[outcome]
        series = -sum(above**j / j for j in range(1, DRAWS + 1))
        assert mean.item() == pytest.approx(series.item(), rel=1e-5, abs=1e-7)
        missing = (series - AT_MOST[outcome].log()).item()
        bound = (above ** (DRAWS + 1) / AT_MOST[outcome] / (DRAWS + 1)).item()
        assert -1e-9 <= missing <= bound + 1e-9


def test_the_forward_term_has_the_gradient_of_the_forward_kl():
    logits = policy()
    target = best_of_n_distribution(ANCHOR, REWARDS, DRAWS)
    forward = (target * (target.log() - logits.log_softmax(0))).sum()
    exact = torch.autograd.grad(forward, logits)[0]
    draws, chance = drawings(ANCHOR, DRAWS)
    scores = log_prob_gradients(logits)[draws]  # (tuples, N, parameters)
    found = -torch.einsum("m,mn,mnp->p", chance, winners(REWARDS[draws]), scores)
    torch.testing.assert_close(found, exact)


@pytest.mark.parametrize("fresh", [1, 3])
def test_the_backward_term_has_the_gradient_of_the_backward_kl(fresh):
    """Expected over anchor samples and 1 or 3 fresh samples, exactly; γ adds KL(π ‖ π_a). The target is
    π_a P_≤^(N−1), π_BoN up to ties, with log P_≤ as the estimate has it on average."""
    logits, beta, gamma = policy(), 0.7, 0.2
    anchors, chance = drawings(ANCHOR, DRAWS)
    quantiles = torch.stack(
        [log_quantile(r.expand(len(anchors)), REWARDS[anchors]).double() for r in REWARDS], 1
    )  # (anchor tuples, outcomes)
    probs = logits.softmax(0)
    log_ratio = logits.log_softmax(0) - ANCHOR.log()
    backward = probs * (log_ratio - (DRAWS - 1) * (chance @ quantiles))
    exact = torch.autograd.grad((beta * backward + gamma * probs * log_ratio).sum(), logits)[0]
    draws, drawn = drawings(probs.detach(), fresh)
    # Which anchor tuple each fresh sample is compared with is independent: their mean will do, as w is linear.
    weights = torch.stack(
        [
            backward_weights((chance @ quantiles)[d], log_ratio.detach()[d], DRAWS, beta, gamma)
            for d in draws
        ]
    )
    scores = log_prob_gradients(logits)[draws]
    found = -torch.einsum("m,mf,mfp->p", drawn, weights, scores) / fresh
    torch.testing.assert_close(found, exact)


def test_ranks_have_the_gradient_of_what_they_reward():
    """`winner`: log π of the best of N of π itself. `rank`: log π weighted by the share of π it beats."""
    logits = policy()
    probs = logits.softmax(0)
    draws, chance = drawings(probs.detach(), DRAWS)
    scores = log_prob_gradients(logits)[draws]
    won = best_of_n_distribution(probs.detach(), REWARDS, DRAWS)
    below = (probs.detach() * (REWARDS[None] < REWARDS[:, None])).sum(1)
    beats = below + probs.detach() / 2
    for kind, weights in (("winner", won), ("rank", DRAWS * probs.detach() * beats)):
        objective = (weights * logits.log_softmax(0)).sum()
        exact = torch.autograd.grad(objective, logits, retain_graph=True)[0]
        found = torch.einsum("m,mn,mnp->p", chance, rank_weights(REWARDS[draws], kind), scores)
        if kind == "rank":  # of N samples of which each is compared with the N − 1 others
            assert torch.cosine_similarity(found, exact, dim=0) > 1 - 1e-9
        else:
            torch.testing.assert_close(found, exact)


def test_sampled_jeffreys_gradients_point_where_the_exact_ones_do():
    """Against the exact π_BoN, ties included: 16 anchor samples and 1 fresh sample of 20,000 prompts."""
    generator = torch.Generator().manual_seed(0)
    prompts, count, beta = 20_000, 16, 0.5
    anchor = torch.full((32,), 1 / 32, dtype=torch.float64)
    rewards = torch.randn(32, generator=generator, dtype=torch.float64)
    logits = (0.3 * torch.randn(32, generator=generator, dtype=torch.float64)).requires_grad_()
    exact = torch.autograd.grad(jeffreys(logits, anchor, rewards, count, beta), logits)[0]
    loss = jeffreys_loss(logits, anchor, rewards, count, prompts, beta, generator)
    found = torch.autograd.grad(loss, logits)[0]
    assert torch.cosine_similarity(found, exact, dim=0) > 0.99
    assert found.norm().item() == pytest.approx(exact.norm().item(), rel=0.15)


# --- a toy policy ----------------------------------------------------------------------------------


def jeffreys(logits, anchor, rewards, count, beta):
    target, log_p = best_of_n_distribution(anchor, rewards, count), logits.log_softmax(0)
    forward = (target * (target.log() - log_p)).sum()
    return (1 - beta) * forward + beta * (log_p.exp() * (log_p - target.log())).sum()


def jeffreys_loss(logits, anchor, rewards, count, prompts, beta, generator, anchor_kl_coef=0.0):
    """One step's loss as the trainer puts it together, each prompt with one fresh sample."""
    drawn = torch.multinomial(anchor.expand(prompts, -1), count, True, generator=generator)
    probs = logits.detach().softmax(0)
    fresh = torch.multinomial(probs, prompts, True, generator=generator)
    log_p = logits.log_softmax(0)
    quantiles = log_quantile(rewards[fresh], rewards[drawn]).to(log_p.dtype)
    log_ratios = (log_p.detach() - anchor.log())[fresh]
    weights = backward_weights(quantiles, log_ratios, count, beta, anchor_kl_coef)
    forward = (winners(rewards[drawn]) * log_p[drawn]).sum()
    return -((1 - beta) * forward + (weights * log_p[fresh]).sum()) / prompts


def kl(target, logits):
    return (target * (target.log() - logits.detach().log_softmax(0))).sum().item()


def trained(step, logits, steps, rate=0.05):
    """Logits after each step of Adam with a falling rate."""
    optimizer = torch.optim.Adam([logits], lr=rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, steps)
    path = []
    for _ in range(steps):
        optimizer.zero_grad()
        step(logits).backward()
        optimizer.step()
        schedule.step()
        path.append(logits.detach().clone())
    return path


class Toy:
    """Eight outcomes, the reward unrelated to how likely the anchor finds them."""

    COUNT = 4

    def __init__(self, seed=0):
        self.generator = torch.Generator().manual_seed(seed)
        self.start = torch.randn(8, generator=self.generator)
        self.anchor = self.start.softmax(0)
        self.rewards = torch.randperm(8, generator=self.generator).float()
        self.target = best_of_n_distribution(self.anchor, self.rewards, self.COUNT)

    def logits(self):
        return self.start.clone().requires_grad_()

    def jeffreys_step(self, beta, anchor_kl_coef=0.0):
        return lambda logits: jeffreys_loss(
            logits, self.anchor, self.rewards, self.COUNT, 64, beta, self.generator, anchor_kl_coef
        )


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_with_a_fixed_anchor_jeffreys_approaches_best_of_n(beta, seed):
    toy = Toy(seed)
    start = kl(toy.target, toy.logits())
    end = kl(toy.target, trained(toy.jeffreys_step(beta), toy.logits(), 300)[-1])
    print(f"toy: β {beta}, seed {seed}: KL(π_BoN ‖ π) {start:.4f} → {end:.4f}")
    assert start > 0.2
    assert end < 0.1 * start


def test_the_anchors_weight_keeps_the_policy_near_it():
    toy = Toy()
    ends = [
        trained(toy.jeffreys_step(0.5, coefficient), toy.logits(), 200)[-1]
        for coefficient in (0.0, 3.0)
    ]
    free, held = (kl(toy.anchor, end) for end in ends)
    assert held < 0.25 * free


@pytest.mark.parametrize("objective", ["best_of_n_sft", "winner", "rank"])
def test_without_an_anchor_the_policy_goes_beyond_best_of_n(objective):
    """Samples of the policy itself: it comes nearer to the first π_BoN, passes it and goes on to the
    outcome of the highest reward."""
    toy = Toy()

    def step(logits):
        probs = logits.detach().softmax(0)
        drawn = torch.multinomial(probs.expand(64, -1), toy.COUNT, True, generator=toy.generator)
        scores = toy.rewards[drawn]
        weights = (
            winners(scores) if objective == "best_of_n_sft" else rank_weights(scores, objective)
        )
        return -(weights * logits.log_softmax(0)[drawn]).sum() / 64

    path = trained(step, toy.logits(), 300)
    distances = [kl(toy.target, logits) for logits in path]
    nearest = distances.index(min(distances))
    assert distances[nearest] < 0.5 * distances[0]
    assert 0 < nearest < 200
    assert distances[-1] > 4 * distances[nearest]
    assert path[-1].softmax(0)[toy.rewards.argmax()] > 0.95
