"""A run's measures, read from what it left.

Most come from per-item records, so that two runs can be compared item by item. Some are one number a run: what is no
mean over items (macro F1, BLEU), and the held-out check of runs that kept no records of it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval.comparison.measures import FIDELITY, MEASURES, SETS, TEXTS, Measure
from eval.comparison.paired import Kind, linearised
from eval.comparison.runs import Run
from eval.options import BENCHMARKS
from medistill_trl.errors import UserError

# Of the benchmarks, without the second form of one of them: its items are among the first's.
DISTINCT = tuple(name for name in BENCHMARKS if name != "pubhealth_2class")
TOLERANCE = 1e-6  # between a result and what its items add up to


@dataclass(frozen=True)
class Column:
    """A measure of one run: Σ numerators / Σ denominators over its items.

    Args:
        items: Names each item with its content; empty for one number a run.
    """

    items: tuple[tuple, ...]
    numerators: np.ndarray
    denominators: np.ndarray

    @property
    def value(self) -> float:
        return float(self.numerators.sum() / self.denominators.sum())

    @property
    def kind(self) -> Kind:
        if not self.items:
            return "whole"
        plain = (self.denominators == 1).all() and np.isin(self.numerators, (0, 1)).all()
        return "right or wrong" if plain else "number"

    @property
    def values(self) -> np.ndarray:
        """One number an item, whose mean is the value."""
        return linearised(self.numerators, self.denominators)

    def of(self, wanted: Sequence[tuple]) -> "Column":
        """The same of some of its items, in their order."""
        places = {item: place for place, item in enumerate(self.items)}
        rows = [places[item] for item in wanted]
        return Column(tuple(wanted), self.numerators[rows], self.denominators[rows])


def columns(run: Run) -> dict[str, Column]:
    """All measures of a run that are there.

    Raises:
        UserError: the per-item records are not those of the result beside them.
    """
    found = _read_heldout(run.items("heldout")) if run.has_items("heldout") else {}
    for part, read in READERS.items():
        if part in run.results:
            found |= read(run.items(part))
    for measure in MEASURES.values():
        value = _value(run, measure)
        if measure.key in found:
            _check(run, measure, found[measure.key], value)
        elif value is not None:
            found[measure.key] = Column((), np.array([value]), np.ones(1))
    return found


def _value(run: Run, measure: Measure) -> float | None:
    """The run's own result."""
    if measure.family == "heldout":
        return run.record["heldout"]["after"][measure.key.partition(".")[2]]
    estimate = reported(run, measure.path)
    return None if estimate is None else estimate["value"]


def reported(run: Run, path: tuple[str, ...] | None) -> dict | None:
    """An estimate of the evaluation, `value` and what goes with it; None where there is none."""
    content: Any = run.results if path else None
    for key in path or ():
        if not isinstance(content, dict) or content.get(key) is None:
            return None
        content = content[key]
    if isinstance(content, dict):
        return content if content.get("value") is not None else None
    return None if content is None else {"value": content, "interval_95": None}


def _check(run: Run, measure: Measure, column: Column, value: float | None) -> None:
    if value is None or math.isclose(column.value, value, rel_tol=TOLERANCE, abs_tol=TOLERANCE):
        return
    raise UserError(
        f"{run.path}: {measure.key} is {value:.6g} in its result and {column.value:.6g} by its items: they do not belong "
        f"together; evaluate again: python -m eval.run {run.path} (held-out check: train again)"
    )


def _column(rows: Sequence[dict], item: Callable, top: Callable, bottom: Callable) -> Column | None:
    """None where nothing is counted."""
    denominators = np.array([float(bottom(row)) for row in rows])
    if denominators.sum() == 0:
        return None
    numerators = np.array([float(top(row)) for row in rows])
    return Column(tuple(item(row) for row in rows), numerators, denominators)


def _known(found: dict[str, Column | None]) -> dict[str, Column]:
    return {key: column for key, column in found.items() if column is not None}


def _one(row: dict) -> float:
    return 1.0


def _right(row: dict) -> float:
    return row["right"]


def _question(row: dict) -> tuple:
    return row["id"], row["doc_hash"]


def _by_benchmark(rows: Sequence[dict]) -> dict[tuple[str, str], list[dict]]:
    found: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        found.setdefault((row["benchmark"], row["subject"]), []).append(row)
    return found


def _read_benchmarks(rows: list[dict]) -> dict[str, Column]:
    by_subject = _by_benchmark(rows)
    found, kept_of_all = {}, []
    for (name, subject), own in by_subject.items():
        if subject != "student":
            continue
        found[f"benchmarks.{name}.accuracy"] = _column(own, _question, _right, _one)
        found[f"calibration.{name}.brier"] = _column(own, _question, _brier, _one)
        teacher = by_subject[name, "teacher"]
        kept = [row for row, other in zip(own, teacher, strict=True) if other["right"]]
        found[f"retention.{name}"] = _column(kept, _question, _right, _one)
        kept_of_all += kept if name in DISTINCT else []
    found["retention.all"] = _column(kept_of_all, _question, _right, _one)
    return _known(found)


def _brier(row: dict) -> float:
    return sum(
        (p - (option == row["answer"])) ** 2 for option, p in enumerate(row["probabilities"])
    )


def _read_generative(rows: list[dict]) -> dict[str, Column]:
    found = {}
    for (name, subject), own in _by_benchmark(rows).items():
        if subject == "student":
            found[f"generative.{name}.accuracy"] = _column(own, _question, _right, _one)
            found[f"unparsed.{name}"] = _column(
                own, _question, lambda row: row["choice"] is None, _one
            )
    return _known(found)


def _read_perplexity(rows: list[dict]) -> dict[str, Column]:
    own = [row for row in rows if row["subject"] == "student"]
    return {
        "perplexity.nats_per_token": _column(own, _document, _get("nats"), _get("tokens")),
        "perplexity.bits_per_byte": _column(own, _document, _bits("nats"), _get("bytes")),
    }


def _document(row: dict) -> tuple:
    return row["id"], row["bytes"]


def _get(name: str) -> Callable[[dict], float]:
    return lambda row: row[name]


def _bits(name: str) -> Callable[[dict], float]:
    return lambda row: row[name] / math.log(2)


def _read_heldout(rows: list[dict]) -> dict[str, Column]:
    own = [row for row in rows if row["stage"] == "after"]
    found = {
        "heldout.ce_nats": _column(own, _completion, _get("ce_nats"), _get("tokens")),
        "heldout.bits_per_byte": _column(own, _completion, _bits("ce_nats"), _get("bytes")),
    }
    # Not defined: either where the tokenizers differ, KL where the teacher is served.
    if own and own[0]["kl_nats"] is not None:
        found["heldout.kl_nats"] = _column(own, _completion, _get("kl_nats"), _get("tokens"))
    if own and own[0]["agreed"] is not None:
        found["heldout.top1"] = _column(own, _completion, _get("agreed"), _get("tokens"))
    return _known(found)


def _completion(row: dict) -> tuple:
    return row["id"], row["tokens"], row["bytes"]


def _read_fidelity(rows: list[dict]) -> dict[str, Column]:
    found: dict[str, Column | None] = {}
    for name in SETS:
        own = [r for r in rows if r.get("prefixes") == name and r.get("subject") != "teacher"]
        # The same text for every run, except the student's own.
        item = (lambda row: (row["id"],)) if name == "student" else _document
        shared = bool(own) and "student_nats" in own[0]  # else the tokenizers differ
        for term in FIDELITY if shared else ():
            found[f"fidelity.{name}.{term}"] = _column(own, item, _get(term), _get("tokens"))
        nats = "student_nats" if shared else "nats"
        bits = _bits(nats)
        found[f"fidelity.{name}.bits_per_byte"] = _column(
            own,
            item,
            lambda row, bits=bits: bits(row) if row["bytes"] else 0.0,  # of an end token alone
            _get("bytes"),
        )
    texts = [row for row in rows if "texts" in row]
    for name in TEXTS:
        if texts and name in texts[0]:
            found[f"text.{name}"] = _column(texts, lambda row: (row["id"],), _get(name), _one)
    return _known(found)


def _read_faithfulness(rows: list[dict]) -> dict[str, Column]:
    own = [row for row in rows if row["subject"] == "student"]

    def claims(holds: Callable[[dict], bool]) -> Column | None:
        return _column(
            own,
            lambda row: (row["id"],),
            lambda row: sum(holds(claim) for claim in row["claims"]),
            lambda row: len(row["claims"]),
        )

    found = {
        "faithfulness.without_claims": _column(
            own, lambda row: (row["id"],), lambda row: not row["claims"], _one
        )
    }
    if any("bin" in claim for row in own for claim in row["claims"]):
        found |= {
            "faithfulness.hallucination": claims(lambda claim: claim["bin"] != "supported"),
            "faithfulness.contradicted": claims(lambda claim: claim["bin"] == "contradicted"),
            "faithfulness.citation_recall": claims(lambda claim: claim["recalled"]),
        }
    return _known(found)


READERS = {
    "benchmarks": _read_benchmarks,
    "generative": _read_generative,
    "perplexity": _read_perplexity,
    "fidelity": _read_fidelity,
    "faithfulness": _read_faithfulness,
}
