"""The held-out check of a run, before and after training: what changed, and how sure that is."""

from dataclasses import dataclass

from eval.report.tables import CHANGE, HUNDREDTHS, PERCENT, PLAIN, POINTS, Form
from eval.statistics import ratio_interval


@dataclass(frozen=True)
class Measure:
    """One number of the check.

    Args:
        label: As a table shows it.
        name: As a sentence has it.
        record: Key of its sum in the records of single prompts.
        weight: Key of what that sum is divided by.
        less_is_better: Which direction is towards the teacher.
    """

    label: str
    name: str
    record: str
    weight: str
    less_is_better: bool
    form: Form
    change: Form


MEASURES = {
    "kl_nats": Measure(
        "KL(T‖S), nats per token", "KL(T‖S)", "kl_nats", "tokens", True, HUNDREDTHS, Form(2, signed=True)
    ),
    "ce_nats": Measure(
        "cross-entropy, nats per token", "cross-entropy", "ce_nats", "tokens", True, HUNDREDTHS, Form(2, signed=True)
    ),
    "top1": Measure(
        "top-1 agreement", "top-1 agreement", "agreed", "tokens", False, PERCENT, POINTS
    ),
    "bits_per_byte": Measure(
        "bits per byte", "bits per byte", "ce_nats", "bytes", True, PLAIN, CHANGE
    ),
}  # fmt: skip
UNITS = {"kl_nats": " nats per token", "bits_per_byte": ""}
NATS_PER_BIT = 0.6931471805599453


def main_measure(after: dict) -> str:
    """What the verdict rests on: KL, or bits per byte where the tokenizers differ."""
    return "kl_nats" if after["kl_nats"] is not None else "bits_per_byte"


def changes(before: dict, after: dict, records: list[dict]) -> dict[str, dict]:
    """after − before of each measure that is defined, as an estimate.

    Both are means over the tokens of the same completions, so the change is one too: Student's t on its linearised
    ratio, with prompts as the independent units.

    Args:
        before: Totals of run.json.
        after: Totals of run.json.
        records: Of results/items/heldout.jsonl; empty where a run has none, and then no change has an interval.
    """
    stages = {
        stage: {row["id"]: row for row in records if row["stage"] == stage}
        for stage in ("before", "after")
    }
    found = {}
    for key, measure in MEASURES.items():
        if after[key] is None:
            continue
        value = after[key] - before[key]
        if not records:
            note = "no interval: the run kept totals only"
            found[key] = {"value": value, "interval_95": None, "n": after["prompts"], "note": note}
            continue
        scale = NATS_PER_BIT if key == "bits_per_byte" else 1.0
        rows = [(row, stages["after"][id]) for id, row in stages["before"].items()]
        differences = [(b[measure.record] - a[measure.record]) / scale for a, b in rows]
        estimate = ratio_interval(differences, [a[measure.weight] for a, _ in rows])
        found[key] = estimate.to_dict()
    return found
