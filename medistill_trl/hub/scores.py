"""The scores of an evaluation that a model card shows, as a table and as the hub's metadata."""

from dataclasses import dataclass

from huggingface_hub import EvalResult

# Benchmark → how people call it, the hub's dataset, the split, and the items in that.
BENCHMARKS = {
    "medqa": (("MedQA", "GBaker/MedQA-USMLE-4-options", "test"), 1273),
    "medmcqa": (("MedMCQA", "openlifescienceai/medmcqa", "validation"), 4183),
    "pubmedqa": (("PubMedQA", "qiaojin/PubMedQA", "test"), 500),
    "pubhealth": (("PubHealth", "ImperialCollegeLondon/health_fact", "test"), 1233),
}
NEARLY_ALL = 0.95  # a data build drops a few items; below this share it is another test set


@dataclass(frozen=True)
class Score:
    """One number of the student, and what stands beside it.

    Args:
        dataset: How people call it, the hub's name (or this project's), the split.
        metric: The hub's name of the metric, and ours.
        student, teacher: Estimates: `value`, `interval_95`, `n`; the teacher's is None where there is none.
        floor: Of always giving the same answer.
        is_whole: Whether it is of the whole public test set, or of data that has no fixed size.
    """

    dataset: tuple[str, str, str | None]
    metric: tuple[str, str]
    student: dict
    teacher: dict | None = None
    floor: float | None = None
    is_whole: bool = True


def scores(evaluation: dict) -> list[Score]:
    """What an evaluation measured and a card shows; parts that were skipped or left out are not there."""
    found = evaluation["results"]
    every = [*_accuracies(found.get("benchmarks", {})), *_others(found)]
    return [score for score in every if score.student["value"] is not None]


def _accuracies(found: dict) -> list[Score]:
    metric = ("accuracy", f"accuracy, {found.get('few_shot')}-shot")
    return [
        Score(
            dataset,
            metric,
            measured["student"]["accuracy"],
            measured["teacher"]["accuracy"] if "teacher" in measured else None,
            measured["floor"]["majority_accuracy"],
            measured["student"]["accuracy"]["n"] >= NEARLY_ALL * items,
        )
        for name, (dataset, items) in BENCHMARKS.items()
        if "student" in (measured := found.get(name, {}))
    ]


def _others(found: dict) -> list[Score]:
    """On this project's own data; lower is better."""
    result = []
    passages, prefixes = found.get("perplexity", {}), found.get("fidelity", {}).get("prefixes", {})
    if "student" in passages:
        metric = ("bits_per_byte", "bits per byte (lower is better)")
        values = [
            passages[role]["bits_per_byte"] if role in passages else None
            for role in ("student", "teacher")
        ]
        result.append(Score(("MedPPL", "medppl_10k", None), metric, *values))
    if "micro" in prefixes.get("teacher", {}):
        metric = ("kl_divergence", "KL(T‖S), nats per token (lower is better)")
        dataset = ("the teacher's answers to held-out questions", "teacher_answers", None)
        result.append(
            Score(dataset, metric, prefixes["teacher"]["micro"]["kl_teacher_student_nats"])
        )
    claims = {
        role: found.get("faithfulness", {}).get(role, {}).get("claims", {}).get("hallucination")
        for role in ("student", "teacher")
    }
    if claims["student"]:
        metric = ("hallucination_rate", "claims without support (lower is better)")
        dataset = ("FidelityBench-Med", "fidelitybench_med", None)
        result.append(Score(dataset, metric, claims["student"], claims["teacher"]))
    return result


def eval_results(evaluation: dict) -> list[EvalResult]:
    """Scores for the card's metadata: none of a part of a test set, be it by `--limit` or by a small data build."""
    if evaluation["options"]["limit"] is not None:
        return []
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=dataset,
            dataset_name=title,
            dataset_split=split,
            metric_type=metric,
            metric_name=label,
            metric_value=round(score.student["value"], 4),
            metric_args={"n": score.student["n"]},
        )
        for score in scores(evaluation)
        if score.is_whole
        for (title, dataset, split), (metric, label) in [(score.dataset, score.metric)]
    ]


def table(evaluation: dict) -> str:
    """The same in Markdown, with intervals and beside the teacher; empty if nothing was measured."""
    lines = [
        f"| {score.dataset[0]}{'' if score.is_whole else ' (a part of it)'}: {score.metric[1]} | {_cell(score.student)} | {_cell(score.teacher)} | "
        f"{'' if score.floor is None else f'{score.floor:.3f}'} |"
        for score in scores(evaluation)
    ]
    if not lines:
        return ""
    limit = evaluation["options"]["limit"]
    note = (
        f" **Only the first {limit} items of each file: a quick look, no scores.**" if limit else ""
    )
    return (
        "| | student | teacher | always the same answer |\n|---|---|---|---|\n"
        + "\n".join(lines)
        + f"\n\nIn brackets 95 % intervals; n is items, documents or answers.{note}"
    )


def _cell(estimate: dict | None) -> str:
    if estimate is None or estimate["value"] is None:
        return ""
    interval = estimate["interval_95"]
    between = f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""
    return f"{estimate['value']:.3f}{between}, n = {estimate['n']}"
