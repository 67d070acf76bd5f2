"""No row of a prompt file is lost without a word."""

import json

import pytest

from medistill_trl.data import Prompt, leave_out_heldout, read_prompts
from medistill_trl.errors import UserError


def row(number=1, **changes):
    base = {
        "id": f"r{number}",
        "source": "s",
        "question": f"Q{number}?",
        "reference": "R",
        "answer": "A",
    }
    return json.dumps({**base, **changes})


def write(tmp_path, *lines):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else x.encode() for x in lines) + b"\n")
    return str(path)


BAD = {
    '{"id": "x", "question"': "not JSON",
    "[1, 2]": "must be an object",
    row(9).replace('"question"', '"questions"'): "missing column question",
    row(9, question=5): "question must be a text, got int",
    row(9, answer=["a"]): "answer must be a text, got list",
    row(9, question="  "): "question is empty",
    row(9, question="a\0b"): "NUL",
    row(1): "already stands in line 1",
    b'{"id": "\xff"}': "not UTF-8",
    "[" * 100_000: "not JSON",
    row(9, reference="\ud800"): "half a surrogate pair",
    '{"id": ' + "9" * 5000 + "}": "not JSON that can be read",
}


@pytest.mark.parametrize(("line", "reason"), BAD.items(), ids=list(BAD.values()))
def test_a_bad_row_stops_the_run_by_line_or_is_skipped_and_counted(tmp_path, line, reason):
    path = write(tmp_path, row(1), line, row(3))
    with pytest.raises(UserError, match="on_bad_row: skip") as caught:
        read_prompts(path, "fail")
    assert f"line 2: {reason}" in str(caught.value) or (
        "line 2: " in str(caught.value) and reason in str(caught.value)
    )
    prompts, report = read_prompts(path, "skip")
    assert [p.id for p in prompts] == ["r1", "r3"]
    assert (report.read, report.kept, len(report.skipped)) == (3, 2, 1)
    assert report.skipped[0].startswith("line 2: ")
    assert reason in report.skipped[0]


def test_all_bad_rows_are_named_in_one_message(tmp_path):
    path = write(tmp_path, row(1), "{", row(2), "}")
    with pytest.raises(UserError) as caught:
        read_prompts(path, "fail")
    assert "line 2:" in str(caught.value)
    assert "line 4:" in str(caught.value)


@pytest.mark.parametrize("policy", ["fail", "skip"])
def test_a_file_without_rows_is_refused(tmp_path, policy):
    with pytest.raises(UserError, match="is empty"):
        read_prompts(write(tmp_path, ""), policy)


def test_a_file_with_only_bad_rows_is_refused_under_skip(tmp_path):
    with pytest.raises(UserError, match="no usable row is left of 1"):
        read_prompts(write(tmp_path, "{"), "skip")


def test_a_prompt_over_the_limit_is_a_bad_row(tmp_path):
    path = write(tmp_path, row(1), row(2, question="long " * 50))
    limit = lambda p: "the prompt has too many tokens" if len(p.question) > 100 else None  # noqa: E731
    with pytest.raises(UserError, match="line 2: the prompt has too many tokens"):
        read_prompts(path, "fail", too_long=limit)
    assert len(read_prompts(path, "skip", too_long=limit)[0]) == 1


def test_columns_limit_and_order(tmp_path):
    path = write(tmp_path, row(1, extra=1), row(2).replace(', "answer": "A"', ""), row(3), "{")
    prompts, report = read_prompts(path, "fail", limit=3)
    assert [p.id for p in prompts] == ["r1", "r2", "r3"]
    assert prompts[1].answer is None
    assert report.kept == 3


def test_a_question_that_is_held_out_is_not_trained_on(tmp_path):
    train, report = read_prompts(write(tmp_path, row(1), row(2), row(3)), "fail")
    heldout = [Prompt("v", "s", "  q2? ", "R")]
    with pytest.raises(UserError, match="r2"):
        leave_out_heldout(train, heldout, report, "fail")
    kept = leave_out_heldout(train, heldout, report, "skip")
    assert [p.id for p in kept] == ["r1", "r3"]
    assert report.kept == 2
    assert report.skipped == ["id r2: its question is held out"]
    assert leave_out_heldout(train, [], report, "fail") == train


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.jsonl: cannot be read"):
        read_prompts(str(tmp_path / "nowhere.jsonl"), "skip")
