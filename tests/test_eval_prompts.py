"""What is asked: prompts, few-shot examples, and the rows and files that are refused."""

import pytest
from benchmark_rows import EXAMPLE, ROW, small_data

from eval.options import Options
from eval.questions import load_benchmarks, refuse_leaks
from medistill_trl.errors import UserError


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        (
            "medqa",
            {},
            "Question: Which vitamin prevents scurvy?\nA. Vitamin K\nB. Vitamin C\nC. Vitamin D\nD. Thiamine\n"
            "Answer:",
        ),
        (
            "medmcqa",
            {},
            "Question: Which vitamin prevents scurvy?\nChoices:\nA. Vitamin K\nB. Vitamin C\nC. Vitamin D\n"
            "D. Thiamine\nAnswer:",
        ),
        (
            "pubmedqa",
            {"options": ["yes", "no", "maybe"]},
            "Abstract: Sailors were given lemons.\nThey stayed well.\nQuestion: Which vitamin prevents "
            "scurvy?\nAnswer:",
        ),
        (
            "pubhealth",
            {"options": ["true", "false", "mixture", "unproven"]},
            "Claim: Which vitamin prevents scurvy?\nQuestion: Is the claim true, false, a mixture of both, or "
            "unproven?\nAnswer:",
        ),
        (
            "pubhealth_2class",
            {"options": ["true", "false"]},
            "Claim: Which vitamin prevents scurvy?\nQuestion: Is the claim true or false?\nAnswer:",
        ),
    ],
)
def test_prompts_are_the_fields(tmp_path, name, changes, expected):
    answer = {"answer": 1}
    data = small_data(tmp_path, name, ROW | changes | answer, EXAMPLE | changes | answer)
    (benchmark,) = load_benchmarks(data, Options(option_shuffles=0))[0].values()
    (question,) = benchmark.questions
    labels = "ABCD" if benchmark.has_letters else changes["options"]
    assert question.prompt == expected
    assert question.choices == [f" {label}" for label in labels]
    (shot,) = load_benchmarks(data, Options(option_shuffles=0, few_shot=1))[0].values()
    solved = expected.replace("scurvy", "rickets") + f" {labels[1]}\n\n"
    assert shot.questions[0].prompt == solved + expected


def test_examples_that_are_asked_are_refused():
    rows = [{"id": "t1", "question": "Which vitamin  prevents SCURVY?"}]
    for example in ({"id": "t1", "question": "other"}, {"id": "x", "question": ROW["question"]}):
        with pytest.raises(UserError, match=f"{example['id']} also stand in the benchmark"):
            refuse_leaks("medqa", [example], rows)
    refuse_leaks("medqa", [EXAMPLE], rows)


def test_a_leaking_file_is_refused_only_when_its_examples_are_shown(tmp_path):
    data = small_data(tmp_path, "medqa", ROW, ROW)
    load_benchmarks(data, Options())
    with pytest.raises(UserError, match="few-shot examples of medqa: t1"):
        load_benchmarks(data, Options(few_shot=1))


def test_what_is_missing_is_said(tmp_path):
    data = small_data(tmp_path, "medqa", ROW, EXAMPLE)
    found, missing = load_benchmarks(data, Options(few_shot=2))
    assert not found
    assert "only 1 few-shot examples" in missing["medqa"]
    assert "python -m data_prep.build --out" in missing["pubmedqa"]


@pytest.mark.parametrize(
    ("change", "problem"),
    [({"answer": 4}, "row t1 has no option 4"), ({"options": None}, ":1: the row has no options")],
)
def test_a_row_that_cannot_be_asked_is_named(tmp_path, change, problem):
    row = {key: value for key, value in (ROW | change).items() if value is not None}
    with pytest.raises(UserError, match=problem):
        load_benchmarks(small_data(tmp_path, "medqa", row, EXAMPLE), Options())
