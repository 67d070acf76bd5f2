"""Is a text one of those held out? Four stages, each named and counted.

1. the same question, with the same options or others (exact hash of the normalised words);
2. 13-grams: half of those of a held-out text of some length, or an answer or passage half of whose own
   are in one held-out text. One shared 13-gram means nothing in vignettes, which share their boilerplate: it
   flags 29 % of MedQA's training questions. A held-out question too short for that: its words in a row;
3. questions with a word 3-gram Jaccard of at least 0.5, found by MinHash LSH, then computed exactly:
   the short ones that the second stage cannot see, and long ones changed every few words;
4. the same PubMed id.
"""

import pickle  # nosec B403
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
    runs,
    shingles,
    word_hashes,
    words,
)

COVERAGE = 0.5
FEWEST_RUNS = 8  # a held-out text of fewer 13-grams (20 words) is looked for as a whole
FEWEST_OWN_RUNS = 24  # and of fewer (36 words) a text is not judged by its own share
FEWEST_WORDS = 8  # a question of fewer says too little to be looked for within another text
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
STAGES = (SAME_OPTIONS, SAME_QUESTION, COVERED, NEAR_DUPLICATE, SAME_PMID)


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
        found = [ngrams(hashes, RUN) for hashes in texts]
        self.sizes = np.array([len(text) for text in found], dtype=np.int64)
        flat = np.concatenate([*found, _NONE])
        owners = np.repeat(np.arange(len(found), dtype=np.int32), self.sizes)
        order = np.argsort(flat, kind="stable")
        self._runs, self._owners = flat[order], owners[order]

    def shared(self, own: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Texts that share any of the 13-grams `own`, and how many different ones they share."""
        own = np.unique(
            own[contains(self._runs, own)]
        )  # few are found: sorting them all would be waste
        if not len(own):
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        start = np.searchsorted(self._runs, own, side="left")
        end = np.searchsorted(self._runs, own, side="right")
        owners = [self._owners[a:b] for a, b in zip(start, end, strict=True)]
        return np.unique(np.concatenate(owners), return_counts=True)


class Quotations:
    """Short questions, to find word for word within other texts.

    Looked up by their last words, which fewer of them share than the first.

    Args:
        questions: The words of each, as hashes; at least `FEWEST_WORDS` and at most `2 * RUN`.
    """

    def __init__(self, questions: dict[int, np.ndarray]):
        # End → length → the whole → number.
        self._by_end: dict[int, dict[int, dict[int, int]]] = {}
        for number, hashes in questions.items():
            end = int(runs(hashes[-FEWEST_WORDS:], FEWEST_WORDS)[0])
            lengths = self._by_end.setdefault(end, {})
            lengths.setdefault(len(hashes), {})[_whole(hashes)] = number
        self._ends = np.array(sorted(self._by_end), dtype=np.uint64)

    def find(self, text: np.ndarray) -> int | None:
        """The number of a question that stands in the text."""
        ends = runs(text, FEWEST_WORDS)
        for place in np.flatnonzero(contains(self._ends, ends)):
            stop = place + FEWEST_WORDS
            for length, wholes in self._by_end[int(ends[place])].items():
                if length <= stop:
                    number = wholes.get(_whole(text[stop - length : stop]))
                    if number is not None:
                        return number
        return None


def _whole(hashes: np.ndarray) -> int:
    return int(runs(hashes, len(hashes))[0])


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
        hashed: list[np.ndarray] = []
        questions: list[np.ndarray] = []
        for number, record in enumerate(self.records):
            question = words(record.question)
            if question:
                self.questions.setdefault(exact_key(question), record.id)
                self.with_options.setdefault(options_key(question, record.options), record.id)
            if record.pmid:
                self.pmids[record.pmid] = record.id
            texts = [word_hashes(tokens) for tokens in (question, *map(words, record.texts))]
            hashed += texts
            self._owners += [number] * len(texts)
            questions.append(texts[0])
        self._runs = RunIndex(hashed)
        self._index_questions(questions)

    def __getstate__(self) -> bytes:
        """For the processes of a map: datasets' own pickler takes ten times as long over the indexes."""
        return pickle.dumps(self.__dict__, pickle.HIGHEST_PROTOCOL)

    def __setstate__(self, state: bytes) -> None:
        # It comes from this process or its parent, by way of a pipe, never from a file
        self.__dict__.update(pickle.loads(state))  # nosec B301

    def _index_questions(self, questions: list[np.ndarray]) -> None:
        texts = [shingles(question) for question in questions]
        seen, times = np.unique(np.concatenate([*texts, _NONE]), return_counts=True)
        self._boilerplate = seen[times >= BOILERPLATE]
        short = {
            number: question
            for number, question in enumerate(questions)
            if FEWEST_WORDS <= len(question) < RUN + FEWEST_RUNS
            and 2 * contains(self._boilerplate, texts[number]).sum() < len(texts[number])
        }
        self._quotations = Quotations(short)
        self._shingles = [self._telling(text) for text in texts]
        self._asked = np.unique(np.concatenate([*self._shingles, _NONE]))
        self._similar = MinHashLSH(num_perm=PERMUTATIONS, params=BANDS)
        for number, text in enumerate(self._shingles):
            if len(text):
                self._similar.insert(number, min_hash(text), check_duplication=False)

    def _telling(self, question: np.ndarray) -> np.ndarray:
        """A question's shingles without the boilerplate, unless it is nothing else."""
        telling = question[~contains(self._boilerplate, question)]
        return telling if len(telling) else question

    def leak(self, record: HeldOut) -> Leak | None:
        """The first stage that finds this record among those held out, or None."""
        question = words(record.question)
        owner = self.questions.get(exact_key(question)) if question else None
        if owner:
            key = options_key(question, record.options) if record.options else None
            same = self.with_options.get(key)
            return Leak(SAME_OPTIONS, same) if same else Leak(SAME_QUESTION, owner)
        asked, *texts = (word_hashes(tokens) for tokens in (question, *map(words, record.texts)))
        found = self._covered(asked, texts) or self._alike(shingles(asked))
        if found:
            return found
        owner = self.pmids.get(record.pmid) if record.pmid else None
        return Leak(SAME_PMID, owner) if owner else None

    def _covered(self, question: np.ndarray, texts: list[np.ndarray]) -> Leak | None:
        own = [runs(text, RUN) for text in (question, *texts)]
        owners, counts = self._runs.shared(np.concatenate(own))
        sizes = self._runs.sizes[owners]
        found = owners[(sizes >= FEWEST_RUNS) & (counts >= COVERAGE * sizes)].tolist()
        for text in own[1:]:  # not of the question: a vignette may be half boilerplate
            if len(owners) and len(text) >= FEWEST_OWN_RUNS:
                its_owners, counts = self._runs.shared(text)
                found += its_owners[counts >= COVERAGE * len(text)].tolist()
        if found:
            return Leak(COVERED, self._ids[self._owners[found[0]]])
        for text in (question, *texts):
            quoted = self._quotations.find(text)
            if quoted is not None:
                return Leak(COVERED, self._ids[quoted])
        return None

    def _alike(self, question: np.ndarray) -> Leak | None:
        question = self._telling(question)
        # A Jaccard of s takes s of one's own shingles; nearly no question has so many, and asking costs.
        if contains(self._asked, question).sum() < max(1, SIMILARITY * len(question)):
            return None
        for candidate in sorted(self._similar.query(min_hash(question))):
            if jaccard(question, self._shingles[candidate]) >= SIMILARITY:
                return Leak(NEAR_DUPLICATE, self._ids[candidate])
        return None


def options_key(question: list[str], options: Iterable[str]) -> int:
    """Of a question with its options, whatever their order."""
    return exact_key(question, *sorted(words(option) for option in options))
