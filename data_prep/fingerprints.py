"""Texts → numbers that tell whether two texts are the same, share long runs, or are much alike.

All of them are of the normalised words: NFKC, case folded, punctuation and spacing gone.
"""

import html
import re
import unicodedata
from functools import lru_cache

import numpy as np
import xxhash
from datasketch import MinHash

RUN = 13  # words of the n-grams that GPT-3's and later decontaminations look for (arXiv 2005.14165)
SHINGLE = 3  # words of the n-grams that MinHash sees
PERMUTATIONS = 96  # 32 bands of 3 against the benchmarks, 24 of 4 within the pool
_WORD = re.compile(r"\w+")
_INVISIBLE = re.compile(
    "[\u00ad\u200b-\u200f\u2060-\u2064\ufeff]"
)  # soft hyphens, zero widths, marks
_FACTOR = 0x9E3779B97F4A7C15  # any odd number: what keeps n-grams of the same words apart
_INVERSE = pow(_FACTOR, -1, 2**64)
# Hashing is done here, on 64-bit numbers; MinHash takes 32 bits of them.
_EMPTY = MinHash(num_perm=PERMUTATIONS, seed=1, hashfunc=int)


def words(text: str) -> list[str]:
    if "&" in text:
        text = html.unescape(text)
    if not text.isascii():  # what it would do to plain text, case folding does
        text = _INVISIBLE.sub("", unicodedata.normalize("NFKC", text))
    return _WORD.findall(text.casefold())


def exact_key(*parts: list[str]) -> int:
    """64 bits of the words of one or several texts."""
    return xxhash.xxh64_intdigest("\x1f".join(" ".join(part) for part in parts).encode())


def word_hashes(tokens: list[str]) -> np.ndarray:
    """(words,) uint64"""
    return np.array(list(map(_word_hash, tokens)), dtype=np.uint64)


@lru_cache(maxsize=2**16)
def _word_hash(token: str) -> int:
    return xxhash.xxh64_intdigest(token.encode())


def runs(hashes: np.ndarray, size: int) -> np.ndarray:
    """The n-grams of a text's word hashes in reading order, (n-grams,) uint64; none if it is shorter.

    The hash of the words h_i … h_(i+n-1) is Σ_k h_(i+k) F^k: a difference of two running sums, divided by F^i.
    """
    count = len(hashes) - size + 1
    if count <= 0:
        return np.empty(0, dtype=np.uint64)
    powers, inverses = _powers(1 << (len(hashes) - 1).bit_length())
    sums = np.cumsum(hashes * powers[: len(hashes)])
    result = sums[size - 1 :].copy()
    result[1:] -= sums[: count - 1]
    return result * inverses[:count]


@lru_cache
def _powers(count: int) -> tuple[np.ndarray, np.ndarray]:
    """F^0, F^1, … and their inverses, modulo 2^64."""
    factors = np.full((2, count), 1, dtype=np.uint64)
    factors[0, 1:], factors[1, 1:] = _FACTOR, _INVERSE
    powers, inverses = np.cumprod(factors, axis=1, dtype=np.uint64)
    return powers, inverses


def ngrams(hashes: np.ndarray, size: int) -> np.ndarray:
    """The distinct n-grams, sorted."""
    return np.unique(runs(hashes, size))


def shingles(hashes: np.ndarray) -> np.ndarray:
    """As `ngrams` of `SHINGLE` words; a shorter text is one shingle, an empty one none."""
    return ngrams(hashes, max(1, min(SHINGLE, len(hashes))))


def min_hash(shingle_hashes: np.ndarray) -> MinHash:
    result = _EMPTY.copy()
    result.update_batch((shingle_hashes >> np.uint64(32)).tolist())
    return result


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """Share of the n-grams of both that they have in common; both sorted and distinct."""
    shared = len(np.intersect1d(one, other, assume_unique=True))
    union = len(one) + len(other) - shared
    return shared / union if union else 0.0


def contains(table: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """(numbers,) bool: which stand in the sorted table."""
    if not len(table):
        return np.zeros(len(numbers), dtype=bool)
    places = np.searchsorted(table, numbers)
    return table[np.minimum(places, len(table) - 1)] == numbers
