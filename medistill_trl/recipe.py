"""Recipes: YAML files and flags → one checked dictionary. Nothing here imports torch.

Later files win over earlier ones, flags win over files. Every problem in every file is reported at
once, with file and line, so that one round of editing is enough.
"""

import difflib
import math
import pkgutil
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from medistill_trl.arguments import SHARED, TRANSIENT
from medistill_trl.errors import UserError
from medistill_trl.recipe_reading import Entry, read_file, read_flags
from medistill_trl.recipe_rules import (
    INHERITED_LIMITS,
    REFUSED,
    SECRET_KEY,
    SECRET_VALUE,
    cautions,
    conflicts,
)
from medistill_trl.schema import (
    COMPUTED,
    REQUIRED,
    Field,
    config_class_name,
    read_fields,
    read_own_fields,
    read_requirements,
    read_unused,
)


class RecipeError(UserError):
    """All problems of a recipe, one per line."""

    def __init__(self, problems: list[str]):
        super().__init__("\n".join(problems))
        self.problems = problems


@dataclass
class Recipe:
    """A checked recipe.

    Args:
        values: Every key given, plus the defaults of this project's own keys.
        warnings: What works but is probably not meant, one line each.
    """

    values: dict[str, Any]
    warnings: list[str] = field(default_factory=list)

    @property
    def output_dir(self) -> Path:
        """The run directory: `output_dir`, or outputs/<method>_<run_name>."""
        given = self.values.get("output_dir")
        name = f"{self.values['method']}_{self.values.get('run_name') or 'default'}"
        return Path(given) if given else Path("outputs") / name

    def resolved(self) -> dict[str, Any]:
        """What is saved with the run: feeding it back reproduces the run."""
        kept = {key: value for key, value in self.values.items() if key not in TRANSIENT}
        return dict(sorted({**kept, "output_dir": str(self.output_dir)}.items()))

    def to_yaml(self) -> str:
        return yaml.safe_dump(
            self.resolved(), sort_keys=False, allow_unicode=True, width=100, default_flow_style=None
        )


def load(arguments: list[str]) -> Recipe:
    """Read `recipe.yaml [overlay.yaml ...] [--key value ...]`.

    Raises:
        RecipeError: naming every problem found.
    """
    paths, flags = split_arguments(arguments)
    problems: list[str] = []
    if not paths:
        raise RecipeError(
            ["no recipe given: name at least one YAML file, such as recipes/sft.yaml"]
        )
    layers = [read_file(path, problems) for path in paths]
    layers.append(read_flags(flags, problems))
    method = next(
        (entry for layer in reversed(layers) for entry in layer if entry.key == "method"), None
    )
    known = _known_keys(method, problems)
    if method is not None:
        layers = [_for_method(layer, method.value, problems) for layer in layers]
    layers = [[entry.fitted(known.schema) for entry in layer] for layer in layers]
    winners = {entry.key: entry for layer in layers for entry in layer}
    warnings: list[str] = []
    if known.schema:
        for layer in layers:
            for entry in layer:
                problems.extend(entry.say(text) for text in _check(entry, known))
        _check_whole(winners, known, problems, warnings)
    if problems:
        raise RecipeError(problems)
    given = {key: entry.value for key, entry in winners.items()}
    return Recipe(values={**known.defaults, **given}, warnings=warnings)


def read_saved(path: Path) -> dict[str, Any]:
    """The recipe a run was saved with; keys that the project has since got have their defaults. Its files need not be
    there any more.

    Raises:
        RecipeError: it is not one, naming every problem.
    """
    problems: list[str] = []
    entries = read_file(str(path), problems)
    values = {entry.key: entry.value for entry in entries}
    if entries:
        method = next((entry for entry in entries if entry.key == "method"), None)
        known = _known_keys(method, problems)
        if known.schema:
            problems.extend(e.say(text) for e in entries for text in _check(e, known))
        wanted = ("student_model", "teacher_model", "output_dir")
        problems.extend(f"{path}: no {key}" for key in wanted if key not in values)
    if problems or not entries:
        raise RecipeError(
            [*problems, f"{path} is not as its run saved it: put a copy back, or make the run anew"]
        )
    defaults = {key: value for key, value in known.defaults.items() if key not in TRANSIENT}
    return {**defaults, **values}


def methods() -> list[str]:
    """Names of the methods that exist: the modules of `medistill_trl/methods`."""
    folder = Path(__file__).parent / "methods"
    return sorted(m.name for m in pkgutil.iter_modules([str(folder)]) if not m.name.startswith("_"))


def split_arguments(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Recipe files come first, flags after them."""
    first_flag = next((i for i, a in enumerate(arguments) if a.startswith("--")), len(arguments))
    return arguments[:first_flag], arguments[first_flag:]


def _for_method(layer: list[Entry], method: str, problems: list[str]) -> list[Entry]:
    """A file may give keys to one method alone, in a mapping under its name, as an overlay for all recipes must:
    those of this method stand behind the file's other keys, so they win; those of others are left out."""
    plain, own = [], []
    for entry in layer:
        if entry.key not in methods() or entry.text is not None:
            plain.append(entry)
        elif not isinstance(entry.value, dict):
            problems.append(entry.say("must be a mapping of keys for this method alone"))
        elif entry.key == method:
            own += [Entry(str(key), value, entry.where) for key, value in entry.value.items()]
    return plain + own


@dataclass(frozen=True)
class _Keys:
    """What a recipe of a method may hold; nothing if the method is not known.

    Args:
        schema: Every key.
        defaults: Of the keys this project defines.
        required: Key → the one value that works with the method, and why.
        unused: Inherited key → why it means nothing with the method.
    """

    schema: dict[str, Field] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)
    required: dict[str, tuple[Any, str]] = field(default_factory=dict)
    unused: dict[str, str] = field(default_factory=dict)


def _known_keys(method: Entry | None, problems: list[str]) -> _Keys:
    if method is None:
        problems.append(f"no `method` given: one of {', '.join(methods())}")
        return _Keys()
    if method.value not in methods():
        problems.append(
            f"{method.where}: method: {method.value!r} does not exist; one of {', '.join(methods())}"
        )
        return _Keys()
    module = f"medistill_trl.methods.{method.value}"
    config = config_class_name(module)
    own = read_own_fields(module, config)
    for arguments in SHARED:
        own.update(read_fields(arguments.__module__, arguments.__name__))
    defaults = {name: item.default for name, item in own.items() if item.default is not REQUIRED}
    schema = {**read_fields(module, config), **own}
    return _Keys(schema, defaults, read_requirements(module, config), read_unused(module, config))


def _check(entry: Entry, known: _Keys) -> list[str]:
    """What is wrong with one entry by itself."""
    key, value, schema = entry.key, entry.value, known.schema
    if SECRET_VALUE.search(str(value)) or (SECRET_KEY.search(key) and key not in schema):
        return [
            "looks like a secret, and a recipe is saved with the run; remove it and log in instead"
        ]
    if key in REFUSED:
        return [f"not supported: {REFUSED[key]}"]
    if key in known.unused:
        return [f"does nothing with this method, leave it out: {known.unused[key]}"]
    if key not in schema:
        if others := _methods_with(key, value):
            return [f"a key of {', '.join(others)}; leave it out, or take another method"]
        close = difflib.get_close_matches(key, schema, n=1)
        hint = f"did you mean {close[0]}?" if close else "medistill train RECIPE --help lists them"
        return [f"unknown key; {hint}"]
    expected = schema[key]
    if problem := _type_problem(value, expected) or _odd_part(value):
        return [problem]
    if expected.choices and value is not None and value not in expected.choices:
        names = [str(choice) for choice in expected.choices]
        close = difflib.get_close_matches(str(value), names, n=3)
        hint = (
            f"did you mean {' or '.join(close)}?"
            if close and len(names) > 6
            else f"one of {', '.join(names)}"
        )
        return [f"{value!r} is not a choice; {hint}"]
    return _limit_problems(value, {**INHERITED_LIMITS.get(key, {}), **expected.limits})


def _methods_with(key: str, value: Any) -> list[str]:
    """Methods that have a key of this project's own, and take this value."""
    return [
        name
        for name in methods()
        if key in _own_keys(name) and _own_keys(name)[key] in (None, value)
    ]


@cache
def _own_keys(method: str) -> dict[str, Any]:
    """The keys of a method's config that this project defines, each with the one value that works, None for all."""
    module = f"medistill_trl.methods.{method}"
    config = config_class_name(module)
    required = read_requirements(module, config)
    return {key: required.get(key, (None,))[0] for key in read_own_fields(module, config)}


def _type_problem(value: Any, expected: Field) -> str | None:
    kind = "none" if value is None else type(value).__name__
    accepted = expected.types
    if not accepted or kind in accepted or (kind == "int" and "float" in accepted):
        if kind == "list" and expected.item_types:
            wrong = [item for item in value if type(item).__name__ not in expected.item_types]
            if wrong:
                return f"items must be {_words(expected.item_types)}, got {wrong[0]!r}"
        return None
    if kind not in {"int", "float", "bool", "str", "list", "dict", "none"}:
        return f"must be {_words(accepted)}, got {value!r} (a {kind}; quote it if a text is meant)"
    hint = ""
    if kind == "str" and accepted & {"int", "float"} and re.fullmatch(r"[-+\d.eE_]+", value):
        hint = "; remove the quotes"
    return f"must be {_words(accepted)}, got {value!r}{hint}"


def _odd_part(value: Any) -> str | None:
    """What no recipe can be saved or run with, wherever in a value it stands."""
    match value:
        case str():
            if "\0" in value:
                return "contains a NUL byte"
            if any("\ud800" <= character <= "\udfff" for character in value):
                return "contains half a surrogate pair, which no text can hold"
        case int() if not -(2**63) <= value < 2**63:
            return (
                f"must fit in 64 bits, got {value:.3e}"
                if abs(value) < 1e300
                else "must fit in 64 bits"
            )
        case float() if not math.isfinite(value):
            return f"must be finite, got {value}"
        case list():
            return next(filter(None, map(_odd_part, value)), None)
        case dict():
            return next(filter(None, map(_odd_part, [*value, *value.values()])), None)
        case None | bool() | int() | float():
            pass
        case _:
            return f"holds {value!r} (a {type(value).__name__}; quote it if a text is meant)"
    return None


def _words(types: frozenset[str]) -> str:
    names = {
        "int": "a whole number",
        "float": "a number",
        "bool": "true or false",
        "str": "a text",
        "list": "a list",
        "dict": "a mapping",
        "none": "null",
    }
    return " or ".join(text for name, text in names.items() if name in types)


def _limit_problems(value: Any, limits: dict[str, float]) -> list[str]:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return []
    if not math.isfinite(value):
        return [f"must be finite, got {value}"]
    tests = {
        "min": (value >= limits.get("min", value), "at least"),
        "max": (value <= limits.get("max", value), "at most"),
        "above": ("above" not in limits or value > limits["above"], "above"),
        "below": ("below" not in limits or value < limits["below"], "below"),
    }
    return [
        f"must be {words} {limits[name]}, got {value}"
        for name, (ok, words) in tests.items()
        if not ok
    ]


def _check_whole(
    winners: dict[str, Entry],
    known: _Keys,
    problems: list[str],
    warnings: list[str],
) -> None:
    """What only the merged recipe shows: missing keys, contradictions, files that are not there."""
    problems.extend(
        f"{name}: required, and given in no file: {item.help}"
        for name, item in known.schema.items()
        if item.default is REQUIRED and name not in winners
    )
    values = {
        name: item.default
        for name, item in known.schema.items()
        if item.default not in (REQUIRED, COMPUTED)
    }
    for key, entry in winners.items():
        if key in known.schema and _type_problem(entry.value, known.schema[key]) is None:
            values[key] = entry.value
    needs = [
        (key, f"must be {value} with this method: {why}")
        for key, (value, why) in known.required.items()
        if values.get(key) != value
    ]
    for found, said in ((problems, [*needs, *conflicts(values)]), (warnings, cautions(values))):
        for key, text in said:
            found.append(winners[key].say(text) if key in winners else f"{key}: {text}")
    for key in ("train_file", "validation_file"):
        if isinstance(values.get(key), str) and not _is_file(values[key]):
            problems.append(
                winners[key].say(
                    f"no file {values[key]} below {Path.cwd()}; the packaged sample is "
                    "data_prep/sample/processed/train.jsonl and validation.jsonl"
                )
            )


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except OSError:  # too long a name, a folder that may not be entered
        return False
