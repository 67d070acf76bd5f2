"""Chain of thought: what is drawn, kept, recorded and encoded, and what is refused."""

import json

import pytest
import torch
from crafted_rationales import PROMPTS, REASON, TINY, build, make_setting
from tiny_setting import TRAINING, make_form

from medistill_trl import methods
from medistill_trl.errors import UserError
from medistill_trl.prompts import IGNORED
from medistill_trl.teacher import completion_logits, mean_log_likelihoods


def rows(setting):
    text = (setting.run_directory.results / "rationales.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def account(setting):
    return setting.run_directory.read_result("rationales_summary.json")


def learnt(setting, example):
    return setting.form.tokenizer.decode([t for t in example["labels"] if t != IGNORED])


# --- examples --------------------------------------------------------------------------------------


def test_the_right_rationale_of_each_prompt_is_what_the_student_learns(tmp_path):
    setting = make_setting(tmp_path)
    dataset = build(setting).train_dataset
    assert len(dataset) == len(PROMPTS)
    for number, (prompt, example) in enumerate(zip(PROMPTS, dataset, strict=True)):
        target = f"{REASON} This is case {number}.\n\nFinal answer: Radial nerve"
        assert learnt(setting, example) == target + setting.form.tokenizer.eos_token
        asked = setting.form.encode(setting.form.render(prompt.question))
        assert example["input_ids"][: len(asked)] == asked
        assert not any(example["rationale_mask"][: len(asked)])
    assert setting.teacher.generated_tokens == setting.totals.generated_teacher == 0


def test_the_mask_parts_rationale_from_separator_answer_and_end(tmp_path):
    setting = make_setting(tmp_path)
    example = build(setting).train_dataset[0]
    pairs = list(zip(example["labels"], example["rationale_mask"], strict=True))
    decode = setting.form.tokenizer.decode
    assert decode([t for t, m in pairs if m]) == f"{REASON} This is case 0."
    rest = decode([t for t, m in pairs if not m and t != IGNORED])
    assert rest == "\n\nFinal answer: Radial nerve" + setting.form.tokenizer.eos_token


def test_every_drawn_rationale_stands_in_the_record_with_its_fate(tmp_path):
    setting = make_setting(tmp_path)
    build(setting)
    found = rows(setting)
    assert len(found) == 24
    assert {(row["id"], row["sample"]) for row in found} == {
        (p.id, n) for p in PROMPTS for n in range(3)
    }
    content = account(setting)
    counts = {fate: count for fate, count in content["by_fate"].items() if count}
    assert counts == {"kept": 8, "wrong_answer": 8, "no_separator": 8}
    assert content["prompts"] == {"total": 8, "with_rationale": 8, "fallback": 0, "dropped": 0}
    for row in found:
        assert (row["score"] is not None) == (row["fate"] == "kept")
        assert row["vote"] == (None if row["fate"] == "no_separator" else 0.5)


def test_the_score_is_the_teachers_mean_log_probability_under_the_prompt_it_answered(tmp_path):
    setting = make_setting(tmp_path, teacher_form=make_form(vocab_size=450, chat=False))
    build(setting)
    _method, config = methods.load("cot"), setting.arguments.training
    form, model = setting.teacher.form, setting.teacher.model
    for row in rows(setting):
        if row["fate"] != "kept":
            continue
        prompt = next(p for p in PROMPTS if p.id == row["id"])
        asked = form.encode(form.render(config.rationale_format().ask(prompt.question)))
        target = form.tokenizer(f"{row['rationale']}\n\nFinal answer: {row['answer']}")["input_ids"]
        logits = completion_logits(model, asked, target).log_softmax(-1)
        expected = logits.gather(1, torch.tensor(target)[:, None]).mean().item()
        assert row["score"] == pytest.approx(expected, abs=1e-4)


def test_likelihoods_do_not_depend_on_the_batch(tmp_path):
    setting = make_setting(tmp_path)
    examples = list(build(setting).train_dataset)

    def score(*parts):
        return mean_log_likelihoods(setting.teacher.completion_log_probs(parts))

    assert score(*examples) == pytest.approx([score(e)[0] for e in examples], abs=1e-5)
    assert score({"input_ids": [5, 6], "labels": [IGNORED] * 2}) == [0.0]


def test_prompts_without_a_rationale_fall_back_to_the_plain_completion(tmp_path):
    texts = {"p3": ["?", "", f"{REASON}\nFinal answer: ulnar nerve"]}
    setting = make_setting(tmp_path, texts=texts)
    dataset = build(setting).train_dataset
    assert account(setting)["prompts"] == {
        "total": 8,
        "with_rationale": 7,
        "fallback": 1,
        "dropped": 0,
    }
    plain = setting.teacher.complete(
        [setting.teacher.form.render(PROMPTS[3].question)], setting.sampling
    )[0]
    assert learnt(setting, dataset[3]).startswith(plain.text)
    assert not any(dataset[3]["rationale_mask"])
    assert setting.totals.generated_teacher == len(plain.token_ids) + (plain.end_id is not None)


def test_prompts_without_a_rationale_are_dropped_if_asked(tmp_path):
    setting = make_setting(tmp_path, texts={"p3": ["?"] * 3}, on_no_rationale="drop")
    assert len(build(setting).train_dataset) == 7
    assert account(setting)["prompts"]["dropped"] == 1


def test_nothing_left_is_an_error_that_says_why(tmp_path):
    texts = {p.id: ["?", "", f"{REASON}\nFinal answer: ulnar nerve"] for p in PROMPTS}
    setting = make_setting(tmp_path, texts=texts, on_no_rationale="drop")
    with pytest.raises(
        UserError, match=r"0 of 24 kept .*wrong_answer 8.*(?s:.)*on_no_rationale: fallback"
    ):
        build(setting)
    assert len(rows(setting)) == 24
    setting = make_setting(tmp_path / "b", texts=texts)
    assert len(build(setting).train_dataset) == 8


@pytest.mark.parametrize(("keep", "expected"), [("best", 8), ("top_k", 16), ("all", 24)])
def test_how_many_are_kept(tmp_path, keep, expected):
    texts = {
        p.id: [f"{REASON} Way {n}.\nFinal answer: radial nerve" for n in range(3)] for p in PROMPTS
    }
    setting = make_setting(tmp_path, texts=texts, keep=keep)
    assert len(build(setting).train_dataset) == account(setting)["by_fate"]["kept"] == expected


def test_a_rationale_that_max_length_would_cut_is_not_used(tmp_path):
    longest = len(build(make_setting(tmp_path)).train_dataset[2]["input_ids"])
    setting = make_setting(tmp_path / "b", max_length=longest - 1)
    dataset = build(setting).train_dataset
    assert account(setting)["by_fate"]["over_max_length"] >= 1
    assert all(len(example["input_ids"]) <= longest - 1 for example in dataset)


def test_the_student_may_be_given_the_instruction_and_an_end_marker(tmp_path):
    setting = make_setting(tmp_path, student_sees_instruction=True, end_marker="THE END")
    example = build(setting).train_dataset[0]
    seen = setting.form.tokenizer.decode(example["input_ids"])
    assert 'starts with "Final answer:"' in seen
    assert 'End with "THE END".' in seen
    assert learnt(setting, example).endswith("Final answer: Radial nerve THE END<|im_end|>")


def test_a_second_run_asks_the_teacher_nothing(tmp_path):
    first = make_setting(tmp_path, texts={"p3": ["?"] * 3})
    build(first)
    assert first.totals.generated_teacher > 0
    second = make_setting(tmp_path, texts={"p3": ["?"] * 3})
    build(second)
    assert second.totals.generated_teacher == second.teacher.generated_tokens == 0
    assert rows(first) == rows(second)


def test_a_resumed_run_takes_its_scores_from_the_record(tmp_path, monkeypatch):
    setting = make_setting(tmp_path)
    build(setting)
    before = rows(setting)
    resumed = make_setting(tmp_path, resume=True)
    monkeypatch.setattr(
        resumed.teacher.model, "forward", lambda *a, **k: pytest.fail("the teacher was asked")
    )
    build(resumed)
    assert rows(resumed) == before


# --- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sampling_temperature": 0.0}, "num_rationales is 3 and sampling_temperature 0"),
        ({"min_rationale_tokens": 9, "max_rationale_tokens": 8}, "must not exceed .*9 and 8"),
        ({"rationale_weight": 0.0, "answer_weight": 0.0}, "nothing is learnt"),
        ({"rationale_separator": ": "}, "rationale_separator must hold"),
        ({"rationale_separator": "A\nB"}, "rationale_separator must be one line"),
        ({"end_marker": " END"}, "end_marker must be one line"),
        ({"rationale_instruction": "Think."}, "must hold {separator}"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        methods.load("cot").config(output_dir=str(tmp_path), **{**TRAINING, **TINY, **wrong})


def test_texts_that_could_never_be_read_are_refused(tmp_path):
    base = make_form(chat=False)
    with pytest.raises(UserError, match=r"completions end at '\\n###'"):
        build(make_setting(tmp_path, teacher_form=base, rationale_separator="### Answer:"))
    with pytest.raises(UserError, match=r"end_marker .* holds the special token '<\|im_end\|>'"):
        build(make_setting(tmp_path, end_marker="<|im_end|>"))


def test_a_prompt_that_leaves_the_teacher_no_room_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"rationale_max_new_tokens: 500 .* more than the 512"):
        build(make_setting(tmp_path, rationale_max_new_tokens=500))
