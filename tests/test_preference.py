"""Log-probabilities of completions and the SPIN loss, against numbers computed by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from medistill_trl.losses.heads import CalledHead, LinearHead
from medistill_trl.losses.preference import PairValues, sequence_log_probs, spin_loss


def pair(chosen, rejected):
    return PairValues(
        torch.tensor([math.log(chosen)], requires_grad=True),
        torch.tensor([math.log(rejected)], requires_grad=True),
    )


def test_the_loss_with_a_reference_by_hand():
    """Ratios 2 and 1/2 at β 1/2: the margin is log 2, σ of it 2/3."""
    policy = pair(0.5, 0.25)
    losses, rewards = spin_loss(policy, pair(0.25, 0.5), beta=0.5)
    assert losses.tolist() == pytest.approx([math.log(1.5)])
    assert rewards.chosen.tolist() == pytest.approx([0.5 * math.log(2)])
    assert rewards.rejected.tolist() == pytest.approx([-0.5 * math.log(2)])
    losses.sum().backward()
    # ∂L/∂ log π(y⁺) = −β σ(−margin) = −1/2 · 1/3, and the opposite for y⁻.
    assert policy.chosen.grad.tolist() == pytest.approx([-1 / 6])
    assert policy.rejected.grad.tolist() == pytest.approx([1 / 6])


def test_the_loss_without_a_reference_by_hand():
    """The ratio of 1/2 to 1/4 at β 1/2: the margin is log √2."""
    policy = pair(0.5, 0.25)
    losses, rewards = spin_loss(policy, None, beta=0.5)
    assert losses.tolist() == pytest.approx([math.log(1 + 1 / math.sqrt(2))])
    assert rewards.chosen.tolist() == pytest.approx([0.5 * math.log(0.5)])
    losses.sum().backward()
    expected = 0.5 / (1 + math.sqrt(2))
    assert policy.chosen.grad.tolist() == pytest.approx([-expected])
    assert policy.rejected.grad.tolist() == pytest.approx([expected])


def test_a_policy_that_is_its_reference_loses_log_2():
    losses, rewards = spin_loss(pair(0.3, 0.1), pair(0.3, 0.1), beta=7.0)
    assert losses.tolist() == pytest.approx([math.log(2)])
    assert rewards.chosen.tolist() == rewards.rejected.tolist() == [0.0]


def test_margins_of_any_size_stay_finite():
    for margin in (-1e4, 1e4):
        policy = PairValues(torch.tensor([margin], requires_grad=True), torch.zeros(1))
        losses, _ = spin_loss(policy, None, beta=1.0)
        losses.sum().backward()
        assert losses.item() == pytest.approx(max(0.0, -margin))
        assert policy.chosen.grad.item() == pytest.approx(-1.0 if margin < 0 else 0.0)


# --- log-probabilities of completions


def of_logits(logits, ids, mask, chunk_size=4):
    """Through a head that changes nothing."""
    head = LinearHead(torch.eye(logits.shape[-1], dtype=logits.dtype))
    return sequence_log_probs(logits, ids, mask, head, chunk_size)


def test_the_log_probability_of_two_tokens_by_hand():
    """Three tokens, the last two the completion: 3/4 for token 0, then 1/2 for token 1."""
    logits = torch.tensor([[[math.log(3.0), 0.0], [0.0, 0.0], [9.0, 9.0]]])
    found = of_logits(logits, torch.tensor([[1, 0, 1]]), torch.tensor([[0, 1, 1]]))
    assert found.tolist() == pytest.approx([math.log(0.75) + math.log(0.5)])


def test_prompt_and_padding_count_nothing_and_get_no_gradient():
    torch.manual_seed(0)
    logits = torch.randn(3, 6, 11, requires_grad=True)
    ids = torch.randint(11, (3, 6))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]])
    found = of_logits(logits, ids, mask)
    plain = logits.detach().log_softmax(-1)
    expected = [
        sum(plain[row, t - 1, ids[row, t]] for t in range(1, 6) if mask[row, t]) for row in range(3)
    ]
    assert found.tolist() == pytest.approx([float(value) for value in expected], abs=1e-5)
    assert found[2] == 0  # a row without completion
    found.sum().backward()
    touched = logits.grad.abs().sum(-1) > 0
    assert torch.equal(touched[:, :-1], mask[:, 1:].bool())
    assert not touched[:, -1].any()


def test_bfloat16_logits_are_summed_in_float32():
    torch.manual_seed(0)
    logits, ids = torch.randn(2, 300, 50), torch.randint(50, (2, 300))
    mask = torch.ones_like(ids)
    rounded = logits.bfloat16()
    found = of_logits(rounded, ids, mask)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, of_logits(rounded.float(), ids, mask))


class Rows:
    """Three rows of states and what a loss that is not a sum over tokens gives for them, by autograd on whole logits."""

    def __init__(self, dtype=torch.float64):
        generator = torch.Generator().manual_seed(0)
        self.states = torch.randn(3, 7, 5, generator=generator, dtype=dtype)
        self.weight = torch.randn(13, 5, generator=generator, dtype=dtype)
        self.bias = torch.randn(13, generator=generator, dtype=dtype)
        self.ids = torch.randint(13, (3, 7), generator=generator)
        self.mask = torch.tensor(
            [[0, 1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 1]]
        )

    @staticmethod
    def loss(log_probs):
        return -F.logsigmoid(log_probs * torch.tensor([0.1, -0.2, 0.05])).sum()

    def expected(self, scale=1.0, softcap=None):
        leaves = [t.clone().requires_grad_() for t in (self.states, self.weight, self.bias)]
        logits = F.linear(*leaves) * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        log_probs = logits[:, :-1].log_softmax(-1).gather(2, self.ids[:, 1:, None])[..., 0]
        loss = self.loss((log_probs * self.mask[:, 1:]).sum(1))
        loss.backward()
        return [loss.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("head", [{}, {"scale": 0.5, "softcap": 3.0}], ids=["plain", "capped"])
@pytest.mark.parametrize("chunk_size", [4, 100])
def test_gradients_in_states_and_head_are_those_of_whole_logits(head, chunk_size):
    rows = Rows()
    leaves = [t.clone().requires_grad_() for t in (rows.states, rows.weight, rows.bias)]
    states, *linear = leaves
    found = sequence_log_probs(states, rows.ids, rows.mask, LinearHead(*linear, **head), chunk_size)
    loss = rows.loss(found)
    loss.backward()
    expected = rows.expected(**head)
    for value, wanted in zip(
        [loss.detach(), *(leaf.grad for leaf in leaves)], expected, strict=True
    ):
        torch.testing.assert_close(value, wanted)


def test_gradients_in_the_states_alone_and_through_a_head_that_is_called():
    rows = Rows(torch.float32)
    frozen = rows.states.clone().requires_grad_()
    head = LinearHead(rows.weight, rows.bias)
    rows.loss(sequence_log_probs(frozen, rows.ids, rows.mask, head, 4)).backward()
    called = nn.Linear(5, 13)
    called.load_state_dict({"weight": rows.weight, "bias": rows.bias})
    states = rows.states.clone().requires_grad_()
    rows.loss(sequence_log_probs(states, rows.ids, rows.mask, CalledHead(called), 4)).backward()
    _, in_states, in_weight, in_bias = rows.expected()
    found = (frozen.grad, states.grad, called.weight.grad, called.bias.grad)
    for value, wanted in zip(found, (in_states, in_states, in_weight, in_bias), strict=True):
        torch.testing.assert_close(value, wanted)


def test_without_gradients_the_numbers_are_the_same():
    rows = Rows(torch.float32)
    head = LinearHead(rows.weight, rows.bias)
    tracked = sequence_log_probs(rows.states.clone().requires_grad_(), rows.ids, rows.mask, head, 4)
    plain = sequence_log_probs(rows.states, rows.ids, rows.mask, head, 4)
    assert tracked.requires_grad
    assert not plain.requires_grad
    torch.testing.assert_close(tracked.detach(), plain)
