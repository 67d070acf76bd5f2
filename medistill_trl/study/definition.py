"""The study file: what is shared, what varies, and the budget every run has. See docs/study.md."""

import difflib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medistill_trl.recipe import RecipeError, methods
from medistill_trl.recipe_reading import Entry, parse_value, read_file

# Kind of budget → the recipe key that ends a run by it.
BUDGETS = {
    "optimizer_steps": "max_steps",
    "completion_tokens": "max_completion_tokens",
    "seconds": "max_seconds",
}
KEYS = {
    "name": str,
    "description": str,
    "overlays": list,
    "shared": dict,
    "methods": dict,
    "grid": list,
    "seeds": list,
    "budget": dict,
    "evaluate": (bool, dict),
}
# Keys no study may give to its runs, and why.
RESERVED = {
    "output_dir": "every run has its own, below --out",
    "run_name": "runs are named by what they vary",
    "resume": "an unfinished run is always resumed",
    "dry_run": "use the study's own --dry_run",
    "num_train_epochs": "the budget says how long a run is",
    **{key: "the budget says how long a run is" for key in BUDGETS.values()},
}
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Budget:
    """What every run of a study may use.

    Args:
        kind: A key of `BUDGETS`.
        amount: Optimizer steps, completion tokens the loss is taken on, or seconds of training.
        max_steps: What the learning rate's schedule is laid out for, and the end in any case.
    """

    kind: str
    amount: float
    max_steps: int

    def recipe_keys(self) -> dict[str, float]:
        return {"max_steps": self.max_steps, BUDGETS[self.kind]: self.amount}

    def __str__(self) -> str:
        text = f"{self.amount:g} {self.kind.replace('_', ' ')}"
        return text if self.kind == "optimizer_steps" else f"{text}, {self.max_steps} steps at most"


@dataclass(frozen=True)
class Study:
    """A checked study file; the recipes of its runs are not checked yet.

    Args:
        name: Of the folder in outputs/.
        overlays: Recipe files laid over each method's own.
        shared: Recipe keys of every run.
        methods: Recipe keys of one method's runs.
        axes: What varies. An axis is a list of points, a point the keys it sets.
        budget: Of every run.
        evaluate: Flags of `python -m eval.run` for every finished run; None for no evaluation.
        places: Key of the study file → where it stands, for messages.
    """

    name: str
    description: str
    overlays: tuple[str, ...]
    shared: dict[str, Any]
    methods: dict[str, dict[str, Any]]
    axes: tuple[list[dict[str, Any]], ...]
    budget: Budget
    evaluate: dict[str, Any] | None
    places: dict[str, str] = field(default_factory=dict, compare=False)


def read(path: str, overlays: list[str], changes: list[str]) -> Study:
    """Read a study file.

    Args:
        path: YAML.
        overlays: Recipe files laid over those the file names.
        changes: `place=value`, the place as in `budget.seconds` or `shared.lora_r`.

    Raises:
        RecipeError: naming every problem found.
    """
    problems: list[str] = []
    entries = {entry.key: entry for entry in read_file(path, problems, "study")}
    _check_entries(entries, problems)
    given = {key: entry.value for key, entry in entries.items()}
    places = {key: entry.where for key, entry in entries.items()}
    for change in changes:
        _apply(change, given, places, problems)
    if problems:
        raise RecipeError(problems)
    return _Reading(path, given, places, problems).study(overlays)


def _check_entries(entries: dict[str, Entry], problems: list[str]) -> None:
    for entry in entries.values():
        if entry.key not in KEYS:
            close = difflib.get_close_matches(entry.key, KEYS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"one of {', '.join(KEYS)}"
            problems.append(entry.say(f"unknown key; {hint}"))


def _apply(change: str, given: dict, places: dict[str, str], problems: list[str]) -> None:
    """Set one place of the study, as `--set` asks."""
    place, separator, text = change.partition("=")
    first, *rest = place.split(".")
    if not separator or first not in KEYS:
        problems.append(
            f"--set {change}: must be a place of the study file and its value, such as budget.seconds=600 "
            f"or shared.lora_r=8; places begin with {', '.join(KEYS)}"
        )
        return
    inner = given
    for part in [first, *rest][:-1]:
        inner = inner.setdefault(part, {})
        if not isinstance(inner, dict):
            problems.append(f"--set {change}: {part} holds no keys")
            return
    try:
        inner[[first, *rest][-1]] = parse_value(text)
    except ValueError as error:
        problems.append(f"--set {change}: {error}")
    places[first] = f"--set {change}"


class _Reading:
    """From the plain content of a study file to a `Study`, with all problems found on the way."""

    def __init__(self, path: str, given: dict, places: dict[str, str], problems: list[str]):
        self.path, self.given, self.places, self.problems = path, given, places, problems

    def say(self, key: str, problem: str) -> None:
        where = self.places.get(key, self.path)
        self.problems.append(f"{where}: {key}: {problem}")

    def study(self, overlays: list[str]) -> Study:
        for key, value in self.given.items():
            kinds = KEYS[key]
            if not isinstance(value, kinds):
                names = {str: "a text", list: "a list", dict: "a mapping", bool: "true or false"}
                wanted = kinds if isinstance(kinds, tuple) else (kinds,)
                self.say(key, f"must be {' or '.join(names[k] for k in wanted)}, got {value!r}")
        if self.problems:
            raise RecipeError(self.problems)
        name = self.given.get("name", Path(self.path).stem)
        if not NAME.fullmatch(name):
            self.say("name", f"names a folder: letters, digits, dot, - and _, got {name!r}")
        named = self.given.get("overlays", [])
        if not all(isinstance(overlay, str) for overlay in named):
            self.say("overlays", f"must be a list of files, got {named!r}")
        evaluate = self.given.get("evaluate", False)
        flags = {} if evaluate is True else evaluate
        study = Study(
            name=name,
            description=self.given.get("description", "").strip(),
            overlays=(*named, *overlays),
            shared=self._recipe_keys("shared", self.given.get("shared", {})),
            methods=self._methods(),
            axes=tuple(self._axes()),
            budget=self._budget(),
            evaluate=None if flags is False else flags,
            places=self.places,
        )
        self._check_overlap(study)
        if self.problems:
            raise RecipeError(self.problems)
        return study

    def _recipe_keys(self, section: str, keys: dict[str, Any]) -> dict[str, Any]:
        for key in keys:
            if key in RESERVED:
                self.say(section, f"{key}: not for a study to give: {RESERVED[key]}")
        return {str(key): value for key, value in keys.items()}

    def _methods(self) -> dict[str, dict[str, Any]]:
        found = {}
        for method, keys in self.given.get("methods", {}).items():
            if not isinstance(keys, dict):
                self.say("methods", f"{method}: must be a mapping of its keys, got {keys!r}")
            elif method not in methods():
                close = difflib.get_close_matches(str(method), methods(), n=1)
                hint = f"did you mean {close[0]}?" if close else f"one of {', '.join(methods())}"
                self.say("methods", f"{method}: no such method; {hint}")
            else:
                found[method] = self._recipe_keys("methods", keys)
        return found

    def _axes(self) -> list[list[dict[str, Any]]]:
        axes = [self._axis("grid", axis) for axis in self.given.get("grid", [])]
        if "seeds" in self.given:
            axes.append(self._axis("seeds", {"seed": self.given["seeds"]}))
        return axes

    def _axis(self, section: str, axis: Any) -> list[dict[str, Any]]:
        """Points of `{key: [values]}`; keys of one axis move together."""
        if not isinstance(axis, dict) or not axis:
            self.say(section, f"an axis is a recipe key and its values, got {axis!r}")
            return []
        self._recipe_keys(section, axis)
        lists = {key: values for key, values in axis.items() if isinstance(values, list)}
        names = ", ".join(map(str, axis))
        if len(lists) < len(axis) or not all(lists.values()):
            self.say(section, f"{names}: must be a list of values")
        elif len({len(values) for values in lists.values()}) > 1:
            self.say(section, f"{names}: keys of one axis move together, so give as many of each")
        else:
            rows = zip(*lists.values(), strict=True)
            points = [dict(zip(lists, row, strict=True)) for row in rows]
            if any(point in points[:n] for n, point in enumerate(points)):
                self.say(section, f"{names}: a value is given twice")
            return points
        return []

    def _budget(self) -> Budget:
        budget = self.given.get("budget", {})
        stands_in = Budget("optimizer_steps", 1, 1)
        if unknown := sorted(map(str, set(budget) - {*BUDGETS, "max_steps"})):
            self.say("budget", f"{unknown[0]}: unknown key; one of {', '.join(BUDGETS)}, max_steps")
            return stands_in
        kinds = [kind for kind in BUDGETS if kind in budget]
        if len(kinds) != 1:
            self.say("budget", f"needs exactly one of {', '.join(BUDGETS)}, got {kinds or 'none'}")
            return stands_in
        for key, value in budget.items():
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not (whole or (key == "seconds" and isinstance(value, float))) or value <= 0:
                self.say("budget", f"{key}: must be a positive number, got {value!r}")
                return stands_in
        kind = kinds[0]
        if kind == "optimizer_steps" and "max_steps" in budget:
            self.say("budget", "max_steps: is optimizer_steps itself; leave it out")
        elif kind != "optimizer_steps" and "max_steps" not in budget:
            self.say(
                "budget",
                f"max_steps: required with {kind}: the learning rate's schedule is laid out for so many "
                "steps, and a run ends there in any case",
            )
            return stands_in
        return Budget(kind, budget[kind], budget.get("max_steps", budget[kind]))

    def _check_overlap(self, study: Study) -> None:
        """A key has one place: the runs would otherwise not be what a part of the file says."""
        varied = [key for axis in study.axes for key in (axis[0] if axis else {})]
        for key in sorted({key for key in varied if varied.count(key) > 1}):
            self.say("grid", f"{key}: varies twice; keep one of them")
        for key in varied:
            fixed = [name for name, keys in study.methods.items() if key in keys]
            for place in ["shared"] * (key in study.shared) + [f"methods.{n}" for n in fixed]:
                self.say("grid", f"{key}: varies here and is fixed in {place}; keep one of them")
        if "method" not in varied and "method" not in study.shared:
            self.say(
                "grid",
                "no method: give `- method: [...]` in grid, or `method:` in shared; one of "
                f"{', '.join(methods())}",
            )
