"""Claims against evidence, by rules: bins, citations, agreement, how good a verifier is."""

import pytest
from rule_verifier import HIP, KNEE, Rules

from eval.claims import Claim
from eval.faithfulness_rates import agreement, quality, verifier_sentence
from eval.support import JudgedClaim, judge_claims, mutual_entailment
from eval.verifier import Verdict

EVIDENCE = [KNEE, HIP, "The hip lacks redness and the wrist shows warmth."]


def judged(text: str, *citations: int, evidence=EVIDENCE) -> JudgedClaim:
    return judge_claims([([Claim(text, citations)], evidence)], Rules())[0][0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (KNEE, "supported"),
        (
            "The knee shows swelling and the hip lacks redness.",
            "unsupported",
        ),  # by no passage alone
        ("The hip shows redness.", "contradicted"),
        ("The elbow shows warmth.", "unsupported"),
    ],
)
def test_bins(text, expected):
    assert judged(text).bin == expected


def test_the_surer_passage_decides_where_passages_disagree():
    def claim(*verdicts):
        found = {(n,): Verdict(*v) for n, v in enumerate(verdicts, start=1)}
        return JudgedClaim(Claim("", ()), len(found), found)

    assert claim((0.9, 0.0), (0.0, 0.8)).bin == "supported"
    assert claim((0.6, 0.0), (0.0, 0.8)).bin == "contradicted"
    assert claim((0.7, 0.1), (0.1, 0.7)).bin == "supported"
    assert claim((0.4, 0.4), (0.3, 0.3)).bin == "unsupported"
    assert claim().bin == "unsupported"
    assert (claim().support, claim().contradiction) == (0, 0)


@pytest.mark.parametrize(
    ("text", "citations", "recalled", "precise"),
    [
        (KNEE, (1,), True, [True]),
        (KNEE, (2,), False, [False]),  # the passage says something else
        (KNEE, (), False, []),  # nothing is cited
        (KNEE, (9,), False, [False]),  # no such passage
        (KNEE, (1, 9), False, [False, False]),  # one of the two is invented
        (KNEE, (1, 2), True, [True, False]),  # the second is not needed
        (HIP, (2, 3), True, [True, True]),  # each of them is enough
        ("The knee shows swelling and the hip lacks redness.", (1, 2), True, [True, True]),
        ("The knee shows swelling and the hip lacks redness.", (1,), False, [False]),
        (
            "The knee shows swelling and the hip lacks redness.",
            (2, 1, 3),
            True,
            [False, True, False],
        ),
    ],
)
def test_citations_as_alce_judges_them(text, citations, recalled, precise):
    claim = judged(text, *citations)
    assert claim.is_recalled == recalled
    assert [claim.is_precise(number) for number in citations] == precise


def test_citations_beside_an_invented_one_have_no_precision():
    assert judged(KNEE, 1, 9).cited == ()
    assert judged(KNEE, 2, 1).cited == (1, 2)


def test_mutual_entailment_is_the_lower_of_both_ways():
    both = "The knee shows swelling and the hip lacks redness."
    scores = mutual_entailment([([KNEE, both], [KNEE, HIP, both]), ([], [KNEE])], Rules())
    # "A and B" entails A, A does not entail "A and B"; the same words agree whatever the verifier says.
    assert scores == [[[1, 0, 0], [0, 0, 1]], []]
    found = agreement(["a", "b"], scores)
    assert found["student_claims_of_the_teacher"]["value"] == 1
    assert found["teacher_claims_of_the_student"]["value"] == pytest.approx(2 / 3)
    assert (found["prompts"], found["prompts_left_out"]) == (1, 1)
    assert agreement([], [])["student_claims_of_the_teacher"]["value"] is None


def test_verifier_quality():
    def claim(support):
        return JudgedClaim(Claim("", ()), 1, {(1,): Verdict(support, 0.0)})

    # Right on 2 of 2 supported and 1 of 2 others; pairs in order: 0.9 above both, 0.6 above 0.2 alone.
    claims = [claim(0.9), claim(0.6), claim(0.7), claim(0.2)]
    labels = ["supported", "supported", "refuted", "unknown"]
    found = quality(claims, labels, [claim(0.1)] * 2)
    assert found["balanced_accuracy"] == pytest.approx((1 + 0.5) / 2)
    assert found["auroc"] == pytest.approx(3 / 4)
    assert found["labels"] == {"supported": 2, "refuted": 1, "unknown": 1}
    assert found["other_evidence"] == {"claims": 4, "balanced_accuracy": 1, "auroc": 1}
    assert "0.75" in verifier_sentence(found)
    # All of one kind: the rates stand beside what is known from other evidence.
    one_kind = quality(claims[:2], labels[:2], [claim(0.1), claim(0.8)])
    assert one_kind["auroc"] is None
    assert "other_evidence" in one_kind["note"]
    assert "other evidence: balanced accuracy 0.75, AUROC 0.75" in verifier_sentence(one_kind)
    nothing = quality([], [], [])
    assert "not known" in verifier_sentence(nothing)
