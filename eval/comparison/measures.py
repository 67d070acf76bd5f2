"""What is compared: the measures, which way they are good, and where the evaluation has them."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

SETS = ("teacher", "gold", "student")  # whose answers both models read


@dataclass(frozen=True)
class Measure:
    """One number of a run.

    Args:
        key: Its name: `family.….name`.
        label: For tables and pictures, within its family.
        family: Which table it is in.
        better: Which way is closer to the aim.
        path: Where the evaluation has it; None for one that only the items give. `student` in it has a twin for the
            teacher.
        share: Whether it is shown in percent.
        common: Whether runs may have it of different items, and are then compared on those they share.
    """

    key: str
    label: str
    family: str
    better: Literal["higher", "lower"]
    path: tuple[str, ...] | None = None
    share: bool = False
    common: bool = False


FAMILIES = {
    "heldout": "Held-out teacher completions",
    "fidelity_teacher": "Fidelity on the teacher's answers",
    "fidelity_gold": "Fidelity on gold answers",
    "fidelity_student": "Fidelity on the student's own answers",
    "text": "Greedy answers beside the teacher's",
    "benchmarks": "Benchmarks by log-likelihood: accuracy",
    "retention": "Retention: accuracy where the teacher is right",
    "macro_f1": "Benchmarks by log-likelihood: macro F1",
    "calibration": "Benchmarks by log-likelihood: calibration",
    "generative": "Written answers to the benchmarks: accuracy",
    "unparsed": "Written answers that name no option",
    "perplexity": "Perplexity on MedPPL",
    "faithfulness": "FidelityBench-Med",
}
# Whose measures are one question asked several times: their tests are adjusted together. Elsewhere each measure is a
# question of its own, adjusted over the configurations.
JOINT = ("benchmarks", "retention", "macro_f1", "calibration", "generative", "unparsed")
TITLES = {
    "medqa": "MedQA",
    "medmcqa": "MedMCQA",
    "pubmedqa": "PubMedQA",
    "pubhealth": "PubHealth",
    "pubhealth_2class": "PubHealth, 2 classes",
}
FIDELITY: dict[str, tuple[str, Literal["higher", "lower"], bool]] = {
    "kl_teacher_student_nats": ("KL(T‖S), nats", "lower", False),
    "kl_student_teacher_nats": ("KL(S‖T), nats", "lower", False),
    "js_nats": ("JS, nats", "lower", False),
    "overlap_at_1": ("top-1 agreement", "higher", True),
    "overlap_at_5": ("top-5 overlap", "higher", True),
    "overlap_at_10": ("top-10 overlap", "higher", True),
    "overlap_at_50": ("top-50 overlap", "higher", True),
    "teacher_mass_at_10": ("teacher mass in top 10", "higher", True),
}
TEXTS = {
    "exact_match": "exact match",
    "rouge_1": "ROUGE-1",
    "rouge_2": "ROUGE-2",
    "rouge_l": "ROUGE-L",
    "semantic_similarity": "semantic similarity",
}


def _heldout() -> Iterable[Measure]:
    yield Measure("heldout.kl_nats", "KL(T‖S), nats", "heldout", "lower")
    yield Measure("heldout.ce_nats", "cross-entropy, nats", "heldout", "lower")
    yield Measure("heldout.top1", "top-1 agreement", "heldout", "higher", share=True)
    yield Measure("heldout.bits_per_byte", "bits per byte", "heldout", "lower")


def _fidelity() -> Iterable[Measure]:
    for name in SETS:
        family, path = f"fidelity_{name}", ("fidelity", "prefixes", name)
        own = name == "student"  # each student has its own answers, and may have written none
        for term, (label, better, share) in FIDELITY.items():
            where = (*path, "micro", term)
            yield Measure(f"fidelity.{name}.{term}", label, family, better, where, share, own)
        bits = "student_bits_per_byte"
        yield Measure(
            f"fidelity.{name}.bits_per_byte",
            "bits per byte",
            family,
            "lower",
            (*path, bits),
            common=own,
        )
    for name, label in TEXTS.items():
        share = name == "exact_match"
        yield Measure(f"text.{name}", label, "text", "higher", ("fidelity", "text", name), share)
    yield Measure("text.bleu", "BLEU", "text", "higher", ("fidelity", "text", "bleu"))


def _benchmarks() -> Iterable[Measure]:
    for name, title in TITLES.items():
        path = ("benchmarks", name, "student")
        key = f"benchmarks.{name}.accuracy"
        yield Measure(key, title, "benchmarks", "higher", (*path, "accuracy"), share=True)
        key = f"retention.{name}"
        where = ("retention", "benchmarks", name, "retention")
        yield Measure(key, title, "retention", "higher", where, share=True, common=True)
        yield Measure(f"macro_f1.{name}", title, "macro_f1", "higher", (*path, "macro_f1"))
        where = (*path, "expected_calibration_error")
        yield Measure(f"calibration.{name}.ece", f"{title}, ECE", "calibration", "lower", where)
        where = (*path, "brier")
        yield Measure(f"calibration.{name}.brier", f"{title}, Brier", "calibration", "lower", where)
        path = ("generative", name, "student")
        key = f"generative.{name}.accuracy"
        yield Measure(key, title, "generative", "higher", (*path, "accuracy"), share=True)
        key = f"unparsed.{name}"
        yield Measure(key, title, "unparsed", "lower", (*path, "unparsed"), share=True)
    yield Measure("retention.all", "all", "retention", "higher", share=True, common=True)


def _others() -> Iterable[Measure]:
    path = ("perplexity", "student")
    for name, label in {
        "nats_per_token": "nats per token",
        "perplexity": "perplexity",
        "bits_per_byte": "bits per byte",
    }.items():
        yield Measure(f"perplexity.{name}", label, "perplexity", "lower", (*path, name))
    for key, label, better, *where in (
        ("hallucination", "hallucination rate", "lower", "student", "claims", "hallucination"),
        ("contradicted", "contradicted claims", "lower", "student", "claims", "contradicted"),
        ("citation_recall", "citation recall", "higher", "student", "citations", "recall"),
        ("citation_precision", "citation precision", "higher", "student", "citations", "precision"),
        ("citation_existence", "citations that exist", "higher", "student", "citations", "existence"),
        ("agreement", "claims the teacher makes too", "higher", "agreement", "student_claims_of_the_teacher"),
        ("without_claims", "answers without claims", "lower", "student", "answers", "without_claims"),
    ):  # fmt: skip
        path = ("faithfulness", *where)
        yield Measure(f"faithfulness.{key}", label, "faithfulness", better, path, share=True)


MEASURES = {m.key: m for part in (_heldout, _fidelity, _benchmarks, _others) for m in part()}


def teacher_path(measure: Measure) -> tuple[str, ...] | None:
    """Where the teacher's own number stands; None for what only a student has."""
    if measure.path is None or measure.path[0] == "fidelity" or "student" not in measure.path:
        return None
    return tuple("teacher" if key == "student" else key for key in measure.path)
