"""The held-out check against numbers computed by hand and the plain formula."""

import math

import pytest
import torch
from conftest import make_model, make_tokenizer

from medistill_trl.completion_store import CompletionStore
from medistill_trl.data import Prompt
from medistill_trl.errors import UserError
from medistill_trl.heldout import HeldoutCheck, compare_logits
from medistill_trl.models import set_generation
from medistill_trl.prompts import PromptFormat
from medistill_trl.teacher import Completion, Teacher

PROMPTS = [Prompt(f"p{i}", "s", f"What causes condition number {i}?", "r") for i in range(3)]


def make_form(**kwargs):
    tokenizer = make_tokenizer(**kwargs)
    tokenizer.pad_token = "<|endoftext|>"
    return PromptFormat(tokenizer)


def make_check(tmp_path, student_form, teacher_form=None, seed=0):
    teacher_form = teacher_form or student_form
    model = make_model(len(teacher_form.tokenizer), seed=seed).eval()
    set_generation(model, teacher_form.tokenizer)
    teacher = Teacher(model, teacher_form.tokenizer, teacher_form, "t")
    store = CompletionStore(tmp_path / "c.sqlite")
    return HeldoutCheck.prepare(student_form, teacher, PROMPTS, store, 12, None)


def test_two_tokens_by_hand():
    """Teacher (3/4, 1/4), student (1/2, 1/2), the teacher wrote token 0."""
    teacher = torch.tensor([[math.log(3.0), 0.0]])
    student = torch.zeros(1, 2)
    sums = compare_logits(student, teacher, torch.tensor([0]))
    assert sums.kl == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-6)
    assert sums.ce == pytest.approx(math.log(2), rel=1e-6)
    assert (sums.agreed, sums.tokens) == (1, 1)


def test_top1_compares_the_models_with_each_other_not_with_the_text():
    teacher = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    student = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert compare_logits(student, teacher, torch.tensor([1, 0])).agreed == 1
    assert compare_logits(teacher, teacher, torch.tensor([1, 0])).agreed == 2


def test_chunks_add_up(monkeypatch):
    torch.manual_seed(0)
    student, teacher, target = torch.randn(9, 7), torch.randn(9, 7), torch.randint(7, (9,))
    whole = compare_logits(student, teacher, target)
    monkeypatch.setattr("medistill_trl.heldout.ROWS_PER_CHUNK", 2)
    parts = compare_logits(student, teacher, target)
    assert parts.kl == pytest.approx(whole.kl, rel=1e-6)
    assert parts.ce == pytest.approx(whole.ce, rel=1e-6)
    assert parts.agreed == whole.agreed


def test_a_student_that_is_its_teacher_has_no_divergence(tmp_path):
    check = make_check(tmp_path, make_form())
    measured = check.measure(check.teacher.model)
    assert measured["kl_nats"] == pytest.approx(0, abs=1e-6)
    assert measured["top1"] == 1
    assert measured["ce_nats"] > 0


def test_the_check_equals_the_plain_formula_on_shifted_positions(tmp_path):
    form = make_form()
    check = make_check(tmp_path, form)
    student = make_model(len(form.tokenizer), seed=3).eval()
    kl = ce = agreed = tokens = 0
    for prompt, completion in zip(check.prompts, check.completions, strict=True):
        start = form.encode(form.render(prompt.question))
        ids = completion.token_ids + [completion.end_id] * (completion.end_id is not None)
        with torch.no_grad():
            p = check.teacher.model(torch.tensor([start + ids])).logits[0].softmax(-1)
            q = student(torch.tensor([start + ids])).logits[0].softmax(-1)
        for t, token in enumerate(ids):
            position = len(start) + t - 1
            kl += (p[position] * (p[position] / q[position]).log()).sum().item()
            ce -= q[position, token].log().item()
            agreed += int(p[position].argmax() == q[position].argmax())
            tokens += 1
    measured = check.measure(student)
    assert measured["kl_nats"] == pytest.approx(kl / tokens, rel=1e-4)
    assert measured["ce_nats"] == pytest.approx(ce / tokens, rel=1e-4)
    assert measured["top1"] == pytest.approx(agreed / tokens)
    assert measured["tokens"] == tokens


def test_each_completion_has_its_record(tmp_path):
    check = make_check(tmp_path, make_form())
    student = make_model(len(check.student_form.tokenizer), seed=3).eval()
    sums = check.compare(student)
    records, measured = check.records(sums), check.summary(sums)
    assert [record["id"] for record in records] == ["p0", "p1", "p2"]
    total = {
        key: sum(record[key] for record in records)
        for key in ("kl_nats", "ce_nats", "agreed", "tokens")
    }
    assert total["tokens"] == measured["tokens"]
    assert total["kl_nats"] / total["tokens"] == pytest.approx(measured["kl_nats"])
    assert total["ce_nats"] / total["tokens"] == pytest.approx(measured["ce_nats"])
    assert total["agreed"] / total["tokens"] == pytest.approx(measured["top1"])
    check.prompts, check.completions = check.prompts[1:2], check.completions[1:2]
    assert check.records(check.compare(student)) == [pytest.approx(records[1])]


def test_an_end_token_is_scored_only_if_the_teacher_chose_it(tmp_path):
    check = make_check(tmp_path, make_form())
    ids = check.completions[0].token_ids
    check.prompts = check.prompts[:1]
    measured = {}
    for end_id in (None, 2):
        check.completions = [Completion("x", ids, finished=True, end_id=end_id)]
        measured[end_id] = check.measure(check.teacher.model)["tokens"]
    assert measured == {None: len(ids), 2: len(ids) + 1}


def test_rows_only_the_teacher_has_are_cut_and_the_rest_renormalised(tmp_path):
    small, large = make_form(), make_form()
    large.tokenizer.add_tokens(["<extra_1>", "<extra_2>"])
    check = make_check(tmp_path, small, large)
    student = make_model(len(small.tokenizer), seed=3).eval()
    measured = check.measure(student)
    assert check.shared == len(small.tokenizer)
    assert measured["kl_nats"] > 0
    assert math.isfinite(measured["kl_nats"])


def test_different_tokenizers_get_no_kl_and_are_told_why(tmp_path):
    check = make_check(tmp_path, make_form(), make_form(vocab_size=450, chat=False), seed=1)
    measured = check.measure(make_model(len(check.student_form.tokenizer)).eval())
    assert measured["kl_nats"] is None
    assert measured["top1"] is None
    assert "different tokenizers" in measured["note"]
    assert measured["bits_per_byte"] > 0
    record = check.records(check.compare(make_model(len(check.student_form.tokenizer))))[0]
    assert record["kl_nats"] is None
    assert record["agreed"] is None
    assert record["ce_nats"] > 0


def test_the_students_mode_is_restored(tmp_path):
    check = make_check(tmp_path, make_form())
    student = make_model(len(check.student_form.tokenizer)).train()
    check.measure(student)
    assert student.training


def test_a_teacher_that_writes_nothing_is_an_error(tmp_path):
    check = make_check(tmp_path, make_form())
    check.completions = [Completion("", [], False)] * len(PROMPTS)
    with pytest.raises(UserError, match="wrote nothing"):
        check.measure(check.teacher.model)
