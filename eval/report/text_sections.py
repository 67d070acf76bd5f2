"""Perplexity, fidelity and faithfulness as sections of a page."""

from eval.report.names import PARTS
from eval.report.tables import (
    CHANGE,
    COUNT,
    MISSING,
    PERCENT,
    PLAIN,
    POINTS,
    Cell,
    Form,
    Section,
    Table,
    estimated,
    inline,
    number,
    words,
)

PREFIXES = {
    "gold": "the references",
    "teacher": "the teacher's answers",
    "student": "the student's answers",
}
TOKEN_MEASURES = {
    "kl_teacher_student_nats": ("KL(T‖S), nats", PLAIN),
    "kl_student_teacher_nats": ("KL(S‖T), nats", PLAIN),
    "js_nats": ("Jensen-Shannon divergence, nats (at most 0.693)", PLAIN),
    "overlap_at_1": ("top-1 agreement", PERCENT),
    "overlap_at_5": ("overlap of the 5 likeliest tokens", PERCENT),
    "overlap_at_10": ("overlap of the 10 likeliest tokens", PERCENT),
    "overlap_at_50": ("overlap of the 50 likeliest tokens", PERCENT),
    "teacher_mass_at_1": ("teacher's probability of the student's likeliest token", PERCENT),
    "teacher_mass_at_5": ("teacher's probability of the student's 5 likeliest", PERCENT),
    "teacher_mass_at_10": ("teacher's probability of the student's 10 likeliest", PERCENT),
    "teacher_mass_at_50": ("teacher's probability of the student's 50 likeliest", PERCENT),
    "student_nats": ("student's −log p of the text, nats", PLAIN),
    "teacher_nats": ("teacher's −log p of the text, nats", PLAIN),
}
TEXT_MEASURES = {
    "exact_match": ("the same, character by character", PERCENT),
    "bleu": ("BLEU, 0 to 100", Form(1)),
    "rouge_1": ("ROUGE-1, F1", PLAIN),
    "rouge_2": ("ROUGE-2, F1", PLAIN),
    "rouge_l": ("ROUGE-L, F1", PLAIN),
    "semantic_similarity": ("cosine of sentence embeddings", PLAIN),
}
FAITHFULNESS = {
    ("claims", "hallucination"): "claims contradicted or unsupported (hallucination)",
    ("claims", "supported"): "claims supported",
    ("claims", "contradicted"): "claims contradicted",
    ("claims", "unsupported"): "claims neither supported nor contradicted",
    ("claims", "faithfulness_by_answer"): "supported share, mean over answers",
    ("answers", "without_claims"): "answers without claims",
    ("answers", "abstained"): "answers that say the evidence does not answer",
    ("citations", "claims_with_citation"): "claims that cite",
    ("citations", "existence"): "cited passages that exist",
    ("citations", "recall"): "citation recall",
    ("citations", "precision"): "citation precision",
}


def perplexity(part: dict) -> Section:
    difference = part.get("student_minus_teacher", {})
    subjects = [name for name in ("student", "teacher") if name in part]
    rows = []
    for key, label in (
        ("bits_per_byte", "bits per byte"),
        ("nats_per_token", "nats per token"),
        ("perplexity", "perplexity per token"),
    ):
        cells = [estimated(part[name][key]) for name in subjects]
        if difference:
            cells.append(estimated(difference.get(key), CHANGE))
        rows.append([words(label), *cells])
    rows.append([words("tokens"), *(number(part[name]["tokens"], COUNT) for name in subjects)])
    if difference:
        rows[-1].append(Cell(MISSING))
    columns = ["measure", *subjects, *(["student − teacher"] if difference else [])]
    return Section(
        "perplexity",
        PARTS["perplexity"],
        f"How well {part['documents']:,} passages are predicted; less is better. Only bits per byte compares models "
        "with different tokenizers.",
        [Table(columns, rows)],
    )


def fidelity(part: dict) -> Section:
    sets = {name: part["prefixes"][name] for name in PREFIXES if name in part["prefixes"]}
    measures = {
        key: spec
        for key, spec in TOKEN_MEASURES.items()
        if any("micro" in found for found in sets.values())
    }
    rows = [
        [words(label), *(estimated(found["micro"][key], form) for found in sets.values())]
        for key, (label, form) in measures.items()
    ]
    for subject in ("student", "teacher"):
        key = f"{subject}_bits_per_byte"
        cells = [estimated(found[key]) for found in sets.values()]
        rows.append([words(f"{subject}, bits per byte"), *cells])
    columns = ["measure", *(f"on {PREFIXES[name]}" for name in sets)]
    text = [
        [words(label), estimated(part["text"].get(key), form)]
        for key, (label, form) in TEXT_MEASURES.items()
        if "value" in part["text"].get(key, {})
    ]
    return Section(
        "fidelity",
        PARTS["fidelity"],
        f"Both models predict the same tokens of three answers to each of {part['questions']:,} held-out questions. "
        "Answers of the student's own show what its mistakes lead it to. Means over tokens; the intervals take "
        "answers as independent.",
        [
            Table(columns, rows, "Token by token"),
            Table(["measure", "student's answer beside the teacher's"], text, "As texts, greedy"),
        ],
        _reasons([*sets.values(), part["text"].get("semantic_similarity", {})]),
    )


def _reasons(found: list[dict]) -> list[str]:
    return list(dict.fromkeys(entry["skipped"] for entry in found if "skipped" in entry))


def faithfulness(part: dict) -> Section:
    subjects = [name for name in ("student", "teacher") if name in part]
    rows = []
    for (group, key), label in FAITHFULNESS.items():
        cells = [estimated(part[name].get(group, {}).get(key), PERCENT) for name in subjects]
        if any(cell.text != MISSING for cell in cells):
            rows.append([words(label), *cells])
    for key, label in (
        ("claims", "claims"),
        ("cut_at_limit", "answers the limit cut"),
        ("questions_too_long", "questions not asked: too long"),
    ):
        rows.append(
            [words(label), *(number(part[name]["answers"].get(key), COUNT) for name in subjects)]
        )
    notes = _reasons([part["verifier"]])
    if not notes:
        notes.append(_verifier(part["verifier"]))
    for key, estimate in part.get("student_minus_teacher", {}).items():
        notes.append(f"{key.replace('_', ' ')}, student − teacher: {inline(estimate, POINTS)}")
    return Section(
        "faithfulness",
        PARTS["faithfulness"],
        f"Both models answer {part['prompts']:,} questions from numbered passages. Each claim is held against them.",
        [Table(["measure", *subjects], rows)],
        notes,
    )


def _verifier(found: dict) -> str:
    """How good the verifier is; on other evidence where the labelled claims are all of one kind."""
    kind, quality = "labelled claims", found
    if found["auroc"] is None:
        kind, quality = "claims beside other evidence", found["other_evidence"]
    if quality["auroc"] is None:
        return "How good the verifier is, is not known: there are no labelled claims."
    return (
        f"The rates are worth what the verifier is worth: balanced accuracy {quality['balanced_accuracy']:.2f}, "
        f"AUROC {quality['auroc']:.2f} on {kind}."
    )
