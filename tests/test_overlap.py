"""The outcomes that two vocabularies share."""

import random

import pytest
from conftest import make_tokenizer
from two_tokenizers import llama_like, permuted, without_merges

from medistill_trl.overlap import Overlap, first_pieces
from medistill_trl.token_bytes import TokenBytes


@pytest.fixture(scope="module")
def llama():
    return llama_like()


@pytest.fixture(scope="module")
def level():
    return make_tokenizer()


def test_a_permutation_shares_everything(level):
    order = list(range(len(level)))
    random.Random(0).shuffle(order)
    overlap = Overlap.of(level, permuted(level, order))
    assert overlap.partners == dict(enumerate(order))
    assert overlap.student_outcomes == {id: n for n, id in enumerate(overlap.student_ids)}
    assert len(overlap.teacher_outcomes) == len(order)


def test_a_token_without_partner_counts_for_the_first_piece_of_it(level):
    fewer = without_merges(level, 50)
    overlap = Overlap.of(fewer, level)
    kept = len(level) - 50
    assert overlap.partners == {id: id for id in range(kept)}
    for id in range(kept, len(level)):
        text = level.decode([id])
        first = fewer.encode(text, add_special_tokens=False)[0]
        assert overlap.teacher_outcomes[id] == overlap.student_outcomes[first], text
    swapped = Overlap.of(level, fewer)
    assert swapped.student_outcomes == overlap.teacher_outcomes


def test_across_families_every_text_token_has_an_outcome_that_begins_it(llama, level):
    overlap = Overlap.of(llama, level)
    sides = TokenBytes.of(llama), TokenBytes.of(level)
    named = [sides[0].texts.get(id) for id in overlap.student_ids]
    for side, outcomes in zip(
        sides, (overlap.student_outcomes, overlap.teacher_outcomes), strict=True
    ):
        assert outcomes.keys() >= side.texts.keys()
        for id, text in side.texts.items():
            assert text.startswith(named[outcomes[id]])
    assert len(named) > 300
    unshared = [id for id in sides[0].texts if id not in overlap.partners]
    assert len(unshared) > 100
    letter = llama.convert_tokens_to_ids("a")
    assert (
        overlap.student_outcomes[llama.convert_tokens_to_ids("<0x61>")]
        == (overlap.student_outcomes[letter])
    )


def test_ends_are_shared_and_other_special_tokens_only_by_name(llama, level):
    overlap = Overlap.of(llama, level)
    assert overlap.partners[llama.eos_token_id] == level.eos_token_id
    assert llama.bos_token_id not in overlap.student_outcomes
    assert level.convert_tokens_to_ids("<|endoftext|>") not in overlap.teacher_outcomes


def test_first_pieces_are_those_of_a_text_that_goes_on(llama):
    table = TokenBytes.of(llama)
    found = first_pieces(llama, table, [b" the", b"the", b"\xce", b""])
    assert found[b" the"] == b" the"
    assert b"the".startswith(found[b"the"])  # without the space put before every text
    assert found.keys() == {b" the", b"the"}
