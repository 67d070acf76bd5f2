"""A study → its runs: every point of the grid as a checked recipe with a name and a hash."""

import hashlib
import itertools
import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from medistill_trl import recipe
from medistill_trl.arguments import EVALUATION_KEYS
from medistill_trl.recipe import Recipe, RecipeError
from medistill_trl.recipe_reading import parse_value
from medistill_trl.schema import config_class_name, read_trains_on
from medistill_trl.study.definition import Study

# Where things are kept: no part of what a run is.
WHERE = ("output_dir", "run_name", "completion_store")
HASH_DIGITS = 12
NAME_LENGTH = 40  # of one value in a run's name


@dataclass(frozen=True)
class Run:
    """One run of a study.

    Args:
        name: The method and the values of all axes; names its folder and its log.
        settings: What the axes say.
        words: Of `recipes/run.py`.
        recipe: Checked.
        directory: Its run directory.
    """

    name: str
    settings: dict[str, Any]
    words: list[str]
    recipe: Recipe
    directory: Path

    @property
    def method(self) -> str:
        return self.recipe.values["method"]

    @property
    def hash(self) -> str:
        return hash_of(self.recipe.resolved())

    @property
    def draws_from_store(self) -> bool:
        """Whether it trains on completions of the teacher that the store keeps."""
        return (
            trains_on(self.method) != "student"
            and self.recipe.values["teacher_completions"] == "stored"
        )


@cache
def trains_on(method: str) -> str:
    """Whose completions a method takes the loss on: `teacher` or `student`."""
    module = f"medistill_trl.methods.{method}"
    return read_trains_on(module, config_class_name(module))


def identity(values: dict[str, Any]) -> dict[str, Any]:
    """What makes a run the run it is: its resolved recipe without places. 2 and 2.0 are the same, and so
    are null and nothing."""
    kept = {key: value for key, value in values.items() if key not in (*WHERE, *EVALUATION_KEYS)}
    return {key: _as_float(value) for key, value in kept.items() if value is not None}


def _as_float(value: Any) -> Any:
    if isinstance(value, list):
        return [_as_float(item) for item in value]
    return float(value) if type(value) is int else value


def hash_of(values: dict[str, Any]) -> str:
    text = json.dumps(identity(values), sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:HASH_DIGITS]


def expand(study: Study, out: Path) -> list[Run]:
    """All runs, the first axis varying slowest.

    Args:
        out: Folder of the study.

    Raises:
        RecipeError: naming every problem of every recipe, and the runs that have it.
    """
    runs: list[Run] = []
    problems: dict[str, list[str]] = {}
    points = [
        {key: value for part in parts for key, value in part.items()}
        for parts in itertools.product(*study.axes)
    ]
    for settings in points:
        method = settings.get("method", study.shared.get("method"))
        name = _name(method, study, settings)
        if method not in recipe.methods():
            place = _place(study, "grid" if "method" in settings else "shared")
            say = (
                f"{place}: method: {method!r} does not exist; one of {', '.join(recipe.methods())}"
            )
            problems.setdefault(say, []).append(name)
            continue
        origins = _origins(study, method, settings)
        words = _words(study, method, settings, name, out)
        try:
            runs.append(Run(name, settings, words, recipe.load(words), out / name))
        except RecipeError as error:
            for problem in error.problems:
                problems.setdefault(_placed(problem, study, origins), []).append(name)
    found = [f"{problem} ({_some(names, len(points))})" for problem, names in problems.items()]
    found += _twice(runs)
    if found:
        raise RecipeError(found)
    return runs


def _words(study: Study, method: str, settings: dict, name: str, out: Path) -> list[str]:
    """What `recipes/run.py` is given: files for the pair and the machine, flags for the experiment."""
    flags = {
        "teacher_completions": "stored",
        "completion_store": str(out / "completions.sqlite"),
        **study.shared,
        **study.methods.get(method, {}),
        **settings,
        **study.budget.recipe_keys(),
        "output_dir": str(out / name),
        "run_name": name,
    }
    del flags["method"]
    words = [f"recipes/{method}.yaml", *study.overlays]
    return words + [word for key, value in flags.items() for word in (f"--{key}", flag_text(value))]


def flag_text(value: Any) -> str:
    """A value as one word that a flag reads back as the same value."""
    if not isinstance(value, str):
        return json.dumps(value, ensure_ascii=False, default=str)
    try:
        plain = parse_value(value) == value and not value.startswith("-")
    except ValueError:
        plain = False
    return value if plain else json.dumps(value, ensure_ascii=False)


def _name(method: str, study: Study, settings: dict[str, Any]) -> str:
    """The method, then the first key of every other axis: keys that move with it need no mention."""
    first = [next(iter(axis[0])) for axis in study.axes]
    values = [f"{key}_{_slug(settings[key])}" for key in first if key != "method"]
    return "-".join([str(method), *values])


def _slug(value: Any) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "_", str(value)).strip("_.")[:NAME_LENGTH]


def _origins(study: Study, method: str, settings: dict[str, Any]) -> dict[str, str]:
    """Key → the section of the study file that gives it to this run."""
    origins = {"max_steps": "budget", "max_completion_tokens": "budget", "max_seconds": "budget"}
    origins |= dict.fromkeys(study.shared, "shared")
    origins |= dict.fromkeys(study.methods.get(method, {}), f"methods.{method}")
    return origins | {key: "seeds" if key == "seed" else "grid" for key in settings}


def _place(study: Study, section: str) -> str:
    key = section.partition(".")[0]
    if key not in study.places:
        key = "grid"  # a seed may stand there too
    return f"{study.places[key]}: {section if key != 'grid' else 'grid'}"


def _placed(problem: str, study: Study, origins: dict[str, str]) -> str:
    """A problem with a flag of a run, at the place of the study file the flag comes from."""
    found = re.match(r"--(\w+): ", problem)
    if found is None or found[1] not in origins:
        return problem
    return f"{_place(study, origins[found[1]])}: {found[1]}: {problem[found.end() :]}"


def _twice(runs: list[Run]) -> list[str]:
    """Runs that would be the same, or share a folder."""
    problems = []
    names: set[str] = set()
    hashes: dict[str, str] = {}
    for run in runs:
        first = hashes.setdefault(run.hash, run.name)
        if run.name in names:
            problems.append(
                f"{run.name}: names two runs; let each axis begin with a key of short distinct values"
            )
        elif first != run.name:
            problems.append(f"{first} and {run.name} are the same run: their recipes do not differ")
        names.add(run.name)
    return problems


def _some(names: list[str], total: int) -> str:
    if len(names) == total:
        return f"all {total} runs" if total > 1 else names[0]
    more = ", …" if len(names) > 4 else ""
    return f"{len(names)} of {total} runs: {', '.join(names[:4])}{more}"
