"""Alike rows stay together, shares are kept, and nothing moves when something is added."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.duplicates import ALIKE, alike_pairs, find_duplicates
from data_prep.fingerprints import PERMUTATIONS, min_hash, shingles, word_hashes, words
from data_prep.splits import BRIDGE, PARTS, TEST, TRAIN, VALIDATION, choose, split_pool

NO_PAIRS = np.empty((0, 2), dtype=np.int64)


def keys(rows, seed=0):
    return np.random.default_rng(seed).integers(0, 2**63, rows).astype(np.uint64)


def signatures(*texts):
    return np.stack([min_hash(shingles(word_hashes(words(t)))).hashvalues for t in texts])


def test_shares_are_90_5_5_of_each_source():
    sources = np.repeat([0, 1], [1000, 400])
    parts = split_pool(sources, keys(1400), NO_PAIRS)
    for source, rows in ((0, 1000), (1, 400)):
        counts = [int(((parts == part) & (sources == source)).sum()) for part in range(3)]
        assert counts == [0.9 * rows, 0.05 * rows, 0.05 * rows]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 119), st.integers(0, 119)), max_size=80), st.integers(0, 9)
)
def test_no_pair_straddles_two_parts(pairs, seed):
    pairs = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    sources = np.repeat([0, 1, 2], 40)
    parts = split_pool(sources, keys(120, seed), pairs)
    for one, other in parts[pairs]:
        assert one == other or BRIDGE in (one, other)
    assert set(parts.tolist()) <= {TRAIN, VALIDATION, TEST, BRIDGE}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 119), st.integers(0, 119)), max_size=80))
def test_a_source_added_at_the_end_moves_no_row_of_the_others(pairs):
    pairs = np.sort(np.array(pairs, dtype=np.int64).reshape(-1, 2), axis=1)
    sources, order = np.repeat([0, 1, 2], 40), keys(120)
    before = split_pool(sources[:80], order[:80], pairs[pairs[:, 1] < 80])
    assert (split_pool(sources, order, pairs)[:80] == before).all()


def test_a_row_alike_to_an_earlier_source_follows_it_and_a_bridge_belongs_nowhere():
    sources, order = np.repeat([0, 1], [200, 10]), keys(210)
    alone = split_pool(sources[:200], order[:200], NO_PAIRS)
    held, trained = np.flatnonzero(alone == TEST)[0], np.flatnonzero(alone == TRAIN)[0]
    pairs = np.array([[held, 200], [held, 201], [trained, 201]])
    parts = split_pool(sources, order, pairs)
    assert parts[200] == TEST
    assert parts[201] == BRIDGE
    assert (parts[:200] == alone).all()


def test_a_large_group_trains():
    chain = np.stack([np.arange(299), np.arange(1, 300)], axis=1)
    parts = split_pool(np.zeros(2000, dtype=int), keys(2000), chain)
    assert (parts[:300] == TRAIN).all()
    assert (parts == VALIDATION).sum() == (parts == TEST).sum() == 100


def test_a_smaller_size_is_a_subset_with_the_same_shares():
    order = keys(1000)
    parts = split_pool(np.zeros(1000, dtype=int), order, NO_PAIRS)
    everything, some = choose(parts, order, None), choose(parts, order, 200)
    assert [len(some[name]) for name in PARTS] == [180, 10, 10]
    for name in PARTS:
        assert some[name].tolist() == everything[name][: len(some[name])].tolist()
    assert [len(rows) for rows in choose(parts, order, 10**6).values()] == [900, 50, 50]


def test_nothing_can_be_split_into_nothing():
    empty = split_pool(np.empty(0, int), keys(0), NO_PAIRS)
    assert [len(rows) for rows in choose(empty, keys(0), None).values()] == [0, 0, 0]


LONG = "A woman has chest pain that radiates to the back and a widened mediastinum on the chest radiograph. Cause?"


def test_duplicates_exact_near_and_alike():
    texts = [
        f"{LONG} aortic dissection",
        f"{LONG} aortic dissection",
        f"{LONG} Aortic dissection type A",
        LONG.replace("chest radiograph", "plain film") + " aortic dissection",
        "Which vitamin is missing in scurvy? vitamin C",
    ]
    asked = np.array([7, 7, 7, 8, 9], dtype=np.uint64)
    found = find_duplicates(np.array([1, 1, 2, 3, 4], dtype=np.uint64), signatures(*texts), [asked])
    assert found.exact.tolist() == [-1, 0, -1, -1, -1]
    assert found.near.tolist()[3:] == [-1, -1]
    assert {(0, 1), (0, 2), (0, 3)} <= set(map(tuple, found.pairs.tolist()))
    assert 4 not in found.pairs


def test_rows_of_one_abstract_are_alike_whatever_their_words():
    texts = signatures("Does gum help?", "Is surgery safe?", "Are statins useful in the old?")
    abstracts = np.array([5, 0, 5], dtype=np.uint64)
    found = find_duplicates(np.arange(1, 4, dtype=np.uint64), texts, [abstracts])
    assert found.pairs.tolist() == [[0, 2]]


def test_alike_pairs_finds_nearly_all_that_comparing_everything_finds():
    rng = np.random.default_rng(0)
    lexicon = np.array([f"w{n}" for n in range(4000)])
    texts = []
    for _ in range(150):
        base = rng.choice(lexicon, 40)
        changed = base.copy()
        changed[rng.choice(40, rng.integers(0, 4), replace=False)] = "other"
        texts += [" ".join(base), " ".join(changed)]
    table = signatures(*texts)
    equal = (table[:, None] == table[None]).mean(axis=2)
    wanted = {(i, j) for i, j in np.argwhere(np.triu(equal >= 0.5, 1)).tolist()}
    pairs, similarity = alike_pairs(table, 0.5)
    found = set(map(tuple, pairs.tolist()))
    assert found <= wanted
    assert len(found) >= 0.97 * len(wanted) > 100
    assert similarity == pytest.approx([equal[i, j] for i, j in pairs])
    assert table.shape[1] == PERMUTATIONS


def test_how_many_pairs_are_linked_at_which_similarity():
    """Stated beside ALIKE: a pair's true Jaccard, and the share of pairs that are found."""
    rng = np.random.default_rng(1)
    for true, least in ((0.5, 0.65), (0.6, 0.9), (0.7, 0.98)):
        shared = round(2 * 60 * true / (1 + true))
        texts = []
        for _ in range(150):
            both, one, other = np.split(
                rng.integers(0, 2**63, 120 - shared).astype(np.uint64), [shared, 60]
            )
            texts += [np.sort(np.r_[both, one]), np.sort(np.r_[both, other])]
        table = np.stack([min_hash(text).hashvalues for text in texts])
        pairs, _ = alike_pairs(table, ALIKE)
        linked = set(map(tuple, pairs.tolist()))
        found = sum((n, n + 1) in linked for n in range(0, 300, 2)) / 150
        assert found >= least, (true, found)
        assert all(b == a + 1 and a % 2 == 0 for a, b in linked)
