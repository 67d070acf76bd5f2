"""What of its teacher's answers a student kept: both models on the same benchmark items.

Accuracies alone hide it: a student may lose what its teacher knew and gain as much elsewhere. So each item is
counted by who is right. Before looking, the primary test is McNemar's on the benchmarks by log-likelihood, adjusted
by Holm's method for how many benchmarks there are.
"""

import logging
from collections.abc import Hashable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from scipy.special import rel_entr

from eval import benchmarks, generative
from eval.item_store import ItemStore
from eval.options import Options
from eval.statistics import (
    bootstrap_difference,
    cohen_kappa,
    holm,
    mcnemar,
    minimum_detectable_effect,
    ratio_interval,
    wilson,
)
from eval.subjects import Pair
from medistill_trl.errors import UserError

logger = logging.getLogger(__name__)

FILES = benchmarks.FILES
PROTOCOLS = {
    "benchmarks": partial(benchmarks.evaluate, quiet=True),  # its own sentences hold as much
    "generative": generative.evaluate,
}
ALPHA = 0.05
NO_TEACHER = "there is no teacher to compare with; name one with --teacher"


def check(pair: Pair, data: Path, options: Options) -> None:
    """Raises UserError for what would stop `evaluate`."""
    if pair.teacher is not None:
        for part in (benchmarks, generative):
            part.check(pair, data, options)


def evaluate(pair: Pair, data: Path, options: Options, store: ItemStore) -> dict:
    """Student and teacher item by item; the parts measured before are read from the store."""
    if pair.teacher is None:
        return {"skipped": NO_TEACHER}
    result = {}
    for name, answer in PROTOCOLS.items():
        records = answer(pair, data, options, store)["items"]
        result[name] = compare_benchmarks(records, options.seed)
        if name == "benchmarks":
            for benchmark, estimate in option_divergence(records).items():
                result[name][benchmark]["option_js_nats"] = estimate
        for benchmark, found in result[name].items():
            logger.info("%s", sentence(f"{name}, {benchmark}", found))
    return result


def compare_benchmarks(records: Sequence[dict], seed: int = 0) -> dict[str, dict]:
    """Each benchmark's comparison, with p-values adjusted over all of them.

    Args:
        records: Of both models: `benchmark`, `subject` (student, teacher), `id`, `doc_hash`, `answer` (of the row),
            `choice` (of the model; None if it gave none), `right`.
    """
    names = list(dict.fromkeys(record["benchmark"] for record in records))
    found = {}
    for name in names:
        of_both = [record for record in records if record["benchmark"] == name]
        student, teacher = (
            [record for record in of_both if record["subject"] == subject]
            for subject in ("student", "teacher")
        )
        found[name] = compare(student, teacher, seed, ALPHA / len(names))
    adjusted = holm([found[name]["mcnemar_p"] for name in names])
    return {
        name: found[name] | {"mcnemar_p_holm": p} for name, p in zip(names, adjusted, strict=True)
    }


def option_divergence(records: Sequence[dict]) -> dict[str, dict]:
    """Each benchmark's mean Jensen-Shannon divergence between the two models' distributions over the options.

    It is defined for any two models, whatever their tokenizers: the options are the same texts for both.

    Args:
        records: Of both models, on the same items in the same order: `benchmark`, `subject`, `probabilities`.

    Returns:
        Nats, from 0 to ln 2, with an interval over items.
    """
    rows: dict[str, dict[str, list]] = {}
    for record in records:
        of = rows.setdefault(record["benchmark"], {"student": [], "teacher": []})
        of[record["subject"]].append(record["probabilities"])
    return {
        name: ratio_interval(
            list(map(jensen_shannon, of["student"], of["teacher"])), [1] * len(of["student"])
        ).to_dict()
        for name, of in rows.items()
    }


def jensen_shannon(first: Sequence[float], second: Sequence[float]) -> float:
    """Nats. Not scipy's `jensenshannon`, whose square root is nan where rounding leaves less than 0."""
    p, q = np.asarray(first), np.asarray(second)
    middle = (p + q) / 2
    return max(0.0, float((rel_entr(p, middle) + rel_entr(q, middle)).sum() / 2))


def compare(
    student: Sequence[dict], teacher: Sequence[dict], seed: int = 0, alpha: float = ALPHA
) -> dict:
    """One benchmark's items, answered by both.

    Args:
        alpha: Level at which `minimum_detectable_gap` must be found; the strictest of Holm's where several
            benchmarks are tested.

    Returns:
        Accuracies; `retention_gap` (teacher − student) with a paired bootstrap interval; `retention`, the student's
        accuracy where the teacher is right; `kept`, `lost`, `gained` and `both_wrong`, numbers of items;
        `inherited_errors`, the share of the teacher's wrong answers that the student gives too, which an answer
        that could not be read never is; `agreement` and Cohen's `kappa` of the choices; `mcnemar_p`; and
        `minimum_detectable_gap`, the smallest gap that so many items with so much disagreement show with a power of
        80 %.

    Raises:
        UserError: the records are not of the same items.
    """
    _check_same_items(student, teacher)
    pairs = list(zip(student, teacher, strict=True))
    right = [record["right"] for record in student]
    teacher_right = [record["right"] for record in teacher]
    kept = sum(s and t for s, t in zip(right, teacher_right, strict=True))
    errors = [(s, t) for s, t in pairs if not t["right"] and t["choice"] is not None]
    inherited = sum(s["choice"] == t["choice"] for s, t in errors)
    test = mcnemar(right, teacher_right)
    gained, lost = test["only_first"], test["only_second"]
    return {
        "items": len(pairs),
        "student_accuracy": wilson(sum(right), len(pairs)).to_dict(),
        "teacher_accuracy": wilson(sum(teacher_right), len(pairs)).to_dict(),
        "retention_gap": bootstrap_difference(teacher_right, right, seed).to_dict(),
        "retention": wilson(kept, sum(teacher_right)).to_dict(),
        "kept": kept,
        "lost": lost,
        "gained": gained,
        "both_wrong": len(pairs) - kept - lost - gained,
        "inherited_errors": wilson(inherited, len(errors)).to_dict(),
        "agreement": wilson(sum(_agree(s, t) for s, t in pairs), len(pairs)).to_dict(),
        "kappa": cohen_kappa(_choices(student), _choices(teacher)),
        "mcnemar_p": test["p_value"],
        "minimum_detectable_gap": minimum_detectable_effect(
            len(pairs), (gained + lost) / len(pairs) if pairs else 0.0, alpha
        ),
    }


def _agree(student: dict, teacher: dict) -> bool:
    """Both give the same option; two answers that could not be read are not the same."""
    return student["choice"] is not None and student["choice"] == teacher["choice"]


def _choices(records: Sequence[dict]) -> list[Hashable]:
    """For κ, where answers that could not be read differ from all others, each other's too."""
    return [
        (record["subject"], "unparsed") if record["choice"] is None else record["choice"]
        for record in records
    ]


def _check_same_items(student: Sequence[dict], teacher: Sequence[dict]) -> None:
    items = [
        [(record["id"], record["doc_hash"], record["answer"]) for record in records]
        for records in (student, teacher)
    ]
    if items[0] == items[1]:
        return
    only = sorted({item[0] for item in {*items[0]} ^ {*items[1]}})
    shown = f"such as {only[0]}" if only else "in another order"
    raise UserError(
        f"student and teacher were not asked the same items: {len(items[0])} and {len(items[1])}, {shown}; evaluate "
        "both on the same data"
    )


def sentence(name: str, found: dict) -> str:
    """One line for the terminal."""
    accuracies = [found[f"{subject}_accuracy"]["value"] for subject in ("student", "teacher")]
    retention = found["retention"]["value"]
    kept = (
        "the teacher has none right"
        if retention is None
        else f"kept {retention:.0%} of what it has right"
    )
    return (
        f"{name}: student {accuracies[0]:.1%}, teacher {accuracies[1]:.1%}; {kept}, "
        f"lost {found['lost']}, gained {found['gained']}, p = {found['mcnemar_p']:.3f}"
    )
