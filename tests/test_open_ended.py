"""Multiple-choice records become questions that stand alone, without a letter left in them."""

import contextlib
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.explanations import clean_explanation
from data_prep.letters import find_letter_leak
from data_prep.open_ended import Unconvertible, convert
from data_prep.schema import Record

DRUGS = ("Aspirin", "Carbamazepine", "Bile salts", "Zinc oxide")


def record(question, options=DRUGS, answer=1, explanation="", source="medmcqa", native_id="1"):
    return Record(source, "train", native_id, question, tuple(options), answer, explanation)


@pytest.mark.parametrize(
    ("stem", "asked"),
    [
        ("A man coughs. Which of the following is the most likely cause?", "A man coughs. What is the most likely cause?"),
        ("Which of the following drugs is most likely responsible?", "Which drug is most likely responsible?"),
        ("Which of the following best describes its action?", "What best describes its action?"),
        ("Which one of the following laboratory findings would be most expected?", "Which laboratory finding would be most expected?"),
        ("Which of the following cells are most affected?", "Which cells are most affected?"),
        ("The rash is most likely due to which of the following?", "The rash is most likely due to what?"),
        ("He most likely lacks which of the following enzymes?", "He most likely lacks which enzyme?"),
        ("After insulin, which of the following would you expect?", "After insulin, what would you expect?"),
        ("On exam, one would also expect:", "On exam, one would also expect …"),
        ("Of the following options, which is the best next step?", "Which is the best next step?"),
        ("Which of the following diagnoses is most likely?", "Which diagnosis is most likely?"),
        ("The murmur was loudest over which of the following areas", "The murmur was loudest over which area?"),
    ],
)  # fmt: skip
def test_the_asking_part_is_rewritten_and_the_case_is_kept(stem, asked):
    question = convert(record(stem, source="medqa")).question
    assert question.startswith(asked + "\n\n")
    assert "Aspirin" not in question


@pytest.mark.parametrize(
    ("stem", "asked"),
    [
        ("All of the following raise the INR, EXCEPT:", "All of these raise the INR except one:"),
        ("The INR is raised by all except -", "The INR is raised by all of these except one:"),
        ("True about warfarin are all except", "All of these are true about warfarin except one:"),
        ("Which of the following is not a cause of ataxia?", "Which of these is not a cause of ataxia?"),
        ("True regarding warfarin is", "Which of these is true regarding warfarin?"),
        ("Which of the following statements about warfarin is correct?", "Which statement about warfarin is correct?"),
    ],
)  # fmt: skip
def test_a_stem_that_depends_on_its_options_lists_them_without_letters(stem, asked):
    question = convert(record(stem)).question
    assert asked in question
    assert "\n- Aspirin\n- Carbamazepine\n- Bile salts\n- Zinc oxide" in question


def test_an_unfinished_statement_is_marked_as_one():
    question = convert(record("Absorption of fat is helped by -")).question
    assert "Absorption of fat is helped by …" in question
    assert "inish" in question or "omplete" in question


@pytest.mark.parametrize(
    "noise",
    ["(AIIMS Nov 2015)", ":September 2005, 2010", "[NEET 14]", ": March 2009", " (1994)", ":-"],
)
def test_marks_of_exams_are_removed(noise):
    question = convert(record(f"Drug of choice for tic douloureux is {noise}")).question
    assert "tic douloureux is …" in question
    assert not re.search(r"\d|AIIMS|NEET|March|September", question)


def test_numbers_of_the_case_stay():
    case = "A 45-year-old man (BMI 31) since 2015 has HbA1c 7.2% and takes vitamin B12. "
    assert case in convert(record(case + "Which of the following is most likely?")).question


@pytest.mark.parametrize(
    ("options", "answer", "text"),
    [
        (("Fever", "Rash", "Both A and B", "Cough"), 2, "Both Fever and Rash"),
        (("Fever", "Rash", "Cough", "A and C"), 3, "Fever and Cough"),
        (("Fever", "Rash", "Cough", "Both option 2 and 3"), 3, "Both Rash and Cough"),
        (("Fever", "Rash", "Both", "None of the above"), 2, "Both Fever and Rash"),
        (("Fever", "Rash", "Cough", "All of the above."), 3, "All of these"),
        (("Fever", "Rash", "Cough", "None"), 3, "None of these"),
    ],
)
def test_options_about_options_are_resolved(options, answer, text):
    long_form = convert(record("It presents with", options, answer))
    assert long_form.answer == text
    assert long_form.reference == f"{text}."
    assert f"- {text}" in long_form.question


def test_codes_are_resolved_by_the_statements_in_the_stem():
    stem = "Measles presents with -a) Feverb) Koplik spotsc) Jaundiced) Coryza"
    long_form = convert(record(stem, ("ac", "abd", "bc", "d"), 1))
    assert long_form.answer == "Fever; Koplik spots; Coryza"
    assert "\n- Fever\n- Koplik spots\n- Jaundice\n- Coryza\n" in long_form.question


@pytest.mark.parametrize(
    ("stem", "options", "reason"),
    [
        ("A chest x-ray is shown. What is the diagnosis?", DRUGS, "needs a picture"),
        ("The structure marked with an arrow is", DRUGS, "needs a picture"),
        ("He has a rash (see image). What is it?", DRUGS, "needs a picture"),
        ("Which nerve is hurt?", ("A", "B", "C", "D"), "options are labels only"),
        ("Match the drugs", ("A-1, B-2", "A-2, B-1", "A-3, B-1", "A-2, B-3"), "options are matching codes"),
        ("What changes?", ("↑ ↓", "↓ ↓", "↑ ↑", "↓ ↑"), "options are symbols only"),
        ("The fracture is", ("Oblique", "Similar to A but open", "Spiral", "Simple"), "option letters cannot be removed"),
    ],
)  # fmt: skip
def test_what_cannot_stand_alone_is_refused_with_its_reason(stem, options, reason):
    with pytest.raises(Unconvertible) as refused:
        convert(record(stem, options))
    assert refused.value.reason == reason


@pytest.mark.parametrize(
    "stem",
    [
        "Laboratory results are shown below:\nSodium 140 mEq/L\nWhat is the diagnosis?",
        "It was shown that the drug works. What is its target?",
        "She denies photophobia and has a poor body image. What is the diagnosis?",
    ],
)
def test_a_table_is_no_picture(stem):
    assert "What is" in convert(record(stem)).question


@pytest.mark.parametrize(
    "opening",
    [
        "Ans. (b) Carbamazepine",
        "Ans: B. Carbamazepine",
        "Answer- B. Carbamazepine",
        "Answer- B Carbamazepine",
        "Ans. is 'b' i.e., Carbamazepine. ",
        "Ans. B: Carbamazepine (Ref: Harrison 19/e p887, 891) ",
        "B i.e. Carbamazepine",
        "Ans. b. Carbamazepine(Ref Katzung 12/e p410)",
    ],
)
def test_the_key_and_the_restated_answer_are_cut(opening):
    long_form = convert(
        record("Which drug helps?", explanation=opening + "Sodium channels are blocked by it.")
    )
    assert long_form.reference == "Carbamazepine. Sodium channels are blocked by it."


@pytest.mark.parametrize(
    ("explanation", "cleaned"),
    [
        ("It blocks sodium channels. Hence choice C.", "It blocks sodium channels."),
        ("Option A is incorrect as it thins blood. It blocks channels.", "It blocks channels."),
        ("Option D is used in fillings.", "Zinc oxide is used in fillings."),
        ("It blocks channels.\nRef: Katzung, 12th edition page 410", "It blocks channels."),
        ("Two steps: (a) binding and (b) block.", "Two steps: binding and block."),
        ("Both A and B are wrong. It blocks channels.", "It blocks channels."),
        ("Answer: A 45-year-old may take it.", "Answer: A 45-year-old may take it."),
        ("Ans. b", ""),
        ("Ans: B. Carbamazepine", ""),
    ],
)
def test_sentences_about_letters_are_repaired_or_dropped(explanation, cleaned):
    assert clean_explanation(explanation, "Carbamazepine", DRUGS) == cleaned


def test_an_explanation_that_still_leaks_is_given_up_and_the_record_is_kept(monkeypatch):
    monkeypatch.setattr(
        "data_prep.open_ended.clean_explanation", lambda *args: "So option B is right."
    )
    assert convert(record("Which drug helps?", explanation="x")).reference == "Carbamazepine."


@pytest.mark.parametrize(
    "text",
    [
        "vitamin A", "hepatitis B", "type A", "group A streptococcus", "factor C", "HLA-A", "blood group B",
        "A 45-year-old man", "Lp(a)", "phase I", "grade A evidence", "protein C deficiency", "T cells",
        "(hepatitis A and B)", "E. coli and C. difficile", "the 'a' wave", "treatment options 2 weeks later",
        "blood groups A and B", "the answer is a vitamin", "A.S.D.", "treatment of choice", "1 and 2 days",
    ],
)  # fmt: skip
def test_letters_of_medicine_are_no_leaks(text):
    assert find_letter_leak(text) is None


@pytest.mark.parametrize(
    "text",
    ["option A is", "(b) fever", "Ans: C", "the answer is 'd'", "Hence choice C.", "Both A and B", "b) fever",
     "a,b,d ruled out", "A. Fever", "options 2 and 3", "Correct: B", "All of the above", "Answer D."],
)  # fmt: skip
def test_letters_of_exams_are_leaks(text):
    assert find_letter_leak(text)


@pytest.mark.parametrize(("answer", "opening"), [(0, "Yes."), (1, "No."), (2, "Maybe.")])
def test_a_yes_no_question(answer, opening):
    options = ("yes", "no", "maybe")
    long_form = convert(
        record("Does rest help?", options, answer, "Rest shortened pain.", "pubmedqa")
    )
    assert long_form.question.startswith("Does rest help?")
    assert long_form.reference == f"{opening} Rest shortened pain."
    assert long_form.answer == options[answer]


@pytest.mark.parametrize(
    ("answer", "opening"),
    [
        (0, "This claim is false."),
        (1, "This claim is a mixture of true and false."),
        (2, "This claim is true."),
    ],
)
def test_a_claim(answer, opening):
    options = ("false", "mixture", "true", "unproven")
    long_form = convert(
        record("Garlic cures colds", options, answer, "No trial shows it.", "pubhealth")
    )
    assert "Garlic cures colds." in long_form.question
    assert long_form.reference == f"{opening} No trial shows it."


def test_another_source_is_refused():
    with pytest.raises(ValueError, match="medquad"):
        convert(record("Why?", source="medquad"))


LETTERS = st.sampled_from("ABCDabcd")
LEAKY = st.builds(
    lambda shape, letter: shape.replace("@", letter),
    st.sampled_from(
        ["Ans. (@) Carbamazepine", "Ans: @. Carbamazepine", "Answer- @. Aspirin", "(@) 50-60 mg is given.",
         "Option @ is incorrect.", "Hence choice @.", "Ans. is '@' i.e., Carbamazepine.", "So option @ it is.",
         "The correct answer is @.", "Both A and @ are wrong.", "\n@) Second point", "answer: @"]
    ),
    LETTERS,
)  # fmt: skip
MEDICINE = st.sampled_from(
    [
        "Vitamin A is fat soluble.",
        "It blocks channels.",
        "Hepatitis B was excluded.",
        "Dose 5 mg/kg.",
    ]
)
# Written apart from the gate: what a reader would call an option letter.
POINTER = re.compile(
    r"\b(?:option|choice)s?\s+['(]?[A-Da-d]\b|\bans(?:wer)?\b[\s.:-]*(?:is\s*)?['(]?[A-Da-d]\b|(?:^|\s)\(?[A-Da-d]\)|both A and",
    re.I,
)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(LEAKY | MEDICINE, min_size=1, max_size=6),
    st.sampled_from(["", " "]),
    st.integers(0, 3),
)
def test_no_planted_letter_survives_and_the_answer_stays(pieces, blank, answer):
    long_form = convert(record("Which drug helps?", DRUGS, answer, blank.join(pieces)))
    assert not POINTER.search(
        long_form.question + "\n" + long_form.reference + "\n" + long_form.answer
    )
    assert long_form.reference.startswith(DRUGS[answer])
    assert long_form.answer == DRUGS[answer]


@settings(max_examples=100, deadline=None)
@given(st.lists(MEDICINE, min_size=1, max_size=4))
def test_an_explanation_without_letters_is_kept_whole(pieces):
    explanation = " ".join(pieces)
    assert (
        convert(record("Which drug helps?", explanation=explanation)).reference
        == f"Carbamazepine. {explanation}"
    )


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=200), st.text(max_size=200))
def test_the_same_record_gives_the_same_question(stem, explanation):
    def outcome():
        try:
            return convert(record(stem, explanation=explanation))
        except Unconvertible as refused:
            return refused.reason

    assert outcome() == outcome()


@pytest.mark.parametrize("source", ["medqa", "medmcqa"])
def test_ids_choose_among_all_the_templates_of_a_form(source):
    questions = {
        convert(record("Which drug helps?", source=source, native_id=str(i))).question
        for i in range(40)
    }
    assert len(questions) == 3


@pytest.mark.parametrize(
    "piece", ["(a) ", "Ans. ", "which of the following ", "(Ref: a ", "A, ", "((", "-", "x.\n"]
)
def test_a_long_text_takes_no_long_time(piece):
    text = piece * (20_000 // len(piece))
    start = time.perf_counter()
    assert convert(record("Which drug helps?", explanation=text)).answer == "Carbamazepine"
    with contextlib.suppress(Unconvertible):
        convert(record(f"{text} What helps?"))
    assert time.perf_counter() - start < 1
