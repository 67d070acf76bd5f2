"""Rows that repeat another, and rows too alike to be torn apart, without comparing all with all.

MinHash signatures are cut into bands; rows with an equal band are candidates, and the share of equal
positions of their signatures estimates the Jaccard similarity (Broder 1997). In a band, each row is
compared with the one before it and with the first of those that share it: the work grows with
the rows, not with the size of the buckets, and the other bands find what one misses.
"""

from dataclasses import dataclass

import numpy as np

BAND = 4  # 24 bands of 4: 79 % of the pairs at Jaccard 0.5 in one comparison, 99.8 % at 0.7
CHUNK = 100_000  # pairs whose signatures are held at a time
SAME = 0.9  # estimated Jaccard of question and answer from which two rows are one
# … and from which they stay in the same part. Of pairs with a true Jaccard of 0.5 / 0.6 / 0.7 this links
# at least 65 / 90 / 98 % (tests/test_splits.py); 0.5 would link half of the first.
ALIKE = 0.42


@dataclass(frozen=True)
class Duplicates:
    """Which rows repeat which, and which belong together.

    Args:
        exact: (rows,) the earlier row with the same question and answer, or -1.
        near: (rows,) an earlier row with nearly the same, where `exact` has none, or -1.
        pairs: (pairs, 2) rows that are alike.
    """

    exact: np.ndarray
    near: np.ndarray
    pairs: np.ndarray


def find_duplicates(
    keys: np.ndarray, signatures: np.ndarray, groups: list[np.ndarray]
) -> Duplicates:
    """Compare all rows.

    Args:
        keys: (rows,) uint64 of question, options and answer: equal keys are the same row.
        signatures: (rows, permutations) uint32, of the same words.
        groups: (rows,) arrays of numbers; rows with the same number in one of them are alike
            whatever their words (the same question, abstract, article). 0 stands for none.
    """
    exact = np.full(len(keys), -1, dtype=np.int64)
    again = _links(keys)
    exact[again[:, 1]] = again[:, 0]
    pairs, similarity = alike_pairs(signatures, ALIKE)
    near = np.full(len(keys), -1, dtype=np.int64)
    for earlier, later in pairs[similarity >= SAME]:
        if exact[later] < 0 and near[later] < 0:
            near[later] = earlier
    return Duplicates(exact, near, np.concatenate([pairs, *map(_links, groups)]))


def _links(numbers: np.ndarray) -> np.ndarray:
    """(pairs, 2): each row with the first that has its number."""
    _, first, inverse = np.unique(numbers, return_index=True, return_inverse=True)
    rows = np.flatnonzero((numbers != 0) & (first[inverse] != np.arange(len(numbers))))
    return np.stack([first[inverse][rows], rows], axis=1)


def alike_pairs(signatures: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (earlier row, later row) with an estimated Jaccard of at least `threshold`.

    Args:
        signatures: (rows, permutations) uint32.

    Returns:
        (pairs, 2) int64, distinct, and (pairs,) float32 similarities.
    """
    found: list[np.ndarray] = []
    for start in range(0, signatures.shape[1] - BAND + 1, BAND):
        found.append(
            _verified(_candidates(signatures[:, start : start + BAND]), signatures, threshold)
        )
    codes = np.unique(np.concatenate([_codes(pairs) for pairs in found]))
    pairs = np.stack([codes >> np.uint64(32), codes & np.uint64(0xFFFFFFFF)], axis=1).astype(
        np.int64
    )
    return pairs, _similarity(pairs, signatures)


def _candidates(band: np.ndarray) -> np.ndarray:
    """(pairs, 2) of rows whose band is equal."""
    rows = np.ascontiguousarray(band).view(np.dtype((np.void, band.shape[1] * 4))).ravel()
    _, bucket, sizes = np.unique(rows, return_inverse=True, return_counts=True)
    members = np.flatnonzero(sizes[bucket] > 1)
    members = members[np.argsort(bucket[members], kind="stable")]
    bucket = bucket[members]
    continues = np.flatnonzero(bucket[1:] == bucket[:-1]) + 1
    starts = np.flatnonzero(np.r_[True, bucket[1:] != bucket[:-1]][: len(bucket)])
    first = starts[np.searchsorted(starts, continues, side="right") - 1]
    before = np.stack([members[continues - 1], members[continues]], axis=1)
    return np.concatenate([before, np.stack([members[first], members[continues]], axis=1)])


def _verified(pairs: np.ndarray, signatures: np.ndarray, threshold: float) -> np.ndarray:
    return pairs[_similarity(pairs, signatures) >= threshold]


def _similarity(pairs: np.ndarray, signatures: np.ndarray) -> np.ndarray:
    result = np.empty(len(pairs), dtype=np.float32)
    for start in range(0, len(pairs), CHUNK):
        one, other = pairs[start : start + CHUNK].T
        result[start : start + CHUNK] = (signatures[one] == signatures[other]).mean(axis=1)
    return result


def _codes(pairs: np.ndarray) -> np.ndarray:
    """A pair as one number, so that pairs can be made distinct quickly."""
    return (pairs[:, 0].astype(np.uint64) << np.uint64(32)) | pairs[:, 1].astype(np.uint64)
