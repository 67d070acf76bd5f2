"""Is a text one of those held out? Four stages, each named and counted.

1. the same question, or the same question with the same options (exact hash of the normalised text);
2. half of the 13-grams of a held-out text of some length. One shared 13-gram means nothing in
   vignettes, which share their boilerplate: it flags 29 % of MedQA's training questions;
3. questions with a word 3-gram Jaccard of at least 0.5, found by MinHash LSH, then computed exactly:
   the short ones that the second stage cannot see, and long ones changed every few words;
4. the same PubMed id.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from datasketch import MinHashLSH

from data_prep.fingerprints import (
    PERMUTATIONS,
    RUN,
    contains,
    exact_key,
    jaccard,
    min_hash,
    ngrams,
    shingles,
    word_hashes,
    words,
)

COVERAGE = 0.5
FEWEST_RUNS = 8  # a text of fewer 13-grams (20 words) is left to the other stages
SIMILARITY = 0.5
# "which of the following is not a": a shingle that so many held-out texts have says nothing.
BOILERPLATE = 10
# 32 bands of 3 rows find 98.6 % of the pairs at Jaccard 0.5; the exact value decides.
BANDS = (32, 3)

_NONE = np.empty(0, dtype=np.uint64)

SAME_QUESTION = "same question"
SAME_OPTIONS = "same question and options"
COVERED = "13-gram coverage"
NEAR_DUPLICATE = "near duplicate (MinHash)"
SAME_PMID = "same PubMed id"
STAGES = (SAME_QUESTION, SAME_OPTIONS, COVERED, NEAR_DUPLICATE, SAME_PMID)


@dataclass(frozen=True)
class HeldOut:
    """A record that must stay unseen: a benchmark's or FidelityBench-Med's.

    Args:
        options: Texts, in any order.
        texts: Further texts that must not be found either: evidence, abstracts.
    """

    id: str
    question: str
    options: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    pmid: str | None = None


@dataclass(frozen=True)
class Leak:
    """Which stage found which held-out record."""

    stage: str
    held_out_id: str


class RunIndex:
    """13-grams of many texts, to count how many a new text shares with each.

    Args:
        texts: The words of each text, as hashes.
    """

    def __init__(self, texts: Iterable[np.ndarray]):
        runs = [ngrams(hashes, RUN) for hashes in texts]
        self.sizes = np.array([len(text) for text in runs], dtype=np.int64)
        flat = np.concatenate([*runs, _NONE])
        owners = np.repeat(np.arange(len(runs), dtype=np.int32), self.sizes)
        order = np.argsort(flat, kind="stable")
        self._runs, self._owners = flat[order], owners[order]

    def shared(self, runs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Texts that share any of the distinct `runs`, and how many they share."""
        runs = runs[contains(self._runs, runs)]
        if not len(runs):
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        start = np.searchsorted(self._runs, runs, side="left")
        end = np.searchsorted(self._runs, runs, side="right")
        owners = [self._owners[a:b] for a, b in zip(start, end, strict=True)]
        return np.unique(np.concatenate(owners), return_counts=True)


@dataclass
class Guard:
    """Everything held out, ready to be asked about one text after another.

    Args:
        records: What is held out.
    """

    records: list[HeldOut]
    questions: dict[int, str] = field(default_factory=dict)
    with_options: dict[int, str] = field(default_factory=dict)
    pmids: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._ids = [record.id for record in self.records]
        self._owners: list[int] = []
        hashed, questions = [], []
        for number, record in enumerate(self.records):
            question = words(record.question)
            self.questions.setdefault(exact_key(question), record.id)
            self.with_options.setdefault(options_key(question, record.options), record.id)
            if record.pmid:
                self.pmids[record.pmid] = record.id
            texts = [word_hashes(tokens) for tokens in (question, *map(words, record.texts))]
            hashed += texts
            self._owners += [number] * len(texts)
            questions.append(shingles(texts[0]))
        self._runs = RunIndex(hashed)
        seen, times = np.unique(np.concatenate([*questions, _NONE]), return_counts=True)
        self._boilerplate = seen[times >= BOILERPLATE]
        self._shingles = [self._telling(question) for question in questions]
        self._similar = MinHashLSH(num_perm=PERMUTATIONS, params=BANDS)
        for number, question in enumerate(self._shingles):
            self._similar.insert(number, min_hash(question), check_duplication=False)

    def _telling(self, question: np.ndarray) -> np.ndarray:
        """A question's shingles without the boilerplate, unless it is nothing else."""
        telling = question[~contains(self._boilerplate, question)]
        return telling if len(telling) else question

    def leak(self, record: HeldOut) -> Leak | None:
        """The first stage that finds this record among those held out, or None."""
        question = words(record.question)
        owner = self.questions.get(exact_key(question))
        if owner:
            return Leak(SAME_QUESTION, owner)
        owner = self.with_options.get(options_key(question, record.options))
        if owner and record.options:
            return Leak(SAME_OPTIONS, owner)
        asked, *texts = (word_hashes(tokens) for tokens in (question, *map(words, record.texts)))
        owner = self._covered([asked, *texts]) or self._alike(shingles(asked))
        if owner:
            return owner
        owner = self.pmids.get(record.pmid) if record.pmid else None
        return Leak(SAME_PMID, owner) if owner else None

    def _covered(self, hashes: list[np.ndarray]) -> Leak | None:
        runs = np.concatenate([ngrams(text, RUN) for text in hashes])
        texts, counts = self._runs.shared(np.unique(runs) if len(hashes) > 1 else runs)
        sizes = self._runs.sizes[texts]
        hit = texts[(sizes >= FEWEST_RUNS) & (counts >= COVERAGE * sizes)]
        return Leak(COVERED, self._ids[self._owners[hit[0]]]) if len(hit) else None

    def _alike(self, question: np.ndarray) -> Leak | None:
        question = self._telling(question)
        for candidate in sorted(self._similar.query(min_hash(question))):
            if jaccard(question, self._shingles[candidate]) >= SIMILARITY:
                return Leak(NEAR_DUPLICATE, self._ids[candidate])
        return None


def options_key(question: list[str], options: Iterable[str]) -> int:
    """Of a question with its options, whatever their order."""
    return exact_key(question, *sorted(words(option) for option in options))
