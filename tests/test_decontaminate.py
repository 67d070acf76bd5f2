"""Held-out texts are found whatever their disguise, and boilerplate is not mistaken for them."""

import json

import numpy as np
import pytest
from conftest import ROOT

from data_prep.decontaminate import (
    COVERED,
    NEAR_DUPLICATE,
    SAME_OPTIONS,
    SAME_PMID,
    SAME_QUESTION,
    Guard,
    HeldOut,
    Leak,
    RunIndex,
)
from data_prep.fingerprints import RUN, jaccard, min_hash, ngrams, shingles, word_hashes, words

REAL = ROOT.parent / "shared/data/raw"
OPENING = (
    "A 54-year-old man comes to the physician because of a 3-month history of progressive shortness of breath. "
    "He has smoked one pack of cigarettes daily for 30 years. His temperature is 37.1 C, pulse is 84/min, "
    "respirations are 18/min, and blood pressure is 132/80 mm Hg. Physical examination shows"
)
VIGNETTE = HeldOut(
    "vignette",
    f"{OPENING} a barrel chest, hyperresonance to percussion, distant breath sounds and a prolonged expiratory "
    "phase on both sides. Pulmonary function testing shows a reduced ratio of forced expiratory volume to forced "
    "vital capacity that does not change after inhaled albuterol. Which of these mechanisms explains his illness?",
    (
        "Loss of elastic recoil",
        "Reversible bronchospasm",
        "Pleural fibrosis",
        "Chest wall weakness",
    ),
)
SHORT = HeldOut(
    "short",
    "Most common site of lodgement of an inhaled peanut in adults?",
    ("Left", "Right"),
)
ABSTRACT = HeldOut(
    "abstract",
    "Does chewing gum shorten postoperative ileus?",
    ("yes", "no", "maybe"),
    (
        "Ileus after bowel surgery delays discharge from hospital and is costly. Patients were given gum to chew "
        "three times a day from the first morning, and the time to first flatus was recorded in both groups.",
    ),
    pmid="123",
)
GUARD = Guard([VIGNETTE, SHORT, ABSTRACT])


def ask(question, options=(), texts=(), pmid=None):
    return GUARD.leak(HeldOut("asked", question, options, texts, pmid))


@pytest.mark.parametrize(
    ("leak", "asked"),
    [
        (Leak(SAME_QUESTION, "short"), HeldOut("x", SHORT.question)),
        (Leak(SAME_QUESTION, "short"), HeldOut("x", f"  {SHORT.question.upper()[:-1]} :-")),
        (Leak(SAME_QUESTION, "vignette"), HeldOut("x", VIGNETTE.question)),
        (Leak(COVERED, "vignette"), HeldOut("x", f"Explain. {VIGNETTE.question} Thank you.")),
        (Leak(COVERED, "vignette"), HeldOut("x", "What is this?", (), (VIGNETTE.question,))),
        (Leak(COVERED, "abstract"), HeldOut("x", "What delays discharge?", (), ABSTRACT.texts)),
        (
            Leak(NEAR_DUPLICATE, "short"),
            HeldOut("x", "The most common site of lodgement of an inhaled peanut in an adult?"),
        ),
        (Leak(SAME_PMID, "abstract"), HeldOut("x", "Is gum useful?", pmid="123")),
    ],
)
def test_each_disguise_is_found_by_its_stage(leak, asked):
    assert GUARD.leak(asked) == leak


def test_a_question_that_only_shares_boilerplate_is_no_leak():
    other = f"{OPENING} clubbing of the fingers and fine crackles at both lung bases. What is found on biopsy?"
    shared = np.intersect1d(
        *(ngrams(word_hashes(words(text)), RUN) for text in (other, VIGNETTE.question))
    )
    assert len(shared) > 20  # any shared 13-gram would have been called a leak
    assert ask(other) is None


def test_openings_that_many_questions_share_do_not_make_them_alike():
    topics = [
        "vasculitis",
        "anaphylaxis",
        "eclampsia",
        "cholestasis",
        "delirium",
        "epistaxis",
        "psoriasis",
        "scurvy",
        "gout",
        "rickets",
        "croup",
    ]
    opening = "Which of the following is not a recognised feature of"
    guard = Guard([HeldOut(t, f"{opening} {t}?") for t in topics])
    assert guard.leak(HeldOut("x", f"{opening} pellagra?")) is None
    assert guard.leak(HeldOut("x", f"{opening} scurvy")) == Leak(SAME_QUESTION, "scurvy")


def test_options_are_compared_in_any_order():
    guard = Guard([HeldOut("x", "Drug of choice?", ("Aspirin", "Heparin"))])
    asked = HeldOut("y", "Drug of choice", ("heparin.", "ASPIRIN"))
    assert guard.leak(asked) == Leak(SAME_OPTIONS, "x")
    other = HeldOut("y", "Drug of choice", ("Warfarin", "Aspirin"))
    assert guard.leak(other) == Leak(SAME_QUESTION, "x")


def test_coverage_is_a_share_of_the_held_out_text():
    tokens = words(VIGNETTE.question)
    half = len(tokens) // 2
    enough, too_little = " ".join(tokens[: half + 12]), " ".join(tokens[: half - 12])
    assert ask(enough) == Leak(COVERED, "vignette")
    assert ask(too_little) is None


def test_an_excerpt_is_judged_by_its_own_share():
    tokens = words(ABSTRACT.texts[0])
    filler = [f"word{n}" for n in range(60)]
    assert len(tokens) < 45
    long = HeldOut("long", "What was done?", (), (" ".join([*tokens, *(filler * 4)[:200]]),))
    guard = Guard([long])
    excerpt = " ".join(
        [*tokens, *["and", "then", "something", "else", "was", "said", "about", "it"]]
    )
    assert guard.leak(HeldOut("x", "Other?", (), (excerpt,))) == Leak(COVERED, "long")
    assert guard.leak(HeldOut("x", excerpt)) is None  # a question may be half boilerplate


def test_a_short_question_is_found_word_for_word_within_another_text():
    explained = f"Remember this one: {SHORT.question.upper()} It is the right lower lobe bronchus."
    assert ask("Anything?", (), (explained,)) == Leak(COVERED, "short")
    assert ask(f"Read on. {SHORT.question}") == Leak(COVERED, "short")
    changed = explained.replace("PEANUT", "NUT")
    assert ask("Anything?", (), (changed,)) is None
    tiny = Guard([HeldOut("tiny", "Cause of scurvy?")])
    assert (
        tiny.leak(HeldOut("x", "Other?", (), ("What is the cause of scurvy? It is simple.",)))
        is None
    )


def test_questions_without_words_are_not_alike():
    guard = Guard([HeldOut("marks", "???", ("a", "b")), ABSTRACT])
    assert guard.leak(HeldOut("x", "", (), ("A passage about something else.",))) is None
    assert guard.leak(HeldOut("x", "!!!", ("a", "b"))) is None


@pytest.mark.parametrize(
    "disguised",
    [
        SHORT.question.replace("inhaled", "in\u200bha\u00adled"),
        SHORT.question.replace(" ", "&nbsp;"),
        SHORT.question.replace(" ", "\u00a0"),
        SHORT.question.replace("peanut", "\uff50eanut"),
    ],
)
def test_invisible_differences_are_no_differences(disguised):
    assert ask(disguised) == Leak(SAME_QUESTION, "short")


def test_run_index_counts_shared_runs_per_text():
    rng = np.random.default_rng(0)
    one, two = rng.integers(0, 2**63, (2, 40)).astype(np.uint64)
    index = RunIndex([one, two, np.concatenate([one[:20], two[20:]])])
    texts, counts = index.shared(ngrams(one, RUN))
    assert dict(zip(texts.tolist(), counts.tolist(), strict=True)) == {0: 28, 2: 8}
    assert index.sizes.tolist() == [28, 28, 28]
    assert len(index.shared(ngrams(rng.integers(0, 2**63, 40).astype(np.uint64), RUN))[0]) == 0


def test_min_hash_estimates_jaccard():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 2**63, 400).astype(np.uint64)
    one, other = shingles(tokens[:300]), shingles(tokens[100:])
    assert min_hash(one).jaccard(min_hash(other)) == pytest.approx(jaccard(one, other), abs=0.1)
    assert jaccard(one, other) == pytest.approx(198 / 398)
    assert len(shingles(tokens[:2])) == 1


@pytest.mark.skipif(not REAL.exists(), reason="the real development rows are not here")
def test_real_training_rows_are_not_taken_for_benchmark_rows():
    def rows(path):
        return [json.loads(line) for line in (REAL / path).read_text().splitlines()]

    guard = Guard([HeldOut(str(r["id"]), r["question"]) for r in rows("medqa/dev.jsonl")])
    leaks = [guard.leak(HeldOut("x", r["question"])) for r in rows("medqa/train_sample.jsonl")]
    assert sum(leak is not None for leak in leaks) <= 2
