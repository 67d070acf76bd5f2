"""The distillation loss against hand-computed numbers, the plain formula and autograd."""

import math

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from medistill_trl.losses import heads, token_kl
from medistill_trl.losses.divergences import DIVERGENCES, Distribution, by_name
from medistill_trl.losses.heads import CalledHead, LinearHead, OutputHead
from medistill_trl.losses.token_kl import completion_states, distillation_loss, token_scores
from medistill_trl.losses.token_terms import InverseConfidence

N, H, V = 13, 8, 31
PARAMETERS = {"jsd": {"beta": 0.3}, "skew_kl": {"skew": 0.2}, "skew_reverse_kl": {"skew": 0.2}}


def divergence(name):
    return by_name(name, **PARAMETERS.get(name, {}))


class Pair:
    """Random hidden states, heads and targets."""

    def __init__(self, dtype=torch.float32, rows=(V, V), tokens=N, trainable_head=False, **shape):
        generator = torch.Generator().manual_seed(1)

        def draw(*size, scale=1.0):
            return (torch.randn(*size, generator=generator, dtype=torch.float64) * scale).to(dtype)

        self.student_hidden = draw(tokens, H).requires_grad_()
        self.teacher_hidden = draw(tokens, H + 4)
        self.targets = torch.randint(min(rows), (tokens,), generator=generator)
        weight, bias = draw(rows[0], H), draw(rows[0])
        weight.requires_grad_(trainable_head)
        bias.requires_grad_(trainable_head)
        self.student_head = LinearHead(weight, bias, **shape)
        self.teacher_head = LinearHead(draw(rows[1], H + 4))

    def loss(self, **options):
        return distillation_loss(
            self.student_hidden,
            self.targets,
            self.student_head,
            self.teacher_hidden,
            self.teacher_head,
            **options,
        )

    def logits(self, vocab_size=None):
        """Full logits of both, by the definition."""
        head = self.student_head
        student = (self.student_hidden @ head.weight.T + head.bias) * head.scale
        if head.softcap is not None:
            student = torch.tanh(student / head.softcap) * head.softcap
        teacher = self.teacher_hidden @ self.teacher_head.weight.T
        return student[:, :vocab_size], teacher[:, :vocab_size]

    def gradients(self, loss):
        wanted = [self.student_hidden, *self.student_head.parameters]
        return torch.autograd.grad(loss, [tensor for tensor in wanted if tensor.requires_grad])


def plain_divergence(name, student_logits, teacher_logits, temperature):
    """From the definitions, in probabilities."""
    p = torch.softmax(student_logits / temperature, -1)
    q = torch.softmax(teacher_logits / temperature, -1)

    def kl(a, b):
        return (a * (a / b).log()).sum(-1)

    if name == "forward_kl":
        return kl(q, p)
    if name == "reverse_kl":
        return kl(p, q)
    share = next(iter(PARAMETERS[name].values()))
    if name == "jsd":
        m = share * q + (1 - share) * p
        return share * kl(q, m) + (1 - share) * kl(p, m)
    if name == "skew_kl":
        return kl(q, share * q + (1 - share) * p)
    return kl(p, (1 - share) * q + share * p)


def plain_loss(pair, name, alpha, temperature, weights=1.0, vocab_size=None):
    student, teacher = pair.logits(vocab_size)
    column = temperature[:, None] if isinstance(temperature, torch.Tensor) else temperature
    ce = F.cross_entropy(student, pair.targets, reduction="none")
    d = plain_divergence(name, student, teacher, column)
    return ((1 - alpha) * ce + alpha * weights * temperature**2 * d).sum()


def temperatures(kind, dtype=torch.float32):
    return torch.linspace(0.6, 3.0, N, dtype=dtype) if kind == "per token" else kind


def assert_same(pair, loss, expected, relative=1e-5):
    assert loss.item() == pytest.approx(expected.item(), rel=relative)
    for got, want in zip(pair.gradients(loss), pair.gradients(expected), strict=True):
        assert (got - want).norm() <= relative * want.norm()


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
    got = rule(logits.log_softmax(-1), None)
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
    monkeypatch.setattr(token_kl, "CPU_BLOCK_ELEMENTS_PER_THREAD", 3 * V)
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
    assert set(sums) == {"ce", "student_entropy", "tokens"}


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


# --- masks


def test_the_state_before_a_token_predicts_it():
    """Position t's state is the number t, so an unshifted mask would select other states."""
    hidden = torch.arange(6.0)[None, :, None].expand(2, 6, 1)
    labels = torch.tensor([[-100, -100, 12, 13, -100, -100], [-100, 21, -100, -100, 24, 25]])
    states, targets = completion_states(hidden, labels)
    assert states[:, 0].tolist() == [1, 2, 0, 3, 4]
    assert targets.tolist() == [12, 13, 21, 24, 25]


def tiny_llama(config=LlamaConfig, model=LlamaForCausalLM, vocab_size=V, **options):
    torch.manual_seed(0)
    return model(
        config(
            vocab_size=vocab_size, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=64,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.5, **options,
        )
    ).eval()  # fmt: skip


def model_loss(student, teacher, input_ids, attention_mask, labels):
    """Loss as a trainer would ask for it."""
    positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": positions}
    student_states, targets = completion_states(student.model(**inputs)[0], labels)
    teacher_states, _ = completion_states(teacher.model(**inputs)[0], labels)
    return distillation_loss(
        student_states, targets, OutputHead.of(student), teacher_states.detach(), OutputHead.of(teacher),
        alpha=0.5, temperature=2.0,
    )  # fmt: skip


def test_padding_side_and_width_do_not_matter():
    student, teacher = tiny_llama(), tiny_llama(tie_word_embeddings=True)
    rows = [([3, 4, 5], [6, 7, 8, 2]), ([9], [10, 11, 2])]
    results = []
    for side, extra in (("right", 0), ("right", 3), ("left", 0), ("left", 5)):
        width = 7 + extra
        ids, mask, labels = [], [], []
        for prompt, completion in rows:
            pad = [0] * (width - len(prompt) - len(completion))
            parts = (
                prompt + completion,
                [1] * (width - len(pad)),
                [-100] * len(prompt) + completion,
            )
            for total, part, fill in zip((ids, mask, labels), parts, (0, 0, -100), strict=True):
                filler = [fill] * len(pad)
                total.append(filler + part if side == "left" else part + filler)
        loss, sums = model_loss(student, teacher, *(torch.tensor(x) for x in (ids, mask, labels)))
        assert sums["tokens"].item() == 7
        results.append(loss.item())
    assert results == pytest.approx([results[0]] * 4, rel=1e-5)


def test_prompt_tokens_have_no_loss():
    """With the states given, what stands in the prompt and how long it is leaves the loss as it is."""
    hidden, labels = torch.randn(1, 4, H), torch.tensor([[-100, 5, 6, 7]])
    longer = torch.cat([torch.randn(1, 3, H), hidden], 1)
    longer_labels = torch.tensor([[-100, -100, -100, -100, 5, 6, 7]])
    head = LinearHead(torch.randn(V, H))
    losses = [
        distillation_loss(*completion_states(h, y), head, alpha=0.0)[0].item()
        for h, y in ((hidden, labels), (longer, longer_labels))
    ]
    assert losses[0] == losses[1]


# --- dtypes and memory


def test_bfloat16_is_summed_in_float32():
    """Against float64 on the very logits a bfloat16 product gives; bfloat16 sums would be off by 1e-2."""
    pair = Pair(torch.bfloat16, tokens=400, trainable_head=True)
    loss, sums = pair.loss(alpha=0.5, temperature=2.0, chunk_size=64)
    head = pair.student_head
    student = F.linear(pair.student_hidden, *head.parameters).detach().double().requires_grad_()
    teacher = F.linear(pair.teacher_hidden, pair.teacher_head.weight).double()
    ce = F.cross_entropy(student, pair.targets, reduction="sum")
    kl = plain_divergence("forward_kl", student, teacher, 2.0).sum()
    expected = 0.5 * ce + 0.5 * 4 * kl
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert sums["divergence"].item() == pytest.approx(kl.item(), rel=1e-5)
    logit_gradient = torch.autograd.grad(expected, student)[0]
    wanted = (
        logit_gradient @ head.weight.double(),
        logit_gradient.T @ pair.student_hidden.double(),
        logit_gradient.sum(0),
    )
    for got, want in zip(pair.gradients(loss), wanted, strict=True):
        assert got.dtype == torch.bfloat16
        assert (got.double() - want).norm() <= 5e-3 * want.norm()


def test_autocast_touches_only_the_products():
    pair = Pair(tokens=100)
    with torch.autocast("cpu", torch.bfloat16):
        loss, sums = pair.loss(alpha=0.5, temperature=2.0)
        scores = token_scores(
            pair.student_hidden, pair.teacher_hidden, pair.student_head, pair.teacher_head
        )
        student = F.linear(pair.student_hidden, *pair.student_head.parameters).double()
        teacher = F.linear(pair.teacher_hidden, pair.teacher_head.weight).double()
    ce = F.cross_entropy(student, pair.targets, reduction="sum")
    kl = plain_divergence("forward_kl", student, teacher, 2.0).sum()
    assert loss.item() == pytest.approx((0.5 * ce + 0.5 * 4 * kl).item(), rel=1e-5)
    assert scores.sum().item() == pytest.approx(sums["kl"].item(), rel=1e-5)


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest floating-point tensor any operation made."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("trainable_head", [True, False])
def test_logits_of_a_chunk_are_the_largest_tensor(trainable_head):
    tokens, rows, chunk_size = 512, 400, 16
    pair = Pair(rows=(rows, rows), tokens=tokens, trainable_head=trainable_head)
    with LargestTensor() as seen:
        loss, _ = pair.loss(alpha=0.5, temperature=2.0, chunk_size=chunk_size)
        loss.backward()
        token_scores(
            pair.student_hidden, pair.teacher_hidden, pair.student_head, pair.teacher_head,
            chunk_size=chunk_size,
        )  # fmt: skip
    assert seen.numel == chunk_size * rows


# --- heads


def test_frozen_head_gets_no_gradient():
    pair = Pair()
    pair.loss(alpha=0.5)[0].backward()
    assert pair.student_hidden.grad is not None
    assert all(tensor.grad is None for tensor in pair.student_head.parameters)


def test_head_trains_on_frozen_states():
    pair = Pair(trainable_head=True)
    pair.student_hidden.requires_grad_(False)
    loss, _ = pair.loss(alpha=0.5)
    for got, want in zip(
        pair.gradients(loss), pair.gradients(plain_loss(pair, "forward_kl", 0.5, 1.0)), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "model", "options"),
    [
        (LlamaConfig, LlamaForCausalLM, {}),
        (CohereConfig, CohereForCausalLM, {"logit_scale": 0.25}),
        (GraniteConfig, GraniteForCausalLM, {"logits_scaling": 8.0}),
        (Gemma2Config, Gemma2ForCausalLM, {"final_logit_softcapping": 2.0}),
    ],
)
def test_head_of_a_model_gives_its_logits(config, model, options):
    built = tiny_llama(config, model, **options)
    head = OutputHead.of(built)
    assert isinstance(head, LinearHead)
    head.check(built)
    ids = torch.tensor([[1, 5, 9, 3]])
    logits = head.project(built.model(ids)[0][0], torch.float32, track=False).logits_CV
    torch.testing.assert_close(logits, built(ids).logits[0])


def test_a_head_that_is_not_the_models_is_refused():
    cohere = tiny_llama(CohereConfig, CohereForCausalLM, logit_scale=0.25)
    weight = cohere.get_output_embeddings().weight
    with pytest.raises(ValueError, match="model type 'cohere' does something else"):
        LinearHead(weight).check(cohere)


def assert_called_head_is_exact(head, hidden, targets, teacher_hidden, teacher_head, tolerance):
    """Against autograd through all logits at once."""
    wanted = [hidden, *head.parameters]
    loss, _ = distillation_loss(
        hidden, targets, head, teacher_hidden, teacher_head,
        alpha=0.5, temperature=2.0, vocab_size=V - 1, chunk_size=4,
    )  # fmt: skip
    student = head.module(hidden)[:, : V - 1].float()
    teacher = teacher_head.module(teacher_hidden)[:, : V - 1].float().detach()
    ce = F.cross_entropy(student, targets, reduction="sum")
    expected = 0.5 * ce + 2 * plain_divergence("forward_kl", student, teacher, 2.0).sum()
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    for got, want in zip(
        torch.autograd.grad(loss, wanted), torch.autograd.grad(expected, wanted), strict=True
    ):
        assert want.norm() > 0
        assert (got - want).norm() <= tolerance * want.norm()


def test_lora_wrapped_head_is_called():
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    layer = model.get_output_embeddings()
    torch.nn.init.normal_(
        layer.lora_B["default"].weight
    )  # zero at the start: A would get no gradient
    head = OutputHead.of(model)
    assert isinstance(head, CalledHead)
    assert len(head.parameters) == 2  # A and B, not the frozen matrix
    head.check(model)
    targets = torch.randint(V - 1, (N,))
    hidden, teacher_hidden = torch.randn(N, 16, requires_grad=True), torch.randn(N, 16)
    assert_called_head_is_exact(head, hidden, targets, teacher_hidden, head, 1e-5)
    assert layer.base_layer.weight.grad is None


def test_check_is_not_misled_by_dropout():
    config = LoraConfig(r=2, target_modules=["lm_head"], lora_dropout=0.5)
    model = get_peft_model(tiny_llama(), config)
    torch.nn.init.normal_(model.get_output_embeddings().lora_B["default"].weight)
    model.train()
    OutputHead.of(model).check(model)
    assert model.training


class TanhHead(torch.nn.Module):
    """Its backward needs its output, and one of its parameters takes no part."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(H, V)
        self.idle = torch.nn.Parameter(torch.zeros(3))

    def forward(self, hidden):
        return self.linear(hidden).tanh()


def test_any_module_can_be_a_head():
    module, hidden = TanhHead(), torch.randn(N, H, requires_grad=True)
    targets = torch.randint(V, (N,))
    loss, _ = distillation_loss(hidden, targets, CalledHead(module), alpha=0.0, chunk_size=4)
    expected = F.cross_entropy(module(hidden), targets, reduction="sum")
    wanted = [hidden, module.linear.weight, module.linear.bias]
    got = torch.autograd.grad(loss, [*wanted, module.idle])
    for g, w in zip(got, torch.autograd.grad(expected, wanted), strict=False):
        torch.testing.assert_close(g, w)
    assert got[-1].count_nonzero() == 0


def test_4bit_head_is_called():
    layer = bnb.nn.Linear4bit(64, V, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer = layer.to("cpu").requires_grad_(False)
    layer(torch.zeros(1, 64))  # quantises
    head = CalledHead(layer)
    assert head.parameters == ()
    targets = torch.randint(V - 1, (N,))
    hidden, teacher_hidden = torch.randn(N, 64, requires_grad=True), torch.randn(N, 64)
    assert_called_head_is_exact(head, hidden, targets, teacher_hidden, head, 1e-4)


def test_a_called_head_without_enough_rows_is_refused():
    head = CalledHead(torch.nn.Linear(H, V))
    with pytest.raises(ValueError, match=f"more than the {V} rows"):
        distillation_loss(
            torch.randn(2, H), torch.tensor([1, 2]), head, alpha=0.0, vocab_size=V + 1
        )
