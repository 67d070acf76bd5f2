"""Rewards against the plain formula on tiny real models: tokens, ends, limits, tokenizers, answers."""

import pytest
import torch
from conftest import make_model, make_tokenizer

from medistill_trl.models import set_generation
from medistill_trl.prompts import IGNORED, PromptFormat
from medistill_trl.rewards import TeacherReward, answer_is_right
from medistill_trl.rollouts import Sample, encode_sample, training_batch
from medistill_trl.teacher import Completion, Teacher, completion_log_probs, completion_logits

QUESTION = "Why does gout hurt?"
END = 2


def make_teacher(vocab_size=600, chat=True, extra_rows=0):
    tokenizer = make_tokenizer(vocab_size, chat)
    tokenizer.pad_token = "<|endoftext|>"
    model = make_model(len(tokenizer) + extra_rows, seed=1).requires_grad_(False).eval()
    set_generation(model, tokenizer)
    return Teacher(model, tokenizer, PromptFormat(tokenizer), "t")


@pytest.fixture(scope="module")
def teacher():
    return make_teacher(extra_rows=5)


def sample(ids, finished=True, end=True, answer=None, text="text", question=QUESTION):
    end_id = END if finished and end else None
    return Sample(question, Completion(text, ids, finished, end_id), answer)


SAMPLES = [
    sample([7, 8, 9]),
    sample([11, 12, 13, 14, 15], finished=False),  # cut at the limit: no end token
    sample([20], question=QUESTION + " Explain at length."),
    sample([30, 31], end=False),  # ended at a stop string
    sample([]),  # only an end token
    sample([], finished=False),  # nothing at all
]
LENGTHS = [4, 5, 2, 2, 1, 0]


def plain_log_probs(teacher, one, shared=600):
    form = teacher.form
    if not one.token_ids:
        return torch.zeros(0)
    logits = completion_logits(
        teacher.model, form.encode(form.render(one.question)), one.token_ids
    )[:, :shared]
    return logits.log_softmax(-1)[range(len(one.token_ids)), one.token_ids]


def test_the_end_counts_only_where_the_student_wrote_it(teacher):
    found = TeacherReward(teacher, 600, "teacher_logprob", "sum")(SAMPLES)
    assert found.mask_BT.sum(1).tolist() == LENGTHS
    for one, log_probs in zip(SAMPLES, found.teacher_log_probs, strict=True):
        torch.testing.assert_close(log_probs, plain_log_probs(teacher, one))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_teacher_logprob_is_one_score_at_the_last_token(teacher, reduction):
    found = TeacherReward(teacher, 600, "teacher_logprob", reduction)(SAMPLES)
    sums = torch.stack([plain_log_probs(teacher, one).sum() for one in SAMPLES])
    counts = torch.tensor([max(1, length) for length in LENGTHS])
    expected = sums / counts if reduction == "mean" else sums
    torch.testing.assert_close(found.scores_B, expected)
    assert not found.per_token
    assert torch.isfinite(found.rewards_BT).all()
    for row, (length, score) in enumerate(zip(LENGTHS, expected, strict=True)):
        placed = found.rewards_BT[row].nonzero().flatten().tolist()
        assert placed == ([length - 1] if length else [])
        assert found.rewards_BT[row].sum().item() == pytest.approx(
            score.item() if length else 0, rel=1e-5
        )


@pytest.mark.parametrize("batch_size", [1, 2, 6])
@pytest.mark.parametrize("chunk_size", [1, 3, 256])
def test_neither_batches_nor_chunks_nor_padding_change_a_reward(teacher, batch_size, chunk_size):
    reward = TeacherReward(teacher, 600, "teacher_logprob", batch_size=batch_size)
    whole = TeacherReward(teacher, 600, "teacher_logprob", chunk_size=chunk_size)(SAMPLES)
    torch.testing.assert_close(reward(SAMPLES).scores_B, whole.scores_B)
    alone = torch.cat([reward([one]).scores_B for one in SAMPLES])
    torch.testing.assert_close(alone, whole.scores_B)


def test_token_kl_is_the_difference_of_each_token(teacher):
    student = make_model(600, layers=2, seed=2)
    own = completion_log_probs(student, [encode_sample(teacher.form, one) for one in SAMPLES])
    found = TeacherReward(teacher, 600, "token_kl")(SAMPLES, own)
    assert found.per_token
    for row, one in enumerate(SAMPLES):
        length = LENGTHS[row]
        expected = plain_log_probs(teacher, one) - own[row]
        torch.testing.assert_close(found.rewards_BT[row, :length], expected)
        assert (found.rewards_BT[row, length:] == 0).all()
        torch.testing.assert_close(found.scores_B[row], expected.sum())
    same = TeacherReward(teacher, 600, "token_kl")(SAMPLES, found.teacher_log_probs)
    assert (same.rewards_BT == 0).all()


@pytest.mark.parametrize("kind", ["teacher_logprob", "token_kl"])
def test_a_cut_completion_is_charged_at_its_last_token(teacher, kind):
    own = [torch.full((length,), -3.0) for length in LENGTHS]
    free = TeacherReward(teacher, 600, kind)(SAMPLES, own)
    charged = TeacherReward(teacher, 600, kind, truncation_penalty=2.0)(SAMPLES, own)
    cut = torch.tensor([0.0, 2, 0, 0, 0, 2])
    torch.testing.assert_close(free.scores_B - charged.scores_B, cut)
    difference = free.rewards_BT - charged.rewards_BT
    assert difference.nonzero().tolist() == [[1, 4]]
    assert difference[1, 4].item() == pytest.approx(2, rel=1e-5)


def test_nothing_but_empty_completions(teacher):
    found = TeacherReward(teacher, 600, "teacher_logprob")([SAMPLES[-1]] * 2)
    assert found.scores_B.tolist() == [0, 0]
    assert found.rewards_BT.shape == found.mask_BT.shape == (2, 0)


def test_another_tokenizer_reads_the_text():
    other = make_teacher(vocab_size=450, chat=False)
    form = other.form
    text = "Urate crystals irritate the joint."
    samples = [sample([7], text=text), sample([7], finished=False, text=text)]
    found = TeacherReward(other, None, "teacher_logprob", "sum")(samples)
    ids = form.tokenizer(text, add_special_tokens=False)["input_ids"]
    for one, tokens in ((0, [*ids, form.tokenizer.eos_token_id]), (1, ids)):
        expected = plain_log_probs(other, sample(tokens, end=False), None).sum()
        torch.testing.assert_close(found.scores_B[one], expected)
    assert found.teacher_log_probs is None
    assert found.mask_BT.sum(1).tolist() == [2, 1]  # the student's tokens
    with pytest.raises(ValueError, match="needs shared tokens, or the two tokenizers"):
        TeacherReward(other, None, "token_kl")


def test_sequence_weighs_likelihood_and_right_answers(teacher):
    samples = [
        sample([7, 8], answer="yes", text="yes"),
        sample([7, 8], answer="no", text="yes"),
        sample([7, 8], text="yes"),  # no reference answer
    ]
    reward = TeacherReward(
        teacher,
        600,
        "sequence",
        likelihood_weight=0.5,
        correctness_weight=3.0,
        is_right=lambda text, reference: text == reference,
    )
    mean = TeacherReward(teacher, 600, "teacher_logprob")(samples).scores_B
    likelihood = TeacherReward(teacher, 600, "sequence", likelihood_weight=0.5)(samples)
    torch.testing.assert_close(likelihood.scores_B, 0.5 * mean)
    found = reward(samples)
    torch.testing.assert_close(found.scores_B, 0.5 * mean + torch.tensor([3.0, 0, 0]))
    assert found.parts["correct"].tolist() == [1, 0]
    assert len(reward(samples[2:]).parts["correct"]) == 0


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("Gout.\n\nFinal answer: Radial nerve", True),
        ("**Final answer:** ulnar nerve", False),
        ("The radial nerve.", True),
        ("Final answer: radial nerve\nFinal answer: ulnar nerve", False),
        ("", False),
    ],
)
def test_a_final_answer_is_found_in_a_completion(text, right):
    assert answer_is_right(text, "radial nerve") is right


@pytest.mark.parametrize("wrong", [{"kind": "bleu"}, {"kind": "sequence", "reduction": "max"}])
def test_unknown_kinds_are_refused(teacher, wrong):
    with pytest.raises(ValueError, match="reward must be one of"):
        TeacherReward(teacher, 600, **wrong)


def test_what_the_teacher_cannot_read_is_cut():
    one = sample([7, 8, 599, 9])
    assert one.readable(600) is one
    assert one.readable(None) is one
    cut = one.readable(100)
    assert (cut.token_ids, cut.truncated) == ([7, 8], True)


def test_a_models_mode_and_dropout_do_not_matter():
    student = make_model(600, layers=2, attention_dropout=0.5).train()
    example = {"input_ids": [5, 6, 7, 8], "labels": [IGNORED, IGNORED, 7, 8]}
    first, again = (completion_log_probs(student, [example])[0] for _ in range(2))
    assert student.training
    assert torch.equal(first, again)


def test_a_training_batch_puts_values_where_their_tokens_stand():
    examples = [
        {"input_ids": prompt + ids, "labels": [IGNORED] * len(prompt) + ids}
        for prompt, ids in (([5, 6], [7, 8]), ([5], []), ([5], [9]))
    ]
    values = torch.tensor([[1.0, 2.0], [0, 0], [3, 0]])
    batch = training_batch(examples, values, [True, True, False], 1)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [5, 1, 1, 1], [5, 9, 1, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 7, 8], [-100] * 4, [-100] * 4]
    assert batch["values"].tolist() == [[0, 0, 1, 2], [0] * 4, [0, 3, 0, 0]]
