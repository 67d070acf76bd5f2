"""What each configuration took, and which of them no other beats in both quality and cost."""

from collections.abc import Mapping, Sequence
from statistics import mean

from eval.comparison.runs import Configuration, Run

NAMES = {
    "training_seconds": "training, s",
    "drawing_seconds": "drawing, s",
    "steps": "steps",
    "trained_tokens": "tokens trained",
    "teacher_tokens": "tokens by the teacher",
    "student_tokens": "tokens by the student",
    "trained_tokens_per_second": "trained tokens/s",
    "peak_memory_gb": "peak memory, GB",
    "student_weights_gb": "student's weights, GB",
    "student_tokens_per_second": "student writes, tokens/s",
}


def of_run(run: Run) -> dict[str, float | None]:
    """What a run took; None where it was not recorded.

    `training_seconds` are without `drawing_seconds`, those spent on stored completions of the teacher: they are
    drawn once for all runs, by whichever comes first.
    """
    record, tokens = run.record, run.record["tokens"]
    drawing = record.get("seconds_drawing")
    seconds = record["seconds"] - (drawing or 0.0)
    speed = run.results.get("speed", {}).get("student", {})
    return {
        "training_seconds": seconds,
        "drawing_seconds": drawing,
        "steps": run.steps,
        "trained_tokens": tokens["trained"],
        "teacher_tokens": tokens["generated_teacher"],
        "student_tokens": tokens["generated_student"],
        "trained_tokens_per_second": tokens["trained"] / seconds if seconds > 0 else None,
        "peak_memory_gb": record["peak_memory_gb"],
        "student_weights_gb": speed.get("weights_gb"),
        "student_tokens_per_second": speed.get("tokens_per_second"),
    }


def of_configuration(configuration: Configuration) -> dict[str, float | None]:
    """Means over its runs; None where a run lacks it."""
    costs = [of_run(run) for run in configuration.runs]
    return {
        name: None if None in (values := [cost[name] for cost in costs]) else mean(values)
        for name in NAMES
    }


def devices(configurations: Sequence[Configuration]) -> set[tuple[str, int]]:
    """What the runs were trained on, and by how many processes."""
    return {
        (run.record["device"], run.record["num_processes"])
        for configuration in configurations
        for run in configuration.runs
    }


def pareto_front(points: Mapping[str, tuple[float, float]], better: str) -> list[str]:
    """The configurations that none other beats: the cheapest first.

    Args:
        points: Cost and quality of each; less cost is better.
        better: Of the quality, `higher` or `lower`.

    Returns:
        Those for which every other one that costs no more is worse, or equal in both.
    """
    sign = 1 if better == "higher" else -1

    def beaten(name: str) -> bool:
        cost, quality = points[name][0], sign * points[name][1]
        return any(
            c <= cost and sign * q >= quality and (c, sign * q) != (cost, quality)
            for c, q in points.values()
        )

    return sorted((name for name in points if not beaten(name)), key=lambda name: points[name])
