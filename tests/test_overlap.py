"""The outcomes that two vocabularies share."""

import json
import random

import pytest
from conftest import make_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from two_tokenizers import (
    llama_like,
    permuted,
    unigram,
    without_merges,
    wrap,
)

from medistill_trl.overlap import Cutter, Overlap
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


def test_a_token_that_ends_amid_a_character_counts_for_what_merging_began_it_with():
    """Of removed merges the first piece is known: the left part of the merge, and of that again."""
    words = ["“dose”", "≥ 5 µg", "α-blocker", "β–γ", "naïve", "’s", "…", "• item", "→", "😷😀"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=["<e>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(words[n:] + words[:n]) for n in range(10)], trainer)
    level = wrap(tokenizer, eos_token="<e>")
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    left = {"".join(merge): merge[0] for merge in merges}
    fewer = without_merges(level, len(merges) - 12)
    kept = fewer.get_vocab()
    overlap = Overlap.of(fewer, level)
    table = TokenBytes.of(level)
    halves = 0
    for id in range(len(kept), len(level)):
        piece = level.convert_ids_to_tokens(id)
        while piece not in kept:
            piece = left[piece]
        assert overlap.teacher_outcomes[id] == overlap.student_outcomes[kept[piece]], piece
        halves += "\ufffd" in table.texts[id].decode(errors="replace")
    assert halves >= 5


def test_ends_are_shared_and_other_special_tokens_only_by_name(llama, level):
    overlap = Overlap.of(llama, level)
    assert overlap.partners[llama.eos_token_id] == level.eos_token_id
    tail = overlap.num_outcomes - 1
    assert overlap.student_outcomes[llama.bos_token_id] == tail
    assert overlap.teacher_outcomes[level.convert_tokens_to_ids("<|endoftext|>")] == tail
    assert tail == len(overlap.student_ids)


def test_a_tail_that_the_student_does_not_have_is_no_outcome(level):
    """A vocabulary and the same with one special token more, on either side."""
    named = make_tokenizer()
    named.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    tool = named.convert_tokens_to_ids("<|tool|>")
    overlap = Overlap.of(level, named)
    assert overlap.num_outcomes == len(level)
    assert tool not in overlap.teacher_outcomes
    swapped = Overlap.of(named, level)
    assert swapped.student_outcomes[tool] == swapped.num_outcomes - 1 == len(level)


@pytest.mark.parametrize("make", [llama_like, unigram, make_tokenizer])
def test_a_first_piece_is_that_of_a_text_that_goes_on(make):
    tokenizer = make()
    cutter = Cutter(tokenizer, TokenBytes.of(tokenizer))
    vocabulary = set(cutter.table.texts.values())
    for word in (b" thermometer", b"thermometer", " naïve".encode(), " 😷".encode()):
        assert word not in vocabulary
        piece = cutter.first_piece(word)
        assert piece in vocabulary
        assert word.startswith(piece)
        assert len(piece) < len(word)
    half = " 😷".encode()[:3]
    assert half.startswith(cutter.first_piece(half))
    assert cutter.first_piece(half[1:]) == half[1:2]
    assert cutter.first_piece(b"t") is None
    assert cutter.first_piece(b"") is None
