"""Questions with their options in other orders: what is asked, and how the answers are counted."""

import json
import re

import pytest
from benchmark_rows import EXAMPLE, ROW, small_data
from tiny_subjects import tiny_pair

from eval.benchmarks import Respondent, records, shuffle_scores
from eval.item_store import ItemStore
from eval.options import Options
from eval.questions import load_benchmarks, movable, other_orders
from medistill_trl.errors import UserError


class Reader(Respondent):
    """Knows how likely each text is, wherever it stands."""

    LIKELY = {"Vitamin K": -3.0, "Vitamin C": -1.0, "Vitamin D": -2.0, "Thiamine": -4.0}

    def _compute(self, items):
        for item in items:
            shown = re.findall(r"^[A-D]\. (.*)$", item["prompt"], re.MULTILINE)
            yield {"log_probs": [self.LIKELY[text] for text in shown], "cut_tokens": 0}


class FirstLetter(Respondent):
    """Says A, whatever stands there."""

    def _compute(self, items):
        for _ in items:
            yield {"log_probs": [-1.0, -2.0, -3.0, -4.0], "cut_tokens": 0}


@pytest.mark.parametrize(("kind", "alike"), [(Reader, 1.0), (FirstLetter, 0.0)])
def test_answers_in_another_order_are_counted_by_option(tmp_path, kind, alike):
    data = small_data(tmp_path, "medqa", ROW, EXAMPLE)
    (benchmark,) = load_benchmarks(data, Options(option_shuffles=23))[0].values()
    respondent = kind(tiny_pair().student, ItemStore(tmp_path / "store"), 1)
    answers = respondent.answer(benchmark.questions, "x")
    shuffled = [respondent.answer(questions, "x") for questions in benchmark.shuffled]
    found = shuffle_scores(benchmark, answers, shuffled)["option_shuffles"]
    assert found["answered_alike"]["value"] == alike
    if kind is Reader:
        assert found["accuracies"] == [1.0] * 23
        assert all(turn[0].log_probs == [-3.0, -1.0, -2.0, -4.0] for turn in shuffled)
    else:  # the right option stands first in 6 of the 23 other orders
        assert sum(found["accuracies"]) == 6
    (record,) = records(benchmark, "student", answers, shuffled)
    assert len(record["shuffled_choices"]) == 23


def test_other_orders_differ_from_the_rows_and_from_each_other():
    orders = other_orders(ROW, 23, seed=1)
    assert len({*orders, (0, 1, 2, 3)}) == 24
    assert other_orders(ROW, 5, seed=1) == orders[:5]
    assert other_orders(ROW, 5, seed=2) != orders[:5]
    with pytest.raises(UserError, match="only 23 other orders"):
        other_orders(ROW, 24, seed=1)


@pytest.mark.parametrize(
    ("options", "places"),
    [
        (["Iron", "Zinc", "Copper", "Lead"], [0, 1, 2, 3]),
        (["Iron", "Zinc", "Copper", "All of the above"], [0, 1, 2]),
        (["Iron", "Zinc", "Copper", "None of these."], [0, 1, 2]),
        (["Iron", "Zinc", "Copper", "None"], [0, 1, 2]),
        (["Iron", "Zinc", "Both", "None"], [0, 1]),
        (["Iron", "Zinc", "Both.", "Lead"], [0, 1]),
        (["None", "Iron", "Zinc", "Lead"], [1, 2, 3]),
        (["Iron", "Zinc", "All of the above", "Lead"], [0, 1]),
        (["Iron", "Zinc", "Lead", "Both A and B"], []),
        (["Iron", "Zinc", "Lead", "a & c"], []),
        (["Iron", "Zinc", "Lead", "Both option 2 and 3"], []),
        (["Iron", "Zinc", "Lead", "Both AB"], []),
        (["Iron", "Zinc", "zinc ", "Lead"], [0, 3]),
        (["B-cells and T-cells", "All nucleated cells", "Both ventricles", "Iron"], [0, 1, 2, 3]),
    ],
)
def test_options_that_speak_of_others_stay_where_they_stand(options, places):
    row = ROW | {"options": options}
    assert movable(row) == places
    orders = other_orders(row, 1, seed=3)
    assert len(orders) == (len(places) > 1)
    for order in orders:
        assert order != (0, 1, 2, 3)
        assert all(order[n] == n for n in range(4) if n not in places)


def test_items_that_have_no_other_order_are_left_out_and_counted(tmp_path):
    data = small_data(tmp_path, "medqa", ROW, EXAMPLE)
    rows = [
        ROW | {"id": "t0", "options": [*ROW["options"][:3], "Both A and B"]},
        ROW | {"id": "t1", "options": [*ROW["options"][:3], "None of the above"]},
        ROW | {"id": "t2"},
    ]
    (data / "benchmarks/medqa.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (benchmark,) = load_benchmarks(data, Options())[0].values()
    respondent = FirstLetter(tiny_pair().student, ItemStore(tmp_path / "store"), 1)
    answers = respondent.answer(benchmark.questions, "x")
    shuffled = [respondent.answer(questions, "x") for questions in benchmark.shuffled]
    found = shuffle_scores(benchmark, answers, shuffled)["option_shuffles"]
    assert (found["items"], found["items_left_out"], found["items_partly_fixed"]) == (2, 1, 1)
    assert found["answered_alike"]["n"] == 2
    choices = [r["shuffled_choices"] for r in records(benchmark, "student", answers, shuffled)]
    assert [len(chosen) for chosen in choices] == [0, 1, 1]


def test_only_lettered_questions_are_asked_in_other_orders(sample_build):
    found, _ = load_benchmarks(sample_build[0], Options(limit=2))
    assert {name for name, b in found.items() if b.shuffled} == {"medqa", "medmcqa"}
