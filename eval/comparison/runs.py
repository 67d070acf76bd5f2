"""From paths to runs, and from runs to configurations: runs that differ in nothing but their seed."""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.run import SCHEMA_VERSION as EVALUATION_VERSION
from medistill_trl.arguments import EVALUATION_KEYS
from medistill_trl.errors import UserError
from medistill_trl.run_directory import EVALUATION, RECORD, RunDirectory
from medistill_trl.sealed_json import read_record
from medistill_trl.study.definition import Budget
from medistill_trl.study.progress import shortfall
from medistill_trl.study.record import STUDY

RECORD_VERSION = 1
RATIONALES = "rationales_summary.json"  # in results/
# Keys of a recipe that say where things are kept.
WHERE = ("output_dir", "run_name", "completion_store")
SHOWN_SETTINGS = 3  # in a configuration's name
VALUE_LENGTH = 24  # of one of them


@dataclass(frozen=True)
class Run:
    """What a run left.

    Args:
        path: Its directory.
        record: results/run.json.
        evaluation: results/comprehensive_evaluation.json; None where it was not evaluated.
        is_complete: Whether it has COMPLETE.
        digests: Of each result's file; None for one that is not there.
    """

    path: Path
    record: dict
    evaluation: dict | None
    is_complete: bool
    digests: dict[str, str | None]

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def method(self) -> str:
        return self.record["method"]

    @property
    def seed(self) -> int:
        return self.record["seed"]

    @property
    def results(self) -> dict:
        """The parts of the evaluation that were measured."""
        parts = {} if self.evaluation is None else self.evaluation["results"]
        return {name: part for name, part in parts.items() if part.keys() != {"skipped"}}

    @property
    def steps(self) -> int:
        """Optimizer steps taken."""
        return max((entry["step"] for entry in self.record["log_history"]), default=0)

    @property
    def rationales(self) -> dict | None:
        """What became of the rationales; None of a run that drew none."""
        directory = RunDirectory(self.path)
        if not (directory.results / RATIONALES).is_file():
            return None
        return directory.read_result(RATIONALES)

    def has_items(self, part: str) -> bool:
        return RunDirectory(self.path).items(part).is_file()

    def items(self, part: str) -> list[dict]:
        """The records of single items of a part of the evaluation, or of the held-out check.

        Raises:
            UserError: there are none, or they cannot be read.
        """
        directory = RunDirectory(self.path)
        if not self.has_items(part):
            raise UserError(
                f"{directory.items(part)}: not there; evaluate the run again: python -m eval.run {self.path}"
            )
        return directory.read_items(part)


@dataclass(frozen=True)
class Configuration:
    """Runs that differ in their seed alone.

    Args:
        name: The method, and where that is not enough the settings that tell it from others.
        settings: Recipe keys that vary among the configurations of the method; one of those that move together.
    """

    name: str
    settings: dict[str, Any]
    runs: tuple[Run, ...]

    @property
    def method(self) -> str:
        return self.runs[0].method

    @property
    def seeds(self) -> list[int]:
        return [run.seed for run in self.runs]


@dataclass
class Found:
    """What the paths on the command line hold.

    Args:
        left_out: Path → why it is not compared.
        studies: The records of the studies among them, without their runs.
    """

    runs: list[Run] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    studies: list[dict] = field(default_factory=list)

    @property
    def axes(self) -> list[str]:
        """The recipe keys that the studies vary, each the first of its axis."""
        return [
            key for study in self.studies for axis in study["grid"] for key in list(axis[0])[:1]
        ]


def find(paths: Sequence[Path], allow_partial: bool = False) -> Found:
    """Read the runs.

    Args:
        paths: Run directories, and folders of studies.
        allow_partial: Take unfinished runs that have a record, and leave out those that have none.

    Raises:
        UserError: a path holds neither, a run is named twice, or a run is not finished.
    """
    found = Found()
    unfinished: dict[str, str] = {}
    for path in paths:
        if (path / STUDY).is_file():
            _add_study(path, found, unfinished)
        else:
            _add_run(path, found, unfinished)
    places = [run.path.resolve() for run in found.runs]
    twice = [run for n, run in enumerate(found.runs) if places[n] in places[:n]]
    if twice:
        raise UserError(f"{twice[0].path}: named twice; name each run once")
    if unfinished and not allow_partial:
        raise UserError(
            "these runs are not finished:\n"
            + "\n".join(f"  {path}: {why}" for path, why in unfinished.items())
            + "\nContinue them (--resume; a study by its own command), or compare what is there with --allow_partial."
        )
    if not found.runs:
        raise UserError(
            "nothing to compare:\n"
            + "\n".join(f"  {path}: {why}" for path, why in found.left_out.items())
        )
    return found


def _add_study(folder: Path, found: Found, unfinished: dict[str, str]) -> None:
    record = read_record(folder / STUDY, "start the study again: it goes on from what is finished")
    for entry in record["runs"]:
        name = entry["name"]
        if name != Path(name).name or name in ("", ".", ".."):
            raise UserError(f"{folder / STUDY}: {name!r} is no name of a run in the study's folder")
        path = folder / name
        # Those that wait were left to a scheduler, or to a study that was stopped: they may have ended since.
        open_ = entry["state"] in ("waiting", "running", "stopped")
        if entry["state"] == "finished" or (open_ and RunDirectory(path).is_complete):
            # Those that the study has seen end used its budget; of the others nobody has looked.
            _add_run(path, found, unfinished, Budget(**record["budget"]) if open_ else None)
        else:
            why = entry.get("problem") or f"the study has it as {entry['state']}"
            unfinished[str(path)] = found.left_out[str(path)] = why
    found.studies.append({key: value for key, value in record.items() if key != "runs"})


def _add_run(
    path: Path, found: Found, unfinished: dict[str, str], budget: Budget | None = None
) -> None:
    """Take a run, unless it has no record, or fell short of a budget."""
    directory = RunDirectory(path)
    if not directory.recipe.is_file() and not directory.results.is_dir():
        raise UserError(
            f"{path}: no run and no study is here (looked below {Path.cwd()}); name folders such as outputs/sft_demo"
        )
    if not directory.is_complete:
        unfinished[str(path)] = "no COMPLETE"
    if not (directory.results / RECORD).is_file():
        unfinished[str(path)] = found.left_out[str(path)] = (
            "no results/run.json: it has not trained to its end"
        )
        return
    record = _read(directory, RECORD, RECORD_VERSION)
    evaluation = None
    if directory.evaluation.is_file():
        evaluation = _read(directory, EVALUATION, EVALUATION_VERSION)
    run = Run(path, record, evaluation, directory.is_complete, directory.digests())
    result = {"steps": run.steps, "ended_by": record.get("ended_by")}
    short = None if budget is None else shortfall(budget, result)
    if short is None:
        found.runs.append(run)
    else:
        unfinished[str(path)] = found.left_out[str(path)] = short


def _read(directory: RunDirectory, name: str, version: int) -> dict:
    content = directory.read_result(name)
    if content.get("schema_version") != version:
        raise UserError(
            f"{directory.results / name}: its schema_version is {content.get('schema_version')}, and this reads {version}; make it anew "
            "with this version of medistill_trl"
        )
    return content


# --- configurations


def identity(recipe: dict[str, Any]) -> dict[str, Any]:
    """What makes runs alike but for their seed: the recipe without seed and places. 2 and 2.0 are the same, and so
    are null and nothing."""
    kept = {
        key: value for key, value in recipe.items() if key not in (*WHERE, *EVALUATION_KEYS, "seed")
    }
    return {key: _as_float(value) for key, value in kept.items() if value is not None}


def _as_float(value: Any) -> Any:
    if isinstance(value, list):
        return [_as_float(item) for item in value]
    return float(value) if type(value) is int else value


def group(runs: Sequence[Run], axes: Sequence[str] = ()) -> list[Configuration]:
    """The runs' configurations, each with its runs by seed.

    Methods come in the order in which they were named, configurations of one method by their settings.

    Args:
        axes: Recipe keys that were varied on purpose, where that is known.

    Raises:
        UserError: two runs have the same recipe and the same seed.
    """
    by_identity: dict[str, list[Run]] = {}
    for run in runs:
        key = json.dumps(identity(run.record["recipe"]), sort_keys=True)
        by_identity.setdefault(key, []).append(run)
    groups = [tuple(sorted(members, key=lambda run: run.seed)) for members in by_identity.values()]
    for members in groups:
        for first, second in itertools.pairwise(members):
            if first.seed == second.seed:
                raise UserError(
                    f"{first.path} and {second.path} have the same recipe and the same seed, {first.seed}: they are one "
                    "run twice, not two seeds; name one of them"
                )
    settings = [_settings(members[0], groups, axes) for members in groups]
    names = [_name(members[0], own) for members, own in zip(groups, settings, strict=True)]
    found = [
        Configuration(name if names.count(name) == 1 else str(members[0].path), own, members)
        for name, own, members in zip(names, settings, groups, strict=True)
    ]
    methods = [run.method for run in runs]
    return sorted(found, key=lambda c: (methods.index(c.method), _order(c.settings)))


def _order(settings: dict[str, Any]) -> list[tuple[float, str]]:
    """Numbers by size, before anything else."""
    return [
        (value, "") if isinstance(value, int | float) else (float("inf"), str(value))
        for value in settings.values()
    ]


def _settings(run: Run, groups: Sequence[tuple[Run, ...]], axes: Sequence[str]) -> dict[str, Any]:
    """The run's values of the recipe keys in which configurations of its method differ.

    Of keys that move together one stands for all: an axis, else the shortest.
    """
    recipes = [identity(g[0].record["recipe"]) for g in groups if g[0].method == run.method]
    keys = {key for recipe in recipes for key in recipe}
    told: dict[tuple, str] = {}
    for key in sorted(keys, key=lambda key: (key not in axes, len(key), key)):
        values = [str(recipe.get(key)) for recipe in recipes]
        partition = tuple(values.index(value) for value in values)
        if len(set(values)) > 1:
            told.setdefault(partition, key)
    return {key: run.record["recipe"].get(key) for key in sorted(told.values())}


def _name(run: Run, settings: dict[str, Any]) -> str:
    if len(settings) > SHOWN_SETTINGS:
        return run.name
    shown = [f"{key} {str(value)[:VALUE_LENGTH]}" for key, value in settings.items()]
    return " ".join([run.method, *([f"({', '.join(shown)})"] if shown else [])])
