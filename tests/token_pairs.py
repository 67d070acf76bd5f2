"""Random pairs of models as tensors, and the plain formula to compare the fused loss with."""

import pytest
import torch
import torch.nn.functional as F

from medistill_trl.losses.divergences import by_name
from medistill_trl.losses.heads import LinearHead
from medistill_trl.losses.token_kl import distillation_loss

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
