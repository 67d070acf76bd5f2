"""What the student is trained on: the completion and its EOS, nothing before, nothing after."""

import pytest
import torch
from conftest import make_model, make_tokenizer
from tokenizers import processors

from medistill_trl.errors import UserError
from medistill_trl.model_source import ModelSource
from medistill_trl.models import _other_special_token
from medistill_trl.prompts import IGNORED, PromptFormat, encode_completion, encode_example

QUESTION = "What causes gout?"
ANSWER = "Uric acid crystals in the joint, β ≥ 5 µmol."


@pytest.fixture(params=[True, False], ids=["chat", "plain"])
def form(request):
    tokenizer = make_tokenizer(chat=request.param)
    tokenizer.pad_token = "<|endoftext|>"
    return PromptFormat(tokenizer)


def test_loss_is_on_the_completion_and_its_eos_only(form):
    example = encode_example(form, QUESTION, ANSWER, True, None)
    prompt_ids = form.encode(form.render(QUESTION))
    labels = example["labels"]
    assert example["input_ids"][: len(prompt_ids)] == prompt_ids
    assert labels[: len(prompt_ids)] == [IGNORED] * len(prompt_ids)
    assert labels[len(prompt_ids) :] == example["input_ids"][len(prompt_ids) :]
    assert labels[-1] == form.tokenizer.eos_token_id
    assert form.tokenizer.decode(labels[len(prompt_ids) : -1]) == ANSWER


def test_a_completion_cut_at_its_limit_gets_no_eos(form):
    example = encode_example(form, QUESTION, ANSWER, False, None)
    assert form.tokenizer.eos_token_id not in example["labels"]


def test_max_length_cuts_the_completion_and_never_the_prompt(form):
    prompt_ids = form.encode(form.render(QUESTION))
    example = encode_example(form, QUESTION, ANSWER, True, len(prompt_ids) + 3)
    assert len(example["input_ids"]) == len(example["labels"]) == len(prompt_ids) + 3
    assert example["input_ids"][: len(prompt_ids)] == prompt_ids


def test_the_system_prompt_stands_in_both_formats(form):
    with_system = PromptFormat(form.tokenizer, "Answer in one sentence.")
    assert "Answer in one sentence." in with_system.render(QUESTION)
    assert "Answer in one sentence." not in form.render(QUESTION)


def test_a_template_without_system_role_is_a_clear_error(form):
    form.tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(UserError, match=r"System role not supported.*remove system_prompt"):
        PromptFormat(form.tokenizer, "Be brief").render(QUESTION)


def test_the_prompt_is_never_resplit_where_the_boundary_would_merge():
    tokenizer = make_tokenizer()
    prompt = "The answer is in"
    ids = encode_completion(tokenizer, prompt, "flammation", finished=False)
    assert tokenizer.decode(ids) == "flammation"
    assert tokenizer.decode(tokenizer(prompt)["input_ids"] + ids) == prompt + "flammation"


@pytest.mark.parametrize("finished", [True, False])
def test_loss_does_not_depend_on_padding_side_or_prompt_length(form, finished):
    model = make_model(len(form.tokenizer)).eval()
    examples = [
        encode_example(form, QUESTION, ANSWER, finished, None),
        encode_example(form, QUESTION * 6, ANSWER[:9], finished, None),
    ]
    width = max(len(e["input_ids"]) for e in examples)
    losses = {}
    for side in ("left", "right"):
        rows = {"input_ids": [], "labels": [], "attention_mask": []}
        for e in examples:
            gap = width - len(e["input_ids"])
            for name, values, fill in (
                ("input_ids", e["input_ids"], form.tokenizer.pad_token_id),
                ("labels", e["labels"], IGNORED),
                ("attention_mask", [1] * len(e["input_ids"]), 0),
            ):
                padding = [fill] * gap
                rows[name].append(padding + values if side == "left" else values + padding)
        batch = {name: torch.tensor(values) for name, values in rows.items()}
        losses[side] = model(**batch).loss
    singles = [
        model(input_ids=torch.tensor([e["input_ids"]]), labels=torch.tensor([e["labels"]])).loss
        * sum(label != IGNORED for label in e["labels"])
        for e in examples
    ]
    tokens = sum(label != IGNORED for e in examples for label in e["labels"])
    torch.testing.assert_close(losses["left"], losses["right"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses["right"], sum(singles) / tokens, rtol=1e-4, atol=1e-5)


def test_bos_opens_a_prompt_once_where_the_tokenizer_opens_texts_so(form):
    """As Llama 2's does; TinyLlama's chat template leaves it out, others write it themselves."""
    tokenizer = form.tokenizer
    without = form.encode(form.render(QUESTION))
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    opened = form.encode(form.render(QUESTION))
    assert opened == [0, *without]
    if form.is_chat:
        tokenizer.chat_template = "<|endoftext|>" + tokenizer.chat_template
        assert form.encode(form.render(QUESTION)) == opened
    completion = encode_example(form, QUESTION, ANSWER, True, None)
    assert next(token for token in completion["labels"] if token >= 0) != 0


def test_pad_is_repaired_with_a_token_that_is_not_eos():
    tokenizer = make_tokenizer()
    assert tokenizer.pad_token == tokenizer.eos_token
    source = ModelSource("m", "folder", None, make_model(len(tokenizer)).config, "f")
    assert _other_special_token(tokenizer, source) == "<|endoftext|>"
    tokenizer.unk_token = None
    assert _other_special_token(tokenizer, source) == "<|endoftext|>"
