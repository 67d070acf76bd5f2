"""The last gate: letters of examinations are leaks, letters of medicine are not."""

import pytest

from data_prep.letters import find_letter_leak


@pytest.mark.parametrize(
    "text",
    [
        "vitamin A", "hepatitis B", "type A", "group A streptococcus", "factor C", "HLA-A", "blood group B",
        "A 45-year-old man", "Lp(a)", "phase I", "grade A evidence", "protein C deficiency", "T cells",
        "(hepatitis A and B)", "E. coli and C. difficile", "the 'a' wave", "treatment options 2 weeks later",
        "blood groups A and B", "the answer is a vitamin", "A.S.D.", "treatment of choice", "1 and 2 days",
        "vitamin C is true vitamins", "hepatitis B is right", "protein C is not correct", "factor V is key",
        "group A streptococcus is right", "type A is wrong", "HLA-B27 is true", "hence E. coli grows",
        "thus C. difficile", "vitamins A and C are right", "because a true aneurysm grows", "so a physician",
        "solution: 5% dextrose", "Answer: 3.5 mg", "the answer is 2 mg", "a letter a week", "they opt a lot", "[18F]",
    ],
)  # fmt: skip
def test_letters_of_medicine_are_no_leaks(text):
    assert find_letter_leak(text) is None


BARE = [
    "@ is the answer.", "Hence @.", "Therefore, @", "Key: @", "Sol: @", "Opt. @", "option@", "[@] is right",
    "@ is not correct", "@ is true", "@ correct.", "Letter @ stands", "i.e., @", "Both (@) and (b)", "So (@).",
]  # fmt: skip


@pytest.mark.parametrize(
    "text",
    ["option A is", "(b) fever", "Ans: C", "the answer is 'd'", "Hence choice C.", "Both A and B", "b) fever",
     "a,b,d ruled out", "A. Fever", "options 2 and 3", "Correct: B", "All of the above", "Answer D.",
     "It is so. D."] + [shape.replace("@", letter) for shape in BARE for letter in "ABCDabcd"],
)  # fmt: skip
def test_letters_of_exams_are_leaks(text):
    assert find_letter_leak(text)
