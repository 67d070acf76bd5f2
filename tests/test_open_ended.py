"""Multiple-choice records become questions that stand alone, without a letter left in them."""

import contextlib
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_letters import BARE

from data_prep.explanations import clean_explanation
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
        (("Fever", "Rash", "Cough", "A and C both"), 3, "Both Fever and Cough"),
        (("Fever", "Rash", "Cough", "A & C only"), 3, "Fever and Cough"),
        (("Fever", "Rash", "Cough", "A and C of the above"), 3, "Fever and Cough"),
        (("Fever", "Rash", "Cough", "Choices A, B"), 3, "Fever and Rash"),
        (("Fever", "Rash", "Cough", "Only B"), 3, "Rash only"),
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


@pytest.mark.parametrize(
    ("options", "answer"),
    [
        (("Folic acid", "Niacin", "Thiamine", "A and C"), 3),
        (("B and O", "AB and O", "O alone", "A and B"), 3),
        (("Parainfluenza virus", "Adenovirus", "Rhinovirus", "A, B"), 3),
        (("Hepatitis B", "Hepatitis C", "Hepatitis D", "Both B and C"), 3),
        (("Fever", "Rash", "Cough", "1 and 2"), 3),
        (("Fever", "Rash", "Cough", "abd"), 3),
        (("A and D", "A and E", "D and E", "B and C"), 0),
        (("ac", "abd", "bc", "bd"), 1),
    ],
)
def test_letters_that_may_be_names_are_neither_resolved_nor_kept(options, answer):
    with pytest.raises(Unconvertible, match="option may refer to other options"):
        convert(record("It is known for", options, answer))


def test_letters_of_statements_in_the_stem_are_not_those_of_options():
    stem = "Two findings: (a) fever (b) rash. It presents with"
    with pytest.raises(Unconvertible):
        convert(record(stem, ("Cough", "Cramps", "Colic", "Both A and B"), 3))


def test_an_option_that_may_refer_to_others_is_not_listed():
    options = ("Folic acid", "Niacin", "Thiamine", "A and C")
    question = convert(record("All of these dissolve in water except", options, 0)).question
    assert "- Niacin\n- Thiamine\n" in question
    assert "A and C" not in question


@pytest.mark.parametrize(
    "options",
    [
        ("1/2", "1/4", "Nil risk", "Certain risk"),
        ("2,5", "3,5", "1,5", "1,4"),
        ("10-20", "20-30", "1-2", "2-5"),
        ("1 and 2", "2 and 3", "3 and 4", "4 and 5"),
        ("1, 2", "1, 3", "2, 4", "All of the above"),
        ("1", "2", "3", "4"),
        ("A", "B", "AB", "O"),
        ("A/B", "Lower", "Higher", "Equal"),
    ],
)
def test_numbers_are_never_references(options):
    assert convert(record("The value is", options, 0)).answer == options[0]


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
    assert str(refused.value) == reason


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
        ("Both (a) and (b) are seen. It blocks channels.", "It blocks channels."),
        ("(a) is wrong. (b) is right. It blocks channels.", "It blocks channels."),
        (
            "HLA antigens (A, B and C) are found on cells.",
            "HLA antigens (A, B and C) are found on cells.",
        ),
        ("It blocks channels. d. Because it binds.", "It blocks channels. Because it binds."),
        ("It blocks channels. Ans. B. It binds.", "It blocks channels. It binds."),
        ("Ans 2 Carbamazepine", ""),
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
         "The correct answer is @.", "Both A and @ are wrong.", "\n@) Second point", "answer: @",
         "Ans 2", "Answer- 3", "It binds. @. Because it does."]
        + [shape if shape.endswith(".") else f"{shape}." for shape in BARE]
    ),
    LETTERS,
)  # fmt: skip
MEDICINE = st.sampled_from(
    [
        "Vitamin A is fat soluble.",
        "It blocks channels.",
        "Hepatitis B was excluded.",
        "Hepatitis B is a virus.",
        "Protein C is an anticoagulant.",
        "Factor V is activated.",
        "Group A streptococcus is of type A.",
        "A 45-year-old man has HLA-B27.",
        "T cells and B cells are counted.",
        "Dose 5 mg/kg.",
    ]
)
# Written apart from the gate: what a reader would call an option letter.
POINTER = re.compile(
    r"\b(?:opt|option|choice|letter)s?\.?\s*['(]?[A-Da-d]\b|\bans(?:wer)?\b[\s.:-]*(?:is\s*)?['(]?[A-Da-d1-5]\b"
    r"|(?:^|\s)\(?[A-Da-d]\)|both A and|both and|\[[A-D]\]|\b(?:key|sol): [A-D]|\b(?:hence|therefore,|i\.e\.,|so) \(?[A-D]\b"
    r"|(?<!\w)[A-D] (?:is )?(?:the answer|not correct|true|correct)|(?<=\. )[b-d]\.",
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
            return str(refused)

    assert outcome() == outcome()


@pytest.mark.parametrize("source", ["medqa", "medmcqa"])
def test_ids_choose_among_all_the_templates_of_a_form(source):
    questions = {
        convert(record("Which drug helps?", source=source, native_id=str(i))).question
        for i in range(40)
    }
    assert len(questions) == 3


@pytest.mark.parametrize(
    "piece",
    [
        "(a) ",
        "Ans. ",
        "which of the following ",
        "(Ref: a ",
        "A, ",
        "((",
        "-",
        "x.\n",
        "hence ",
        "A is also not ",
        "key: ",
        "Opt. B",
        "[A",
        "C. ",
        "A and ",
    ],
)
def test_a_long_text_takes_no_long_time(piece):
    text = piece * (20_000 // len(piece))
    start = time.perf_counter()
    assert convert(record("Which drug helps?", explanation=text)).answer == "Carbamazepine"
    with contextlib.suppress(Unconvertible):
        convert(record(f"{text} What helps?"))
    assert time.perf_counter() - start < 1
