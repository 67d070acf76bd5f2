"""Benchmarks and what of the teacher is kept on them, as sections of a page."""

from eval.report.names import PARTS, TITLES, measured
from eval.report.tables import (
    COUNT,
    PERCENT,
    POINTS,
    Cell,
    Section,
    Table,
    accuracy_chart,
    estimated,
    number,
    p_value,
    words,
)


def benchmarks(part: dict) -> Section:
    shots = "without examples" if part["few_shot"] == 0 else f"after {part['few_shot']} examples"
    tables = [_accuracies(part, "benchmarks"), _answering(part)]
    tables += [_by_subject(name, found) for name, found in measured(part).items()]
    return Section(
        "benchmarks",
        PARTS["benchmarks"],
        f"The answer is the option the model finds likeliest, {shots}. The floor is the share of always giving the "
        "commonest answer: a score that does not lie above it shows no knowledge.",
        [table for table in tables if table is not None],
    )


def generative(part: dict) -> Section:
    return Section(
        "generative",
        PARTS["generative"],
        f"Both models write their answer ({part['protocol']}, at most {part['answer_tokens']} tokens). What names no "
        "option, or two, cannot be read and is wrong.",
        [_accuracies(part, "generative"), _unparsed(part)],
    )


def _accuracies(part: dict, name: str) -> Table:
    rows = []
    for benchmark, found in measured(part).items():
        floor = found["floor"]["majority_accuracy"]
        accuracies = {
            subject: found[subject]["accuracy"]
            for subject in ("student", "teacher")
            if subject in found
        }
        rows.append(
            [
                Cell(TITLES[benchmark], TITLES[benchmark], link=(f"{name}/{benchmark}", "")),
                number(found["num_items"], COUNT),
                estimated(accuracies["student"], PERCENT),
                estimated(accuracies.get("teacher"), PERCENT),
                Cell(
                    PERCENT(floor), floor, f"always {found['floor']['majority_label']}; "
                    f"chance {PERCENT(found['floor']['random_accuracy'])}",
                ),
                accuracy_chart(accuracies, floor),
            ]
        )  # fmt: skip
    columns = ["benchmark", "items", "student", "teacher", "floor", "0 to 100 %"]
    return Table(
        columns,
        rows,
        "Accuracy with Wilson's 95 % interval; ● student, ■ teacher, dashed the floor",
    )


def _answering(part: dict) -> Table:
    rows = []
    for benchmark, found in measured(part).items():
        for subject in ("student", "teacher"):
            if subject not in found:
                continue
            score = found[subject]
            shuffles = score.get("option_shuffles")
            rows.append(
                [
                    words(TITLES[benchmark]),
                    words(subject),
                    words("yes" if _above_floor(found, subject) else "not shown"),
                    number(score["macro_f1"]),
                    number(score["expected_calibration_error"]),
                    number(score["brier"]),
                    estimated(shuffles["answered_alike"] if shuffles else None, PERCENT),
                    words(_histogram(score["predictions"])),
                    number(score["truncated_items"], COUNT),
                ]
            )
    columns = [
        "benchmark", "model", "above the floor", "macro F1", "calibration error", "Brier score", "same answer in every order",
        "answers given", "prompts cut",
    ]  # fmt: skip
    return Table(columns, rows, "How they answer", folded=True)


def _above_floor(found: dict, subject: str) -> bool:
    low = found[subject]["accuracy"]["interval_95"]
    return low is not None and low[0] > found["floor"]["majority_accuracy"]


def _histogram(counts: dict[str, int]) -> str:
    return ", ".join(f"{label} {count:,}" for label, count in counts.items())


def _by_subject(benchmark: str, found: dict) -> Table | None:
    """Accuracy within each medical subject, where the benchmark has them."""
    subjects = found["student"].get("by_medical_subject")
    if subjects is None:
        return None
    teacher = found["teacher"]["by_medical_subject"] if "teacher" in found else {}
    rows = [
        [
            words(name),
            number(estimate["n"], COUNT),
            estimated(estimate, PERCENT),
            estimated(teacher.get(name), PERCENT),
        ]
        for name, estimate in subjects.items()
    ]
    columns = ["subject", "items", "student", "teacher"]
    return Table(columns, rows, f"{TITLES[benchmark]} by medical subject", folded=True)


def _unparsed(part: dict) -> Table:
    rows = [
        [
            words(TITLES[benchmark]),
            words(subject),
            estimated(found[subject]["unparsed"], PERCENT),
            estimated(found[subject]["accuracy_of_parsed"], PERCENT),
            number(found[subject]["cut_at_limit"], COUNT),
            number(found[subject].get("too_long"), COUNT),
            words(_histogram(found[subject]["predictions"])),
        ]
        for benchmark, found in measured(part).items()
        for subject in ("student", "teacher")
        if subject in found
    ]
    columns = ["benchmark", "model", "unreadable", "accuracy of the rest", "cut at the limit", "not asked: too long", "answers given"]  # fmt: skip
    return Table(columns, rows, "What could be read", folded=True)


def retention(part: dict) -> Section:
    tables = [
        _retention(protocol, found, PARTS[protocol]) for protocol, found in part.items() if found
    ]
    return Section(
        "retention",
        PARTS["retention"],
        "Each item counts by who is right. Kept: both; lost: only the teacher; gained: only the student. Inherited "
        "are the teacher's errors that the student repeats. JS is how far the two models' probabilities of the options lie "
        "apart, from 0 to ln 2 = 0.693, whatever their tokenizers. The numbers of items open them below.",
        tables,
    )


def _retention(protocol: str, part: dict, caption: str) -> Table:
    rows = []
    diverge = any("option_js_nats" in found for found in part.values())  # by likelihood alone
    for benchmark, found in part.items():
        items = f"{protocol}/{benchmark}"
        rows.append(
            [
                words(TITLES[benchmark]),
                estimated(found["retention"], PERCENT),
                Cell(
                    POINTS(-found["retention_gap"]["value"]),
                    -found["retention_gap"]["value"],
                    f"{p_value(found['mcnemar_p_holm'])} (Holm)",
                ),
                *(
                    number(found[outcome], COUNT, link=(items, outcome))
                    for outcome in ("kept", "lost", "gained")
                ),
                number(found["both_wrong"], COUNT, link=(items, "both_wrong")),
                estimated(found["inherited_errors"], PERCENT),
                estimated(found["agreement"], PERCENT),
                number(found["kappa"]),
                *([estimated(found.get("option_js_nats"))] if diverge else []),
            ]
        )
    columns = [
        "benchmark", "kept of what the teacher has right", "student − teacher", "kept", "lost", "gained", "both wrong",
        "errors inherited", "same answer", "Cohen's κ", *(["JS of the options, nats"] if diverge else []),
    ]  # fmt: skip
    return Table(columns, rows, caption)
