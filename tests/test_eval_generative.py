"""eval/generative.py: how benchmarks are asked for in writing, and what is read out of the answers."""

from dataclasses import replace

import pytest
from conftest import ROOT
from tiny_subjects import write_rows

from eval import benchmarks
from eval.generative import Protocol, evaluate, named_option, score, stated_option
from eval.item_store import ItemStore
from eval.options import ModelOptions, Options
from eval.questions import load_benchmarks
from eval.subjects import load_models
from medistill_trl.recipe import load

NERVES = ["Median nerve", "Ulnar nerve", "Radial nerve", "Axillary nerve"]
DECISION = ["yes", "no", "maybe"]
VERDICTS = ["true", "false", "mixture", "unproven"]
COT = {
    "rationale_separator": "Final answer:",
    "end_marker": "",
    "rationale_instruction": 'Reason first. Then write "{separator}" and the answer.',
    "rationale_max_new_tokens": 20,
    "student_sees_instruction": False,
}
REASONING = Protocol.of(COT, Options())
PLAIN = Protocol.of({"method": "sft"}, Options())


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        ("C", NERVES, 2),
        ("c", NERVES, 2),
        ("(C)", NERVES, 2),
        ("**C**", NERVES, 2),
        ("C. Radial nerve", NERVES, 2),
        ("C) Radial nerve\n\nIt supplies the extensors.", NERVES, 2),
        ("Radial nerve", NERVES, 2),
        ("The radial nerve.", NERVES, 2),
        ("The answer is C.", NERVES, 2),
        ("The correct answer is (C) because the wrist drops.", NERVES, 2),
        ("The wrist drops.\nAnswer: C\n\nQuestion: another one", NERVES, 2),
        ("Option C is correct.", NERVES, 2),
        ("A and B are wrong, so the answer is C", NERVES, 2),
        ("The extensors are paralysed, as in wrist drop.\nC", NERVES, 2),
        ("The answer is A. The answer is B.", NERVES, None),
        ("A or B", NERVES, None),
        ("A patient with wrist drop", NERVES, None),
        ("The answer is A patient matter", NERVES, None),
        ("The answer is not C", NERVES, None),
        ("E", NERVES, None),
        ("I do not know.", NERVES, None),
        ("", NERVES, None),
        ("Yes", DECISION, 0),
        ("No, it does not.", DECISION, 1),
        ("The answer is maybe.", DECISION, 2),
        ("The evidence is mixed.\nAnswer: no", DECISION, 1),
        ("Yes or no", DECISION, None),
        ("Choose one: yes, no, maybe.", DECISION, None),
        ("Aspirin is a drug.", DECISION, None),
        ("The claim is false.", VERDICTS, 1),
        ("Partly true", VERDICTS, 2),
        ("This claim is not true", VERDICTS, None),
        ("mixture", ["true", "false"], None),
        # A list of the options is no answer, nor is the question that the model asks itself next.
        ("A. Median nerve\nB. Ulnar nerve\nC. Radial nerve\nD. Axillary nerve", NERVES, None),
        ("A. Median nerve B. Ulnar nerve C. Radial nerve D. Axillary nerve", NERVES, None),
        ("B. Ulnar nerve\nC. Radial nerve", NERVES, None),
        ("B. Ulnar nerve\nIt is hurt.\nC. Radial nerve\nIt is not.", NERVES, None),
        ("A. Median nerve\nB. Ulnar nerve\nC. Radial nerve\n\nThe answer is C.", NERVES, 2),
        ("yes/no/maybe", DECISION, None),
        ("Yes, no, maybe", DECISION, None),
        ("Answer: yes / no", DECISION, None),
        ("yes\nno\nmaybe", DECISION, None),
        ("B\n\nQuestion: Which muscle?\nAnswer: C", NERVES, 1),
        ("false\n\nClaim: Another.\nAnswer: true", VERDICTS, 1),
        # Other ways to state an answer.
        ("Answer: C, because A is wrong", NERVES, 2),
        ("I would choose C", NERVES, 2),
        ("The extensors are paralysed. I'd go with the radial nerve.", NERVES, 2),
        (r"\boxed{C}", NERVES, 2),
        (r"It is \boxed{\text{no}}.", DECISION, 1),
        ("No evidence was found, so maybe.", DECISION, 2),
        ("No evidence was found.", DECISION, None),
        ("No, it was not found.", DECISION, 1),
        ("No it was not.", DECISION, 1),
    ],
)
def test_stated_option(text, options, expected):
    assert stated_option(text, options) == expected


def test_an_option_within_another_is_not_taken_for_it():
    options = ["Aspirin", "Aspirin and clopidogrel", "Warfarin", "Heparin"]
    assert named_option("Aspirin and clopidogrel", options) == 1
    assert named_option("Aspirin", options) == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The wrist cannot be extended.\n\nFinal answer: C", 2),
        ("The wrist cannot be extended.\n\nFinal answer: radial nerve", 2),
        ("It is not A or B. Final answer: (C) Radial nerve", 2),
        ("Final answer: C\nFinal answer: C", 2),
        ("Final answer: C\nFinal answer: B", None),
        ("The answer is C", None),  # without the separator a reasoning text has no answer yet
        ("Final answer:", None),
        ("", None),
    ],
)
def test_answers_after_reasoning(text, expected):
    options = NERVES
    assert REASONING.find(text, options) == expected


def test_a_run_decides_how_it_is_asked():
    row = {"question": "Which nerve?", "options": NERVES}
    plain, reasoning = (p.ask("teacher", "medqa", row, [""]) for p in (PLAIN, REASONING))
    shared = (
        "Which nerve?\n\nA. Median nerve\nB. Ulnar nerve\nC. Radial nerve\nD. Axillary nerve\n\n"
    )
    assert plain.startswith(shared)
    assert reasoning.startswith(shared)
    assert plain.endswith("Give only the answer.")
    assert reasoning.endswith('Reason first. Then write "Final answer:" and the answer.')
    assert (PLAIN.max_new_tokens, REASONING.max_new_tokens) == (32, 20)
    assert Protocol.of(COT, Options(generative_tokens=7)).max_new_tokens == 7
    decision = PLAIN.ask(
        "student", "pubmedqa", {"question": "Does it?", "options": DECISION}, ["It does."]
    )
    assert decision.startswith(
        "Abstract: It does.\n\nQuestion: Does it?\n\nChoose one: yes, no, maybe."
    )


@pytest.mark.parametrize("sees", [False, True])
def test_a_student_is_instructed_only_if_it_trained_on_the_instruction(sees):
    """The teacher always is: it was when it wrote the rationales."""
    flags = ["--student_sees_instruction", str(sees).lower()]
    recipe = load([str(ROOT / "recipes/cot.yaml"), *flags]).resolved()
    protocol = Protocol.of(recipe, Options())
    row = {"question": "Which nerve?", "options": NERVES}
    student, teacher = (protocol.ask(name, "medqa", row, [""]) for name in ("student", "teacher"))
    assert 'starts with "Final answer:"' in teacher
    assert ('starts with "Final answer:"' in student) == sees
    assert student == teacher or student.endswith("its letter is the answer.")
    assert protocol.max_new_tokens == recipe["rationale_max_new_tokens"]


def test_a_recipe_without_rationales_asks_for_the_answer_alone():
    recipe = load([str(ROOT / "recipes/sft.yaml")]).resolved()
    assert Protocol.of(recipe, Options()).reasoning is None


def test_what_cannot_be_read_is_wrong(sample_build):
    benchmark = load_benchmarks(sample_build[0], Options(limit=4, benchmarks=["medqa"]))[0]["medqa"]
    records = [
        {
            "choice": choice,
            "answer": 1,
            "right": choice == 1,
            "finished": True,
            "shortened": False,
            "too_long": choice is None,
        }
        for choice in (1, 1, 0, None)
    ]
    found = score(benchmark, records)
    assert found["accuracy"]["value"] == 2 / 4
    assert found["unparsed"]["value"] == 1 / 4
    assert found["accuracy_of_parsed"]["value"] == 2 / 3
    assert found["too_long"] == 1
    assert found["predictions"] == {"A": 1, "B": 2, "C": 0, "D": 0, "unparsed": 1}
    # F1: A 0, B 2 · 2/(2 · 2 + 0 + 2).
    assert found["macro_f1"] == pytest.approx((0 + 4 / 6) / 2)


def test_an_abstract_too_long_for_the_model_is_shortened(
    teacher_folder, model_cache, sample_build, tmp_path
):
    options = Options(limit=2, benchmarks=["pubmedqa"], generative_tokens=2)
    pair = load_models(ModelOptions(model=str(teacher_folder)))
    store = ItemStore(tmp_path)
    whole = evaluate(pair, sample_build[0], options, store)["pubmedqa"]["student"]
    short = replace(pair, student=replace(pair.student, context_length=150))
    cut = evaluate(short, sample_build[0], options, store)["pubmedqa"]["student"]
    assert (whole["context_shortened"], cut["context_shortened"]) == (0, 2)


def test_a_question_that_leaves_no_room_is_counted_and_not_asked(
    teacher_folder, model_cache, tmp_path
):
    row = {"id": "t1", "question": "Which nerve?", "options": NERVES, "answer": 2}
    long = row | {"id": "t2", "question": "Which nerve? " * 400}
    write_rows(tmp_path / "benchmarks/medqa.jsonl", [long, row])
    write_rows(tmp_path / "benchmarks/few_shot/medqa.jsonl", [row])
    pair = load_models(ModelOptions(model=str(teacher_folder)))
    options = Options(benchmarks=["medqa"], generative_tokens=8)
    found = evaluate(pair, tmp_path, options, ItemStore(tmp_path / "store"))
    assert found["medqa"]["student"]["too_long"] == 1
    assert [record["too_long"] for record in found["items"]] == [True, False]
    assert (found["items"][0]["text"], found["items"][0]["choice"]) == ("", None)


@pytest.mark.parametrize("recipe", [None, COT], ids=["plain", "reasoning"])
def test_answers_are_the_same_whatever_the_batch_size(
    recipe, teacher_folder, other_teacher_folder, model_cache, sample_build, tmp_path
):
    loaded = load_models(ModelOptions(model=str(teacher_folder), teacher=str(other_teacher_folder)))
    pair = replace(loaded, recipe=recipe)

    def found(size: int) -> dict:
        options = Options(limit=3, batch_size=size, generative_tokens=8)
        return evaluate(pair, sample_build[0], options, ItemStore(tmp_path / str(size)))

    alone = found(1)
    assert alone == found(8)
    assert set(alone["medqa"]) >= {"student", "teacher", "floor", "num_items"}
    records = alone["items"]
    assert len(records) == 2 * 5 * 3
    assert {record["finished"] for record in records} <= {True, False}
    assert all(record["right"] == (record["choice"] == record["answer"]) for record in records)


def test_examples_for_likelihoods_keep_nothing_from_being_asked_in_writing(
    teacher_folder, model_cache, tmp_path, caplog
):
    """There is one example, and it also stands in the benchmark."""
    row = {"id": "t1", "question": "Which nerve?", "options": NERVES, "answer": 2}
    for place in ("medqa", "few_shot/medqa"):
        write_rows(tmp_path / f"benchmarks/{place}.jsonl", [row])
    pair = load_models(ModelOptions(model=str(teacher_folder)))
    options = Options(few_shot=4, benchmarks=["medqa"], generative_tokens=2)
    found = evaluate(pair, tmp_path, options, ItemStore(tmp_path / "store"))
    assert found["medqa"]["num_items"] == 1
    by_likelihood = benchmarks.evaluate(pair, tmp_path, options, ItemStore(tmp_path / "store"))
    assert "choose a smaller --few_shot" in by_likelihood["skipped"]["medqa"]
    assert "benchmark medqa is skipped: only 1 few-shot examples" in caplog.text
