"""eval/claims.py: where sentences end, what is a claim, and what is cited. Hand-made cases."""

import pytest

from eval.claims import Claim, citations, claims, sentences

ONE_SENTENCE = [
    "Give 0.5 mg of atropine, e.g. for bradycardia, and repeat it every 3 to 5 minutes.",
    "Use a beta-blocker, i.e. Metoprolol or another one, if there is no asthma.",
    "Mortality was lower with the drug (12.5 vs. 15.1 per cent; P < 0.05).",
    "E. coli causes most urinary infections, and S. aureus is rare.",
    "The dose is approx. 5 mg per kg of body weight.",
    "Dr. Snow traced cholera to a pump.",
    "Amoxicillin 500 mg p.o. t.i.d. for seven days is enough.",
    "This was shown by Smith J. Palmer and others.",
    "The trial of Smith et al. showed no benefit.",
    "The U.S. Preventive Services Task Force recommends screening.",
    "Shunts (see the review. It is long) may become blocked.",
    "Heparin is given i.v. Enoxaparin, its fractionated form, s.c. once a day.",
    "The pH was 7.25 and the potassium 6.1 mmol/L.",
    "Streptococcus spp. are usually sensitive to penicillin.",
    "As Fig. 2 shows, survival was longer.",
]


@pytest.mark.parametrize("text", ONE_SENTENCE)
def test_one_sentence(text):
    assert sentences(text) == [text]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "Interferon helps in MS. Steroids shorten relapses.",
            ["Interferon helps in MS.", "Steroids shorten relapses."],
        ),
        ("It is safe. It is cheap.", ["It is safe.", "It is cheap."]),
        ("No. The drug did not help.", ["No.", "The drug did not help."]),
        (
            "Rickets is caused by lack of vitamin D. Calcium may be low too.",
            ["Rickets is caused by lack of vitamin D.", "Calcium may be low too."],
        ),
        ("Hepatitis B. Vaccination protects.", ["Hepatitis B.", "Vaccination protects."]),
        (
            "Give it at 8 a.m. The next dose follows at noon.",
            ["Give it at 8 a.m.", "The next dose follows at noon."],
        ),
        ("Wait 30 min. Then measure it again.", ["Wait 30 min.", "Then measure it again."]),
        (
            "It acts in 12 weeks. 30 patients were treated.",
            ["It acts in 12 weeks.", "30 patients were treated."],
        ),
        (
            "Two vaccines exist. mRNA vaccines are one kind.",
            ["Two vaccines exist.", "mRNA vaccines are one kind."],
        ),
        (
            'The verdict was "false." Experts disagree!',
            ['The verdict was "false."', "Experts disagree!"],
        ),
        (
            "- Rest helps\n- Ice helps.\n\n1. Elevation helps.",
            ["Rest helps", "Ice helps.", "Elevation helps."],
        ),
        (
            "1. Aspirin inhibits platelets. 2. Heparin activates antithrombin.",
            ["Aspirin inhibits platelets.", "Heparin activates antithrombin."],
        ),
        ("It works.[1] It is safe [2].", ["It works.[1]", "It is safe [2]."]),
        ("It works. [1][2] It is safe. [3]", ["It works. [1][2]", "It is safe. [3]"]),
        ("[1] It works. [2] It is safe.", ["[1] It works.", "[2] It is safe."]),
        ("", []),
        (" \n\n ", []),
    ],
)
def test_several_sentences(text, expected):
    assert sentences(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It works [1].", (1,)),
        ("It works [2][1][2].", (2, 1)),
        ("It works [1, 3].", (1, 3)),
        ("It works [1-3] and [2 and 5].", (1, 2, 3, 5)),
        ("It works [Passage 2].", (2,)),
        ("Sodium was 141 mmol/L [135-145].", ()),
        ("Potassium was 4.1 [3.5-5.0].", ()),
        ("It works (1).", ()),
        ("It works.", ()),
    ],
)
def test_citations(text, expected):
    assert citations(text) == expected


def test_claims_carry_their_citations_and_lose_them_from_the_text():
    found = claims(
        "Yes. Statins lower LDL cholesterol [1][2]. Muscle pain is rare, e.g. 1 in 100 [3]. [2]"
    )
    assert found.claims == (
        Claim("Statins lower LDL cholesterol.", (1, 2)),
        Claim("Muscle pain is rare, e.g. 1 in 100.", (3, 2)),
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Yes.",
        "No",
        "**Maybe.**",
        "The claim is false.",
        "Answer:",
        "Is it so?",
        "[1]",
        "3.5",
        "Aspirin",
        "...",
    ],
)
def test_no_claim(text):
    assert claims(text).claims == ()


@pytest.mark.parametrize(
    "text",
    [
        "The evidence does not say whether aspirin helps.",
        "The provided evidence does not contain information about the dose [1].",
        "The passages don't mention aspirin.",
        "The evidence provided is not sufficient to answer the question.",
        "None of the passages mention aspirin.",
        "I cannot answer this from the passages.",
        "Based on the evidence, I am unable to determine the dose.",
        "I don't know the answer.",
        "Unfortunately, the question cannot be answered.",
        "It is unclear from the evidence whether aspirin helps.",
        "There is not enough information to answer the question.",
        "There is no evidence to answer this question.",
    ],
)
def test_an_abstention_is_no_claim(text):
    found = claims(f"{text} Aspirin lowers fever [1].")
    assert [claim.text for claim in found.claims] == ["Aspirin lowers fever."]
    assert found.abstentions == 1


@pytest.mark.parametrize(
    "text",
    [
        "The evidence does not support the use of aspirin.",
        "The evidence is not sufficient to recommend aspirin.",
        "There is no evidence that aspirin helps.",
        "It is unclear whether aspirin helps.",
        "The passages do not say so, but aspirin lowers fever.",
        "The study did not report serious adverse events.",
        "Patients cannot answer questions after anaesthesia.",
        "Information leaflets do not clearly explain the risks to patients who cannot read, but films do.",
    ],
)
def test_what_is_found_to_be_unknown_is_a_claim(text):
    found = claims(text)
    assert (len(found.claims), found.abstentions) == (1, 0)


def test_repeated_sentences_count_once():
    found = claims("Rest helps. Ice helps. REST helps. Rest  helps [1].")
    assert [claim.text for claim in found.claims] == ["Rest helps.", "Ice helps."]
    assert found.repeated == 2


def test_a_sentence_cut_at_the_length_limit_is_no_claim():
    text = "Statins lower cholesterol [1]. They are given to patients with"
    assert [claim.text for claim in claims(text, finished=False).claims] == [
        "Statins lower cholesterol."
    ]
    assert claims(text, finished=False).cut
    assert len(claims(text).claims) == 2
    whole = claims("Statins lower cholesterol. [1]", finished=False)
    assert len(whole.claims) == 1
    assert not whole.cut
