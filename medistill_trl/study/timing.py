"""How long runs will take, known from runs of the same kind that have finished.

A run's time has three parts, and each depends on something else:

- **training**: seconds of an optimizer step, times the steps of the budget;
- **around it**: loading, held-out checks, the evaluation, however long the run is;
- **drawing**: the teacher writes the stored completions once for all runs that ask alike, so the first of them takes
  that time and the others none.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medistill_trl.errors import UserError
from medistill_trl.recipe import methods
from medistill_trl.run_directory import RECORD, RunDirectory
from medistill_trl.sealed_json import read_record
from medistill_trl.study.definition import Budget, Study
from medistill_trl.study.grid import Run, trains_on
from medistill_trl.study.record import REMEDY, STUDY

# What a step's time depends on, besides the machine.
COST_KEYS = (
    "method", "teacher_model", "student_model", "student_keep_layers", "use_lora", "student_load_in_4bit",
    "per_device_train_batch_size", "gradient_accumulation_steps", "teacher_max_new_tokens",
)  # fmt: skip
# How the teacher works, and what else is asked of it: not what it writes.
NOT_ITS_WORDS = {
    "teacher_batch_size", "teacher_sharding", "teacher_logits", "teacher_logits_top_k",
    "teacher_url", "teacher_timeout", "teacher_wait", "teacher_requests_in_flight",
}  # fmt: skip
# How many completions are drawn: fewer of them are the first of more.
AMOUNTS = ("max_train_samples", "num_completions", "num_rationales")
NEEDED = {"steps", "seconds_drawing", "teacher_use"}  # of a record


def asking(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What the teacher's completions depend on, besides the prompts: runs with the same share them."""
    named = {key for key in recipe if key.startswith("teacher_") or "rationale" in key}
    asked = {key: recipe[key] for key in sorted(named - NOT_ITS_WORDS)}
    return {**asked, "trains on": trains_on(recipe["method"])}


@dataclass(frozen=True)
class Expected:
    """Seconds a run will take, in parts; None where no run of its kind has finished.

    Args:
        drawing: 0 where an earlier run draws what it asks for.
    """

    training: float | None
    around: float | None
    drawing: float | None

    @property
    def known(self) -> float:
        """The sum of what is known."""
        return sum(part for part in self._parts if part is not None)

    @property
    def is_whole(self) -> bool:
        return None not in self._parts

    @property
    def is_unknown(self) -> bool:
        """Whether nothing is known of the training, which is most of a run."""
        return self.training is None

    @property
    def _parts(self) -> tuple[float | None, ...]:
        return self.training, self.around, self.drawing


@dataclass
class Known:
    """What finished runs took; the last one of a kind counts.

    Args:
        step: Kind → seconds of an optimizer step.
        around: Kind → seconds of wall clock besides training and drawing.
        drawing: What was asked of the teacher, and how much → seconds of drawing it.
    """

    step: dict[str, float] = field(default_factory=dict)
    around: dict[str, float] = field(default_factory=dict)
    drawing: dict[str, float] = field(default_factory=dict)

    def learn(self, record: Mapping[str, Any], wall_seconds: float | None = None) -> None:
        """Take in a finished run; one of another version, or of a method that is gone, says nothing.

        Args:
            record: results/run.json.
            wall_seconds: Of all its commands; None or 0 where that is not known.
        """
        if not record.keys() >= NEEDED or record["method"] not in methods():
            return
        recipe = record["recipe"]
        drawn = record["teacher_use"]["stored_seconds"]
        if drawn is not None:
            self.drawing[_amount_key(recipe)] = drawn
        if record["steps"]:
            training = record["seconds"] - record["seconds_drawing"]
            self.step[cost_key(recipe)] = training / record["steps"]
        if wall_seconds:
            self.around[cost_key(recipe)] = max(0.0, wall_seconds - record["seconds"])

    def training(self, run: Run, budget: Budget) -> float | None:
        if budget.kind == "seconds":
            return budget.amount
        step = self.step.get(cost_key(run.recipe.values))
        return None if step is None else step * budget.max_steps


def read_known(folder: Path, study: Study) -> Known:
    """From the finished runs in a folder and its folders, the oldest first.

    What goes on around training counts only where it was the same evaluation.

    Args:
        folder: That of the study lies in it; usually outputs/.
    """
    paths = [*folder.glob("*/results/run.json"), *folder.glob("*/*/results/run.json")]
    walls: dict[Path, float] = {}
    for path in folder.glob(f"*/{STUDY}"):
        walls |= _wall_seconds(path, study)
    known = Known()
    for path in sorted(paths, key=lambda path: path.stat().st_mtime):
        run = RunDirectory(path.parents[1])
        try:
            record = run.read_result(RECORD)
        except UserError:  # it is refused where its run is wanted
            continue
        known.learn(record, walls.get(run.path))
    return known


def _wall_seconds(path: Path, study: Study) -> dict[Path, float]:
    """Of each finished run of another study, or of this one, that evaluates as this one does."""
    try:
        record = read_record(path, REMEDY)
    except UserError:  # it is refused where its study is wanted
        return {}
    if record.get("evaluate") != study.evaluate:
        return {}
    entries = [entry for entry in record["runs"] if entry["state"] in ("finished", "short")]
    return {path.parent / entry["name"]: entry.get("wall_seconds", 0.0) for entry in entries}


def cost_key(recipe: Mapping[str, Any]) -> str:
    return json.dumps([recipe.get(key) for key in COST_KEYS])


def _asking_key(recipe: Mapping[str, Any]) -> str:
    """Of the completions alone, however many of them."""
    shared = {key: value for key, value in asking(recipe).items() if key not in AMOUNTS}
    return json.dumps([recipe["train_file"], shared], sort_keys=True)


def _amount_key(recipe: Mapping[str, Any]) -> str:
    return json.dumps([_asking_key(recipe), *(recipe.get(key) for key in AMOUNTS)])


def expected(
    runs: Sequence[Run], finished: Iterable[Run], budget: Budget, known: Known
) -> list[Expected]:
    """What each run will take.

    Args:
        runs: In the order in which they start: of those that ask the teacher alike the first draws.
        finished: Runs whose completions are in the store already.
    """
    asked: set[tuple[str, str]] = set()
    drawn: dict[tuple[str, str], float] = {}

    def draw(run: Run) -> float | None:
        """What of its completions no run before it has drawn."""
        recipe = run.recipe.values
        store = str(recipe.get("completion_store"))
        amount, place = (store, _amount_key(recipe)), (store, _asking_key(recipe))
        if amount in asked:
            return 0.0
        asked.add(amount)
        wanted, there = known.drawing.get(_amount_key(recipe)), drawn.get(place, 0.0)
        if wanted is None:
            return None
        drawn[place] = max(wanted, there)
        return max(0.0, wanted - there)

    for run in finished:
        draw(run)
    return [
        Expected(known.training(run, budget), known.around.get(cost_key(run.recipe.values)), draw(run))
        for run in runs
    ]  # fmt: skip


def time_left(
    waiting: Iterable[Expected], working: Iterable[tuple[Expected, float]], jobs: int
) -> str:
    """Until the last run ends, in words; `at least` where something is not known of some runs.

    Args:
        working: Of every run at work what it is expected to take, and the seconds it has run.
        jobs: Runs side by side.
    """
    waiting, working = list(waiting), list(working)
    every = [*waiting, *(run for run, _ in working)]
    if every and all(run.is_unknown for run in every):
        return "unknown"
    rest = [max(0.0, run.known - spent) for run, spent in working]
    total = sum(run.known for run in waiting) + sum(rest)
    about = "about" if all(run.is_whole for run in every) else "at least"
    return f"{about} {duration(max(total / jobs, max(rest, default=0.0)))}"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
