"""What a study shows of itself: its budget, its plan and what came out, as plain text."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from medistill_trl.study import progress, timing
from medistill_trl.study.definition import Study
from medistill_trl.study.grid import Run
from medistill_trl.study.record import StudyRecord


def header(study: Study, runs: list[Run], out: Path) -> str:
    stores = sorted({run.recipe.values["completion_store"] for run in runs})
    lines = [
        f"study {study.name}: {len(runs)} runs in {out}",
        f"budget of every run: {study.budget}",
        f"teacher completions, each drawn once: {', '.join(stores)}",
    ]
    return "\n".join(lines)


def plan(
    study: Study,
    runs: list[Run],
    memory: dict[str, dict[str, Any]],
    known: timing.Known,
    jobs: int,
) -> str:
    """What is to be done: one line a run, then the sum.

    Args:
        memory: See `plan.measure`.
    """
    to_do = [run for run in runs if not progress.is_trained(run)]
    finished = [run for run in runs if progress.is_trained(run)]
    expected = timing.expected(to_do, finished, study.budget, known)
    rows, problems = [], []
    for run in runs:
        found = memory[run.name]
        if "problem" in found:
            problems.append(f"{run.name}: {found['problem']}")
        state = "unfinished" if progress.is_started(run) else "new"
        state = "finished" if progress.is_trained(run) else state
        rows.append(
            [
                run.name,
                run.hash,
                state,
                "training and held out" if run.draws_from_store else "held out",
                f"{found['peak_gb']:.2f} GB" if "peak_gb" in found else "unknown",
                timing.duration(known.training(run, study.budget)),
            ]
        )
    left = timing.time_left(expected, [], jobs)
    heads = ["run", "recipe", "state", "from the store", "memory", "training"]
    lines = [
        table(heads, rows),
        f"\nto do: {len(to_do)} runs, {jobs} at a time: {left}{_parts(expected)}",
        "Memory is an estimate, per device: on a GPU add about 1 GB and 10 %, on CPU about 1 GB. Time is that of "
        "finished runs of the same kind.",
    ]
    if problems:
        lines.append(
            "\nthese runs would be refused:\n" + "\n".join(f"  {line}" for line in problems)
        )
    return "\n".join(lines)


def _parts(expected: Sequence[timing.Expected]) -> str:
    """What the time goes into, as far as it is known."""
    names = {
        "training": "training",
        "drawing": "the teacher's completions, each drawn once",
        "around": "loading, checks and evaluation",
    }
    seconds = {
        name: sum(asdict(run)[part] or 0.0 for run in expected) for part, name in names.items()
    }
    parts = [f"{timing.duration(total)} of {name}" for name, total in seconds.items() if total]
    return f" ({', '.join(parts)})" if parts else ""


def results(record: StudyRecord) -> str:
    """What came out so far: one line a run."""
    rows = []
    for entry in record.content["runs"]:
        row = [entry["name"], entry["state"]]
        if "heldout" in entry:
            before, after = entry["heldout"]["before"], entry["heldout"]["after"]
            row += [
                str(entry["steps"]),
                timing.duration(entry["training_seconds"]),
                f"{entry['tokens']['trained']:,}",
                f"{entry['tokens']['generated_teacher']:,}",
                f"{entry['tokens']['generated_student']:,}",
                *(_change(before[key], after[key]) for key in ("kl_nats", "ce_nats", "top1")),
            ]
        rows.append(row)
    heads = [
        "run", "state", "steps", "training", "tokens trained", "by teacher", "by student",
        "held-out KL, nats", "CE, nats", "top-1",
    ]  # fmt: skip
    return table(heads, rows)


def _change(before: float | None, after: float | None) -> str:
    return "–" if before is None or after is None else f"{before:.3f} → {after:.3f}"


def table(heads: list[str], rows: list[list[str]]) -> str:
    """Columns of plain text; rows may be short."""
    filled = [heads, *([*row, *[""] * (len(heads) - len(row))] for row in rows)]
    widths = [max(len(row[n]) for row in filled) for n in range(len(heads))]
    lines = [
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in filled
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
