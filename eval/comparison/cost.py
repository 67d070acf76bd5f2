"""What each configuration took, and which of them no other beats in both quality and cost.

Training costs what it took without drawing stored completions. The teacher's writing is counted for every run that
used it, whoever drew it: each method pays for the answers it needs, once, however many runs share them.
"""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from eval.comparison.runs import Configuration, Run
from medistill_trl.study.grid import trains_on
from medistill_trl.study.timing import asking

NAMES = {
    "total_seconds": "in all, s",
    "training_seconds": "training, s",
    "teacher_seconds": "teacher's writing, s",
    "steps": "steps",
    "trained_tokens": "tokens trained",
    "teacher_tokens": "tokens by the teacher, used",
    "student_tokens": "tokens by the student",
    "trained_tokens_per_second": "trained tokens/s",
    "peak_memory_gb": "peak memory, GB",
    "student_weights_gb": "student's weights, GB",
    "student_tokens_per_second": "student writes, tokens/s",
}
UNKNOWN = "what drawing the teacher's answers took is not recorded for {}, and the run that drew them is not compared here"
ESTIMATED = (
    "records of an earlier version do not say which of the teacher's answers a run used ({}): each counts what the "
    "run drew that drew most for the same training data and the same way of asking the teacher"
)

Cost = dict[str, float | None]


def costs(configurations: Sequence[Configuration]) -> dict[str, Cost]:
    """Configuration → means over its runs; None where a run lacks it."""
    every = [run for configuration in configurations for run in configuration.runs]
    found = {}
    for configuration in configurations:
        own = [of_run(run, every) for run in configuration.runs]
        found[configuration.name] = {
            name: None if None in (values := [cost[name] for cost in own]) else mean(values)
            for name in NAMES
        }
    return found


def of_run(run: Run, every: Sequence[Run]) -> Cost:
    """What a run took; None where it was not recorded.

    Args:
        every: All runs that are compared, among which may be the one that drew what this one used.
    """
    record, tokens = run.record, run.record["tokens"]
    training = record["seconds"] - record.get("seconds_drawing", 0.0)
    writing, written = _teacher(run, every)
    speed = run.results.get("speed", {}).get("student", {})
    return {
        "total_seconds": None if writing is None else training + writing,
        "training_seconds": training,
        "teacher_seconds": writing,
        "steps": run.steps,
        "trained_tokens": tokens["trained"],
        "teacher_tokens": written,
        "student_tokens": tokens["generated_student"],
        "trained_tokens_per_second": tokens["trained"] / training if training > 0 else None,
        "peak_memory_gb": record["peak_memory_gb"],
        "student_weights_gb": speed.get("weights_gb"),
        "student_tokens_per_second": speed.get("tokens_per_second"),
    }


# --- the teacher's writing


def _teacher(run: Run, every: Sequence[Run]) -> tuple[float | None, int | None]:
    """Seconds and tokens of the teacher's writing that a run used; seconds of writing online are in the training."""
    use = run.record.get("teacher_use", {"tokens": None, "stored_seconds": None})
    seconds, tokens = use["stored_seconds"], use["tokens"]
    if seconds is None or tokens is None:
        drawn_seconds, drawn_tokens = _drawn(run, every)
        seconds = drawn_seconds if seconds is None else seconds
        tokens = drawn_tokens if tokens is None else tokens
    return seconds, tokens


def _drawn(run: Run, every: Sequence[Run]) -> tuple[float | None, int | None]:
    """What the run drew that drew most, of those that asked the teacher alike; None of both where none drew anything
    and yet this one trained on stored answers."""
    asking = _asking(run)
    most = max(
        (other.record for other in every if _asking(other) == asking),
        key=lambda record: record["tokens"]["generated_teacher"],
    )
    tokens = most["tokens"]["generated_teacher"]
    if tokens == 0 and _trains_on_stored(run):
        return None, None
    return most.get("seconds_drawing", 0.0) if tokens else 0.0, tokens


def _asking(run: Run) -> dict[str, Any]:
    """What the teacher's answers depend on: runs with the same had the same of them."""
    recipe, (train, _) = run.record["recipe"], run.record["data"]["files"]
    samples = recipe.get("max_train_samples")
    return {**asking(recipe), "data": train["sha256"], "samples": samples}


def _trains_on_stored(run: Run) -> bool:
    stored = run.record["recipe"].get("teacher_completions") == "stored"
    return stored and trains_on(run.method) != "student"


def note(configurations: Sequence[Configuration]) -> list[str]:
    """That the teacher's writing is not recorded run by run, where it is not."""
    runs = [run for configuration in configurations for run in configuration.runs]
    without = dict.fromkeys(run.method for run in runs if "teacher_use" not in run.record)
    return [ESTIMATED.format(", ".join(without))] if without else []


# --- the front


def front(
    configurations: Sequence[Configuration],
    found: Mapping[str, Cost],
    qualities: Mapping[str, float],
    better: str,
) -> dict:
    """The front of quality against seconds in all, or why there is none."""
    if len(devices(configurations)) > 1:
        return {"front": None, "note": "trained on different devices: their seconds do not compare"}
    unknown = [name for name, cost in found.items() if cost["total_seconds"] is None]
    if unknown:
        return {"front": None, "note": UNKNOWN.format(", ".join(unknown))}
    points = {name: (found[name]["total_seconds"], qualities[name]) for name in found}
    return {"cost": "total_seconds", "front": pareto_front(points, better)}


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
