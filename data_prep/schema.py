"""What a record is, whichever dataset and file it came from."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Record:
    """One record of a dataset, its quirks already removed.

    Args:
        source: The dataset: medqa, medmcqa, pubmedqa, pubhealth.
        split: The part of the dataset, as the dataset names it: train, validation, test, artificial…
        native_id: Its id in the dataset, or a hash of its text where the dataset gives none.
        question: The stem, question or claim as it was written.
        options: Texts of the options without letters; yes/no/maybe or the claim labels by name.
        answer: Index of the right option.
        explanation: The dataset's own explanation or conclusion, uncleaned; may be empty.
        context: Passages of evidence, in order; may be empty.
        subject: The dataset's subject where it has one.
        pmid: PubMed id of the abstract it is about.
    """

    source: str
    split: str
    native_id: str
    question: str
    options: tuple[str, ...]
    answer: int
    explanation: str = ""
    context: tuple[str, ...] = ()
    subject: str | None = None
    pmid: str | None = None

    @property
    def id(self) -> str:
        """`source-split-native_id`; see `parse_id`."""
        return f"{self.source}-{self.split}-{self.native_id}"


def parse_id(record_id: str) -> tuple[str, str, str]:
    """The source, split and native id of a record's id (neither of the first two holds a hyphen)."""
    source, split, native_id = record_id.split("-", 2)
    return source, split, native_id
