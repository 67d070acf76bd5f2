"""The report's verdict on training: the change on the held-out prompts, its interval, and what is said of it."""

import pytest
from report_runs import heldout_records, heldout_totals

from eval.report.heldout import changes
from eval.report.verdict import of_training


def verdict_of(before, after):
    records = heldout_records(before, after)
    totals = heldout_totals(records)
    return of_training(
        totals["before"], totals["after"], changes(totals["before"], totals["after"], records)
    )


def test_the_change_and_its_interval_by_hand():
    """Changes of −1 and −3 nats per token on as many tokens: mean −2, standard error 1, t of one degree 12.706."""
    records = heldout_records([4.0, 4.0], [3.0, 1.0])
    totals = heldout_totals(records)
    found = changes(totals["before"], totals["after"], records)
    assert found["kl_nats"]["value"] == pytest.approx(-2)
    assert found["kl_nats"]["interval_95"] == pytest.approx([-2 - 12.7062, -2 + 12.7062], abs=1e-3)
    assert found["top1"]["value"] == pytest.approx(0.4)
    # 40 bytes for 10 tokens: −2 nats a token are −2/4 nats a byte.
    assert found["bits_per_byte"]["value"] == pytest.approx(-0.5 / 0.693147, rel=1e-5)


def test_the_verdict_follows_the_interval():
    better = verdict_of([4.0, 4.2, 4.1, 4.3], [2.0, 2.1, 2.2, 2.2])
    assert (better.tone, better.lead) == ("better", "Closer to its teacher than before training")
    assert "fell from 4.15 to 2.12 nats per token" in better.sentences[0]
    assert "51\u00a0% of what it was" in better.sentences[0]
    worse = verdict_of([2.0, 2.1, 2.2, 2.2], [4.0, 4.2, 4.1, 4.3])
    assert (worse.tone, worse.lead) == ("worse", "Further from its teacher than before training")
    unclear = verdict_of([4.0, 4.2, 4.1, 4.3], [2.0, 6.0, 2.5, 5.9])
    assert (unclear.tone, unclear.lead) == ("unclear", "Not told apart from the untrained student")
    assert any("The interval holds 0" in sentence for sentence in unclear.sentences)


def test_few_prompts_are_called_few():
    assert any(
        "4 prompts: few" in s
        for s in verdict_of([4.0, 4.2, 4.1, 4.3], [2.0, 2.1, 2.2, 2.2]).sentences
    )
    many = verdict_of([4.0 + n / 100 for n in range(40)], [2.0 + n / 90 for n in range(40)])
    assert not any("few" in sentence for sentence in many.sentences)


def test_totals_alone_give_no_interval_and_no_claim():
    totals = heldout_totals(heldout_records([4.0, 4.2], [2.0, 2.1]))
    found = changes(totals["before"], totals["after"], [])
    verdict = of_training(totals["before"], totals["after"], found)
    assert verdict.tone == "unclear"
    assert "no interval: the run kept totals only" in " ".join(verdict.sentences)


def test_different_tokenizers_are_judged_by_bits_per_byte():
    records = heldout_records([4.0, 4.2, 4.1], [2.0, 2.1, 2.2])
    totals = heldout_totals(records)
    for stage in totals.values():
        stage |= {"kl_nats": None, "top1": None}
    for record in records:
        record |= {"kl_nats": None, "agreed": None}
    found = changes(totals["before"], totals["after"], records)
    assert set(found) == {"ce_nats", "bits_per_byte"}
    assert (
        of_training(totals["before"], totals["after"], found)
        .sentences[0]
        .startswith("bits per byte")
    )
