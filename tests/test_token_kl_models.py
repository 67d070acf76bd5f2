"""The distillation loss on whole models: masks, dtypes, memory, and heads of every kind."""

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from token_pairs import (
    H,
    N,
    Pair,
    V,
    plain_divergence,
    plain_loss,
)
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

from medistill_trl.losses.heads import CalledHead, LinearHead, OutputHead
from medistill_trl.losses.token_kl import completion_states, distillation_loss, token_scores

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
