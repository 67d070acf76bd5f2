"""PubHealth (Kotonya & Toni 2020, arXiv 2010.09926): claims about health, checked by journalists."""

from data_prep.schema import Record
from data_prep.sources import BENCHMARK, POOL, RESERVE, Hub, Source
from data_prep.sources.rows import (
    BadRow,
    Dropped,
    content_id,
    identity,
    optional_text,
    text,
)

LABELS = ("true", "false", "mixture", "unproven")
# The hub's integers, for exports that lost the names (parquet keeps them, see reading.py).
HUB_ORDER = ("false", "mixture", "true", "unproven")


def normalise(row: dict, split: str, facts: None) -> Record:
    label = _label(row.get("label"))
    claim = text(row, "claim")
    main_text = optional_text(row, "main_text")
    return Record(
        source="pubhealth",
        split=split,
        native_id=identity(row, "claim_id") or content_id(claim),
        question=claim,
        options=LABELS,
        answer=LABELS.index(label),
        explanation=optional_text(row, "explanation"),
        context=(main_text,) if main_text else (),
        subject=optional_text(row, "subjects") or None,
    )


def _label(value: object) -> str:
    """A label's name.

    Raises:
        Dropped: where it is missing (None, "", -1) or a text that is no label: rows whose columns
            slipped, which the release has.
        BadRow: for a number or a type that no release has.
    """
    if value in (None, "", -1, "-1"):
        raise Dropped("has no label")
    if isinstance(value, int) and not isinstance(value, bool):
        if 0 <= value < len(HUB_ORDER):
            return HUB_ORDER[value]
        raise BadRow(f"label is {value}, outside 0 to {len(HUB_ORDER) - 1}")
    if not isinstance(value, str):
        raise BadRow(f"label must be a name, got {type(value).__name__}")
    label = value.strip().lower()
    if label not in LABELS:
        raise Dropped("its label is none of true, false, mixture, unproven")
    return label


SOURCE = Source(
    name="pubhealth",
    hub=Hub(
        # The dataset is a script, which datasets no longer runs; this is its parquet conversion.
        "ImperialCollegeLondon/health_fact",
        "7f898a16838e708a4597986e3fab8af05b710ba4",
        ("default/*/*.parquet",),
    ),
    splits=(("train", "train"), ("dev|valid", "validation"), ("test", "test")),
    roles={"train": POOL, "validation": RESERVE, "test": BENCHMARK},
    normalise=normalise,
)
