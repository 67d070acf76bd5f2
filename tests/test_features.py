"""Losses on hidden states against hand-computed numbers and plain formulas, and the projections' start."""

import math

import pytest
import torch

from medistill_trl.losses.features import KINDS, FeatureLoss
from medistill_trl.methods.fitnets.projections import (
    LeastSquares,
    Moments,
    Projections,
    map_between_heads,
)

STUDENT = torch.tensor([[1.0, 2.0], [3.0, 4.0], [0.0, 2.0]])
TEACHER = torch.tensor([[1.0, 0.0], [0.0, 4.0], [0.0, 2.0]])


def states(tokens, width, seed=0, dtype=torch.float64):
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("mse", (4 + 9 + 0) / 2),
        ("normalised_mse", 4 / 1 + 9 / 16 + 0),
        ("cosine", (1 - 1 / math.sqrt(5)) + (1 - 16 / 20) + 0),
    ],
)
def test_hand_computed_values(kind, expected):
    assert FeatureLoss(kind).token_sum(STUDENT, TEACHER).item() == pytest.approx(expected, rel=1e-6)


def test_hand_computed_cka():
    """Centred Gram matrices of (0, 1, 2) and (0, 2, 1): of outer products, so CKA is a squared cosine."""
    student, teacher = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[0.0], [2.0], [1.0]])
    # Centred: (-1, 0, 1) and (-1, 1, 0): cosine 1/2.
    loss = FeatureLoss("cka").token_sum(student, teacher)
    assert loss.item() == pytest.approx(3 * (1 - 0.25), rel=1e-6)


def test_hand_computed_gradient_of_mse():
    student = STUDENT.clone().requires_grad_()
    FeatureLoss("mse").token_sum(student, TEACHER).backward()
    assert torch.equal(student.grad, STUDENT - TEACHER)  # 2 (s − h) / H


def plain(kind, student, teacher):
    """Token by token; CKA from features, as Kornblith et al. write it."""
    if kind == "cka":
        x, y = (side - side.mean(0, keepdim=True) for side in (student, teacher))
        norms = (x.T @ x).pow(2).sum().sqrt() * (y.T @ y).pow(2).sum().sqrt()
        return len(x) * (1 - (y.T @ x).pow(2).sum() / norms)
    total = 0.0
    for s, h in zip(student, teacher, strict=True):
        if kind == "mse":
            total = total + sum((a - b) ** 2 for a, b in zip(s, h, strict=True)) / len(h)
        elif kind == "normalised_mse":
            total = total + (s - h).dot(s - h) / h.dot(h)
        else:
            total = total + 1 - s.dot(h) / (s.dot(s).sqrt() * h.dot(h).sqrt())
    return total


@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_those_of_the_plain_formula(kind):
    teacher = states(7, 5, 1, torch.float32)
    results = []
    for formula in (FeatureLoss(kind).token_sum, lambda *pair: plain(kind, *pair)):
        student = states(7, 5, 2, torch.float32).requires_grad_()
        loss = formula(student, teacher)
        loss.backward()
        results.append((loss.detach(), student.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_right_and_the_teacher_gets_none(kind):
    student, teacher = states(6, 4, 1).requires_grad_(), states(6, 4, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: FeatureLoss(kind).token_sum(s, teacher), student)
    FeatureLoss(kind).token_sum(student, teacher).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("kind", KINDS)
def test_equal_states_cost_nothing_and_others_do(kind):
    teacher = states(6, 4)
    loss = FeatureLoss(kind).token_sum
    assert loss(teacher.clone(), teacher).item() == pytest.approx(0, abs=1e-12)
    assert loss(teacher.roll(1, 0), teacher).item() > 0.1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens_give_a_finite_loss_with_a_graph(kind, tokens):
    student = states(tokens, 4).requires_grad_()
    loss = FeatureLoss(kind).token_sum(student, states(tokens, 4, 1))
    loss.backward()
    assert torch.isfinite(loss)
    assert loss.item() == 0 or tokens == 1
    assert student.grad.shape == (tokens, 4)
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("kind", KINDS)
def test_states_that_are_all_zero_have_finite_gradients(kind):
    for student, teacher in ((torch.zeros(3, 4), states(3, 4)), (states(3, 4), torch.zeros(3, 4))):
        student = student.float().requires_grad_()
        FeatureLoss(kind).token_sum(student, teacher.float()).backward()
        assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_states_are_summed_in_float32_even_under_autocast(kind):
    student, teacher = states(500, 64, 1).bfloat16(), states(500, 64, 2).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = FeatureLoss(kind).token_sum(student, teacher)
    assert loss.dtype == torch.float32
    exact = FeatureLoss(kind).token_sum(student.double(), teacher.double())
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)


def test_cka_ignores_rotation_scale_shift_and_width():
    student, teacher = states(9, 4, 1), states(9, 6, 2)
    rotation = torch.linalg.qr(states(4, 4, 3)).Q
    loss = FeatureLoss("cka").token_sum
    moved = 3 * student @ rotation + 5
    assert loss(moved, teacher).item() == pytest.approx(loss(student, teacher).item(), rel=1e-9)
    assert loss(moved, student).item() == pytest.approx(0, abs=1e-9)


def test_mean_is_over_tokens_and_dimensions_and_sum_over_neither():
    total = FeatureLoss("mse").token_sum(STUDENT, TEACHER)
    assert FeatureLoss("mse").reduce(total, 3, 2).item() == pytest.approx(13 / 6)
    assert FeatureLoss("mse", "sum").reduce(total, 3, 2).item() == pytest.approx(13)
    assert FeatureLoss("cosine", "sum").reduce(total, 3, 2) == total
    assert str(FeatureLoss("mse", "sum")) == "mse, sum over tokens and dimensions"
    assert str(FeatureLoss("cosine")) == "cosine, mean over tokens"


@pytest.mark.parametrize(("kind", "reduction"), [("mae", "mean"), ("mse", "max")])
def test_what_does_not_exist_is_refused(kind, reduction):
    with pytest.raises(ValueError, match=f"{kind if kind == 'mae' else reduction}"):
        FeatureLoss(kind, reduction)


# --- where projections start


def fit(student, teacher, rows=10):
    """A completion every `rows` tokens."""
    squares = LeastSquares()
    for start in range(0, len(student), rows):
        squares.add(student[start : start + rows], teacher[start : start + rows])
    return squares


def error(student, teacher, weight, bias):
    return (student @ weight.T + bias - teacher).square().sum()


def test_least_squares_finds_an_affine_map_exactly():
    student, weight, bias = states(200, 6, 1), states(9, 6, 2), states(1, 9, 3)[0]
    squares = fit(student.float(), student @ weight.T + bias)
    squares.add(student[:0], states(0, 9))  # a completion of no tokens
    found = squares.solve()
    torch.testing.assert_close(found[0], weight, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[1], bias, rtol=1e-4, atol=1e-4)


def test_without_ridge_it_is_the_least_squares_of_textbooks():
    student, teacher = states(100, 6, 1), states(100, 9, 2)
    weight, bias = Moments.of(student, teacher).maps([0.0])[0]
    ones = torch.ones(100, 1, dtype=torch.float64)
    expected = torch.linalg.lstsq(torch.cat([student, ones], 1), teacher).solution.T
    torch.testing.assert_close(torch.cat([weight, bias[:, None]], 1), expected)


def test_the_error_of_a_map_is_known_from_the_moments():
    student, teacher, weight = states(20, 6, 1), states(20, 9, 2), states(9, 6, 3)
    moments = Moments.of(student[:5], teacher[:5]) + Moments.of(student[5:], teacher[5:])
    found = moments.error(weight, weight[:, 0])
    torch.testing.assert_close(found, error(student, teacher, weight, weight[:, 0]))


def test_noise_is_not_fitted():
    """With hardly more tokens than dimensions the exact fit serves no other completion."""
    student, weight = states(140, 40, 1), states(9, 40, 2) / 40**0.5
    teacher = student @ weight.T + states(140, 9, 3)
    other, expected = states(400, 40, 4), states(400, 40, 4) @ weight.T
    exact = Moments.of(student[:60], teacher[:60]).maps([0.0])[0]
    chosen = fit(student[:60], teacher[:60]).solve()
    zero = torch.zeros(9, 40, dtype=torch.float64), torch.zeros(9, dtype=torch.float64)
    errors = [error(other, expected, *found).item() for found in (exact, chosen, zero)]
    assert errors[1] < 0.7 * errors[0]
    assert errors[1] < 0.7 * errors[2]


def test_fewer_tokens_than_dimensions_and_one_completion_give_a_map_without_large_weights():
    for rows in (2, 8):
        weight, bias = fit(states(8, 32, 1), states(8, 5, 2), rows).solve()
        assert torch.isfinite(weight).all()
        assert torch.isfinite(bias).all()
        assert weight.abs().max() < 1


def test_least_squares_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="at least one token"):
        LeastSquares().solve()


def test_the_map_between_heads_keeps_logits():
    teacher_head, inner = states(50, 8, 1), states(8, 6, 2)
    student_head = teacher_head @ inner  # within reach of the teacher's head
    found = map_between_heads(student_head.float(), teacher_head.float())
    torch.testing.assert_close(found, inner, rtol=1e-3, atol=1e-3)
    exact = torch.linalg.pinv(teacher_head) @ states(50, 6, 3)
    found = map_between_heads(states(50, 6, 3), teacher_head)
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)


def test_projections_are_orthogonal_and_seeded_and_leave_the_random_state_alone():
    before = torch.get_rng_state()
    first, second = (Projections(2, 6, 9, seed=3) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(first[0].weight.T @ first[0].weight, torch.eye(6))
    assert not torch.equal(first[0].weight, first[1].weight)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
