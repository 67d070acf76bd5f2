"""The distillation loss against hand-computed numbers and the plain formula."""

import math

import pytest
import torch
import torch.nn.functional as F
from token_pairs import (
    H,
    N,
    Pair,
    V,
    assert_same,
    divergence,
    plain_divergence,
    plain_loss,
    temperatures,
)

from medistill_trl.losses import chunked, heads
from medistill_trl.losses.divergences import DIVERGENCES, Distribution, by_name
from medistill_trl.losses.heads import LinearHead
from medistill_trl.losses.token_kl import completion_states, distillation_loss, token_scores
from medistill_trl.losses.token_terms import InverseConfidence

# --- hand-computed numbers


# Student logits (0, 0): p = (½, ½). Teacher logits (ln 3, 0): q = (¾, ¼). Target 0.
# The head is the identity, so hidden states are logits.
def two_token_loss(**options):
    hidden = torch.zeros(1, 2, requires_grad=True)
    head = LinearHead(torch.eye(2))
    loss, sums = distillation_loss(
        hidden, torch.tensor([0]), head, torch.tensor([[math.log(3.0), 0.0]]), head, **options
    )
    loss.backward()
    return loss.item(), hidden.grad[0].tolist(), sums


@pytest.mark.parametrize(
    ("name", "parameters", "value"),
    [
        # ¾ ln(¾/½) + ¼ ln(¼/½) = 0.304099 − 0.173287
        ("forward_kl", {}, 0.130812),
        # ½ ln(½/¾) + ½ ln(½/¼) = −0.202733 + 0.346574
        ("reverse_kl", {}, 0.143841),
        # m = (⅝, ⅜): ½(¾ ln 1.2 + ¼ ln ⅔) + ½(½ ln 0.8 + ½ ln 4/3) = ½·0.035375 + ½·0.032269
        ("jsd", {"beta": 0.5}, 0.033822),
        # m = 0.1 q + 0.9 p = (0.525, 0.475): ¾ ln(0.75/0.525) + ¼ ln(0.25/0.475) = 0.267506 − 0.160463
        ("skew_kl", {"skew": 0.1}, 0.107043),
        # m = 0.9 q + 0.1 p = (0.725, 0.275): ½ ln(0.5/0.725) + ½ ln(0.5/0.275) = −0.185782 + 0.298919
        ("skew_reverse_kl", {"skew": 0.1}, 0.113137),
    ],
)
def test_divergence_by_hand(name, parameters, value):
    loss, _, sums = two_token_loss(alpha=1.0, divergence=by_name(name, **parameters))
    assert loss == pytest.approx(value, abs=1e-6)
    assert sums["divergence"].item() == pytest.approx(value, abs=1e-6)
    assert sums["kl"].item() == pytest.approx(0.130812, abs=1e-6)  # forward, whatever is trained


def test_temperature_squared_is_on_the_divergence_only():
    """At T = 2, q ∝ (√3, 1) = (0.633975, 0.366025) and p stays (½, ½).

    KL = 0.633975 ln 1.267949 + 0.366025 ln 0.732051 = 0.150506 − 0.114165 = 0.036341
    L = ½ ln 2 + ½·4·0.036341 = 0.346574 + 0.072682
    ∂L/∂z₀ = ½(½ − 1) + ½·2·(½ − 0.633975) = −0.25 − 0.133975
    """
    loss, gradient, sums = two_token_loss(alpha=0.5, temperature=2.0)
    assert loss == pytest.approx(0.419255, abs=1e-6)
    assert gradient == pytest.approx([-0.383975, 0.383975], abs=1e-6)
    assert sums["divergence"].item() == pytest.approx(0.036341, abs=1e-6)
    assert "temperature" not in sums  # one temperature for all is no news


def test_metrics_by_hand():
    """H(p) = ln 2; H(q) = −¾ ln ¾ − ¼ ln ¼ = 0.215762 + 0.346574; token 0 is a likeliest one of both."""
    _, _, sums = two_token_loss(alpha=0.5, temperature=2.0)
    assert sums["ce"].item() == pytest.approx(math.log(2))
    assert sums["student_entropy"].item() == pytest.approx(math.log(2))
    assert sums["teacher_entropy"].item() == pytest.approx(0.562335, abs=1e-6)
    assert sums["kl"].item() == pytest.approx(0.130812, abs=1e-6)
    assert sums["agreed"].item() == 1
    assert sums["tokens"].item() == 1
    assert all(s.dtype == torch.float32 and not s.requires_grad for s in sums.values())


def test_agreement_by_hand():
    """Agreed: the first, and the third, where the student's first of two equals is the teacher's."""
    student = torch.tensor([[2.0, 1, 0], [0, 2, 1], [1, 1, 0], [0, 1, 2]])
    teacher = torch.tensor([[5.0, 1, 0], [1, 0, 5], [3, 0, 1], [2, 1, 0]])
    head = LinearHead(torch.eye(3))
    _, sums = distillation_loss(student, torch.zeros(4).long(), head, teacher, head, alpha=0.5)
    assert sums["agreed"].item() == 2


def test_inverse_confidence_by_hand():
    """Confidences ½ and 0.99 (logits 0, 0 and ln 99, 0) and ~1, base 1: T = 2, 1.0101, and 4 / 1 at the
    bounds of the clip."""
    logits = torch.tensor([[0.0, 0.0], [math.log(99.0), 0.0], [40.0, 0.0]])
    rule = InverseConfidence(base=1.0, minimum=1.005, maximum=1.8, epsilon=0.0)
    got = rule(Distribution.of(logits), None)
    assert got.tolist() == pytest.approx([1.8, 1 / 0.99, 1.005])
    head = LinearHead(torch.eye(2))
    _, sums = distillation_loss(
        logits, torch.tensor([0, 0, 0]), head, logits + 1, head, alpha=0.5, temperature=rule
    )
    assert sums["temperature"].item() == pytest.approx(1.8 + 1 / 0.99 + 1.005)
    assert sums["temperature_min"].item() == pytest.approx(1.005)
    assert sums["temperature_max"].item() == pytest.approx(1.8)
    assert (sums["clipped_low"].item(), sums["clipped_high"].item()) == (1, 1)


def test_hellinger_by_hand():
    """½[(√½ − √¾)² + (√½ − √¼)²] = ½[0.025255 + 0.042893] = 0.034074, its root 0.184592."""
    head = LinearHead(torch.eye(2))
    student, teacher = torch.zeros(1, 2), torch.tensor([[math.log(3.0), 0.0]])
    score = token_scores(student, teacher, head, head, score="hellinger")
    assert score.tolist() == pytest.approx([0.184592], abs=1e-5)
    assert token_scores(student, teacher, head, head).tolist() == pytest.approx(
        [0.130812], abs=1e-6
    )


# --- the plain formula


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", [1.0, 2.0, "per token"])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_value_and_gradient_equal_the_plain_formula(name, kind, alpha):
    temperature = temperatures(kind)
    for metrics in (True, False):
        pair = Pair(trainable_head=True)
        loss, _ = pair.loss(
            alpha=alpha, temperature=temperature, divergence=divergence(name), metrics=metrics
        )
        assert_same(pair, loss, plain_loss(pair, name, alpha, temperature))


@pytest.mark.parametrize(
    "shape", [{}, {"scale": 0.25}, {"softcap": 3.0}, {"scale": 2.0, "softcap": 5.0}]
)
def test_head_shapes_and_vocabulary_slice(shape):
    for rows, vocab_size in (((V, V), None), ((V + 3, V + 6), V), ((V, V + 2), V)):
        pair = Pair(rows=rows, trainable_head=True, **shape)
        loss, _ = pair.loss(alpha=0.5, temperature=2.0, vocab_size=vocab_size)
        assert_same(pair, loss, plain_loss(pair, "forward_kl", 0.5, 2.0, vocab_size=vocab_size))


@pytest.mark.parametrize("kind", [1.0, 2.0, "per token"])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_gradcheck(name, kind):
    pair = Pair(torch.float64, trainable_head=True, rows=(V + 2, V), scale=0.5, softcap=4.0)
    temperature = temperatures(kind, torch.float64)

    def function(hidden, weight, bias):
        head = LinearHead(weight, bias, scale=0.5, softcap=4.0)
        options = {"alpha": 0.4, "temperature": temperature, "divergence": divergence(name)}
        return distillation_loss(
            hidden, pair.targets, head, pair.teacher_hidden, pair.teacher_head, **options,
            vocab_size=V, chunk_size=5,
        )[0]  # fmt: skip

    inputs = (pair.student_hidden, *pair.student_head.parameters)
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_rule_is_a_constant_to_the_gradient(name):
    """Loss and gradient are those of the temperatures it gives, passed as numbers."""
    pair = Pair()
    rule = InverseConfidence(base=1.0, minimum=1.2, maximum=2.5, epsilon=1e-3)
    confidence = pair.logits()[0].softmax(-1).amax(-1).detach()
    given = (1.0 / (confidence + 1e-3)).clamp(1.2, 2.5)
    assert len(given.unique()) > 4
    loss, sums = pair.loss(alpha=0.5, temperature=rule, divergence=divergence(name), chunk_size=4)
    assert_same(pair, loss, plain_loss(pair, name, 0.5, given))
    assert sums["temperature"].item() == pytest.approx(given.sum().item())


def test_weights_scale_the_divergence_of_a_token():
    pair, weights = Pair(), torch.linspace(0, 2, N)
    loss, sums = pair.loss(alpha=0.5, temperature=2.0, divergence_weights_N=weights, chunk_size=4)
    assert_same(pair, loss, plain_loss(pair, "forward_kl", 0.5, 2.0, weights))
    assert sums["divergence"].equal(pair.loss(alpha=0.5, temperature=2.0)[1]["divergence"])


def test_chunks_and_blocks_change_nothing(monkeypatch):
    def run(chunk_size):
        pair = Pair(tokens=300, trainable_head=True)
        loss, sums = pair.loss(alpha=0.5, temperature=2.0, chunk_size=chunk_size)
        return [loss, *pair.gradients(loss), *sums.values()]

    reference = run(10**6)
    for chunk_size in (1, 7, 256):
        for got, want in zip(run(chunk_size), reference, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)
    monkeypatch.setattr(chunked, "CPU_BLOCK_ELEMENTS_PER_THREAD", 3 * V)
    for got, want in zip(run(256), reference, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)


def test_metrics_equal_the_plain_formula():
    pair = Pair()
    student, teacher = (logits.detach() for logits in pair.logits())
    p, q = student.softmax(-1), teacher.softmax(-1)
    _, sums = pair.loss(
        alpha=0.5, temperature=2.0, divergence=divergence("reverse_kl"), chunk_size=4
    )
    expected = {
        "tokens": N,
        "ce": F.cross_entropy(student, pair.targets, reduction="sum"),
        "kl": (q * (q / p).log()).sum(),
        "divergence": plain_divergence("reverse_kl", student, teacher, 2.0).sum(),
        "student_entropy": -(p * p.log()).sum(),
        "teacher_entropy": -(q * q.log()).sum(),
        "agreed": (student.argmax(-1) == teacher.argmax(-1)).sum(),
    }
    assert set(sums) == set(expected)
    for name, value in expected.items():
        assert sums[name].item() == pytest.approx(float(value), rel=1e-5), name
    assert set(pair.loss(alpha=0.5, metrics=False)[1]) == {"tokens"}


# --- corner cases


@pytest.mark.parametrize("name", DIVERGENCES)
def test_equal_models_have_no_divergence(name):
    pair = Pair()
    hidden = pair.student_hidden
    for temperature in (1.0, 2.0):
        loss, sums = distillation_loss(
            hidden, pair.targets, pair.student_head, hidden.detach(), pair.student_head,
            alpha=1.0, temperature=temperature, divergence=divergence(name),
        )  # fmt: skip
        assert loss.item() == pytest.approx(0, abs=1e-5)
        assert sums["kl"].item() == 0
        assert torch.autograd.grad(loss, hidden)[0].abs().max() < 1e-5


@pytest.mark.parametrize("name", DIVERGENCES)
def test_far_apart_models_stay_finite(name):
    """Probabilities of both underflow: no 0 · ∞."""
    hidden = torch.tensor([[300.0, 0.0, -300.0]], requires_grad=True)
    head = LinearHead(torch.eye(3))
    loss, _ = distillation_loss(
        hidden,
        torch.tensor([2]),
        head,
        -hidden.detach(),
        head,
        alpha=0.5,
        divergence=divergence(name),
    )
    loss.backward()
    assert loss.isfinite()
    assert hidden.grad.isfinite().all()


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [1.0, InverseConfidence(1.0, 0.5, 2.0)])
def test_all_masked_batch_is_zero(alpha, temperature):
    pair = Pair(trainable_head=True)
    hidden = torch.randn(2, 5, H, requires_grad=True)
    states, targets = completion_states(hidden, torch.full((2, 5), -100))
    loss, sums = distillation_loss(
        states, targets, pair.student_head, pair.teacher_hidden[:0], pair.teacher_head,
        alpha=alpha, temperature=temperature,
    )  # fmt: skip
    loss.backward()
    assert loss.item() == 0
    assert sums["tokens"].item() == 0
    for tensor in (hidden, *pair.student_head.parameters):
        assert tensor.grad.count_nonzero() == 0


def test_alpha_zero_needs_no_teacher():
    pair = Pair()
    loss, sums = distillation_loss(pair.student_hidden, pair.targets, pair.student_head, alpha=0.0)
    expected = F.cross_entropy(pair.logits()[0], pair.targets, reduction="sum")
    assert_same(pair, loss, expected)
    assert set(sums) == {"ce", "student_entropy", "correct", "tokens"}
    right = pair.logits()[0].argmax(-1) == pair.targets
    assert sums["correct"] == right.sum()


def test_evaluation_stores_nothing(monkeypatch):
    def fail(*_):
        raise AssertionError("a gradient was computed that nobody asked for")

    monkeypatch.setattr(heads._LinearProjection, "backward", fail)
    pair = Pair(trainable_head=True)
    with torch.no_grad():
        loss, _ = pair.loss(alpha=0.5)
    assert not loss.requires_grad
    pair = Pair()
    pair.student_hidden.requires_grad_(False)
    assert not pair.loss(alpha=0.5)[0].requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.5}, "alpha must lie between 0 and 1, got 1.5"),
        ({"alpha": 0.5, "temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"alpha": 0.5, "chunk_size": 0}, "chunk_size must be at least 1, got 0"),
        ({"alpha": 0.5, "vocab_size": V + 1}, f"more than the {V} rows"),
        ({"alpha": 0.5, "temperature": torch.ones(3)}, r"temperature must be \(13,\), got \(3,\)"),
        (
            {"alpha": 0.5, "divergence_weights_N": torch.ones(N, 1)},
            r"must be \(13,\), got \(13, 1\)",
        ),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Pair().loss(**options)


def test_heads_of_different_rows_need_a_vocabulary():
    with pytest.raises(ValueError, match="pass vocab_size"):
        Pair(rows=(V, V + 1)).loss(alpha=0.5)


def test_states_and_targets_must_correspond():
    pair = Pair()
    pair.targets = pair.targets[1:]
    with pytest.raises(ValueError, match="must be of the same tokens, got \\[13, 12, 13\\]"):
        pair.loss(alpha=0.5)


def test_unknown_divergences_and_parameters_are_refused():
    with pytest.raises(ValueError, match="one of forward_kl, reverse_kl, jsd"):
        by_name("kl")
    with pytest.raises(ValueError, match="forward_kl has no parameter 'beta'"):
        by_name("forward_kl", beta=0.5)
    with pytest.raises(
        ValueError, match="beta of jsd must lie between 0 and 1, both excluded, got 1"
    ):
        by_name("jsd", beta=1)


def test_limits_of_the_generalised_jsd():
    """jsd / β → forward KL and jsd / (1−β) → reverse KL; slowly where the models are far apart."""
    student, teacher = (Distribution.of(logits / 4) for logits in Pair(torch.float64).logits())
    forward, reverse = (by_name(n)(student, teacher)[0] for n in ("forward_kl", "reverse_kl"))
    near_0 = by_name("jsd", beta=1e-6)(student, teacher)[0] / 1e-6
    near_1 = by_name("jsd", beta=1 - 1e-6)(student, teacher)[0] / 1e-6
    torch.testing.assert_close(near_0, forward, rtol=1e-2, atol=0)
    torch.testing.assert_close(near_1, reverse, rtol=1e-2, atol=0)
