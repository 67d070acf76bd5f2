"""A right answer in other words is right; anything doubtful is not."""

import itertools
import json

import pytest
from conftest import ROOT

from medistill_trl.answer_matching import answer_key, matches

RIGHT = [
    # letters
    ("B", "B"),
    ("(B)", "B"),
    ("b)", "B"),
    ("**B**", "B"),
    ("B. radial nerve", "B"),
    ("Option B: radial nerve", "B"),
    ("The answer is (B).", "B"),
    ("B) the radial nerve", "(B) Radial nerve"),
    ("the radial nerve", "B. Radial nerve"),
    # labels
    ("Yes, it does.", "yes"),
    ("The answer is no.", "no"),
    ("Yes", "Yes."),
    ("It is unclear", "maybe"),
    ("The claim is true", "true"),
    ("Based on this, the claim is false.", "false"),
    ("A mixture of true and false", "mixture"),
    ("Partly true", "mixture"),
    ("This is not proven", "unproven"),
    # free text
    ("The radial nerve.", "Radial nerve"),
    ("radial nerves", "Radial nerve"),
    ("Radial nerve, as the wrist drops", "Radial nerve"),
    ("The diagnosis is acute pericarditis.", "Acute pericarditis"),
    ("Ampulla of the fallopian tube", "Ampulla"),
    ("Lithium, not valproate", "Lithium"),
    ("Non-contrast computed tomography of the head", "Noncontrast computed tomography of the head"),
    ("factor 8", "Factor VIII"),
    ("two weeks", "2 weeks"),
    ("45,X (Turner)", "45,X"),
    ("1,000 mg", "1000 mg"),
    ("beta-blockers", "β blocker"),
    ("Guillain-Barre syndrome", "Guillain–Barré syndrome"),
    ("haemophilia; anaemia of tumours", "Hemophilia; anemia of tumors"),
    ("E. coli", "E. coli"),
    ("...", "..."),
]
WRONG = [
    ("C", "B"),
    ("", "B"),
    ("B and C", "B"),
    ("B, C", "B"),
    ("A patient", "A"),
    ("No", "yes"),
    ("yes or no", "yes"),
    ("Not yes", "yes"),
    ("It depends", "maybe"),
    ("This claim is not true.", "true"),
    ("This claim is not true.", "false"),
    ("mixture", "true"),
    ("Partly true, partly false", "true"),
    ("", "Lithium"),
    ("Not lithium", "Lithium"),
    ("It doesn't need lithium", "Lithium"),
    ("Lithium is not the cause", "Lithium"),
    ("lithium or valproate", "Lithium"),
    ("lithium " + "and so on " * 12, "Lithium"),
    ("Vitamin C", "Vitamin A"),
    ("vitamin", "Vitamin A"),
    ("hepatitis B virus", "Hepatitis A virus"),
    ("Non-Hodgkin lymphoma", "Hodgkin lymphoma"),
    ("Portal hypertension", "Hypertension"),
    ("Diabetes insipidus", "Diabetes"),
    ("E. histolytica", "E. coli"),
    ("HER2-", "HER2+"),
    ("<5", ">5"),
    ("0.5", "5"),
]


@pytest.mark.parametrize(("answer", "reference"), RIGHT)
def test_the_same_in_other_words(answer, reference):
    assert matches(answer, reference)
    assert answer_key(answer, reference) == answer_key(reference, reference)


@pytest.mark.parametrize(("answer", "reference"), WRONG)
def test_something_else_or_in_doubt(answer, reference):
    assert not matches(answer, reference)
    assert answer_key(answer, reference) != answer_key(reference, reference)


def test_every_answer_of_the_sample_is_said_by_its_reference():
    rows = [
        json.loads(line)
        for line in (ROOT / "data_prep/sample/processed/train.jsonl").read_text().splitlines()
    ]
    for row in rows:
        assert matches(row["answer"], row["answer"]), row
        assert matches(row["reference"].split(". ")[0], row["answer"]), row
    for row, other in itertools.pairwise(rows):
        assert matches(row["answer"], other["answer"]) == (row["answer"] == other["answer"])


@pytest.mark.parametrize(
    "alike",
    [
        ["Yes, it is.", "yes", "The answer is yes"],
        ["(B)", "B", "B. Radial nerve"],
        ["The radial nerve", "radial nerves"],
        ["It is unclear", "maybe"],
    ],
)
def test_without_a_reference_what_says_the_same_has_one_key(alike):
    assert len({answer_key(answer) for answer in alike}) == 1
    assert answer_key(alike[0]) != answer_key("something else")


def test_species_are_no_letters():
    assert answer_key("E. coli") != answer_key("E. histolytica")
