"""Credit and the policy-gradient loss: hand-computed numbers, the plain formula, the estimator itself."""

import itertools

import pytest
import torch
from test_token_kl_models import LargestTensor

from medistill_trl.losses.heads import CalledHead, LinearHead
from medistill_trl.losses.policy import (
    baseline,
    discounted_returns,
    policy_loss,
    sequence_advantages,
    span_rewards,
    token_advantages,
    token_log_probs,
)

N, H, V = 13, 8, 31
BETA = 0.3


# --- credit ----------------------------------------------------------------------------------------


def test_returns_are_causal_and_stop_at_the_end():
    rewards = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 99.0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    assert discounted_returns(rewards, mask, 0.5).tolist() == [[2.75, 3.5, 3.0], [6.5, 5.0, 0.0]]
    assert discounted_returns(rewards, mask, 1.0).tolist() == [[6, 5, 3], [9, 5, 0]]
    assert discounted_returns(rewards, mask, 0.0).tolist() == [[1, 2, 3], [4, 5, 0]]
    assert discounted_returns(rewards, torch.zeros_like(mask), 1.0).tolist() == [[0] * 3] * 2
    assert discounted_returns(rewards[:, :0], mask[:, :0], 1.0).shape == (2, 0)
    with pytest.raises(ValueError, match=r"gamma must lie between 0 and 1, got 1\.5"):
        discounted_returns(rewards, mask, 1.5)


def test_a_span_is_rewarded_at_its_last_token_and_all_of_them_sum_to_the_log_ratio():
    student = torch.tensor([-1.0, -2.0, -4.0, -8.0, -16.0])
    teacher = torch.tensor([-0.5, -0.25, -3.0, -7.0])
    spans = torch.tensor([0, 1, 1, 2, -100]), torch.tensor([0, 0, 1, 2])
    rewards = span_rewards(student, teacher, *spans)
    assert rewards.tolist() == [-0.75 + 1, 0, -3 + 6, -7 + 8, 0]
    assert rewards.sum() == teacher.sum() - student[:4].sum()
    later = student.clone()
    later[3:] = -1
    assert span_rewards(later, teacher, *spans)[:3].tolist() == rewards[:3].tolist()  # causal
    singles = torch.arange(4)
    by_token = span_rewards(student[:4], teacher, singles, singles)
    assert torch.equal(by_token, teacher - student[:4])
    nothing = torch.zeros(0)
    assert span_rewards(nothing, nothing, nothing.long(), nothing.long()).shape == (0,)
    outside = torch.full((5,), -100), torch.full((4,), -100)
    assert not span_rewards(student, teacher, *outside).any()


def test_baselines_are_means_over_the_prompts_other_samples_or_all():
    values = torch.tensor([[1.0], [2.0], [6.0], [10.0], [20.0], [60.0]])
    ones = torch.ones_like(values)
    assert baseline(values, ones, 3, "none").flatten().tolist() == [0] * 6
    assert baseline(values, ones, 3, "group_mean").flatten().tolist() == [3] * 3 + [30] * 3
    expected = [4.0, 3.5, 1.5, 40.0, 35.0, 15.0]
    assert baseline(values, ones, 3, "leave_one_out").flatten().tolist() == expected
    # group_mean = (1 − 1/K) of leave_one_out, as differences
    whole = values - baseline(values, ones, 3, "group_mean")
    torch.testing.assert_close(whole, 2 / 3 * (values - baseline(values, ones, 3, "leave_one_out")))


def test_a_completion_that_has_ended_is_in_no_baseline():
    values = torch.tensor([[1.0, 4.0], [3.0, 77.0], [8.0, 6.0]])
    mask = torch.tensor([[1, 1], [1, 0], [1, 1]])
    found = baseline(values, mask, 3, "leave_one_out")
    assert found[:, 0].tolist() == [5.5, 4.5, 2.0]
    assert found[[0, 2], 1].tolist() == [6.0, 4.0]
    alone = torch.tensor([[1, 1], [1, 0], [1, 0]])
    assert baseline(values, alone, 3, "leave_one_out")[0, 1] == 0
    assert baseline(values, mask, 3, "group_mean").tolist()[0] == pytest.approx([4.0, 10 / 3])
    assert baseline(values, torch.zeros_like(mask), 3, "group_mean").tolist() == [[0, 0]] * 3


@pytest.mark.parametrize("wrong", [("mean", 3), ("none", 2)])
def test_what_makes_no_baseline_is_refused(wrong):
    with pytest.raises(ValueError, match=r"does not exist|do not make groups"):
        baseline(torch.zeros(3, 1), torch.ones(3, 1), wrong[1], wrong[0])


def test_a_score_is_credited_back_from_the_last_token():
    scores = torch.tensor([5.0, 1.0, 3.0])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]])  # the last is empty, its score counts
    whole = sequence_advantages(scores, mask, 1.0, 3, "leave_one_out")
    assert whole.tolist() == [[3, 3, 3], [-3, 0, 0], [0, 0, 0]]
    half = sequence_advantages(scores, mask, 0.5, 3, "none")
    assert half.tolist() == [[1.25, 2.5, 5], [1, 0, 0], [0, 0, 0]]
    assert sequence_advantages(scores, mask[:, :0], 1.0, 3, "none").shape == (3, 0)


# --- the loss --------------------------------------------------------------------------------------


class Policy:
    """Random states, head, samples and advantages in double precision."""

    def __init__(self, called=False, softcap=None, tokens=N):
        generator = torch.Generator().manual_seed(3)

        def draw(*size):
            return torch.randn(*size, generator=generator, dtype=torch.float64)

        self.hidden = draw(tokens, H).requires_grad_()
        self.weight = draw(V, H).requires_grad_()
        self.tokens = torch.randint(V, (tokens,), generator=generator)
        self.advantages = draw(tokens)
        self.head = LinearHead(self.weight, softcap=softcap)
        if called:
            module = torch.nn.Linear(H, V, bias=False, dtype=torch.float64)
            module.weight = torch.nn.Parameter(self.weight.detach().clone())
            self.head, self.weight = CalledHead(module), module.weight

    def logits(self):
        logits = self.hidden @ self.weight.T
        cap = self.head.softcap
        return logits if cap is None else cap * (logits / cap).tanh()

    def log_probs(self):
        return self.logits().log_softmax(-1)[range(len(self.tokens)), self.tokens]

    def loss(self, **options):
        return policy_loss(self.hidden, self.tokens, self.head, self.advantages, **options)

    def gradients(self, loss):
        return torch.autograd.grad(loss, [self.hidden, self.weight])


def clipped_surrogate(policy, old, epsilon):
    ratio = (policy.log_probs() - old).exp()
    bounded = ratio.clamp(1 - epsilon, 1 + epsilon)
    return -torch.minimum(ratio * policy.advantages, bounded * policy.advantages).sum()


@pytest.mark.parametrize("setup", [{}, {"called": True}, {"softcap": 2.0}, {"tokens": 0}])
@pytest.mark.parametrize("chunk_size", [1, 5, 256])
def test_value_and_gradients_are_those_of_the_formula(setup, chunk_size):
    policy = Policy(**setup)
    loss, terms = policy.loss(entropy_coef=BETA, chunk_size=chunk_size)
    log_p = policy.logits().log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    plain = -(policy.advantages * policy.log_probs()).sum() - BETA * entropy.sum()
    torch.testing.assert_close(loss, plain)
    for found, expected in zip(policy.gradients(loss), policy.gradients(plain), strict=True):
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(terms["log_prob"], policy.log_probs().detach())
    torch.testing.assert_close(terms["entropy"], entropy.detach())
    assert (terms["ratio"] == 1).all()
    assert not any(term.requires_grad for term in terms.values())


def test_reused_samples_get_the_gradient_of_the_clipped_surrogate():
    policy = Policy()
    old = policy.log_probs().detach() + torch.linspace(-0.6, 0.6, N, dtype=torch.float64)
    loss, terms = policy.loss(old_log_probs_N=old, clip=(0.2, 0.2), chunk_size=4)
    plain = clipped_surrogate(policy, old, 0.2)
    gradients = policy.gradients(loss)
    for found, expected in zip(gradients, policy.gradients(plain), strict=True):
        torch.testing.assert_close(found, expected)
    assert 0 < terms["clipped"].sum() < N
    outside = (terms["ratio"] - 1).abs() > 0.2
    assert terms["clipped"].sum() < outside.sum()  # the other direction is not bounded
    assert (gradients[0][terms["clipped"].bool()] == 0).all()
    free, terms = policy.loss(old_log_probs_N=old)
    plain = -((policy.log_probs() - old).exp() * policy.advantages).sum()
    torch.testing.assert_close(policy.gradients(free)[0], policy.gradients(plain)[0])
    assert terms["clipped"].sum() == 0


def test_one_sided_bounds():
    policy = Policy()
    old = policy.log_probs().detach()
    policy.advantages = torch.ones_like(old)
    _, terms = policy.loss(old_log_probs_N=old - 0.3, clip=(0.2, 0.4))  # ratio e^0.3 = 1.35
    assert terms["clipped"].sum() == 0
    _, terms = policy.loss(old_log_probs_N=old - 0.3, clip=(0.2, 0.2))
    assert terms["clipped"].sum() == N


@pytest.mark.parametrize("called", [False, True])
def test_logits_of_a_chunk_are_the_largest_tensor(called):
    policy = Policy(called, tokens=200)
    with LargestTensor() as seen:
        loss, _ = policy.loss(entropy_coef=BETA, chunk_size=20)
        loss.backward()
    assert seen.numel == max(20 * V, 200 * H)


def test_without_gradients_there_is_only_the_value():
    policy = Policy()
    with torch.no_grad():
        loss, _ = policy.loss()
    assert not loss.requires_grad
    torch.testing.assert_close(loss, policy.loss()[0].detach())


def test_log_probs_over_a_part_of_the_vocabulary_are_renormalised():
    policy = Policy()
    tokens = policy.tokens % 9
    found = token_log_probs(policy.hidden, tokens, policy.head, vocab_size=9, chunk_size=4)
    expected = policy.logits()[:, :9].log_softmax(-1)[range(N), tokens]
    torch.testing.assert_close(found, expected.detach())


def test_vectors_of_different_tokens_are_refused():
    policy = Policy()
    policy.advantages = policy.advantages[1:]
    with pytest.raises(ValueError, match="of the same tokens, got"):
        policy.loss()


# --- the estimator ---------------------------------------------------------------------------------


def test_one_token_many_samples_is_the_reverse_kl_gradient():
    """Token-KL REINFORCE at completion length 1, 2048 samples of each of 4 prompts."""
    prompts, samples = 4, 2048
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(prompts, H, generator=generator)
    weight = (0.3 * torch.randn(V, H, generator=generator)).requires_grad_()
    teacher = (torch.randn(prompts, V, generator=generator)).log_softmax(-1)
    student = (hidden @ weight.T).log_softmax(-1)
    exact = (student.exp() * (student - teacher)).sum(-1).mean()
    expected = torch.autograd.grad(exact, weight)[0].flatten()
    tokens = torch.multinomial(student.exp().detach(), samples, True, generator=generator)
    rewards = (teacher - student).detach().gather(1, tokens).reshape(-1, 1)
    for kind in ("none", "group_mean", "leave_one_out"):
        advantages = token_advantages(rewards, torch.ones_like(rewards), 1.0, samples, kind)
        states = hidden.repeat_interleave(samples, 0)
        loss, _ = policy_loss(
            states, tokens.flatten(), LinearHead(weight), advantages.flatten(), chunk_size=1024
        )
        found = torch.autograd.grad(loss / len(rewards), weight)[0].flatten()
        assert torch.cosine_similarity(found, expected, dim=0) > 0.99, kind
        assert found.norm().item() == pytest.approx(expected.norm().item(), rel=0.05)


class Enumerated:
    """All completions of at most 3 tokens over {end, a, b} with their probabilities, under a student and a
    teacher that look at the token before: expectations are sums, without sampling."""

    LONGEST, VOCAB = 3, 3  # token 0 ends

    def __init__(self):
        generator = torch.Generator().manual_seed(5)
        self.student, self.teacher = (
            torch.randn(self.VOCAB, self.VOCAB + 1, generator=generator, dtype=torch.float64)
            for _ in range(2)
        )
        self.teacher[0] += (
            6  # it would end, the student goes on: all returns are bad, and much alike
        )
        self.student.requires_grad_()
        paths = itertools.product(range(self.VOCAB), repeat=self.LONGEST)
        cut = {path[: path.index(0) + 1] if 0 in path else path for path in paths}
        self.paths = sorted(cut)
        mask = [[t < len(path) for t in range(self.LONGEST)] for path in self.paths]
        self.mask = torch.tensor(mask).double()
        padded = [[*path, *[0] * (self.LONGEST - len(path))] for path in self.paths]
        self.tokens = torch.tensor(padded)
        before = torch.cat(
            [torch.full_like(self.tokens[:, :1], self.VOCAB), self.tokens[:, :-1]], 1
        )
        self.states = torch.nn.functional.one_hot(before, self.VOCAB + 1).double()

    def log_probs(self, weight):
        """(paths, T), 0 past the end."""
        log_p = (self.states @ weight.T).log_softmax(-1)
        return log_p.gather(2, self.tokens[:, :, None])[:, :, 0] * self.mask

    def minus_kl(self):
        student, teacher = self.log_probs(self.student), self.log_probs(self.teacher)
        return (student.sum(1).exp() * (teacher - student).sum(1)).sum()

    def gradients(self, gamma, kind, samples):
        """The estimate for every tuple of samples, (tuples, parameters), and the tuples' probabilities."""
        log_p = self.log_probs(self.student).detach()
        rewards = (self.log_probs(self.teacher) - log_p).detach()
        scores = torch.autograd.functional.jacobian(self.log_probs, self.student.detach())
        scores = scores.flatten(2)  # (paths, T, parameters)
        tuples = torch.cartesian_prod(*[torch.arange(len(self.paths))] * samples).reshape(
            -1, samples
        )
        rows = tuples.flatten()
        advantages = token_advantages(rewards[rows], self.mask[rows], gamma, samples, kind)
        found = torch.einsum("rt,rtp->rp", advantages, scores[rows])
        return found.reshape(len(tuples), samples, -1).mean(1), log_p.sum(1)[tuples].sum(1).exp()


@pytest.mark.parametrize("kind", ["none", "group_mean", "leave_one_out"])
def test_the_expected_gradient_is_that_of_the_sequences_kl(kind):
    """Exactly, with completions of different lengths; and with a baseline it varies less."""
    world = Enumerated()
    exact = torch.autograd.grad(world.minus_kl(), world.student)[0].flatten()
    found, probabilities = world.gradients(1.0, kind, 3)
    assert probabilities.sum().item() == pytest.approx(1)
    scale = 2 / 3 if kind == "group_mean" else 1  # 1 − 1/K
    torch.testing.assert_close(probabilities @ found, scale * exact)
    if kind != "none":
        plain, _ = world.gradients(1.0, "none", 3)
        variance, without = (
            probabilities @ (estimate - exact).square().sum(1)
            for estimate in (found / scale, plain)
        )
        assert variance < 0.95 * without


def test_a_tokens_own_reward_alone_is_another_gradient():
    world = Enumerated()
    exact = torch.autograd.grad(world.minus_kl(), world.student)[0].flatten()
    found, probabilities = world.gradients(0.0, "none", 1)
    assert not torch.allclose(probabilities @ found, exact, rtol=1e-2)
