"""The attention losses beside hand-computed rows and the plain formulas on whole maps."""

import math

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from medistill_trl.losses.attention import (
    KINDS,
    AttentionInputs,
    attention_loss,
    most_relation_heads,
)

B, T = 2, 13
# Left padding in one sequence, right padding in the other.
KEYS = torch.ones(B, T, dtype=torch.bool)
KEYS[0, :3] = False
KEYS[1, 9:] = False
ROWS = KEYS.clone()
ROWS[:, :5] = False


def make_inputs(heads, key_heads, size, seed, grad=False):
    generator = torch.Generator().manual_seed(seed)
    tensors = [
        torch.randn(B, n, T, size, generator=generator, dtype=torch.float64)
        for n in (heads, key_heads, key_heads)
    ]
    return AttentionInputs(*(t.requires_grad_(grad) for t in tensors), size**-0.5)


def softmax_rows(left, right, scaling, keys=KEYS):
    """(B, H, T, T) in the plain way: repeated keys, −∞ where nothing is seen."""
    right = right.repeat_interleave(left.shape[1] // right.shape[1], 1)
    seen = torch.ones(T, T, dtype=torch.bool).tril() & keys[:, None, None, :]
    scores = (left @ right.transpose(2, 3) * scaling).masked_fill(~seen, -math.inf)
    return scores.softmax(-1).nan_to_num()  # rows of padding alone


def regrouped(x, number):
    return torch.stack(x.transpose(1, 2).flatten(2).chunk(number, -1), 1)


def kl(teacher, student):
    ratio = torch.where(teacher > 0, teacher.log() - student.clamp_min(1e-300).log(), 0.0)
    return (teacher * ratio).sum(-1)


def plain(student, teacher, rows, keys, kind, mean_heads=False, relation_heads=None):
    """The three formulas of the module's docstring."""
    if kind == "relations":
        total = 0.0
        for x_s, x_t in zip(student[:3], teacher[:3], strict=True):
            both = [regrouped(x, relation_heads) for x in (x_s, x_t)]
            r_s, r_t = (softmax_rows(x, x, x.shape[-1] ** -0.5, keys) for x in both)
            total = total + kl(r_t, r_s).mean(1)[rows].sum()
        return total
    a_s, a_t = (
        softmax_rows(x.queries_BHTD, x.keys_BKTD, x.scaling, keys) for x in (student, teacher)
    )
    if mean_heads:
        a_s, a_t = (a.mean(1, keepdim=True) for a in (a_s, a_t))
    if kind == "map_mse":
        return (a_s - a_t).square().sum((1, 3))[rows].sum()
    return kl(a_t, a_s).mean(1)[rows].sum()


# Student's and teacher's heads, key heads and head size.
SAME, GROUPED, OTHER = (4, 4, 6), (4, 2, 6), (2, 1, 8)
CASES = [
    ("map_mse", SAME, SAME, {}),
    ("map_mse", GROUPED, SAME, {}),
    ("map_mse", GROUPED, OTHER, {"mean_heads": True}),
    ("row_kl", SAME, GROUPED, {}),
    ("row_kl", OTHER, GROUPED, {"mean_heads": True}),
    ("relations", SAME, SAME, {"relation_heads": 4}),
    ("relations", GROUPED, OTHER, {"relation_heads": 4}),
    ("relations", OTHER, SAME, {"relation_heads": 8}),
]


@pytest.mark.parametrize(("kind", "student_sizes", "teacher_sizes", "options"), CASES)
@pytest.mark.parametrize("chunk_size", [1, 4, 64])
def test_values_and_gradients_are_those_of_whole_maps(
    kind, student_sizes, teacher_sizes, options, chunk_size
):
    teacher = make_inputs(*teacher_sizes, seed=1)
    results = []
    for function in (plain, attention_loss):
        student = make_inputs(*student_sizes, seed=0, grad=True)
        extra = {} if function is plain else {"chunk_size": chunk_size}
        value = function(student, teacher, ROWS, KEYS, kind=kind, **options, **extra)
        (3 * value).backward()  # backward scales
        grads = [torch.zeros(1) if t.grad is None else t.grad for t in student[:3]]
        results.append((value.detach(), *grads))
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12, check_dtype=False)


def test_a_case_by_hand():
    """Two positions, one head: the second row attends with (½, ½) and (¾, ¼)."""
    rows = torch.tensor([[False, True]])
    keys = torch.ones(1, 2, dtype=torch.bool)

    def inputs(score):  # of the first key; the second key's is 0
        queries = torch.tensor([[[[0.0], [1.0]]]], dtype=torch.float64)
        states = torch.tensor([[[[score], [0.0]]]], dtype=torch.float64)
        return AttentionInputs(queries, states.requires_grad_(), states, 1.0)

    student, teacher = inputs(0.0), inputs(math.log(3))
    value = attention_loss(student, teacher, rows, keys)
    assert value.item() == pytest.approx(2 * 0.25**2)
    value.backward()
    # ∂/∂p = 2(p − q) = (−½, ½); ∂/∂score = p (g − Σ p g) = ½ · (−½)
    assert student.keys_BKTD.grad.flatten().tolist() == pytest.approx([-0.25, 0.25])
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    found = attention_loss(inputs(0.0), teacher, rows, keys, kind="row_kl")
    assert found.item() == pytest.approx(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_a_key_or_a_row_does_not_count(kind):
    """Padding may hold anything, NaN excepted, and may stand on either side."""
    student, teacher = make_inputs(*SAME, 0), make_inputs(*SAME, 1)
    value = attention_loss(student, teacher, ROWS, KEYS, kind=kind, relation_heads=2)

    def moved(inputs, by):
        return AttentionInputs(*(t.roll(by, 2) for t in inputs[:3]), inputs.scaling)

    # Rolling moves the padding from one side to the other; rows and keys move with their tokens.
    first = AttentionInputs(*(t[:1] for t in student[:3]), student.scaling)
    theirs = AttentionInputs(*(t[:1] for t in teacher[:3]), teacher.scaling)
    left = attention_loss(first, theirs, ROWS[:1], KEYS[:1], kind=kind, relation_heads=2)
    right = attention_loss(
        moved(first, -3),
        moved(theirs, -3),
        ROWS[:1].roll(-3, 1),
        KEYS[:1].roll(-3, 1),
        kind=kind,
        relation_heads=2,
    )
    torch.testing.assert_close(left, right)
    for tensor in (*student[:3], *teacher[:3]):
        tensor.masked_fill_(~KEYS[:, None, :, None], 1e3)
    again = attention_loss(student, teacher, ROWS, KEYS, kind=kind, relation_heads=2)
    torch.testing.assert_close(again, value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_at_no_distance_from_itself_and_no_rows_at_all_give_zero(kind):
    student = make_inputs(*GROUPED, 0, grad=True)
    options = {"kind": kind, "relation_heads": 2}
    copy = make_inputs(*GROUPED, 0)
    assert attention_loss(student, copy, ROWS, KEYS, **options).item() == pytest.approx(
        0, abs=1e-12
    )
    other = make_inputs(*GROUPED, 5)
    assert attention_loss(student, other, ROWS, KEYS, **options).item() > 0.1
    nothing = attention_loss(student, other, torch.zeros_like(ROWS), KEYS, **options)
    nothing.backward()
    assert nothing.item() == 0
    assert all(t.grad is None or not t.grad.any() for t in student[:3])


def test_half_precision_is_summed_in_float32_and_returned_as_it_came():
    student = make_inputs(*SAME, 0)
    halves = AttentionInputs(*(t.bfloat16().requires_grad_() for t in student[:3]), student.scaling)
    teacher = make_inputs(*SAME, 1)
    expected = attention_loss(
        AttentionInputs(*(t.double() for t in halves[:3]), student.scaling), teacher, ROWS, KEYS
    )
    found = attention_loss(halves, teacher, ROWS, KEYS)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    found.backward()
    assert halves.queries_BHTD.grad.dtype == torch.bfloat16


def test_what_does_not_fit_is_refused():
    student, teacher = make_inputs(*SAME, 0), make_inputs(*OTHER, 1)
    with pytest.raises(ValueError, match="the student has 4 heads and the teacher 2"):
        attention_loss(student, teacher, ROWS, KEYS)
    with pytest.raises(ValueError, match="5 relation heads do not divide a width of 24"):
        attention_loss(student, teacher, ROWS, KEYS, kind="relations", relation_heads=5)
    with pytest.raises(ValueError, match="one of map_mse, row_kl, relations"):
        attention_loss(student, teacher, ROWS, KEYS, kind="cosine")


def test_the_most_relation_heads_divide_every_width():
    assert most_relation_heads([2048, 256, 4096], 32) == 32
    assert most_relation_heads([576, 192], 9) == 8
    assert most_relation_heads([7], 6) == 1


class LiveMemory(TorchDispatchMode):
    """The most bytes that tensors made within hold at a time."""

    def __init__(self):
        super().__init__()
        self.held: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.held[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.held = {key: held for key, held in self.held.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.held.values()))
        return result


def peak_of(time, chunk_size):
    """Bytes of loss and backward over `time` positions, and of one map of time × time."""
    sides = [
        AttentionInputs(*(torch.randn(1, 4, time, 8) for _ in range(3)), 8**-0.5) for _ in range(2)
    ]
    for tensor in sides[0][:3]:
        tensor.requires_grad_()
    rows = torch.ones(1, time, dtype=torch.bool)
    with LiveMemory() as memory:
        attention_loss(*sides, rows, rows, chunk_size=chunk_size).backward()
    return memory.peak, 4 * 4 * time**2


def test_no_map_is_ever_held_and_memory_grows_with_the_chunk_and_linearly_with_time():
    peak, whole_map = peak_of(1024, chunk_size=16)
    assert peak < 0.25 * whole_map
    twice, whole_map = peak_of(2048, chunk_size=16)
    assert twice < 2.1 * peak
    assert twice < 0.125 * whole_map
    in_one, whole_map = peak_of(1024, chunk_size=1024)
    assert in_one > 4 * whole_map  # what the measure sees where maps are held
