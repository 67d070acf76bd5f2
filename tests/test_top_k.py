"""The loss from what is kept of the teacher, against hand-computed numbers, the plain formula and the whole loss."""

import math

import pytest
import torch
import torch.nn.functional as F
from token_pairs import (
    PARAMETERS,
    H,
    N,
    Pair,
    V,
    assert_same,
    divergence,
    plain_loss,
)

from medistill_trl.losses import chunked
from medistill_trl.losses.divergences import DIVERGENCES
from medistill_trl.losses.heads import LinearHead
from medistill_trl.losses.token_kl import completion_states
from medistill_trl.losses.top_k import TopK, largest, top_k_distillation_loss


def kept(logits, top_k, temperature=1.0):
    temperatures = (1.0,) if temperature == 1 else (1.0, temperature)
    return largest(logits.detach().clone(), top_k, temperatures)


def loss_of(pair, top_k, temperature=1.0, **options):
    teacher = kept(pair.logits()[1], top_k, temperature)
    return top_k_distillation_loss(
        pair.student_hidden,
        pair.targets,
        pair.student_head,
        teacher,
        temperature=temperature,
        **options,
    )


def folded(logits, ids, temperature):
    """Probabilities of the kept tokens and of all others, from the definition."""
    probs = torch.softmax(logits / temperature, -1)
    chosen = torch.zeros_like(probs).scatter(1, ids, 1.0)
    return torch.cat([probs.gather(1, ids), (probs * (1 - chosen)).sum(-1, keepdim=True)], 1)


def plain_folded(name, p, q):
    """A divergence of the student's p and the teacher's q from the definitions."""

    def kl(a, b):
        return (a * (a / b).log()).sum(-1)

    share = next(iter(PARAMETERS.get(name, {"": 0.0}).values()))
    mixed, other = share * q + (1 - share) * p, (1 - share) * q + share * p
    return {
        "forward_kl": lambda: kl(q, p),
        "reverse_kl": lambda: kl(p, q),
        "jsd": lambda: share * kl(q, mixed) + (1 - share) * kl(p, mixed),
        "skew_kl": lambda: kl(q, mixed),
        "skew_reverse_kl": lambda: kl(p, other),
    }[name]()


def test_one_token_by_hand():
    """Teacher (1/2, 1/4, 1/8, 1/8), student uniform, k = 1: (1/2, 1/2) against (1/4, 3/4)."""
    hidden = torch.zeros(1, 4, requires_grad=True)
    teacher = kept(torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log(), 1)
    assert teacher.ids.tolist() == [[0]]
    assert teacher.log_probs.item() == pytest.approx(math.log(0.5))
    assert teacher.log_tails.item() == pytest.approx(math.log(0.5))
    loss, sums = top_k_distillation_loss(
        hidden, torch.tensor([2]), LinearHead(torch.eye(4)), teacher, alpha=1.0
    )
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)  # 0.143841
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    # p − q of the kept token, and −(p − q) of the tail shared as the student's three are.
    assert hidden.grad[0].tolist() == pytest.approx([-0.25, *[0.25 / 3] * 3], rel=1e-5)
    assert sums["teacher_tail_mass"].item() == pytest.approx(0.5)
    assert sums["teacher_entropy"].item() == pytest.approx(math.log(2))
    assert sums["ce"].item() == pytest.approx(math.log(4))


def test_the_tail_is_taken_at_the_losss_temperature():
    """p^(1/2) of (16, 4, 1, 4)/25 is (4, 2, 1, 2)/5: with k = 1 the tail has 5/9 at T = 2, and 9/25 at T = 1."""
    logits = torch.tensor([[16.0, 4.0, 1.0, 4.0]]).log()
    teacher = kept(logits, 1, 2.0)
    assert teacher.outcomes(None).probs.tolist()[0] == pytest.approx([16 / 25, 9 / 25])
    soft = teacher.outcomes(torch.tensor([[2.0]]))
    assert soft.probs.tolist()[0] == pytest.approx([4 / 9, 5 / 9])


@pytest.mark.parametrize("alpha", [0.5, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_with_the_whole_vocabulary_kept_it_is_the_online_loss(name, temperature, alpha):
    pair = Pair(trainable_head=True)
    loss, sums = loss_of(pair, V, temperature, alpha=alpha, divergence=divergence(name))
    assert_same(pair, loss, plain_loss(pair, name, alpha, temperature))
    online = pair.loss(alpha=alpha, temperature=temperature, divergence=divergence(name))
    assert loss.item() == pytest.approx(online[0].item(), rel=1e-5)
    assert sums.pop("teacher_tail_mass").item() < 1e-30
    assert set(sums) == set(online[1])
    for log, value in online[1].items():
        assert sums[log].item() == pytest.approx(value.item(), rel=1e-4), log


@pytest.mark.parametrize("metrics", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_value_and_gradient_are_those_of_the_folded_distributions(name, temperature, metrics):
    pair = Pair(trainable_head=True, rows=(V + 2, V), scale=0.5, softcap=4.0)
    loss, _ = loss_of(
        pair,
        5,
        temperature,
        alpha=0.4,
        divergence=divergence(name),
        vocab_size=V,
        chunk_size=4,
        metrics=metrics,
    )
    student, teacher = pair.logits(V)
    ids = teacher.topk(5).indices
    p, q = folded(student, ids, temperature), folded(teacher, ids, temperature)
    ce = F.cross_entropy(student, pair.targets % V, reduction="none")
    d = plain_folded(name, p, q)
    assert_same(pair, loss, (0.6 * ce + 0.4 * temperature**2 * d).sum())


def test_what_is_lost_is_the_divergence_within_the_tail():
    """The chain rule of the forward KL: never more than the whole, by Q · KL(q ‖ p) less."""
    pair, temperature = Pair(torch.float64), 2.0
    student, teacher = (logits.detach() / temperature for logits in pair.logits())
    whole = pair.loss(alpha=1.0, temperature=temperature)[1]["divergence"].item()
    found = []
    for top_k in (1, 3, 8, 20, V):
        ids = teacher.topk(top_k).indices
        loss, sums = loss_of(pair, top_k, temperature, alpha=1.0)
        left = torch.ones_like(teacher).scatter(1, ids, 0.0)
        p, q = student.softmax(-1) * left, teacher.softmax(-1) * left
        mass, student_mass = q.sum(-1), p.sum(-1)
        ratio = ((q / mass[:, None]) / (p / student_mass[:, None])).log()
        lost = (q * ratio).nan_to_num(0.0).sum().item()
        assert lost >= 0
        assert sums["divergence"].item() == pytest.approx(whole - lost, rel=1e-6)
        assert loss.item() == pytest.approx(temperature**2 * sums["divergence"].item(), rel=1e-6)
        found.append(sums["divergence"].item())
    assert found == sorted(found)
    assert found[0] < 0.9 * whole
    assert found[-1] == pytest.approx(whole, rel=1e-9)


def test_gradcheck():
    pair = Pair(torch.float64, trainable_head=True, scale=0.5, softcap=4.0)
    teacher = kept(pair.logits()[1], 6, 2.0)

    def function(hidden, weight, bias):
        head = LinearHead(weight, bias, scale=0.5, softcap=4.0)
        options = {"alpha": 0.4, "temperature": 2.0, "chunk_size": 5}
        return top_k_distillation_loss(hidden, pair.targets, head, teacher, **options)[0]

    inputs = (pair.student_hidden, *pair.student_head.parameters)
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


def test_weights_scale_the_divergence_of_a_token():
    pair, weights = Pair(), torch.linspace(0, 2, N)
    loss, _ = loss_of(pair, V, 2.0, alpha=0.5, divergence_weights_N=weights, chunk_size=4)
    assert_same(pair, loss, plain_loss(pair, "forward_kl", 0.5, 2.0, weights))


def test_chunks_and_blocks_change_nothing(monkeypatch):
    def run(chunk_size):
        pair = Pair(tokens=300, trainable_head=True)
        loss, sums = loss_of(pair, 7, 2.0, alpha=0.5, chunk_size=chunk_size)
        return [loss, *pair.gradients(loss), *sums.values()]

    reference = run(10**6)
    monkeypatch.setattr(chunked, "CPU_BLOCK_ELEMENTS_PER_THREAD", 3 * V)
    for chunk_size in (1, 7, 256):
        for got, want in zip(run(chunk_size), reference, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)


def test_a_small_tail_keeps_its_digits():
    """The student's tail is 3e-12, which 1 minus the kept would make 0 in float32."""
    logits = torch.tensor([[26.0, 25.0, 0.0, -1.0]], requires_grad=True)
    teacher = kept(torch.tensor([[1.0, 0.5, 0.25, 0.0]]), 2)
    head = LinearHead(torch.eye(4))
    loss, _ = top_k_distillation_loss(logits, torch.tensor([0]), head, teacher, alpha=1.0)
    loss.backward()
    exact = logits.detach().double().requires_grad_()
    q = torch.tensor([[1.0, 0.5, 0.25, 0.0]], dtype=torch.float64)
    ids = torch.tensor([[0, 1]])
    plain = plain_folded("forward_kl", folded(exact, ids, 1.0), folded(q, ids, 1.0)).sum()
    plain.backward()
    assert loss.item() == pytest.approx(plain.item(), rel=1e-5)
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_far_apart_models_stay_finite(name):
    hidden = torch.tensor([[300.0, 0.0, -300.0]], requires_grad=True)
    for top_k in (1, 3):
        teacher = kept(torch.tensor([[-300.0, 0.0, 300.0]]), top_k)
        loss, sums = top_k_distillation_loss(
            hidden, torch.tensor([2]), LinearHead(torch.eye(3)), teacher, alpha=0.5,
            divergence=divergence(name),
        )  # fmt: skip
        assert loss.isfinite()
        assert torch.autograd.grad(loss, hidden)[0].isfinite().all()
        assert all(value.isfinite() for value in sums.values())


def test_all_masked_batch_is_zero():
    hidden = torch.randn(2, 5, H, requires_grad=True)
    states, targets = completion_states(hidden, torch.full((2, 5), -100))
    pair = Pair(trainable_head=True)
    teacher = kept(pair.logits()[1], 4, 2.0).each(lambda tensor: tensor[:0])
    loss, sums = top_k_distillation_loss(
        states, targets, pair.student_head, teacher, alpha=0.5, temperature=2.0
    )
    loss.backward()
    assert loss.item() == sums["tokens"].item() == hidden.grad.count_nonzero() == 0


def test_without_a_divergence_the_teacher_is_not_looked_at():
    pair = Pair()
    loss, sums = loss_of(pair, 3, alpha=0.0)
    assert_same(pair, loss, F.cross_entropy(pair.logits()[0], pair.targets, reduction="sum"))
    assert set(sums) == {"ce", "student_entropy", "correct", "tokens"}


def test_tokens_must_correspond():
    pair = Pair()
    teacher = kept(pair.logits()[1], 3)
    short = TopK(*(tensor[1:] for tensor in teacher))
    with pytest.raises(ValueError, match=r"must be of the same tokens, got \[13, 13, 12, 12, 12\]"):
        top_k_distillation_loss(
            pair.student_hidden, pair.targets, pair.student_head, short, alpha=0.5
        )
