"""Losses over spans beside hand-computed cases, the plain formulas, and the losses over tokens."""

import math

import pytest
import torch
from test_attention_loss import LiveMemory

from medistill_trl.losses.attention import AttentionInputs, attention_loss
from medistill_trl.losses.features import KINDS as FEATURES
from medistill_trl.losses.features import FeatureLoss
from medistill_trl.losses.span_attention import span_attention_loss
from medistill_trl.losses.span_states import span_states
from medistill_trl.prompts import IGNORED as NO

# Two sequences of 5 and 4 spans, in the tokens of a student and of a teacher; the prompt is the first. The first
# sequence is padded on the left.
STUDENT_ALL = torch.tensor([[NO, 0, 1, 2, 2, 3, 4, 4], [0, 0, 1, 1, 2, 3, NO, NO]])
TEACHER_ALL = torch.tensor([[NO, NO, 0, 0, 1, 1, 2, 3, 3, 4], [0, 0, 0, 1, 2, 2, 3, NO, NO, NO]])
ROWS = torch.tensor([[False, True, True, True, True], [False, True, True, True, False]])


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# --- states

# The tokens [start, end) of seven spans, in two tokenizations; what lies between is in none.
STUDENT = torch.tensor([[0, 1], [1, 3], [3, 4], [4, 6], [7, 9], [9, 10], [10, 11]])
TEACHER = torch.tensor([[0, 2], [2, 3], [3, 5], [5, 6], [6, 7], [7, 9], [9, 10]])


def test_states_by_hand():
    states = torch.tensor([[1.0], [2.0], [4.0], [8.0], [16.0]], requires_grad=True)
    bounds = torch.tensor([[0, 1], [1, 3], [4, 5]])
    pooled = span_states(states, bounds)
    assert pooled.flatten().tolist() == [1, 3, 16]
    assert span_states(states, bounds, "first").flatten().tolist() == [1, 2, 16]
    pooled.square().sum().backward()  # 2 · mean / length
    assert states.grad.flatten().tolist() == [2, 3, 3, 0, 32]
    with pytest.raises(ValueError, match="one of mean, first"):
        span_states(states, bounds, "last")


@pytest.mark.parametrize("kind", FEATURES)
def test_a_feature_loss_over_spans_is_the_plain_formula(kind):
    states, theirs = draw(12, 5), draw(10, 5, seed=1)
    means = [
        torch.stack([tokens[start:end].mean(0) for start, end in bounds.tolist()])
        for tokens, bounds in ((states, STUDENT), (theirs, TEACHER))
    ]
    loss = FeatureLoss(kind)
    found = loss.token_sum(span_states(states, STUDENT), span_states(theirs, TEACHER))
    torch.testing.assert_close(found, loss.token_sum(*means))
    shifted = TEACHER.clone()
    shifted[0, 1] = shifted[1, 0] = 1
    other = loss.token_sum(span_states(states, STUDENT), span_states(theirs, shifted))
    assert abs(other - found) > 0.01


@pytest.mark.parametrize("pooling", ["mean", "first"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_spans_of_one_token_are_its_states_bit_for_bit(pooling, dtype):
    states = draw(7, 5).to(dtype)
    bounds = torch.stack([torch.arange(7), torch.arange(1, 8)], 1)
    assert torch.equal(span_states(states, bounds, pooling), states.float())


def test_no_spans_give_no_states_with_a_graph():
    states_NH = draw(4, 3).requires_grad_()
    states = span_states(states_NH, torch.zeros(0, 2, dtype=torch.long))
    assert states.shape == (0, 3)
    FeatureLoss("mse").token_sum(states, torch.zeros(0, 3)).backward()
    assert not states_NH.grad.any()


# --- attention


def make_inputs(heads, key_heads, time, seed, grad=False):
    tensors = [
        draw(2, n, time, 6, seed=seed + n * i) for i, n in enumerate((heads, key_heads, key_heads))
    ]
    return AttentionInputs(*(t.requires_grad_(grad) for t in tensors), 6**-0.5)


def softmax_rows(left, right, scaling, tokens):
    """(H, N, N) of one sequence's tokens, in the plain way."""
    right = right.repeat_interleave(len(left) // len(right), 0)
    scores = left[:, tokens] @ right[:, tokens].mT * scaling
    seen = torch.ones(scores.shape[1:], dtype=torch.bool).tril()
    return scores.masked_fill(~seen, -math.inf).softmax(-1)


def plain_map(inputs, row, column):
    """P of one sequence, (H, S, S), entry by entry."""
    tokens = [t for t, span in enumerate(column) if span != NO]
    spans = [column[t] for t in tokens]
    a = softmax_rows(inputs.queries_BHTD[row], inputs.keys_BKTD[row], inputs.scaling, tokens)
    members = [[n for n, span in enumerate(spans) if span == s] for s in range(max(spans) + 1)]
    return torch.stack(
        [
            torch.stack([a[:, asking][:, :, keys].sum(2).mean(1) for keys in members], -1)
            for asking in members
        ],
        1,
    )


def plain_relation(states, row, column, heads):
    """R of the averaged states of one sequence, (R, S, S)."""
    joined = states[row].transpose(0, 1).flatten(1)
    means = torch.stack(
        [
            joined[[t for t, span in enumerate(column) if span == s]].mean(0)
            for s in range(max(column) + 1)
        ]
    )
    parts = torch.stack(means.chunk(heads, -1))
    return softmax_rows(parts, parts, parts.shape[-1] ** -0.5, list(range(len(means))))


def kl(teacher, student):
    ratio = torch.where(teacher > 0, teacher.log() - student.clamp_min(1e-300).log(), 0.0)
    return (teacher * ratio).sum(-1)


def plain(student, teacher, kind, mean_heads=False, relation_heads=None):
    total = 0.0
    for row in range(2):
        columns = STUDENT_ALL[row].tolist(), TEACHER_ALL[row].tolist()
        rows = [span for span in range(max(columns[0]) + 1) if ROWS[row, span]]
        if kind == "relations":
            for x_s, x_t in zip(student[:3], teacher[:3], strict=True):
                r_s, r_t = (
                    plain_relation(x, row, column, relation_heads)
                    for x, column in zip((x_s, x_t), columns, strict=True)
                )
                total = total + kl(r_t, r_s)[:, rows].mean(0).sum()
            continue
        p_s, p_t = (
            plain_map(side, row, column)
            for side, column in zip((student, teacher), columns, strict=True)
        )
        torch.testing.assert_close(p_s.sum(-1), torch.ones_like(p_s[..., 0]))
        assert not p_s.triu(1).any()  # causal in spans
        if mean_heads:
            p_s, p_t = (p.mean(0, keepdim=True) for p in (p_s, p_t))
        if kind == "map_mse":
            total = total + (p_s - p_t).square()[:, rows].sum()
        else:
            total = total + kl(p_t, p_s)[:, rows].mean(0).sum()
    return total


def over_spans(student, teacher, kind, spans=(STUDENT_ALL, TEACHER_ALL), **options):
    return span_attention_loss(student, teacher, *spans, ROWS, kind=kind, **options)


SAME, GROUPED = (4, 4), (4, 2)
CASES = [
    ("map_mse", GROUPED, SAME, {}),
    ("map_mse", (2, 1), GROUPED, {"mean_heads": True}),
    ("row_kl", SAME, GROUPED, {}),
    ("row_kl", (2, 2), SAME, {"mean_heads": True}),
    ("relations", GROUPED, (2, 1), {"relation_heads": 2}),
]


@pytest.mark.parametrize(("kind", "student_heads", "teacher_heads", "options"), CASES)
@pytest.mark.parametrize("chunk_size", [1, 3, 64])
def test_attention_over_spans_is_the_plain_formula(
    kind, student_heads, teacher_heads, options, chunk_size
):
    teacher, results = make_inputs(*teacher_heads, 10, seed=9), []
    for function in (plain, over_spans):
        student = make_inputs(*student_heads, 8, seed=0, grad=True)
        extra = {} if function is plain else {"chunk_size": chunk_size}
        value = function(student, teacher, kind, **options, **extra)
        (3 * value).backward()
        grads = [torch.zeros(1) if t.grad is None else t.grad for t in student[:3]]
        results.append((value.detach(), *grads))
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12, check_dtype=False)


def test_a_span_of_two_by_hand():
    """The student's second token attends with (¼, ¾), its third with (½, ¼, ¼); the teacher read both as one.

    Of the span of these two, the student gives the first (¼ + ½) / 2 = ⅜ and itself ⅝, the teacher ½ and ½.
    """
    student = torch.tensor([[[[0.0, 0, 0], [0, math.log(3), 0], [math.log(2), 0, 0]]]])
    keys = torch.eye(3)[None, None]
    teacher = torch.zeros(1, 1, 2, 1)
    rows = torch.tensor([[False, True]])
    value = span_attention_loss(
        AttentionInputs(student, keys, keys, 1.0),
        AttentionInputs(teacher, teacher, teacher, 1.0),
        torch.tensor([[0, 1, 1]]),
        torch.tensor([[0, 1]]),
        rows,
    )
    assert value.item() == pytest.approx(2 * 0.125**2)


@pytest.mark.parametrize(("kind", "heads", "other_heads", "options"), CASES)
def test_spans_of_one_token_give_the_loss_over_tokens(kind, heads, other_heads, options):
    spans = torch.tensor([[NO, NO, 0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, NO, NO, NO]])
    rows = torch.tensor([[False, False, True, True, True, True], [False] + [True] * 4 + [False]])
    rows_BT = torch.zeros_like(spans, dtype=torch.bool)
    rows_BT[0, 4:], rows_BT[1, 1:5] = True, True
    teacher, results = make_inputs(*other_heads, 8, seed=9), []
    for over in ("tokens", "spans"):
        student = make_inputs(*heads, 8, seed=0, grad=True)
        if over == "tokens":
            value = attention_loss(student, teacher, rows_BT, spans != NO, kind=kind, **options)
        else:
            value = span_attention_loss(student, teacher, spans, spans, rows, kind=kind, **options)
        value.backward()
        grads = [torch.zeros(1) if t.grad is None else t.grad for t in student[:3]]
        results.append((value.detach(), *grads))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("kind", ["map_mse", "row_kl", "relations"])
def test_another_alignment_is_another_value_and_padding_is_nothing(kind):
    student, teacher = make_inputs(*SAME, 8, 0), make_inputs(*SAME, 10, 9)
    options = {"relation_heads": 2}
    value = over_spans(student, teacher, kind, **options)
    shifted = STUDENT_ALL.clone()
    shifted[0] = torch.tensor([NO, 0, 1, 1, 2, 3, 4, 4])
    assert abs(over_spans(student, teacher, kind, (shifted, TEACHER_ALL), **options) - value) > 1e-3
    moved = torch.stack([STUDENT_ALL[0].roll(-1), STUDENT_ALL[1].roll(2)])
    rolled = AttentionInputs(
        *(torch.stack([t[0].roll(-1, 1), t[1].roll(2, 1)]) for t in student[:3]), student.scaling
    )
    torch.testing.assert_close(
        over_spans(rolled, teacher, kind, (moved, TEACHER_ALL), **options), value
    )
    for tensor in student[:3]:
        tensor.masked_fill_((STUDENT_ALL == NO)[:, None, :, None], 1e3)
    torch.testing.assert_close(over_spans(student, teacher, kind, **options), value)


def test_no_rows_give_zero_with_gradients():
    student = make_inputs(*SAME, 8, 0, grad=True)
    value = span_attention_loss(
        student, make_inputs(*SAME, 10, 9), STUDENT_ALL, TEACHER_ALL, torch.zeros_like(ROWS)
    )
    value.backward()
    assert value.item() == 0
    assert not student.queries_BHTD.grad.any()


def peak_of(time, chunk_size):
    """Bytes of loss and backward over spans of two tokens and of one, and of one map of the student's tokens."""
    student = AttentionInputs(*(torch.randn(1, 4, time, 8) for _ in range(3)), 8**-0.5)
    teacher = AttentionInputs(*(torch.randn(1, 4, time // 2, 8) for _ in range(3)), 8**-0.5)
    for tensor in student[:3]:
        tensor.requires_grad_()
    spans = torch.arange(time // 2)[None]
    rows = torch.ones_like(spans, dtype=torch.bool)
    with LiveMemory() as memory:
        value = span_attention_loss(
            student, teacher, spans.repeat_interleave(2, 1), spans, rows, chunk_size=chunk_size
        )
        value.backward()
    return memory.peak, 4 * 4 * time**2


def test_memory_grows_with_the_chunk_and_linearly_with_time():
    peak, whole_map = peak_of(512, chunk_size=16)
    assert peak < 0.3 * whole_map
    assert peak_of(1024, chunk_size=16)[0] < 2.1 * peak
    assert (
        peak_of(512, chunk_size=512)[0] > 2 * whole_map
    )  # what the measure sees where maps are held


def test_what_does_not_fit_is_refused():
    student, teacher = make_inputs(*SAME, 8, 0), make_inputs(2, 2, 10, 9)
    with pytest.raises(ValueError, match="the student has 4 heads and the teacher 2"):
        over_spans(student, teacher, "map_mse")
    with pytest.raises(ValueError, match="one of map_mse, row_kl, relations"):
        over_spans(student, teacher, "cosine")
