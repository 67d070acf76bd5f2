"""Distillation over spans: against whole logits, against the same-tokenizer loss, and within its bounds."""

import math

import pytest
import torch
from token_pairs import PARAMETERS, divergence, plain_divergence

from medistill_trl.losses.heads import LinearHead
from medistill_trl.losses.overlap import Fold
from medistill_trl.losses.span_kl import (
    Reading,
    SpanBatch,
    span_distillation_loss,
    span_scores,
    two_outcomes,
)
from medistill_trl.losses.token_kl import distillation_loss, token_scores
from medistill_trl.losses.token_terms import InverseConfidence
from medistill_trl.overlap import Overlap

DIVERGENCES = ["forward_kl", "reverse_kl", *PARAMETERS]
V, W, H = 13, 17, 6  # student's and teacher's vocabulary
# The student's 0..8 are the teacher's 16..8; its 9 counts for outcome 2, 10 and 11 for 5, 12 is the tail.
# Of the teacher, 0 and 1 count for outcome 2, 3 for 7, 2 and 4 are the tail, the others count for nothing.
OVERLAP = Overlap(
    list(range(9)),
    list(range(16, 7, -1)),
    {**{n: n for n in range(9)}, 9: 2, 10: 5, 11: 5, 12: 9},
    {**{16 - n: n for n in range(9)}, 0: 2, 1: 2, 3: 7, 2: 9, 4: 9},
)
# The same without a tail: 12, and the teacher's 2 and 4, count for nothing either.
NO_TAIL = Overlap(
    OVERLAP.student_ids,
    OVERLAP.teacher_ids,
    {id: n for id, n in OVERLAP.student_outcomes.items() if n < 9},
    {id: n for id, n in OVERLAP.teacher_outcomes.items() if n < 9},
)
# Student tokens 0–9, teacher tokens 0–8: pairs, two against one, one against three, no span, two against two.
SPANS = torch.tensor(
    [[0, 1, 0, 1], [1, 3, 1, 2], [3, 4, 2, 5], [4, 5, 5, 6], [6, 8, 6, 8], [9, 10, 8, 9]]
)
ONE_TO_ONE = torch.tensor([True, False, False, True, False, True])


def draw(*size, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*size, generator=generator, dtype=torch.float64) * scale


class Case:
    """Ten student tokens and nine of the teacher, tied by `SPANS`."""

    def __init__(self, dtype=torch.float64, overlap=OVERLAP):
        self.overlap = overlap
        self.student = Reading(
            draw(10, H, seed=1).to(dtype).requires_grad_(),
            torch.tensor([0, 9, 12, 3, 5, 6, 10, 1, 2, 8]),
            LinearHead(draw(V, H, seed=2).to(dtype).requires_grad_()),
        )
        self.teacher = Reading(
            draw(9, H + 2, seed=3).to(dtype),
            torch.tensor([16, 3, 4, 5, 9, 11, 0, 1, 8]),
            LinearHead(draw(W, H + 2, seed=4).to(dtype)),
        )
        self.batch = SpanBatch(SPANS, ONE_TO_ONE)
        self.fold = Fold.of(overlap)

    def loss(self, **options):
        return span_distillation_loss(self.student, self.teacher, self.batch, self.fold, **options)

    def gradients(self, loss):
        wanted = [self.student.states, self.student.head.weight]
        return torch.autograd.grad(loss, wanted, retain_graph=True)

    def logits(self):
        return tuple(side.states @ side.head.weight.T for side in (self.student, self.teacher))

    def plain(self, name, alpha, temperature_G, weights_G):
        """From the definitions: whole logits, loops and autograd."""
        z_s, z_t = self.logits()
        ours, theirs = z_s.log_softmax(-1), z_t.log_softmax(-1)
        ce = -ours[range(10), self.student.tokens].sum()
        total = 0
        for g, (a, b, c, d) in enumerate(SPANS.tolist()):
            if ONE_TO_ONE[g]:
                outcomes = [
                    torch.stack([p[ids].sum().log() for ids in members])
                    for p, members in (
                        (ours[a].exp(), self.members(self.overlap.student_outcomes)),
                        (theirs[c].exp(), self.members(self.overlap.teacher_outcomes)),
                    )
                ]
            else:
                texts = [
                    p[range(start, end), side.tokens[start:end]].sum()
                    for p, side, start, end in (
                        (ours, self.student, a, b),
                        (theirs, self.teacher, c, d),
                    )
                ]
                outcomes = [torch.stack([s, torch.log1p(-s.exp())]) for s in texts]
            t = temperature_G[g]
            total = total + weights_G[g] * t**2 * plain_divergence(name, *outcomes, t)
        return (1 - alpha) * ce + alpha * total

    def members(self, outcomes):
        numbers = range(self.overlap.num_outcomes)
        return [[id for id, n in outcomes.items() if n == k] for k in numbers]


def assert_same(case, loss, expected, tolerance=1e-9):
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    for got, want in zip(case.gradients(loss), case.gradients(expected), strict=True):
        assert (got - want).norm() <= tolerance * want.norm()


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize(("alpha", "overlap"), [(0.3, OVERLAP), (1.0, OVERLAP), (1.0, NO_TAIL)])
def test_value_and_gradient_are_those_of_the_formula(name, alpha, overlap):
    case = Case(overlap=overlap)
    temperature_G = torch.tensor([1.0, 2.0, 0.7, 1.5, 3.0, 2.0], dtype=torch.float64)
    weights_G = torch.tensor([1.0, 0.5, 1.0, 0.0, 2.0, 1.0], dtype=torch.float64)
    loss, sums = case.loss(
        alpha=alpha,
        temperature=temperature_G,
        divergence=divergence(name),
        weights_G=weights_G,
        chunk_size=3,
    )
    assert_same(case, loss, case.plain(name, alpha, temperature_G, weights_G))
    ones = torch.ones(6, dtype=torch.float64)
    assert sums["ce"].item() == pytest.approx(case.plain(name, 0.0, ones, ones).item(), rel=1e-6)
    kl = case.plain("forward_kl", 1.0, ones, ones).item()
    assert sums["kl"].item() == pytest.approx(kl, rel=1e-6)
    counts = {name: sums[name].item() for name in ("tokens", "spans", "one_to_one", "merged")}
    assert counts == {"tokens": 10, "spans": 6, "one_to_one": 3, "merged": 5}
    assert sums["temperature_min"].item() == pytest.approx(0.7)
    assert sums["temperature_max"] == 3


def test_chunks_do_not_matter_and_one_temperature_is_that_of_all():
    case = Case()
    found = [
        case.loss(alpha=0.5, temperature=t, chunk_size=size)[0]
        for size in (1, 4, 100)
        for t in (2.0, torch.full((6,), 2.0, dtype=torch.float64))
    ]
    for loss in found[1:]:
        assert_same(case, loss, found[0])
    ce, sums = case.loss(alpha=0.0)
    own = case.student
    assert_same(case, ce, distillation_loss(own.states, own.tokens, own.head, alpha=0.0)[0])
    assert sums["one_to_one"] == 3


def test_a_shifted_alignment_changes_the_value():
    case = Case()
    right = case.loss(alpha=1.0)[0].item()
    shifted = SPANS.clone()
    shifted[1] += torch.tensor([0, 0, 1, 1])
    case.batch = SpanBatch(shifted, ONE_TO_ONE)
    assert case.loss(alpha=1.0)[0].item() != pytest.approx(right, rel=1e-3)


def test_without_spans_there_is_cross_entropy_alone():
    case = Case()
    case.batch = SpanBatch(SPANS[:0], ONE_TO_ONE[:0])
    own = case.student
    expected = 0.25 * distillation_loss(own.states, own.tokens, own.head, alpha=0.0)[0]
    assert_same(case, case.loss(alpha=0.75, temperature=2.0)[0], expected)
    none = torch.zeros(0, dtype=torch.long)
    empty = (
        Reading(own.states[:0], none, own.head),
        Reading(case.teacher.states[:0], none, case.teacher.head),
    )
    loss, _ = span_distillation_loss(*empty, case.batch, case.fold, alpha=0.75)
    assert loss.item() == 0
    assert all((gradient == 0).all() for gradient in case.gradients(loss))


def test_a_rule_sees_the_outcomes_that_are_compared():
    case = Case()
    rule = InverseConfidence(base=1.0, minimum=1.1, maximum=3.0)
    seen = []

    def spy(student, teacher):
        seen.append(student.probs.shape[1])
        return rule(student, teacher)

    loss, sums = case.loss(alpha=0.5, temperature=rule)
    assert case.loss(alpha=0.5, temperature=spy)[0] == loss
    assert set(seen) == {2, 10}
    assert 1.1 <= sums["temperature_min"] < sums["temperature_max"] <= 3
    assert "clipped_low" in sums


def test_what_a_student_puts_on_tokens_of_its_own_costs():
    """Forward KL of a teacher that never takes the tail: −log of what the student leaves for the other outcomes."""
    p = torch.tensor([0.5, 0.3, 0.2, 0.0, 0.0], dtype=torch.float64)
    teacher = Reading(p.log().clamp_min(-200)[None], torch.tensor([0]), LinearHead(torch.eye(5)))
    batch = SpanBatch(torch.tensor([[0, 1, 0, 1]]), torch.tensor([True]))
    shared = {0: 0, 1: 1, 2: 2}
    overlap = Overlap([0, 1, 2], [0, 1, 2], shared | {3: 3}, shared | {3: 3, 4: 3})
    for lost in (0.0, 0.25, 0.9):
        q = torch.cat([p[:3] * (1 - lost), p.new_tensor([lost])])
        states = q.log().clamp_min(-200)[None].requires_grad_()
        student = Reading(states, torch.tensor([0]), LinearHead(torch.eye(4)))
        found, _ = span_distillation_loss(student, teacher, batch, Fold.of(overlap), alpha=1.0)
        assert found.item() == pytest.approx(-math.log(1 - lost), abs=1e-6)
        (gradient,) = torch.autograd.grad(found, states)
        assert gradient[0, 3].item() == pytest.approx(lost, abs=1e-6)


def same_vocabulary(order=None):
    """A pair with one vocabulary of ten, and the same with the teacher's ids changed."""
    order = list(range(10)) if order is None else order
    student = Reading(
        draw(8, H, seed=5).float().requires_grad_(),
        torch.arange(8) % 10,
        LinearHead(draw(10, H, seed=6).float().requires_grad_()),
    )
    states, head = draw(8, H, seed=7).float(), draw(10, H, seed=8).float()
    changed = torch.empty_like(head)
    changed[order] = head
    teacher = Reading(states, torch.tensor(order)[student.tokens], LinearHead(changed))
    same = {n: n for n in range(10)}
    overlap = Overlap(list(same), order, same, {id: n for n, id in enumerate(order)})
    n = torch.arange(8)
    batch = SpanBatch(torch.stack([n, n + 1, n, n + 1], 1), torch.ones(8, dtype=torch.bool))
    return student, teacher, batch, Fold.of(overlap), LinearHead(head)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("order", [None, [3, 1, 9, 0, 2, 8, 7, 5, 6, 4]])
def test_the_same_or_a_permuted_vocabulary_is_the_same_tokenizer_loss(name, order):
    student, teacher, batch, fold, head = same_vocabulary(order)
    options = {"alpha": 0.4, "temperature": 2.0, "divergence": divergence(name)}
    loss, sums = span_distillation_loss(student, teacher, batch, fold, **options)
    expected, plain_sums = distillation_loss(
        student.states, student.tokens, student.head, teacher.states, head, **options
    )
    case = Case()
    case.student = student
    assert_same(case, loss, expected, 1e-5)
    for key, value in plain_sums.items():
        assert sums[key].item() == pytest.approx(value.item(), rel=1e-5), key
    assert sums["teacher_shared_mass"].item() == pytest.approx(8)
    scores = span_scores(student, teacher, batch, fold, score="hellinger")
    plain = token_scores(student.states, teacher.states, student.head, head, score="hellinger")
    torch.testing.assert_close(scores, plain, rtol=1e-5, atol=1e-6)


def test_two_outcomes_by_hand():
    """P_S = ¼, P_T = ½: ½ log 2 + ½ log ⅔; near certainty stays finite."""
    pair = two_outcomes(torch.tensor([0.25]).log()), two_outcomes(torch.tensor([0.5]).log())
    value, gradient = divergence("forward_kl")(*pair)
    assert value.item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), rel=1e-5)
    assert gradient[0].tolist() == pytest.approx([-0.25, 0.25])
    for log_prob in (0.0, -1e-9, -500.0):
        sure = two_outcomes(torch.tensor([log_prob]))
        assert torch.isfinite(divergence("forward_kl")(sure, pair[1])[0]).all()
        assert sure.probs.sum().item() == pytest.approx(1)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_gradient_of_a_merged_span_is_bounded(temperature):
    """Σ |∂/∂logits| ≤ 2T for every token, also of a student that is nearly sure of another text."""
    states = draw(4, V, seed=9, scale=12.0).float().requires_grad_()
    student = Reading(states, torch.tensor([1, 2, 3, 4]), LinearHead(torch.eye(V)))
    teacher = Reading(
        draw(2, V, seed=10, scale=5.0).float(), torch.tensor([1, 2]), LinearHead(torch.eye(V))
    )
    batch = SpanBatch(torch.tensor([[0, 2, 0, 1], [2, 4, 1, 2]]), torch.zeros(2, dtype=torch.bool))
    loss, _ = span_distillation_loss(
        student, teacher, batch, Fold.of(OVERLAP), alpha=1.0, temperature=temperature
    )
    (gradient,) = torch.autograd.grad(loss, states)
    assert torch.isfinite(loss)
    assert 0 < gradient.abs().sum(-1).max() <= 2 * temperature + 1e-5


# --- merges removed: the same model, cut further, where the exact answer is known --------------------


def cut_further(q, first, last):
    """The distribution of a model that writes tokens from `last` on as their first piece and a rest.

    Args:
        q: (R, V) over the whole vocabulary.
        first: First piece of each removed token.

    Returns:
        Over the kept tokens, and of each removed token the probability of the rest after its first piece.
    """
    kept = q[:, :last].clone()
    kept.index_add_(1, first, q[:, last:])
    return kept, q[:, last:] / kept[:, first]


@pytest.mark.parametrize("seed", range(5))
def test_removed_merges_keep_the_divergence_within_its_bound(seed):
    """Exact KL minus ours = Σ_k p(k) KL(p(·|k) ‖ q(·|k)), k an outcome: what its tokens differ by inside it."""
    last, size, rows = 12, 20, 6
    first = torch.tensor([0, 0, 1, 2, 3, 4, 4, 4])
    p = draw(rows, size, seed=seed, scale=2.0).softmax(-1)
    q = draw(rows, size, seed=seed + 50, scale=2.0).softmax(-1)
    kept, rest = cut_further(q, first, last)
    outcome = list(range(last)) + first.tolist()
    overlap = Overlap(
        list(range(last)), list(range(last)), {n: n for n in range(last)}, dict(enumerate(outcome))
    )
    # A token of each row: the first four rows one that both have, the others a removed one, in two pieces.
    teacher_tokens = torch.tensor([0, 5, 9, 11, 12, 15])
    pieces = torch.full((2, last + 1), -40.0, dtype=torch.float64)
    for n, row in enumerate((4, 5)):
        chance = rest[row, teacher_tokens[row] - last]
        pieces[n, last] = chance.log()
        pieces[n, 0] = (1 - chance).log()
    logits = torch.cat([kept.log(), torch.full((rows, 1), -40.0, dtype=torch.float64)], 1)
    student_logits = torch.cat([logits[:5], pieces[:1], logits[5:], pieces[1:]])
    tokens = torch.tensor([0, 5, 9, 11, first[0], last, first[3], last])
    spans = torch.tensor(
        [[0, 1, 0, 1], [1, 2, 1, 2], [2, 3, 2, 3], [3, 4, 3, 4], [4, 6, 4, 5], [6, 8, 5, 6]]
    )
    batch = SpanBatch(spans, torch.tensor([True] * 4 + [False] * 2))
    student = Reading(student_logits, tokens, LinearHead(torch.eye(last + 1, dtype=torch.float64)))
    teacher = Reading(p.log(), teacher_tokens, LinearHead(torch.eye(size, dtype=torch.float64)))
    _, sums = span_distillation_loss(student, teacher, batch, Fold.of(overlap), alpha=1.0)
    scores = span_scores(student, teacher, batch, Fold.of(overlap))
    exact_R = (p * (p / q).log()).sum(1)
    inside_R = torch.zeros(rows, dtype=torch.float64)
    for k in range(last):
        ids = [id for id in range(size) if outcome[id] == k]
        own, other = p[:, ids].sum(1), q[:, ids].sum(1)
        inside_R += (
            p[:, ids] * ((p[:, ids] / own[:, None]) / (q[:, ids] / other[:, None])).log()
        ).sum(1)
    torch.testing.assert_close(exact_R[:4] - scores[:4], inside_R[:4], rtol=1e-6, atol=1e-9)
    assert (scores[4:] <= exact_R[4:]).all()
    assert (scores > 0).all()
    assert sums["kl"].item() == pytest.approx(scores.sum().item(), rel=1e-6)
    # A student that is the teacher, cut further, has nothing to learn, at any temperature.
    kept, rest = cut_further(p, first, last)
    logits = torch.cat([kept.log(), torch.full((rows, 1), -40.0, dtype=torch.float64)], 1)
    same = Reading(logits[:4], teacher_tokens[:4], student.head)
    loss, _ = span_distillation_loss(
        same,
        teacher,
        SpanBatch(spans[:4], torch.ones(4, dtype=torch.bool)),
        Fold.of(overlap),
        alpha=1.0,
        temperature=2.0,
    )
    assert abs(loss.item()) < 1e-9
