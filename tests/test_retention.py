"""eval/retention.py: who is right where, by hand."""

import math

import pytest
from scipy.spatial.distance import jensenshannon

from eval import benchmarks
from eval.item_store import ItemStore
from eval.options import ModelOptions, Options
from eval.retention import (
    compare,
    compare_benchmarks,
    evaluate,
    jensen_shannon,
    option_divergence,
    sentence,
)
from eval.statistics import minimum_detectable_effect
from eval.subjects import load_models
from medistill_trl.errors import UserError


def records(subject: str, choices: list[int | None], answers: list[int], benchmark="medqa"):
    return [
        {
            "benchmark": benchmark,
            "subject": subject,
            "id": f"{benchmark}-{n}",
            "doc_hash": f"{benchmark}{n}",
            "answer": answer,
            "choice": choice,
            "right": choice == answer,
        }
        for n, (choice, answer) in enumerate(zip(choices, answers, strict=True))
    ]


ANSWERS = [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
TEACHER = [0, 0, 0, 1, 1, 1, 0, 2, 0, None]  # 5 right
STUDENT = [0, 0, 1, 0, 1, 0, 0, 0, 1, None]  # 4 right, 3 of them where the teacher is


def test_by_hand():
    found = compare(records("student", STUDENT, ANSWERS), records("teacher", TEACHER, ANSWERS))
    assert found["items"] == 10
    assert found["student_accuracy"]["value"] == 0.4
    assert found["teacher_accuracy"]["value"] == 0.5
    assert found["retention_gap"]["value"] == pytest.approx(0.1)
    assert found["retention"]["value"] == 3 / 5
    assert (found["kept"], found["lost"], found["gained"], found["both_wrong"]) == (3, 2, 1, 4)
    # The teacher's wrong answers that could be read: items 3, 6, 7, 8; of these the student repeats that of 6.
    assert found["inherited_errors"]["value"] == 1 / 4
    assert found["inherited_errors"]["n"] == 4
    # The same option on items 0, 1, 4 and 6.
    assert found["agreement"]["value"] == 4 / 10
    # By chance: 0 at 6/10 · 5/10, 1 at 3/10 · 3/10, the rest never: 0.39.
    assert found["kappa"] == pytest.approx((0.4 - 0.39) / (1 - 0.39))
    assert found["mcnemar_p"] == 1  # two lost and one gained
    assert found["minimum_detectable_gap"] is None or found["minimum_detectable_gap"] <= 0.3
    assert "kept 60%" in sentence("medqa", found)


def test_a_model_against_itself():
    own = records("student", TEACHER, ANSWERS)
    found = compare(own, records("teacher", TEACHER, ANSWERS))
    assert found["retention"]["value"] == 1
    assert found["inherited_errors"]["value"] == 1
    assert (found["lost"], found["gained"], found["mcnemar_p"]) == (0, 0, 1)
    gap = found["retention_gap"]
    assert (gap["value"], gap["interval_95"]) == (0, [0, 0])


def test_a_student_that_lost_much():
    answers = [0] * 40
    found = compare(
        records("student", [1] * 12 + [0] * 28, answers), records("teacher", [0] * 40, answers)
    )
    assert found["mcnemar_p"] == pytest.approx(2 * 0.5**12)
    low, high = found["retention_gap"]["interval_95"]
    assert 0 < low < 0.3 < high
    assert found["minimum_detectable_gap"] < 0.3
    assert found["inherited_errors"]["value"] is None  # the teacher made none


def test_degenerate():
    empty = compare([], [])
    assert (empty["items"], empty["retention"]["value"], empty["kappa"]) == (0, None, None)
    wrong = compare(records("student", [1], [0]), records("teacher", [None], [0]))
    assert wrong["retention"]["value"] is None
    assert "none right" in sentence("medqa", wrong)


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows[:-1],
        lambda rows: [rows[1], rows[0], *rows[2:]],
        lambda rows: [{**rows[0], "doc_hash": "other"}, *rows[1:]],
        lambda rows: [{**rows[0], "id": "other"}, *rows[1:]],
    ],
)
def test_other_items_are_refused(change):
    student = records("student", STUDENT, ANSWERS)
    with pytest.raises(UserError, match="not asked the same items"):
        compare(student, change(records("teacher", TEACHER, ANSWERS)))


def test_p_values_are_adjusted_over_benchmarks():
    answers = [0] * 10
    rows = []
    for name, lost in (("medqa", 8), ("medmcqa", 6), ("pubmedqa", 0)):
        rows += records("student", [1] * lost + [0] * (10 - lost), answers, name)
        rows += records("teacher", [0] * 10, answers, name)
    found = compare_benchmarks(rows)
    assert [found[name]["mcnemar_p"] for name in found] == [2 * 0.5**8, 2 * 0.5**6, 1]
    assert [found[name]["mcnemar_p_holm"] for name in found] == [6 * 0.5**8, 4 * 0.5**6, 1]


def test_the_smallest_gap_is_that_of_the_test_that_is_adjusted():
    """Among five benchmarks a gap must be larger to be found than alone."""
    answers = [0] * 200
    rows = []
    for name in ("a", "b", "c", "d", "e"):
        rows += records("student", [1] * 40 + [0] * 160, answers, name)
        rows += records("teacher", [0] * 200, answers, name)
    among_five = compare_benchmarks(rows)["a"]["minimum_detectable_gap"]
    alone = compare_benchmarks([row for row in rows if row["benchmark"] == "a"])["a"]
    assert alone["minimum_detectable_gap"] == minimum_detectable_effect(200, 0.2)
    assert among_five == minimum_detectable_effect(200, 0.2, alpha=0.01)
    assert among_five > alone["minimum_detectable_gap"]


def test_the_divergence_over_options_by_hand():
    def rows(subject, *probabilities):
        return [
            {"benchmark": "medqa", "subject": subject, "probabilities": p} for p in probabilities
        ]

    certain, other, even = [1.0, 0.0], [0.0, 1.0], [0.5, 0.5]
    found = option_divergence(rows("student", certain, even) + rows("teacher", other, even))
    assert found["medqa"]["value"] == pytest.approx(math.log(2) / 2)  # ln 2 and 0
    assert found["medqa"]["n"] == 2
    between = jensen_shannon(certain, even)
    assert between == pytest.approx(jensenshannon(certain, even) ** 2)
    assert between == jensen_shannon(even, certain)
    assert jensen_shannon([0.1, 0.9], [0.1, 0.9]) == 0
    assert 0 <= jensen_shannon([0.1, 0.9], [0.1 + 1e-17, 0.9 - 1e-17]) < 1e-15  # never below 0


def test_the_part_reads_what_both_protocols_stored(
    teacher_folder, other_teacher_folder, model_cache, sample_build, tmp_path, caplog
):
    caplog.set_level("INFO")
    pair = load_models(ModelOptions(model=str(teacher_folder), teacher=str(other_teacher_folder)))
    options = Options(limit=4, generative_tokens=4, option_shuffles=0, benchmarks=["medqa"])
    data = sample_build[0]
    measured = benchmarks.evaluate(pair, data, options, ItemStore(tmp_path))
    store = ItemStore(tmp_path)
    found = evaluate(pair, data, options, store)
    said = [message.split(":")[0] for message in caplog.messages if "right" in message]
    parts = ["benchmarks, medqa", "generative, medqa"]
    assert said == ["medqa, student", "medqa, teacher", *parts]  # nothing twice
    assert (store.computed, store.reused) == (0, 8)
    assert set(found) == {"benchmarks", "generative"}
    medqa = found["benchmarks"]["medqa"]
    for name in ("student", "teacher"):
        assert medqa[f"{name}_accuracy"] == measured["medqa"][name]["accuracy"]
    assert 0 < medqa["option_js_nats"]["value"] < math.log(2)
    assert "option_js_nats" not in found["generative"]["medqa"]
    alone = load_models(ModelOptions(model=str(teacher_folder)))
    assert "--teacher" in evaluate(alone, data, options, store)["skipped"]
