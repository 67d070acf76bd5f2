"""Every drawn rationale has exactly one fate, and the right one."""

import json
import random
import sys

import pytest
from conftest import run_command

from medistill_trl.data import Prompt
from medistill_trl.rationale_selection import (
    Selection,
    drop_duplicates,
    select,
    summary,
    to_jsonl,
    to_text,
    vote,
)
from medistill_trl.rationales import Fate, Limits, Rationale, RationaleFormat, judge
from medistill_trl.teacher import Completion

FORM = RationaleFormat("Final answer:", "", 'Reason, then write "{separator}" and the answer.')
LIMITS = Limits(3, 50, 10, check_answer=True)
PROMPT = Prompt("p", "s", "Which nerve is hurt?", "Radial nerve. It is.", "Radial nerve")
OPEN = Prompt("p", "s", "Which nerve is hurt?", "It is.", None)
REASON = "The wrist drops, so its extensors fail."


def count_words(text):
    return len(text.split())


def judged(text, prompt=PROMPT, finished=True, form=FORM, limits=LIMITS, room=None, sample=0):
    return judge(prompt, sample, Completion(text, [], finished), form, limits, count_words, room)


# --- asking, parsing, rendering --------------------------------------------------------------------


def test_the_teacher_is_told_the_separator_and_the_end_marker():
    assert FORM.ask("Why?") == 'Why?\n\nReason, then write "Final answer:" and the answer.'
    marked = RationaleFormat("Therefore:", "END", "Reason. {separator}")
    assert marked.ask("Why?") == 'Why?\n\nReason. Therefore: End with "END".'


@pytest.mark.parametrize(
    "text",
    [
        f"{REASON}\n\nFinal answer: radial nerve",
        f"{REASON}\nFinal answer:\nradial nerve\n",
        f"  {REASON}\n\n**Final Answer:** radial nerve\n\nLet me know if you have more questions!",
        f"{REASON}\n\n## Final answer\n\nradial nerve",
        f"{REASON} Final answer: radial nerve",
        f"{REASON}\n---\n**final answer**: *radial nerve*",
        f"{REASON}\nFinal answer: radial nerve\nFinal answer: the radial nerve.",
    ],
)
def test_the_separator_is_found_in_the_ways_teachers_write_it(text):
    parsed = FORM.parse(text)
    assert (parsed.rationale, parsed.answer) == (REASON, "radial nerve")
    assert not parsed.answers_differ
    assert "".join(FORM.render(parsed.rationale, parsed.answer)) == (
        f"{REASON}\n\nFinal answer: radial nerve"
    )


def test_a_separator_within_a_sentence_is_none():
    assert FORM.parse("I think the final answer: radial nerve").answer is None
    assert FORM.parse("Final answers: radial nerve").answer is None


def test_a_negative_number_keeps_its_sign():
    assert FORM.parse(f"{REASON}\nFinal answer: -2").answer == "-2"


def test_what_is_rendered_is_parsed_back():
    for separator, marker in (("Final answer:", ""), ("###", "END"), ("So =>", "")):
        form = RationaleFormat(separator, marker, "{separator}")
        text = "".join(form.render("One.\n\nTwo (2) steps.", "yes"))
        parsed = form.parse(text)
        assert (parsed.rationale, parsed.answer) == ("One.\n\nTwo (2) steps.", "yes")
        assert parsed.closed == bool(marker)


# --- fates -----------------------------------------------------------------------------------------

CRAFTED = {
    "\n ": Fate.EMPTY,
    REASON: Fate.NO_SEPARATOR,
    "The answer is the radial nerve, since the wrist drops.": Fate.NO_SEPARATOR,
    f"{REASON} It is the radial nerve.\nFinal answer:": Fate.EMPTY_ANSWER,
    "Final answer: radial nerve": Fate.EMPTY_RATIONALE,
    "word " * 2000: Fate.TOO_LONG,
    "word " * 2000 + "\nFinal answer: radial nerve": Fate.TOO_LONG,
    "It drops.\nFinal answer: radial nerve": Fate.TOO_SHORT,
    f"{REASON}\nFinal answer: radial nerve " + "as I said " * 5: Fate.ANSWER_TOO_LONG,
    f"{REASON}\nFinal answer: ulnar nerve": Fate.WRONG_ANSWER,
    f"{REASON}\nFinal answer: radial nerve\nNo.\nFinal answer: ulnar nerve": Fate.SEVERAL_ANSWERS,
    f"{REASON}\nFinal answer: radial nerve": None,
}


@pytest.mark.parametrize("text", CRAFTED, ids=lambda text: text.strip()[-25:] or "blank")
def test_each_crafted_output_has_its_fate(text):
    assert judged(text).fate is CRAFTED[text]


def test_what_was_cut_before_its_answer_ended_is_not_used():
    answered = f"{REASON}\nFinal answer: radial nerve"
    assert judged(answered, finished=False).fate is Fate.CUT
    assert judged(REASON, finished=False).fate is Fate.CUT
    assert judged("word " * 2000, finished=False).fate is Fate.CUT
    assert judged(f"{answered}\nAnd now I shall", finished=False).fate is None
    marked = RationaleFormat("Final answer:", "END", "{separator}")
    assert judged(f"{answered} END and so", finished=False, form=marked).fate is None
    assert judged(f"{answered} EN", finished=False, form=marked).fate is Fate.CUT


def test_room_counts_the_whole_target_and_its_end_token():
    text = f"{REASON}\nFinal answer: radial nerve"
    needed = count_words(text) + 1
    assert judged(text, room=needed).fate is None
    assert judged(text, room=needed - 1).fate is Fate.OVER_MAX_LENGTH


def test_the_answer_is_checked_where_there_is_one_and_if_asked():
    wrong = f"{REASON}\nFinal answer: ulnar nerve"
    assert judged(wrong).right is False
    assert judged(wrong, prompt=OPEN).fate is None
    assert judged(wrong, prompt=OPEN).right is None
    unchecked = judged(wrong, limits=Limits(3, 50, 10, check_answer=False))
    assert (unchecked.fate, unchecked.right) == (None, False)


# --- votes and selection ---------------------------------------------------------------------------


def drawn(*texts, prompt=OPEN):
    group = [judged(text, prompt, sample=n) for n, text in enumerate(texts)]
    vote(group)
    drop_duplicates(group)
    return group


def answered(answer, reason=REASON):
    return f"{reason}\nFinal answer: {answer}"


def fates(group):
    return [rationale.fate for rationale in group]


def decided(group, scores, keep="all", top_k=2, rank_by="vote", keep_contradictory=False):
    for rationale, score in zip(group, scores, strict=True):
        rationale.score = score
    return select(group, Selection(keep, top_k, rank_by, keep_contradictory))


def test_the_vote_is_the_share_of_readable_answers_that_say_the_same():
    group = drawn(
        answered("Yes."), answered("yes, it is", "More reasons here."), answered("no"), "?"
    )
    assert [r.vote for r in group] == pytest.approx([2 / 3, 2 / 3, 1 / 3, None])


def test_a_rationale_that_repeats_another_word_for_word_is_a_duplicate():
    group = drawn(answered("yes"), answered("Yes.", REASON.upper()), answered("no"))
    assert fates(group) == [None, Fate.DUPLICATE, None]


def test_two_contradictory_rationales_are_not_kept_together():
    group = drawn(answered("yes"), answered("no"))
    kept = decided(group, [-2.0, -1.0])
    assert kept == [group[1]]  # one vote each: the likelier
    assert fates(group) == [Fate.CONTRADICTORY, Fate.KEPT]
    group = drawn(answered("yes"), answered("no"))
    assert len(decided(group, [-2.0, -1.0], keep_contradictory=True)) == 2


def test_vote_or_likelihood_ranks_and_the_other_decides_ties():
    texts = [answered("yes", f"{REASON} {n}") for n in range(2)] + [answered("no")]
    group = drawn(*texts)
    assert decided(group, [-3.0, -2.0, -1.0], keep="best") == [group[1]]
    assert fates(group) == [Fate.NOT_SELECTED, Fate.KEPT, Fate.CONTRADICTORY]
    group = drawn(*texts)
    assert decided(group, [-3.0, -2.0, -1.0], keep="best", rank_by="likelihood") == [group[2]]
    assert fates(group) == [Fate.CONTRADICTORY, Fate.CONTRADICTORY, Fate.KEPT]
    group = drawn(*texts)
    assert decided(group, [-2.0, -2.0, -1.0], keep="best") == [group[0]]  # the earlier


def test_top_k_keeps_at_most_k_and_all_keeps_all():
    texts = [answered("yes", f"{REASON} {n}") for n in range(4)]
    scores = [-4.0, -1.0, -3.0, -2.0]
    group = drawn(*texts)
    assert decided(group, scores, keep="top_k", top_k=2) == [group[1], group[3]]
    assert fates(group).count(Fate.NOT_SELECTED) == 2
    assert len(decided(drawn(*texts), scores, keep="all")) == 4
    assert len(decided(drawn(*texts), scores, keep="top_k", top_k=9)) == 4


# --- the account -----------------------------------------------------------------------------------


def test_no_record_is_lost_whatever_is_drawn():
    draw = random.Random(0)
    texts = [
        *CRAFTED,
        answered("radial nerve", "Another way to see it."),
        answered("the radial nerve"),
    ]
    groups = []
    for number in range(60):
        prompt = Prompt(f"p{number}", "s", "q", "r", draw.choice(["Radial nerve", None]))
        chosen = draw.choices(texts, k=draw.randint(1, 6))
        group = [
            judged(text, prompt, finished=draw.random() < 0.8, sample=n)
            for n, text in enumerate(chosen)
        ]
        vote(group)
        drop_duplicates(group)
        for rationale in group:
            if rationale.fate is None:
                rationale.score = draw.uniform(-3, 0)
        keep = draw.choice(["best", "all", "top_k"])
        kept = select(group, Selection(keep, 2, "vote", draw.random() < 0.3))
        assert [r for r in group if r.fate is Fate.KEPT] == sorted(kept, key=lambda r: r.sample)
        groups.append(group)
    account = summary(groups, "fallback")
    assert account["drawn"] == sum(map(len, groups)) == sum(account["by_fate"].values())
    assert set(account["by_fate"]) == set(Fate)
    never = {fate for fate, count in account["by_fate"].items() if count == 0}
    assert never == {Fate.OVER_MAX_LENGTH}  # there is room for all
    prompts = account["prompts"]
    assert prompts["total"] == 60 == prompts["with_rationale"] + prompts["fallback"]
    rows = [json.loads(line) for line in to_jsonl(groups).splitlines()]
    assert len(rows) == account["drawn"]
    assert {row["fate"] for row in rows} <= set(Fate)


def test_the_summary_by_hand():
    right, wrong = answered("radial nerve"), answered("ulnar nerve")
    first = drawn(
        right, wrong, answered("radial nerve", "It is quite another reason."), prompt=PROMPT
    )
    second = drawn("?", wrong, prompt=PROMPT)
    decided(first, [-1.0, None, -2.0], keep="all")
    decided(second, [None, None])
    account = summary([first, second], "drop")
    assert account["drawn"] == 5
    counts = {fate: count for fate, count in account["by_fate"].items() if count}
    assert counts == {"kept": 2, "wrong_answer": 2, "no_separator": 1}
    assert account["prompts"] == {"total": 2, "with_rationale": 1, "fallback": 0, "dropped": 1}
    assert account["reference"] == {"compared": 4, "right": 2}
    assert account["agreement"]["readable"] == 4
    assert account["agreement"]["mean_majority_share"] == pytest.approx((2 / 3 + 1) / 2, abs=1e-4)
    assert account["kept"]["mean_log_likelihood_nats"] == -1.5
    assert account["kept"]["rationale_tokens"] == {"min": 5, "median": 6, "max": 7}
    text = to_text(account)
    assert "2 of 5 kept (wrong_answer 2, no_separator 1)" in text
    assert "1 of 2 have a rationale, 1 are dropped" in text


def test_an_undecided_rationale_is_noticed():
    with pytest.raises(AssertionError, match="has no fate"):
        summary([[Rationale("p", 0, "t", "r", "a", 1, 1)]], "drop")


def test_judging_needs_no_torch():
    code = "import sys, medistill_trl.rationale_selection; sys.exit('torch' in sys.modules)"
    assert run_command(sys.executable, "-c", code).returncode == 0
