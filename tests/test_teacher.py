"""Completions and logits of a teacher."""

import pytest
import torch
from conftest import make_model, make_tokenizer

from medistill_trl.models import set_generation
from medistill_trl.prompts import PromptFormat
from medistill_trl.teacher import Completion, Sampling, Teacher, complete, completion_logits, cut

QUESTIONS = ["What causes gout?", "Why does a patient with long-standing asthma wheeze at night?"]


@pytest.fixture(params=[True, False], ids=["chat", "plain"])
def pair(request):
    tokenizer = make_tokenizer(chat=request.param)
    tokenizer.pad_token = "<|endoftext|>"
    model = make_model(len(tokenizer)).eval()
    set_generation(model, tokenizer)
    return model, PromptFormat(tokenizer)


def test_a_batch_gives_what_single_prompts_give(pair):
    model, form = pair
    prompts = [form.render(q) for q in QUESTIONS]
    sampling = Sampling(max_new_tokens=10)
    together = complete(model, form, prompts, sampling)
    alone = [complete(model, form, [p], sampling)[0] for p in prompts]
    assert together == alone
    assert all(len(c.token_ids) <= 10 for c in together)


def test_greedy_tokens_are_the_argmax_of_the_model(pair):
    model, form = pair
    prompt = form.render(QUESTIONS[0])
    completion = complete(model, form, [prompt], Sampling(6))[0]
    ids = form.encode(prompt)
    for token in completion.token_ids:
        assert model(torch.tensor([ids])).logits[0, -1].argmax() == token
        ids.append(token)


def test_sampling_is_seeded_and_leaves_the_global_random_state_alone(pair):
    model, form = pair
    prompts = [form.render(q) for q in QUESTIONS]
    sampling = Sampling(max_new_tokens=12, temperature=1.0)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = complete(model, form, prompts, sampling, seed=1)
    assert torch.equal(torch.rand(3), expected)
    assert complete(model, form, prompts, sampling, seed=1) == first
    assert complete(model, form, prompts, sampling, seed=2) != first


def test_training_mode_is_restored(pair):
    model, form = pair
    model.train()
    complete(model, form, [form.render("Q?")], Sampling(2))
    assert model.training


def test_eos_and_what_follows_iscut():
    tokenizer = make_tokenizer()
    form = PromptFormat(tokenizer)
    ids = tokenizer("An answer.")["input_ids"]
    completion = cut([*ids, 2, 7, 7], {2}, form)
    assert completion == Completion("An answer.", ids, finished=True, end_id=2)
    assert cut(ids, {2}, form).finished is False


def test_a_plain_completion_ends_at_the_next_heading():
    tokenizer = make_tokenizer(chat=False)
    form = PromptFormat(tokenizer)
    ids = tokenizer("An answer.\n### Question:\nAnother?")["input_ids"]
    completion = cut(ids, {2}, form)
    assert completion.text == "An answer."
    assert completion.finished
    assert completion.end_id is None  # it never chose an end token, so none is scored
    assert tokenizer.decode(completion.token_ids).startswith("An answer.")
    assert len(completion.token_ids) < len(ids)


def test_completion_logits_are_those_of_a_full_forward_shifted_by_one(pair):
    model, _ = pair
    prompt_ids, completion_ids = [5, 6, 7, 8], [9, 10, 11]
    logits = completion_logits(model, prompt_ids, completion_ids)
    full = model(torch.tensor([prompt_ids + completion_ids])).logits[0]
    torch.testing.assert_close(logits, full[3:6])


def test_generated_tokens_are_counted(pair):
    model, form = pair
    teacher = Teacher(model, form.tokenizer, form, "t")
    completions = teacher.complete([form.render(q) for q in QUESTIONS], Sampling(5))
    expected = sum(len(c.token_ids) + (c.end_id is not None) for c in completions)
    assert teacher.generated_tokens == expected > 0
